"""The studies in their storage: opening them, running what is left of them, and reading their results.

Any number of processes, here or on other hosts, may run the trials of one study. They share it by Optuna's own means:
the storage, its heartbeats, and a count before each trial.
"""

from __future__ import annotations

import os
import re
import socket
import sqlite3
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import optuna
import psutil
from optuna.exceptions import ExperimentalWarning, StorageInternalError, UpdateFinishedTrialError
from optuna.pruners import BasePruner
from optuna.storages import BaseStorage, RDBStorage
from optuna.study import Study
from optuna.trial import FrozenTrial, Trial, TrialState
from sqlalchemy.engine import URL, make_url
from sqlalchemy.exc import ArgumentError, SQLAlchemyError

from dact import signals
from dact.tuning.run import Run
from dact.tuning.space import Space
from dact.tuning.stages import Stage
from dact.tuning.training import Deadline

CAUSE = "cause"  # user attribute of a trial that was pruned or failed: why
DEATHS = "deaths"  # user attribute: how often the process of an earlier trial with these parameters died
EXIT_HISTOGRAM = "exit_histogram"  # user attribute: number of validation examples that left after each layer
INTERRUPTED = "interrupted"  # user attribute of a trial that was stopped from outside
OWNER = "owner"  # user attribute: host, process id and start of the process that runs a trial
RETRY_OF = "retry_of"  # user attribute: number of the interrupted trial whose parameters run again
SETTING = "setting"  # user attribute of a study: what its trials have in common
UNDER = "under"  # user attribute of a study: digest of the winners of the studies before it
MAX_DEATHS = 3  # parameters whose process died so often are not run again
HOPELESS = 5  # after so many failed trials and no other, a study ends
POLL = 0.5  # seconds between two looks at what other processes do
NAMELESS = 10.0  # seconds after which a running trial that names no process has lost it


class TrialFailed(RuntimeError):
    """A trial cannot give a value, for the cause that this says; the study continues."""


class TrialInterrupted(Exception):
    """A trial was stopped from outside, and its parameters run again later."""


# ---------------------------------------------------------------------- faults of disks and storages


class RunStopped(RuntimeError):
    """A worker process ended because a disk or a storage failed."""


def environment_error(error: BaseException | None) -> BaseException | None:
    """Return the cause of an error if a disk or a storage failed, None if the error says something about a trial.

    A file that is not there and a broken pipe come from the code of a trial; other system errors do not.
    """
    while error is not None:
        if isinstance(error, (RunStopped, StorageInternalError, SQLAlchemyError)):
            return error
        if isinstance(error, OSError) and not isinstance(error, (FileNotFoundError, BrokenPipeError)):
            return error
        error = error.__cause__ or error.__context__
    return None


def root_cause(error: BaseException) -> str:
    """Return the first line of the first error in a chain."""
    while error.__cause__ is not None:
        error = error.__cause__
    return (str(error) or type(error).__name__).splitlines()[0]


# ---------------------------------------------------------------------- opening


def describe_storage(address: str | BaseStorage | None, folder: Path) -> str:
    """Return where the studies are, for messages: a file, or an address without its password."""
    if isinstance(address, BaseStorage):
        return f"the storage ({type(address).__name__})"
    if address is None:
        return str(folder / "studies.db")
    return re.sub("//.*@", "//…@", address)


def open_storage(address: str | BaseStorage | None, folder: Path) -> BaseStorage:
    """Return the storage of the studies: an sqlite file in `folder` unless an address says otherwise.

    Raises:
        ConnectionError: If it cannot be opened.
        ValueError: If it is a corrupted sqlite file.
    """
    if isinstance(address, BaseStorage):
        return address
    folder.mkdir(parents=True, exist_ok=True)
    where = describe_storage(address, folder)
    try:
        # A URL object, since a question mark in a path would end an address.
        url = URL.create("sqlite", database=str(folder / "studies.db")) if address is None else make_url(address)
    except ArgumentError as error:
        raise _cannot_be_opened(where, error) from error
    if url.drivername in ("postgres", "postgresql"):  # which driver that means depends on the version of SQLAlchemy
        url = url.set(drivername="postgresql+psycopg")
    sqlite = url.drivername.startswith("sqlite")
    if sqlite and url.database:
        _check_sqlite(Path(url.database))
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ExperimentalWarning)  # heartbeats, which we chose
            return RDBStorage(
                url.render_as_string(hide_password=False),
                engine_kwargs={"connect_args": {"timeout": 60}} if sqlite else {"pool_pre_ping": True},
                heartbeat_interval=30,
                grace_period=120,
                heartbeat_stale_trial_callback=retry,
            )
    except Exception as error:  # SQLAlchemy and its drivers raise many kinds
        raise _cannot_be_opened(where, error) from error


def _cannot_be_opened(where: str, error: BaseException) -> ConnectionError:
    return ConnectionError(
        f"the storage {where} cannot be opened: {root_cause(error)}. Expected an address such as sqlite:///FILE or "
        "postgresql://USER@HOST/DATABASE"
    )


