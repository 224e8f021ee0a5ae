"""Interrupted trials: how they are told from others, and how their parameters are tried again."""

from __future__ import annotations

import os
import socket
import time
import warnings
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Any

import optuna
import psutil
from optuna.exceptions import ExperimentalWarning, UpdateFinishedTrialError
from optuna.storages._heartbeat import is_heartbeat_enabled
from optuna.study import Study
from optuna.trial import FrozenTrial, TrialState

STOPPED = "stopped_at"  # user attribute of a study: the n_trials before which Optuna's study.stop() ended it
CAUSE = "cause"  # user attribute of a trial that was pruned or failed: why
DEATHS = (
    "deaths"  # user attribute: how often the process of an earlier trial with these parameters died
)
INTERRUPTED = "interrupted"  # user attribute of a trial that was stopped from outside
OWNER = "owner"  # user attribute: host, process id and start of the process that runs a trial
RETRY_OF = (
    "retry_of"  # user attribute: number of the interrupted trial whose parameters are tried again
)
MAX_DEATHS = 3  # parameters whose process died this often are not tried again
NAMELESS = 10.0  # seconds after which a running trial without an owner is taken for dead


def is_interrupted(trial: FrozenTrial) -> bool:
    """Return whether a trial was stopped from outside or its process died, so that its parameters
    are tried again."""
    if trial.state != TrialState.FAIL or CAUSE in trial.user_attrs:
        return False
    return INTERRUPTED in trial.user_attrs or trial.user_attrs.get(DEATHS, 0) + 1 < MAX_DEATHS


def is_counted(trial: FrozenTrial) -> bool:
    """Return whether a trial has ended and was not interrupted."""
    return trial.state.is_finished() and not is_interrupted(trial)


def retries_due(trials: Sequence[FrozenTrial]) -> list[FrozenTrial]:
    """Return the interrupted trials whose parameters are not queued again yet; `sweep` does
    that."""
    queued = {trial.user_attrs.get(RETRY_OF) for trial in trials}
    return [trial for trial in trials if is_interrupted(trial) and trial.number not in queued]


def owner() -> list[Any]:
    """Return host, id and start time of this process, by which others can tell whether it is
    alive."""
    return [socket.gethostname(), os.getpid(), psutil.Process().create_time()]


def sweep(study: Study, lock: Callable[[], AbstractContextManager[Any]]) -> list[FrozenTrial]:
    """Fail running trials whose process on this host is gone, and queue interrupted parameters
    again.

    Dead trials of other hosts are found by Optuna's heartbeats, after a grace period. On this host,
    a command that is restarted right after a crash need not wait for it.

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
        for trial in retries_due(study.get_trials(deepcopy=False)):
            # A trial that died before it drew all of its parameters must keep those that it was
            # queued with.
            params = {**trial.system_attrs.get("fixed_params", {}), **trial.params}
            deaths = trial.user_attrs.get(DEATHS, 0) + (INTERRUPTED not in trial.user_attrs)
            study.enqueue_trial(params, user_attrs={RETRY_OF: trial.number, DEATHS: deaths})
    return orphans


def unwatched(study: Study) -> list[FrozenTrial]:
    """Return the running trials of other hosts, if the storage has no heartbeats by which their end
    would show."""
    if is_heartbeat_enabled(study._storage):
        return []
    here = socket.gethostname()
    running = study.get_trials(deepcopy=False, states=(TrialState.RUNNING,))
    return [trial for trial in running if trial.user_attrs.get(OWNER, [here])[0] != here]


def was_ended_by_others(study: Study, number: int) -> bool:
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
        # Process ids are reused. Start times are compared loosely, since the clock may have been
        # set meanwhile.
        return found.status() == psutil.STATUS_ZOMBIE or abs(found.create_time() - started) > 10
    except psutil.NoSuchProcess:
        return True
    except psutil.AccessDenied:
        return False
