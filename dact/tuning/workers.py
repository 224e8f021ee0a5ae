"""The processes of a study: this one, or several workers."""

from __future__ import annotations

import copy
import gc
import multiprocessing
import os
import pickle
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from multiprocessing.context import ForkServerContext, SpawnContext
from multiprocessing.process import BaseProcess
from typing import Any

import torch
from optuna.pruners import BasePruner
from optuna.samplers import BaseSampler
from optuna.storages import BaseStorage, InMemoryStorage
from optuna.study import Study, load_study
from optuna.trial import FrozenTrial, TrialState

from dact import signals
from dact.checks import check_count
from dact.files import remove_partial
from dact.tuning import tensorboard
from dact.tuning.retries import MAX_DEATHS, sweep
from dact.tuning.storage import RunStopped, environment_error, open_storage, root_cause, stopped_by
from dact.tuning.studies import finished
from dact.tuning.trial import Objective
from dact.tuning.trial_loop import POLL, run_trials

PATIENCE = 8.0  # seconds that a stopped worker has to end its trial


@dataclass(frozen=True)
class StudyJob:
    """Everything that a process needs to run trials of a study.

    Args:
        objective: Objective of the study.
        n_trials: Total number of trials.
        storage: Address of the storage, or a storage, or None for the run's own file.
        sampler: Sampler of the study.
        pruner: Pruner of the study, or None.
        callbacks: Optuna callbacks, called after each trial.
        setup: Function that a worker process calls first, such as one that installs log filters, or
            None.
        before: Number of trials that had ended when the command began.
        is_worker: Whether a worker process runs it.
    """

    objective: Objective
    n_trials: int
    storage: str | BaseStorage | None
    sampler: BaseSampler
    pruner: BasePruner | None
    callbacks: Sequence[Callable[[Study, FrozenTrial], None]] = ()
    setup: Callable[[], None] | None = None
    before: int = 0
    is_worker: bool = False

    def for_worker(self, worker: int) -> StudyJob:
        """Return the job of one worker process, by its number from 0; see `Recipe.for_worker`."""
        prepared = self.objective.prepared
        recipe = prepared.recipe.for_worker(worker, torch.cuda.device_count())
        objective = replace(self.objective, prepared=replace(prepared, recipe=recipe))
        return replace(self, objective=objective, is_worker=True)

    def run(
        self, study: Study, idle: Callable[[], None], *more: Callable[[Study, FrozenTrial], None]
    ) -> None:
        """Run trials in this process; see `run_trials`."""
        objective = self.objective
        study.sampler = copy.deepcopy(
            self.sampler
        )  # what samplers such as TPE remember is of one study
        begun = any(trial.state != TrialState.WAITING for trial in study.get_trials(deepcopy=False))
        if self.is_worker or begun:
            # a seeded one would propose the points of another process again
            study.sampler.reseed_rng()

        def close_session(trial: FrozenTrial) -> None:
            """Log to TensorBoard that a trial whose process died has ended, and remove its
            unfinished files."""
            folder = objective.run.trial_folder(objective.stage, trial.number)
            if folder.is_dir():
                remove_partial(folder)
                with tensorboard.writer(folder) as writer:
                    tensorboard.log_outcome(writer, {}, succeeded=False)

        run_trials(
            study,
            objective,
            self.n_trials,
            objective.run.locked,
            deadline=objective.deadline,
            idle=idle,
            callbacks=[*self.callbacks, *more],
            before=self.before,
            orphaned=close_session,
        )


def check_workers(workers: int, storage: str | BaseStorage | None, **sent: Any) -> None:
    """Check that this number of processes can share a run.

    Args:
        workers: Number of processes.
        storage: Storage of the studies.
        **sent: Objects that worker processes are sent, by the names of the engine's arguments.

    Raises:
        TypeError: If something cannot be sent to another process.
        ValueError: If there is no worker, or several cannot share the storage.
    """
    check_count("TuningEngine: workers", workers)
    if workers == 1:
        return
    if isinstance(storage, InMemoryStorage):
        raise ValueError(
            "TuningEngine: workers cannot share a storage in memory; leave storage out for an sqlite file"
        )
    main = sys.modules["__main__"]
    for name, argument in sent.items():
        try:
            if b"__main__" in pickle.dumps(argument) and not os.path.isfile(
                getattr(main, "__file__", None) or ""
            ):
                raise TypeError("it was defined in a notebook or on standard input")
        except Exception as error:
            what = "something that can be pickled"
            if callable(argument):
                what = (
                    "a function that other processes can import, such as one at the top of a module or a "
                    "functools.partial of it"
                )
            raise TypeError(
                f"TuningEngine: with several workers, {name} must be {what}: {error}"
            ) from None


