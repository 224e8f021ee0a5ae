"""The studies on disk: opening, checking, resuming, and counting what is left to do."""

from __future__ import annotations

import os
import re
import socket
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import optuna
from optuna.pruners import BasePruner
from optuna.samplers import BaseSampler
from optuna.storages import BaseStorage, RDBStorage, RetryHeartbeatStaleTrialCallback
from optuna.study import Study
from optuna.trial import FrozenTrial, TrialState

from dact.tuning.objective import CAUSE, INTERRUPTED, OWNER

RETRY_OF = "retry_of"  # user attribute: the number of the interrupted trial that this one runs again
SETTING = "setting"  # user attribute of a study: what its trials have in common


def check_run_tag(run_tag: str) -> str:
    """`run_tag`, if it is a name.

    Raises:
        ValueError: If it could lead out of the log folder.
    """
    if not re.fullmatch(r"[A-Za-z0-9_][\w.-]*", run_tag) or ".." in run_tag:
        raise ValueError(
            f"run_tag must be a name of letters, digits, '.', '_' and '-', got {run_tag!r}: it names a folder in log_dir"
        )
    return run_tag


def open_storage(address: str | BaseStorage | None, folder: Path) -> BaseStorage:
    """The storage of the studies: an sqlite file in `folder` unless told otherwise.

    Raises:
        ConnectionError: If it cannot be opened.
    """
    if isinstance(address, BaseStorage):
        return address
    folder.mkdir(parents=True, exist_ok=True)
    url = address or f"sqlite:///{folder / 'studies.db'}"
    try:
        return RDBStorage(
            url,
            engine_kwargs={"connect_args": {"timeout": 60}} if url.startswith("sqlite") else None,
            heartbeat_interval=30,
            grace_period=120,
            heartbeat_stale_trial_callback=RetryHeartbeatStaleTrialCallback(max_retry=3),
        )
    except Exception as error:  # SQLAlchemy and its drivers raise many kinds
        raise ConnectionError(
            f"the storage {re.sub('//.*@', '//…@', url)} cannot be opened: {str(error).splitlines()[0]}. Expected an "
            "address such as sqlite:///FILE or postgresql://USER@HOST/DATABASE"
        ) from error


def open_study(
    name: str,
    storage: BaseStorage,
    directions: list[Literal["minimize", "maximize"]],
    sampler: BaseSampler,
    pruner: BasePruner,
    setting: Mapping[str, Any],
) -> Study:
    """Create a study or load it, and take up what was interrupted.

    Raises:
        ValueError: If the study was made with another search space or data set.
    """
    study = optuna.create_study(
        study_name=name, storage=storage, directions=directions, sampler=sampler, pruner=pruner, load_if_exists=True
    )
    stored = study.user_attrs.get(SETTING)
    if stored is None:
        study.set_user_attr(SETTING, dict(setting))
    elif stored != dict(setting):
        different = ", ".join(key for key in setting if stored.get(key) != setting[key])
        raise ValueError(
            f"the study {name} was made with another {different}; trials of both would not compare. Take another run_tag, "
            f"or the {different} of then"
        )
    _fail_orphans(study)
    _queue_again(study)
    return study


def _fail_orphans(study: Study) -> None:
    """End trials that say they are running, but whose process on this host is gone. (Heartbeats serve other hosts.)"""
    for trial in study.get_trials(deepcopy=False, states=(TrialState.RUNNING,)):
        host, process = trial.user_attrs.get(OWNER, [None, None])
        if host == socket.gethostname() and not _is_alive(process):
            study._storage.set_trial_user_attr(trial._trial_id, INTERRUPTED, True)
            study.tell(trial.number, state=TrialState.FAIL)


def _is_alive(process: int) -> bool:
    if process == os.getpid():
        return False  # this process runs no trial when it opens a study
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


def _queue_again(study: Study) -> None:
    """Queue the parameters of interrupted trials, each once."""
    trials = study.get_trials(deepcopy=False)
    retried = {trial.user_attrs.get(RETRY_OF) for trial in trials}
    for trial in trials:
        interrupted = trial.state == TrialState.FAIL and trial.user_attrs.get(INTERRUPTED)
        if interrupted and trial.number not in retried and trial.params:
            study.enqueue_trial(trial.params, user_attrs={RETRY_OF: trial.number})


def finished(study: Study) -> list[FrozenTrial]:
    """Trials that count: completed, pruned, or failed for a reason of their own."""
    states = (TrialState.COMPLETE, TrialState.PRUNED, TrialState.FAIL)
    trials = study.get_trials(deepcopy=False, states=states)
    return [trial for trial in trials if not trial.user_attrs.get(INTERRUPTED)]


def completed(study: Study) -> list[FrozenTrial]:
    """Trials that gave a value.

    Raises:
        RuntimeError: If there is none, with the first cause.
    """
    trials = study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,))
    if trials:
        return trials
    others = study.get_trials(deepcopy=False)
    causes = [f"trial {trial.number}: {trial.user_attrs[CAUSE]}" for trial in others if CAUSE in trial.user_attrs]
    if not others or (causes and all("time_out" in cause for cause in causes)):
        raise RuntimeError(
            f"{study.study_name}: time_out ended the study before any trial finished; raise time_out, or train for fewer "
            "epochs"
        )
    raise RuntimeError(
        f"{study.study_name}: none of its {len(others)} trials finished. The first cause: "
        f"{causes[0] if causes else 'unknown'}"
    )
