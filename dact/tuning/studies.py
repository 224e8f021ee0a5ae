"""The studies in their storage: how they are opened, resumed and read.

Any number of processes, on this host or others, may run the trials of one study. They share it by Optuna's own means:
the storage, its heartbeats, and a count of the trials before each new one.
"""

from __future__ import annotations

import os
import socket
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any

import optuna
import psutil
from optuna.exceptions import ExperimentalWarning, UpdateFinishedTrialError
from optuna.pruners import BasePruner
from optuna.storages import BaseStorage
from optuna.study import Study
from optuna.trial import FrozenTrial, Trial, TrialState

from dact import signals
from dact.tuning.deadline import Deadline
from dact.tuning.run import Run
from dact.tuning.stages import Stage
from dact.tuning.storage import corrupted, describe_storage, is_unreachable, open_storage, root_cause

CAUSE = "cause"  # user attribute of a trial that was pruned or failed: why
DEATHS = "deaths"  # user attribute: how often the process of an earlier trial with these parameters died
EXIT_HISTOGRAM = "exit_histogram"  # user attribute: number of validation examples that left after each layer
INTERRUPTED = "interrupted"  # user attribute of a trial that was stopped from outside
OWNER = "owner"  # user attribute: host, process id and start of the process that runs a trial
RETRY_OF = "retry_of"  # user attribute: number of the interrupted trial whose parameters are tried again
IDENTITY = "setting"  # user attribute of a study: settings that its trials have in common
ORIGIN = "under"  # user attribute of a study: digest of the winners of the studies before it
MAX_DEATHS = 3  # parameters whose process died this often are not tried again
HOPELESS = 5  # number of failed trials, with no other outcome, after which a study ends
POLL = 0.5  # seconds between two checks of what other processes do
QUIET = 3  # checks in a row without a running trial after which a process leaves a study past its deadline
NAMELESS = 10.0  # seconds after which a running trial without an owner is taken for dead


class TrialFailed(RuntimeError):
    """A trial has no value, for the cause in the message; the study continues."""


class TrialInterrupted(Exception):
    """A trial was stopped from outside; its parameters are tried again later."""


# ---------------------------------------------------------------------- opening


def open_study(
    run: Run, stage: Stage, identity: Mapping[str, Any], address: str | BaseStorage | None, pruner: BasePruner | None
) -> Study:
    """Create or load a study, and check that its trials are comparable. The caller holds the lock of the run.

    Args:
        run: The run.
        stage: The stage.
        identity: Settings that all trials of the study have in common, as plain data.
        address: Address of the storage, or a storage; None for the run's own file.
        pruner: Pruner, for a study of one objective.

    Raises:
        ConnectionError: If the storage cannot be reached.
        ValueError: If the study was made with another identity, or is corrupted.
    """
    name, where = run.study_name(stage), describe_storage(address, run.folder)
    storage = open_storage(address, run.folder)
    try:
        study = optuna.create_study(
            study_name=name,
            storage=storage,
            directions=list(stage.directions),
            pruner=pruner,
            load_if_exists=True,
        )
        stored = study.user_attrs.get(IDENTITY)
        trials = study.get_trials(deepcopy=False)
        directions = tuple(direction.name.lower() for direction in study.directions)
    except Exception as error:
        if is_unreachable(error):
            raise ConnectionError(f"{where} cannot be read: {root_cause(error)}") from error
        raise corrupted(where, error) from error
    if directions != stage.directions:
        raise corrupted(where, f"the objectives of {name}")
    if stored is None and not trials:
        study.set_user_attr(IDENTITY, dict(identity))
        return study
    stored = stored if isinstance(stored, Mapping) else {}
    different = [key for key in sorted({*identity, *stored}) if stored.get(key) != identity.get(key)]
    if different:
        raise ValueError(
            f"the study {name} in {where} was made with another {', '.join(different)}; trials of both would not "
            f"compare. Use another run_tag, or the {different[0]} of that time"
        )
    return study


def start_with(study: Study, first_trials: Sequence[Mapping[str, Any]]) -> None:
    """Queue the first trials of a new study. The caller holds the lock of the run.

    Args:
        study: The study.
        first_trials: Parameters of its first trials.
    """
    if len(study.get_trials(deepcopy=False)) < len(first_trials):  # some exist if a kill came between two of them
        for params in first_trials:
            study.enqueue_trial(dict(params), skip_if_exists=True)