def run_study(job: StudyJob, study: Study, workers: int, refresh: Callable[..., None]) -> None:
    """Run a study to its end, in this process or in several; a worker process that dies is
    replaced.

    Args:
        job: Job of the study.
        study: The same study, opened in this process.
        workers: Number of processes.
        refresh: Function that redraws the state of the study; it accepts the arguments of an Optuna
            callback.

    Raises:
        RuntimeError: If a worker ended with an error, whose message it has, or if workers keep
            dying.
        RunStopped: If a disk or the storage failed.
    """
    job = replace(job, before=len(finished(study)))
    if workers == 1:
        job.run(study, refresh, refresh)
        return
    context = _context()
    errors = context.SimpleQueue()
    method = multiprocessing.get_start_method(
        allow_none=True
    )  # asking without it would fix the host program's method
    threads = max(1, torch.get_num_threads() // workers)

    def start(number: int) -> BaseProcess:
        # Not a daemon: the data may have processes of its own.
        arguments = (job.for_worker(number), threads, method, dict(os.environ), errors)
        process = context.Process(target=_run_worker, args=arguments)
        process.start()
        return process

    processes = {number: start(number) for number in range(workers)}
    deaths, done = 0, 0
    try:
        while processes:
            time.sleep(POLL)
            signals.check()
            refresh()
            ended = {
                number: process for number, process in processes.items() if not process.is_alive()
            }
            died = [number for number, process in ended.items() if process.exitcode != 0]
            processes = {
                number: process for number, process in processes.items() if number not in ended
            }
            if not errors.empty():
                kind, message = errors.get()
                raise kind(message)
            if died:
                now_done = len(finished(study))
                deaths, done = (deaths if now_done == done else 0) + len(died), now_done
                if deaths > workers * (MAX_DEATHS + 1):
                    codes = ", ".join(str(process.exitcode) for process in ended.values())
                    raise RuntimeError(
                        f"the workers of {study.study_name} keep dying (exit codes {codes})"
                    )
                processes |= {
                    number: start(number) for number in died
                }  # on the device of the one that died
    finally:
        _stop([*processes.values()])
        if processes:  # a stopped worker may leave a trial that is still marked as running
            try:
                sweep(study, job.objective.run.locked)
            except Exception as error:
                if environment_error(error) is None:
                    raise


def _context() -> ForkServerContext | SpawnContext:
    """Return the context that starts workers: on Linux as forks of a server process that has only
    imported modules.

    A fresh interpreter would spend seconds on its imports, for each worker of each study. The
    server process has no threads and uses no GPU. On other systems a fork is not safe."""
    if sys.platform != "linux":
        return multiprocessing.get_context("spawn")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__])
    return context


def _stop(processes: list[BaseProcess]) -> None:
    for process in processes:
        process.terminate()
    end = time.monotonic() + PATIENCE
    for process in processes:
        process.join(max(0.0, end - time.monotonic()))
        if process.is_alive():
            process.kill()
            process.join()


def _run_worker(
    job: StudyJob, threads: int, method: str | None, environment: Mapping[str, str], errors: Any
) -> None:
    """Run trials until the study is done, as the main function of a worker process."""
    gc.freeze()  # what was imported lives as long as the process: collections would copy its memory
    os.environ.clear()
    os.environ.update(
        environment
    )  # of the parent now: the server process has that of the first study
    signals.install()
    # Processes that the data starts here start as they would in the parent, not as this worker did.
    multiprocessing.set_start_method(method, force=True)
    threading.Thread(target=_end_with_parent, daemon=True).start()
    if job.setup is not None:
        job.setup()
    torch.set_num_threads(threads)
    try:
        run = job.objective.run
        storage = open_storage(job.storage, run.folder)
        study = load_study(
            study_name=run.study_name(job.objective.stage), storage=storage, pruner=job.pruner
        )
        job.run(study, lambda: None)
    except KeyboardInterrupt:
        sys.exit(130)
    except Exception as error:
        cause = stopped_by(error)
        errors.put((RuntimeError, str(error)) if cause is None else (RunStopped, root_cause(cause)))
        sys.exit(1)


def _end_with_parent() -> None:
    """End this process when its parent ends: a killed command must not leave workers behind."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)
