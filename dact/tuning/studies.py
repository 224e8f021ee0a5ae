"""The studies in their storage: how they are opened, resumed, shared by processes, and read.

A trial that was killed, interrupted or stopped by a deadline is stored as failed, without a cause.
It does not count, and its parameters are tried again.
"""

from __future__ import annotations

import itertools
import json
import multiprocessing
import os
import sys
import threading
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import optuna
import torch
from optuna.exceptions import ExperimentalWarning
from optuna.pruners import BasePruner
from optuna.samplers import BaseSampler
from optuna.storages import BaseStorage, RDBStorage, RetryHeartbeatStaleTrialCallback
from optuna.study import Study
from optuna.trial import FrozenTrial, TrialState
from sqlalchemy import event
from sqlalchemy.engine import make_url
from sqlalchemy.exc import IntegrityError, ProgrammingError

from dact import signals
from dact.tuning.outcome import CAUSE, finished, was_interrupted
from dact.tuning.run import Run
from dact.tuning.settings import Settings
from dact.tuning.stages import Stage
from dact.tuning.trial import Objective

# user attribute of a study: winners of the earlier studies that its trials ran under
UNDER = "under"
POLL = 0.5  # seconds between checks of other processes
StudyCallback = Callable[[Study, FrozenTrial], None]

# Heartbeats are experimental in Optuna, and warn about it.
with warnings.catch_warnings(action="ignore", category=ExperimentalWarning):
    # Queues the parameters of a dead trial again, at most twice.
    RETRY = RetryHeartbeatStaleTrialCallback(max_retry=2)


def open_storage(address: str | BaseStorage | None, run: Run) -> BaseStorage:
    """Return the storage of the studies: by default, an sqlite file in the run's folder.

    Heartbeats detect that the process of a trial has died, on any machine. Its parameters are then
    tried again, if the study still lacks a trial.
    """
    if isinstance(address, BaseStorage):
        return address
    url = make_url(address or f"sqlite:///{run.folder / 'studies.db'}")
    if url.drivername == "postgresql":  # its default driver depends on SQLAlchemy's version
        url = url.set(drivername="postgresql+psycopg")
    options: dict[str, Any] = {"pool_pre_ping": True}
    if url.drivername.startswith("sqlite"):
        options = {"connect_args": {"timeout": 60}}
    connect = partial(
        RDBStorage,
        url.render_as_string(hide_password=False),
        engine_kwargs=options,
        heartbeat_interval=30,
        grace_period=120,
    )
    with warnings.catch_warnings(action="ignore", category=ExperimentalWarning):
        try:
            storage = connect()
        except (IntegrityError, ProgrammingError):
            # Another machine is creating the tables.
            time.sleep(2)
            storage = connect()
    if storage.engine.name == "sqlite":
        # By default a transaction locks at its first write: two workers could both read that a
        # trial is waiting, and both run it.
        event.listen(storage.engine, "begin", lambda c: c.exec_driver_sql("BEGIN IMMEDIATE"))
    return storage


def open_study(
    run: Run, stage: Stage, address: str | BaseStorage | None, before: Settings
) -> Study:
    """Create or load the study of a stage; the caller must hold the lock of the run.

    If its trials ran under other winners of the earlier studies than `before`, the study is kept
    under another name, and a new one takes its place.
    """
    storage, name = open_storage(address, run), run.study_name(stage)
    create: dict[str, Any] = {"storage": storage, "directions": stage.directions}
    study = optuna.create_study(study_name=name, **create, load_if_exists=True)
    under = json.dumps(before.arguments(), sort_keys=True)
    if study.user_attrs.get(UNDER, under) != under:
        taken, numbered = optuna.get_all_study_names(storage), itertools.count(1)
        kept = next(one for n in numbered if (one := f"{name}/outdated_{n}") not in taken)
        optuna.copy_study(
            from_study_name=name, from_storage=storage, to_storage=storage, to_study_name=kept
        )
        optuna.delete_study(study_name=name, storage=storage)
        study = optuna.create_study(study_name=name, **create)
        run.set_aside(stage.name)
    study.set_user_attr(UNDER, under)
    if address is None:
        fail_running(study)
    return study


def fail_running(study: Study) -> None:
    """Mark the running trials of a study as failed; their processes must have ended."""
    for trial in study.get_trials(deepcopy=False, states=(TrialState.RUNNING,)):
        study.tell(trial.number, state=TrialState.FAIL)


def queue_first(study: Study, first_trials: Sequence[Mapping[str, Any]], n_trials: int) -> None:
    """Queue the first trials of a study of `n_trials`, after those that the user queued."""
    for params in first_trials[: max(0, n_trials - len(study.trials))]:
        study.enqueue_trial(dict(params), skip_if_exists=True)


def queue_again(study: Study, missing: int) -> None:
    """Queue the parameters of interrupted trials again, up to the number of `missing` trials."""
    trials = study.get_trials(deepcopy=False)
    waiting = sum(trial.state == TrialState.WAITING for trial in trials)
    retried = {number for trial in trials for number in trial.system_attrs.get("retry_history", [])}
    again = [t for t in trials if was_interrupted(t) and t.number not in retried]
    for trial in again[: max(0, missing - waiting)]:
        RETRY(study, trial)