def archive_if_outdated(study: Study, origin: str) -> tuple[Study, int]:
    """Return a study whose trials all ran under the current winners of the studies before it.

    A study that ran under other winners is kept under another name, and a new one takes its place. The caller holds the
    lock of the run.

    Args:
        study: The study.
        origin: Digest of the winners of the studies before it.

    Returns:
        The study to continue, and the number of trials that are ignored from now on.
    """
    if study.user_attrs.get(ORIGIN, origin) == origin:
        study.set_user_attr(ORIGIN, origin)
        return study, 0
    trials = study.get_trials(deepcopy=False)
    storage, name, pruner = study._storage, study.study_name, study.pruner
    known = {summary.study_name for summary in optuna.get_all_study_summaries(storage, include_best_trial=False)}
    number = next(number for number in range(1, len(known) + 2) if f"{name}/outdated_{number}" not in known)
    identity, directions = study.user_attrs.get(IDENTITY), study.directions
    if trials:
        optuna.copy_study(
            from_study_name=name, from_storage=storage, to_storage=storage, to_study_name=f"{name}/outdated_{number}"
        )
    optuna.delete_study(study_name=name, storage=storage)
    study = optuna.create_study(study_name=name, storage=storage, directions=directions, pruner=pruner)
    study.set_user_attr(IDENTITY, identity)
    study.set_user_attr(ORIGIN, origin)
    for trial in trials[:2]:  # the first trials are the same
        if "fixed_params" in trial.system_attrs and RETRY_OF not in trial.user_attrs:
            study.enqueue_trial(trial.system_attrs["fixed_params"], skip_if_exists=True)
    return study, sum(is_counted(trial) for trial in trials)


# ---------------------------------------------------------------------- what is done and what is left


def is_interrupted(trial: FrozenTrial) -> bool:
    """Return whether a trial was stopped from outside or its process died, so that its parameters are tried again."""
    if trial.state != TrialState.FAIL or CAUSE in trial.user_attrs:
        return False
    return INTERRUPTED in trial.user_attrs or trial.user_attrs.get(DEATHS, 0) + 1 < MAX_DEATHS


def is_counted(trial: FrozenTrial) -> bool:
    """Return whether a trial has ended and was not interrupted."""
    return trial.state.is_finished() and not is_interrupted(trial)


def finished(study: Study) -> list[FrozenTrial]:
    """Return the trials that count: completed, pruned, or failed by their own fault."""
    return [trial for trial in study.get_trials(deepcopy=False) if is_counted(trial)]


def completed(study: Study) -> list[FrozenTrial]:
    """Return the trials that have a value.

    Raises:
        RuntimeError: If there is none; the message gives the first cause.
    """
    trials = study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,))
    if trials:
        return trials
    others = finished(study)
    if not others:
        raise RuntimeError(
            f"{study.study_name}: time_out ended the study before any trial finished; raise time_out, or train for "
            "fewer epochs"
        )
    raise RuntimeError(
        f"{study.study_name}: none of its {len(others)} trials finished. The first cause: trial {others[0].number}: "
        f"{_cause(others[0])}"
    )


def _cause(trial: FrozenTrial) -> str:
    died = f"its process died without a word, {MAX_DEATHS} times with these parameters (out of memory?)"
    return str(trial.user_attrs.get(CAUSE, died if trial.state == TrialState.FAIL else "pruned"))


# ---------------------------------------------------------------------- interrupted trials


def owner() -> list[Any]:
    """Return host, id and start time of this process, by which others can tell whether it is alive."""
    return [socket.gethostname(), os.getpid(), psutil.Process().create_time()]


def sweep(study: Study, lock: Callable[[], AbstractContextManager[Any]]) -> list[FrozenTrial]:
    """Fail running trials whose process on this host is gone, and queue interrupted parameters again.

    Dead trials of other hosts are found by Optuna's heartbeats, after a grace period. On this host, a command that is
    restarted right after a crash need not wait for it.

    Args:
        study: The study.
        lock: The lock of the run.

    Returns:
        The running trials whose process was gone.
    """
    with lock():
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ExperimentalWarning)
            optuna.storages.fail_stale_trials(study)  # those of other hosts, by their heartbeats
        orphans = []
        for trial in study.get_trials(deepcopy=False, states=(TrialState.RUNNING,)):
            if _has_died(trial):
                try:
                    study.tell(trial.number, state=TrialState.FAIL)
                except (UpdateFinishedTrialError, ValueError):
                    continue  # it has just ended
                orphans.append(trial)
        for trial in study.get_trials(deepcopy=False, states=(TrialState.FAIL,)):
            retry(study, trial)
    return orphans


