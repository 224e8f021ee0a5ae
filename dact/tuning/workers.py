"""Running an objective until its study is done: in this process, or in several."""

from __future__ import annotations

import dataclasses
import multiprocessing
import os
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from multiprocessing.context import SpawnProcess
from typing import Any

import torch
from optuna.pruners import BasePruner
from optuna.samplers import BaseSampler
from optuna.storages import BaseStorage
from optuna.study import Study, load_study
from optuna.trial import FrozenTrial

from dact import signals
from dact.tuning import tensorboard
from dact.tuning.storage import RunStopped, environment_error, open_storage, root_cause
from dact.tuning.studies import MAX_DEATHS, POLL, finished, run_trials, sweep
from dact.tuning.trial import Objective, trial_folder

PATIENCE = 8.0  # seconds that a stopped worker has to end its trial


@dataclass(frozen=True)
class StudyJob:
    """A study to be run to its end.

    Args:
        objective: The objective.
        n_trials: Total number of trials.
        storage: Address of the storage, or a storage, or None for the run's own file.
        sampler: Sampler.
        pruner: Pruner, or None.
        callbacks: Optuna callbacks, called after each trial.
        setup: Function that a worker process calls first, such as the command line's log filters; None for none.
    """

    objective: Objective
    n_trials: int
    storage: str | BaseStorage | None
    sampler: BaseSampler
    pruner: BasePruner | None
    callbacks: Sequence[Callable[[Study, FrozenTrial], None]] = ()
    setup: Callable[[], None] | None = None

    def run(self, study: Study, idle: Callable[[], None], *more: Callable[[Study, FrozenTrial], None]) -> None:
        """Run trials in this process; see `run_trials`."""
        objective = self.objective
        study.sampler = self.sampler
        if multiprocessing.parent_process() is not None or study.get_trials(deepcopy=False):
            self.sampler.reseed_rng()  # a seeded one would propose the points of another process again

        def close_session(trial: FrozenTrial) -> None:
            """Log in TensorBoard that a trial whose process died is no longer running."""
            folder = objective.run.folder / objective.stage.name / trial_folder(trial.number)
            if folder.is_dir():
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
            orphaned=close_session,
        )


def run_side_by_side(job: StudyJob, study: Study, workers: int, refresh: Callable[[], None]) -> None:
    """Run a study in several processes; one that dies is replaced.

    Args:
        job: The study to run.
        study: The same, opened in this process.
        workers: Number of processes.
        refresh: Function that is called now and then.

    Raises:
        RuntimeError: If a worker ended with an error, which the message holds, or if workers keep dying.
        RunStopped: If a disk or the storage failed.
    """
    context = multiprocessing.get_context("spawn")
    errors = context.SimpleQueue()
    threads = max(1, torch.get_num_threads() // workers)
    started = 0

    def start() -> SpawnProcess:
        nonlocal started
        # Not a daemon: the data may have processes of its own.
        process = context.Process(target=_run_worker, args=(on_device(job, started), threads, errors))
        process.start()
        started += 1
        return process

    processes = [start() for _ in range(workers)]
    deaths, done = 0, 0
    try:
        while processes:
            time.sleep(POLL)
            signals.check()
            refresh()
            ended = [process for process in processes if not process.is_alive()]
            died = sum(process.exitcode != 0 for process in ended)
            processes = [process for process in processes if process not in ended]
            if not errors.empty():
                kind, message = errors.get()
                raise kind(message)
            if died:
                now_done = len(finished(study))
                deaths, done = (deaths + died if now_done == done else died), now_done
                if deaths > workers * (MAX_DEATHS + 1):
                    codes = ", ".join(str(process.exitcode) for process in ended)
                    raise RuntimeError(f"the workers of {study.study_name} keep dying (exit codes {codes})")
                processes += [start() for _ in range(died)]
    finally:
        _stop(processes)
        if processes:  # whoever was stopped between two steps of a trial leaves none that says it is running
            try:
                sweep(study, job.objective.run.locked)
            except Exception as error:
                if environment_error(error) is None:
                    raise


def on_device(job: StudyJob, worker: int) -> StudyJob:
    """Return the job of one worker: on a machine of several GPUs each takes one of its own, round robin.

    Args:
        job: The study to run.
        worker: Number of the worker, from 0.
    """
    recipe = job.objective.shared.recipe
    devices = device_of(worker, recipe.trainer, torch.cuda.device_count())
    recipe = dataclasses.replace(recipe, trainer={**recipe.trainer, "devices": devices})
    objective = dataclasses.replace(job.objective, shared=dataclasses.replace(job.objective.shared, recipe=recipe))
    return dataclasses.replace(job, objective=objective)


def device_of(worker: int, trainer: Mapping[str, Any], gpus: int) -> Any:
    """Return the ``devices`` argument of a worker's Trainer.

    Args:
        worker: Number of the worker, from 0.
        trainer: Arguments of the Trainer, with one device.
        gpus: Number of GPUs of this machine.
    """
    devices = trainer["devices"]
    if gpus > 1 and trainer.get("accelerator", "auto") in ("auto", "gpu", "cuda") and devices in (1, "1"):
        return [worker % gpus]
    return devices


def _stop(processes: list[SpawnProcess]) -> None:
    for process in processes:
        process.terminate()
    end = time.monotonic() + PATIENCE
    for process in processes:
        process.join(max(0.0, end - time.monotonic()))
        if process.is_alive():
            process.kill()
            process.join()


def _run_worker(job: StudyJob, threads: int, errors: Any) -> None:
    """Take trials from the study until there are none left: what a worker process does."""
    signals.install()
    threading.Thread(target=_end_with_parent, daemon=True).start()
    if job.setup is not None:
        job.setup()
    torch.set_num_threads(threads)
    try:
        run = job.objective.run
        storage = open_storage(job.storage, run.folder)
        study = load_study(study_name=run.study_name(job.objective.stage), storage=storage, pruner=job.pruner)
        job.run(study, lambda: None)
    except KeyboardInterrupt:
        sys.exit(130)
    except Exception as error:
        cause = environment_error(error)
        errors.put((RuntimeError, str(error)) if cause is None else (RunStopped, root_cause(cause)))
        sys.exit(1)


def _end_with_parent() -> None:
    """End this process with its parent: a killed command must not leave workers behind."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)