def completed(study: Study) -> list[FrozenTrial]:
    """Return the trials that have a value, or raise a ``RuntimeError`` that says why none has."""
    trials = study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,))
    if trials:
        return trials
    if not (others := finished(study)):
        raise RuntimeError(f"{study.study_name}: no trial finished in time: raise time_out")
    first = others[0]
    raise RuntimeError(
        f"{study.study_name}: none of its {len(others)} trials finished. Trial {first.number}: "
        f"{first.user_attrs.get(CAUSE)}. Remove the cause, and use another run_tag or more n_trials"
    )


@dataclass(frozen=True)
class StudyJob:
    """Everything that a process needs to run trials of a study.

    Args:
        n_trials: Total number of trials.
        storage: Storage, its address, or None for the run's own file.
        setup: Function that a worker process calls first, or None.
    """

    objective: Objective
    n_trials: int
    storage: str | BaseStorage | None
    sampler: BaseSampler
    pruner: BasePruner | None
    callbacks: Sequence[StudyCallback] = ()
    setup: Callable[[], None] | None = None

    def missing(self, study: Study) -> int:
        """Return how many trials the study lacks; 0 after the deadline."""
        if self.objective.deadline.left == 0:
            return 0
        return max(0, self.n_trials - len(finished(study)))

    def run(self, study: Study, n_trials: int, *more: StudyCallback) -> None:
        """Run up to `n_trials` trials in this process."""

        def stop_when_done(study: Study, trial: FrozenTrial) -> None:
            signals.check()
            if self.missing(study) == 0:  # other machines may have run some
                study.stop()

        study.optimize(
            self.objective,
            n_trials=n_trials,
            catch=(Exception,),
            callbacks=[*self.callbacks, *more, stop_when_done],
            gc_after_trial=True,  # a Trainer and its model refer to each other
        )


def run_study(job: StudyJob, study: Study, workers: int, refresh: Callable[..., None]) -> None:
    """Run the trials that a study lacks, in this process or in a pool of workers.

    If a worker dies, the pool ends, and this process runs the rest. With a shared storage, the call
    returns when no machine runs a trial of the study any more, so that all machines see the same
    winner. `refresh` redraws the state of the study.
    """
    study.sampler, study.pruner = job.sampler, job.pruner or study.pruner
    if finished(study):
        study.sampler.reseed_rng()  # a seeded sampler would propose the same points again
    while missing := job.missing(study):
        queue_again(study, missing)
        try:
            if workers > 1:
                _run_pool(job, missing, workers, refresh)
            else:
                job.run(study, missing, refresh)
        except BrokenProcessPool:
            pass  # a worker died, and this process runs what is left
        finally:
            if job.storage is None:
                fail_running(study)
        # A callback may have stopped the study.
        if workers == 1 and (job.storage is None or missing == job.missing(study)):
            break
        workers = 1
        while study.get_trials(deepcopy=False, states=(TrialState.RUNNING,)):
            with warnings.catch_warnings(action="ignore", category=ExperimentalWarning):
                optuna.storages.fail_stale_trials(study)  # those without heartbeats
            time.sleep(POLL)
            signals.check()
            refresh()


def _run_pool(job: StudyJob, n_trials: int, workers: int, refresh: Callable[..., None]) -> None:
    """Run trials in a pool of processes; raise ``BrokenProcessPool`` if one of them dies."""
    # On Linux workers are forks of a server process that has only imported modules: a fresh
    # interpreter would spend seconds on its imports. On other systems a fork is not safe.
    context: Any = multiprocessing.get_context("spawn")
    if sys.platform == "linux":
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload([__name__])
    begun = (job, max(1, torch.get_num_threads() // workers), dict(os.environ))
    pool = ProcessPoolExecutor(workers, context, initializer=_begin_worker, initargs=begun)
    pending = {pool.submit(_run_one) for _ in range(n_trials)}
    try:
        while pending:
            done, pending = wait(pending, timeout=POLL, return_when=FIRST_COMPLETED)
            for future in done:
                future.result()
            signals.check()
            refresh()
    finally:
        for process in list((pool._processes or {}).values()) if pending else []:
            process.terminate()  # this interrupts its trial
        pool.shutdown(cancel_futures=True)


_work: tuple[StudyJob, Study] | None = None  # set in worker processes only


def _begin_worker(job: StudyJob, threads: int, environment: dict[str, str]) -> None:
    """Make this process a worker, which ends with its parent."""
    global _work
    os.environ.update(environment)
    signals.install()
    threading.Thread(target=_end_with_parent, daemon=True).start()
    if job.setup is not None:
        job.setup()
    torch.set_num_threads(threads)
    # the names of worker processes end in consecutive numbers
    worker = int(multiprocessing.current_process().name.rpartition("-")[2])
    stage, run = job.objective.stage, job.objective.prepared.run
    prepared = job.objective.prepared
    recipe = prepared.recipe.for_worker(worker, torch.cuda.device_count())
    prepared = replace(prepared, recipe=recipe)
    study = optuna.load_study(
        study_name=run.study_name(stage),
        storage=open_storage(job.storage, run),
        sampler=job.sampler,
        pruner=job.pruner,
    )
    study.sampler.reseed_rng()
    _work = replace(job, objective=replace(job.objective, prepared=prepared)), study


def _run_one() -> None:
    """Run one trial in a worker process, unless none is missing."""
    assert _work is not None
    job, study = _work
    if job.missing(study):
        job.run(study, 1)


def _end_with_parent() -> None:
    """End this process when its parent ends: a killed command must not leave workers behind."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)