def _check_sqlite(file: Path) -> None:
    if not file.is_file() or file.stat().st_size == 0:
        return
    try:
        connection = sqlite3.connect(file, timeout=60)
        try:
            verdict = connection.execute("PRAGMA integrity_check").fetchone()[0]
        finally:
            connection.close()
    except sqlite3.OperationalError as error:  # not a fault of its content: a lock, a full disk, missing rights
        raise ConnectionError(f"{file} cannot be read: {error}") from error
    except sqlite3.DatabaseError as error:
        verdict = str(error)
    if verdict != "ok":
        raise _corrupted(str(file), verdict)


def _corrupted(where: str, what: object) -> ValueError:
    return ValueError(f"{where} is corrupted ({what}): restore a sound copy, or start anew under another run_tag")


def open_study(
    run: Run, stage: Stage, setting: Mapping[str, Any], storage: BaseStorage, where: str, pruner: BasePruner | None
) -> Study:
    """Create a study or load it, and check that its trials compare. One process at a time.

    Args:
        run: The run.
        stage: The stage.
        setting: What its trials have in common, as plain data.
        storage: The storage.
        where: Description of the storage for messages.
        pruner: Pruner, for a study of one objective.

    Raises:
        ConnectionError: If the storage cannot be reached.
        ValueError: If the study was made with another setting, or is corrupted.
    """
    name = run.study_name(stage)
    try:
        study = optuna.create_study(
            study_name=name,
            storage=storage,
            directions=list(stage.directions),
            pruner=pruner,
            load_if_exists=True,
        )
        stored = study.user_attrs.get(SETTING)
        trials = study.get_trials(deepcopy=False)
        directions = tuple(direction.name.lower() for direction in study.directions)
    except Exception as error:
        if isinstance(environment_error(error), ConnectionError) or _is_unreachable(error):
            raise ConnectionError(f"{where} cannot be read: {root_cause(error)}") from error
        raise _corrupted(where, error) from error
    if directions != stage.directions:
        raise _corrupted(where, f"the objectives of {name}")
    if stored is None and not trials:
        study.set_user_attr(SETTING, dict(setting))
        return study
    stored = stored if isinstance(stored, Mapping) else {}
    different = [key for key in sorted({*setting, *stored}) if stored.get(key) != setting.get(key)]
    if different:
        raise ValueError(
            f"the study {name} in {where} was made with another {', '.join(different)}; trials of both would not "
            f"compare. Take another run_tag, or the {different[0]} of then"
        )
    return study


def _is_unreachable(error: BaseException | None) -> bool:
    from sqlalchemy.exc import InterfaceError, OperationalError

    while error is not None:
        if isinstance(error, (OperationalError, InterfaceError)):
            return True
        error = error.__cause__ or error.__context__
    return False


def start_with(study: Study, space: Space, starts: Sequence[Mapping[str, Any]]) -> None:
    """Queue the first trials of a new study. One process at a time.

    Args:
        study: The study.
        space: Dimension of each parameter.
        starts: Parameters of its first trials; those that the space lacks are left out.
    """
    if not study.get_trials(deepcopy=False):
        for params in starts:
            study.enqueue_trial({name: params[name] for name in space if name in params}, skip_if_exists=True)


def start_under(study: Study, under: str) -> tuple[Study, int]:
    """Let a study count only trials that ran under the current winners of the studies before it.

    A study that ran under other winners is kept under another name, and a new one takes its place. One process at a
    time.

    Args:
        study: The study.
        under: Digest of the winners of the studies before it.

    Returns:
        The study to continue, and the number of trials that no longer count.
    """
    trials = study.get_trials(deepcopy=False)
    if study.user_attrs.get(UNDER) is None and not any(trial.user_attrs.get(UNDER, under) != under for trial in trials):
        study.set_user_attr(UNDER, under)
        return study, 0
    if study.user_attrs.get(UNDER) == under:
        return study, 0
    storage, name, pruner = study._storage, study.study_name, study.pruner
    known = {summary.study_name for summary in optuna.get_all_study_summaries(storage, include_best_trial=False)}
    number = next(number for number in range(1, len(known) + 2) if f"{name}/outdated_{number}" not in known)
    setting, directions = study.user_attrs.get(SETTING), study.directions
    if trials:
        optuna.copy_study(
            from_study_name=name, from_storage=storage, to_storage=storage, to_study_name=f"{name}/outdated_{number}"
        )
    optuna.delete_study(study_name=name, storage=storage)
    study = optuna.create_study(study_name=name, storage=storage, directions=directions, pruner=pruner)
    study.set_user_attr(SETTING, setting)
    study.set_user_attr(UNDER, under)
    for trial in trials[:2]:  # the first trials are the same
        if "fixed_params" in trial.system_attrs and RETRY_OF not in trial.user_attrs:
            study.enqueue_trial(trial.system_attrs["fixed_params"], skip_if_exists=True)
    return study, sum(counts(trial) for trial in trials)