def retry(study: Study, trial: FrozenTrial) -> None:
    """Queue the parameters of an interrupted trial again, once. The caller holds the lock of the run."""
    if not is_interrupted(trial):
        return
    if any(other.user_attrs.get(RETRY_OF) == trial.number for other in study.get_trials(deepcopy=False)):
        return
    # A trial that died before it drew all of its parameters must keep those that it was queued with.
    params = {**trial.system_attrs.get("fixed_params", {}), **trial.params}
    deaths = trial.user_attrs.get(DEATHS, 0) + (INTERRUPTED not in trial.user_attrs)
    study.enqueue_trial(params, user_attrs={RETRY_OF: trial.number, DEATHS: deaths})


def _was_ended_by_others(study: Study, number: int) -> bool:
    """Return whether another process declared a trial of this process failed."""
    trial = study.get_trials(deepcopy=False)[number]
    return trial.state == TrialState.FAIL and not {CAUSE, INTERRUPTED} & trial.user_attrs.keys()


def _has_died(trial: FrozenTrial) -> bool:
    """Return whether the process of this host that runs a trial is gone."""
    if OWNER not in trial.user_attrs:
        assert trial.datetime_start is not None
        return time.time() - trial.datetime_start.timestamp() > NAMELESS
    host, process, started = trial.user_attrs[OWNER]
    if host != socket.gethostname():
        return False  # its heartbeat decides
    if process == os.getpid():
        return True  # this process runs one trial at a time, and now none
    try:
        found = psutil.Process(process)
        # Process ids are reused. Start times are compared loosely, since the clock may have been set meanwhile.
        return found.status() == psutil.STATUS_ZOMBIE or abs(found.create_time() - started) > 10
    except psutil.NoSuchProcess:
        return True
    except psutil.AccessDenied:
        return False


# ---------------------------------------------------------------------- running


def run_trials(
    study: Study,
    objective: Callable[[Trial], Any],
    n_trials: int,
    lock: Callable[[], AbstractContextManager[Any]],
    *,
    deadline: Deadline | None = None,
    idle: Callable[[], None] = lambda: None,
    callbacks: Sequence[Callable[[Study, FrozenTrial], None]] = (),
    orphaned: Callable[[FrozenTrial], None] = lambda trial: None,
) -> None:
    """Run trials until the study has `n_trials` of them, possibly next to other processes that do the same.

    Before each trial a process counts those that have ended or are running, so that the total exceeds `n_trials` by at
    most the number of processes minus one. A process returns only when no trial is running any more, even after a
    deadline, so that all processes see the same winner.

    Args:
        study: The study, with its sampler and pruner.
        objective: Objective. It raises `TrialFailed` if a trial has no value, and `TrialInterrupted` if its parameters
            should be tried again; any other exception, except that of a pruned trial, ends the run.
        n_trials: Total number of trials; see `finished`.
        lock: The lock of the run.
        deadline: Deadline after which no trial starts.
        idle: Function that is called while other processes run the last trials.
        callbacks: Optuna callbacks, called after each trial of this process.
        orphaned: Function that is called with each trial whose process is gone.
    """
    deadline = deadline or Deadline()

    def sweep_now() -> None:
        for orphan in sweep(study, lock):
            orphaned(orphan)

    quiet = 0  # checks in a row at which nothing was running
    sweep_now()
    while True:
        signals.check()
        # One query: a trial that ends between two would be missing from both.
        trials = study.get_trials(deepcopy=False)
        done = [trial for trial in trials if is_counted(trial)]
        running = sum(trial.state == TrialState.RUNNING for trial in trials)
        quiet = 0 if running else quiet + 1
        hopeless = len(done) >= HOPELESS and all(trial.state == TrialState.FAIL for trial in done)
        late = deadline.left == 0
        if (len(done) >= n_trials and not running) or hopeless or (late and quiet >= QUIET):
            return
        if late or len(done) + running >= n_trials:
            if running:
                sweep_now()
            idle()
            time.sleep(POLL if running else POLL / QUIET)
            continue
        started: list[int] = []

        def tracked(trial: Trial, started: list[int] = started) -> Any:
            started.append(trial.number)
            return objective(trial)

        try:
            study.optimize(
                tracked,
                n_trials=1,
                catch=(TrialFailed, TrialInterrupted),
                callbacks=list(callbacks),
                gc_after_trial=True,  # a Trainer and its model refer to each other
            )
        except (UpdateFinishedTrialError, ValueError):
            if not (started and _was_ended_by_others(study, started[0])):
                raise  # from a sampler or a callback
            continue  # another process took this one for dead; Optuna refuses to finish a trial twice
        if study._stop_flag:  # a callback called Optuna's study.stop()
            return