# ---------------------------------------------------------------------- what is done and what is left


def is_interrupted(trial: FrozenTrial) -> bool:
    """Return whether a trial was stopped from outside, or its process died: its parameters run again."""
    if trial.state != TrialState.FAIL or CAUSE in trial.user_attrs:
        return False
    return INTERRUPTED in trial.user_attrs or trial.user_attrs.get(DEATHS, 0) + 1 < MAX_DEATHS


def counts(trial: FrozenTrial) -> bool:
    """Return whether a trial has ended and says something about its parameters."""
    return trial.state.is_finished() and not is_interrupted(trial)


def finished(study: Study) -> list[FrozenTrial]:
    """Return the trials that count: completed, pruned, or failed for a reason of their own."""
    return [trial for trial in study.get_trials(deepcopy=False) if counts(trial)]


def completed(study: Study) -> list[FrozenTrial]:
    """Return the trials that gave a value.

    Raises:
        RuntimeError: If there are none, with the first cause.
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


def best(study: Study) -> FrozenTrial:
    """Return the completed trial of the lowest value.

    Raises:
        RuntimeError: If none completed; see `completed`.
    """
    return min(completed(study), key=lambda trial: trial.values[0])


# ---------------------------------------------------------------------- interrupted trials


def owner() -> list[Any]:
    """Return what names this process, so that others can tell whether it still lives."""
    return [socket.gethostname(), os.getpid(), psutil.Process().create_time()]


def sweep(study: Study, lock: Callable[[], AbstractContextManager[Any]]) -> list[FrozenTrial]:
    """Fail running trials whose process on this host is gone, and queue interrupted parameters again.

    Heartbeats serve other hosts, and only after their grace period; a command that is started again right after a crash
    need not wait for it.

    Args:
        study: The study.
        lock: The lock of the run.

    Returns:
        The trials that were found without their process.
    """
    with lock():
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
    """Queue the parameters of an interrupted trial again, once; Optuna calls this for trials without a heartbeat."""
    if not is_interrupted(trial):
        return
    if any(other.user_attrs.get(RETRY_OF) == trial.number for other in study.get_trials(deepcopy=False)):
        return
    # One that died before it had drawn all of its parameters still owes those that it was queued with.
    params = {**trial.system_attrs.get("fixed_params", {}), **trial.params}
    deaths = trial.user_attrs.get(DEATHS, 0) + (INTERRUPTED not in trial.user_attrs)
    study.enqueue_trial(params, user_attrs={RETRY_OF: trial.number, DEATHS: deaths})


def _has_died(trial: FrozenTrial) -> bool:
    """Return whether the process of this host that runs a trial is gone."""
    if OWNER not in trial.user_attrs:
        assert trial.datetime_start is not None
        return time.time() - trial.datetime_start.timestamp() > NAMELESS
    host, process, started = trial.user_attrs[OWNER]
    if host != socket.gethostname():
        return False  # its heartbeat tells
    if process == os.getpid():
        return True  # this process runs one trial at a time, and is here
    try:
        found = psutil.Process(process)
        # A number is used again in time. (The start is told from the clock, which may be set meanwhile.)
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
    """Run trials until the study has `n_trials` of them, next to other processes that do the same.

    Processes count what has ended or is running before each trial, so that the total exceeds `n_trials` by at most the
    number of processes less one. All return when no trial is running any more, so that all see the same winner.

    Args:
        study: The study, with its sampler and pruner.
        objective: Objective, which raises `TrialFailed` for a trial that cannot give a value and `TrialInterrupted` for
            one that runs again; any other exception except a pruned trial ends the run.
        n_trials: Total number of trials; see `finished`.
        lock: The lock of the run.
        deadline: Deadline after which no trial starts.
        idle: Function that is called while other processes run the last trials.
        callbacks: Optuna callbacks, called after each trial of this process.
        orphaned: Function that is called with each trial that was found without its process.
    """
    deadline = deadline or Deadline()

    def sweep_now() -> None:
        for orphan in sweep(study, lock):
            orphaned(orphan)

    sweep_now()
    while deadline.left > 0:
        signals.check()
        # One look: a trial that ends between two would be missing from both.
        trials = study.get_trials(deepcopy=False)
        done = [trial for trial in trials if counts(trial)]
        running = sum(trial.state == TrialState.RUNNING for trial in trials)
        hopeless = len(done) >= HOPELESS and all(trial.state == TrialState.FAIL for trial in done)
        if (len(done) >= n_trials and not running) or hopeless:
            return
        if len(done) + running >= n_trials:
            sweep_now()
            idle()
            time.sleep(POLL)
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
            if not started:
                raise  # from the sampler
            continue  # others took this process for dead, and ended its trial: Optuna will not tell it again
        if study._stop_flag:  # a callback called Optuna's study.stop()
            return
