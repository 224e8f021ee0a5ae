"""The studies on disk: opening and checking them, sharing their trials among processes, and taking up what was
interrupted.

Any number of processes, here or on other hosts, may run the trials of one study. What must not happen twice at a time
is done under a lock in the run's folder, which the system releases when its holder dies.
"""

from __future__ import annotations

import contextlib
import gc
import hashlib
import json
import os
import re
import socket
import sqlite3
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import optuna
import psutil
from filelock import BaseFileLock, FileLock
from optuna.samplers import BaseSampler
from optuna.storages import BaseStorage, RDBStorage
from optuna.storages._heartbeat import BaseHeartbeat
from optuna.study import Study
from optuna.trial import FrozenTrial, Trial, TrialState
from typing_extensions import override

from dact.tuning.environment import root_cause
from dact.tuning.objective import CAUSE, INTERRUPTED, TrialFailed
from dact.tuning.stopping import check_stop

OWNER = "owner"  # user attribute: host, process id and start of the process that runs a trial
RETRY_OF = "retry_of"  # user attribute: the number of the interrupted trial that this one runs again
SEAL = "seal"  # user attribute: digest of what a trial that ended had found
SETTING = "setting"  # user attribute of a study: what its trials have in common
UNDER = "under"  # user attribute of a trial: digest of what the studies before had chosen when it began
RETRIES = 3  # how often parameters run again whose process died under them
HOPELESS = 5  # after so many failed trials and no other, a study ends
POLL = 0.5  # seconds between two looks at what other processes do


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


def run_lock(folder: Path, name: str) -> BaseFileLock:
    """A lock that one process at a time holds, on all hosts that share `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    return FileLock(folder / f".{name}.lock", poll_interval=0.05)


@contextlib.contextmanager
def quiet_optuna() -> Iterator[None]:
    """Keep Optuna's log lines off the console: the table shows what they say."""
    level = optuna.logging.get_verbosity()
    optuna.logging.set_verbosity(optuna.logging.CRITICAL)
    try:
        yield
    finally:
        optuna.logging.set_verbosity(level)


# ---------------------------------------------------------------------- opening


def describe_storage(address: str | BaseStorage | None, folder: Path) -> str:
    """Where the studies lie, for messages: a file, or an address without its password."""
    if isinstance(address, BaseStorage):
        return f"the storage ({type(address).__name__})"
    if address is None:
        return str(folder / "studies.db")
    return re.sub("//.*@", "//…@", address)


def open_storage(address: str | BaseStorage | None, folder: Path) -> BaseStorage:
    """The storage of the studies: an sqlite file in `folder` unless told otherwise.

    Raises:
        ConnectionError: If it cannot be opened.
        ValueError: If it is a damaged sqlite file.
    """
    if isinstance(address, BaseStorage):
        return address
    folder.mkdir(parents=True, exist_ok=True)
    where = describe_storage(address, folder)
    url = address or f"sqlite:///{folder / 'studies.db'}"
    # Which driver a bare address means depends on the version of SQLAlchemy.
    url = re.sub("^postgres(ql)?://", "postgresql+psycopg://", url)
    if url.startswith("sqlite:///"):
        _check_sqlite(Path(url.removeprefix("sqlite:///")))
    try:
        return RDBStorage(
            url,
            engine_kwargs={"connect_args": {"timeout": 60}} if url.startswith("sqlite") else {"pool_pre_ping": True},
            heartbeat_interval=30,
            grace_period=120,
        )
    except Exception as error:  # SQLAlchemy and its drivers raise many kinds
        raise ConnectionError(
            f"the storage {where} cannot be opened: {root_cause(error)}. Expected an address such as "
            "sqlite:///FILE or postgresql://USER@HOST/DATABASE"
        ) from error


def _check_sqlite(file: Path) -> None:
    if not file.is_file() or file.stat().st_size == 0:
        return
    try:
        connection = sqlite3.connect(file, timeout=60)
        try:
            verdict = connection.execute("PRAGMA integrity_check").fetchone()[0]
        finally:
            connection.close()
    except sqlite3.OperationalError as error:  # no fault of its content: a lock, a full disk, missing rights
        raise ConnectionError(f"{file} cannot be read: {error}") from error
    except sqlite3.DatabaseError as error:
        verdict = str(error)
    if verdict != "ok":
        raise _damaged(str(file), verdict)


def _damaged(where: str, what: object) -> ValueError:
    return ValueError(
        f"{where} is damaged ({what}): put a sound copy in its place, or take another run_tag and start anew"
    )


@dataclass(frozen=True)
class StudyPlan:
    """What a study of a run is.

    Args:
        name: ``<run_tag>/<stage>``.
        directions: One for each objective.
        setting: What its trials have in common.
        known: The names of all studies of the run.
        under: Digest of what the studies before have chosen.
    """

    name: str
    directions: Sequence[Literal["minimize", "maximize"]]
    setting: Mapping[str, Any]
    known: Sequence[str]
    under: str


class ComparableStudy(Study):
    """A study without the trials that ended under other winners of the studies before it: their values do not compare.

    Args:
        study: The study.
        under: Digest of what the studies before have chosen.
    """

    def __init__(self, study: Study, under: str) -> None:
        super().__init__(study.study_name, study._storage, study.sampler, study.pruner)
        self._under = under

    @override
    def _get_trials(self, *args: Any, **kwargs: Any) -> list[FrozenTrial]:
        # Everything asks this method: samplers, pruners, pictures, and get_trials.
        return [trial for trial in super()._get_trials(*args, **kwargs) if self._compares(trial)]

    @property
    def left_out(self) -> int:
        """How many trials it is without."""
        return sum(not self._compares(trial) for trial in _every_trial(self))

    def _compares(self, trial: FrozenTrial) -> bool:
        return not trial.state.is_finished() or trial.user_attrs.get(UNDER, self._under) == self._under


def _every_trial(study: Study) -> list[FrozenTrial]:
    """The trials of a study, also those that do not compare."""
    return study._storage.get_all_trials(study._study_id, deepcopy=False)


def digest(content: Any) -> str:
    """A digest of plain data."""
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def open_study(plan: StudyPlan, storage: BaseStorage, where: str, pruner: optuna.pruners.BasePruner) -> ComparableStudy:
    """Create a study or load it, and check what it holds. One process at a time.

    Raises:
        ValueError: If the study was made with another search space or data set, or is damaged.
    """
    tag = plan.name.partition("/")[0]
    try:
        names = [study.study_name for study in storage.get_all_studies()]
        strange = [name for name in names if name.startswith(f"{tag}/") and name not in plan.known]
        study = optuna.create_study(
            study_name=plan.name,
            storage=storage,
            directions=list(plan.directions),
            pruner=pruner,
            load_if_exists=True,
        )
        stored = study.user_attrs.get(SETTING)
        trials = study.get_trials(deepcopy=False)
        turned = [direction.name.lower() for direction in study.directions] != list(plan.directions)
    except Exception as error:
        if _is_out_of_reach(error):
            raise ConnectionError(f"{where} cannot be read: {root_cause(error)}") from error
        raise _damaged(where, error) from error  # what the library cannot make sense of
    if strange or turned:
        raise _damaged(where, f"study {strange[0]!r} is not of dact" if strange else f"the objectives of {plan.name}")
    _check_seals(plan.name, trials, where)
    if stored is None and not trials:
        study.set_user_attr(SETTING, dict(plan.setting))
        return ComparableStudy(study, plan.under)
    if not isinstance(stored, Mapping):
        raise _damaged(where, f"the setting of {plan.name} is missing")
    different = ", ".join(key for key in plan.setting if key in stored and stored[key] != plan.setting[key])
    if different:
        raise ValueError(
            f"the study {plan.name} in {where} was made with another {different}; trials of both would not compare. Take "
            f"another run_tag, or the {different} of then"
        )
    return ComparableStudy(study, plan.under)


def _is_out_of_reach(error: BaseException | None) -> bool:
    """Whether the storage could not be reached, which says nothing of what it holds."""
    from sqlalchemy.exc import InterfaceError, OperationalError

    while error is not None:
        if isinstance(error, (OperationalError, InterfaceError, ConnectionError)):
            return True
        error = error.__cause__ or error.__context__
    return False


def _seal(study: str, trial: FrozenTrial, state: TrialState, values: Sequence[float] | None) -> str:
    attributes = {name: value for name, value in trial.user_attrs.items() if name != SEAL}
    content = [study, trial.number, state.name, list(values or []), trial.params, attributes]
    content.append(sorted(trial.intermediate_values.items()))
    return digest(content)


def _check_seals(study: str, trials: Sequence[FrozenTrial], where: str) -> None:
    """No trial is missing, and none that ended says anything but what it found."""
    for number, trial in enumerate(trials):
        if trial.number != number:
            raise _damaged(where, f"{study} lacks trial {number}")
        if not trial.state.is_finished() or is_interrupted(trial):
            continue
        values = trial.values if trial.state == TrialState.COMPLETE else None
        if trial.user_attrs.get(SEAL) != _seal(study, trial, trial.state, values):
            raise _damaged(where, f"trial {number} of {study} is not what dact wrote")


# ---------------------------------------------------------------------- what is done and what is left


def is_interrupted(trial: FrozenTrial) -> bool:
    """Whether somebody stopped a trial, or its process died: it says nothing of its parameters and runs again."""
    return trial.state == TrialState.FAIL and CAUSE not in trial.user_attrs


def counts(trial: FrozenTrial) -> bool:
    """Whether a trial has ended and says something of its parameters."""
    return trial.state.is_finished() and not is_interrupted(trial)


def finished(study: Study) -> list[FrozenTrial]:
    """Trials that count: completed, pruned, or failed for a reason of their own."""
    return [trial for trial in study.get_trials(deepcopy=False) if counts(trial)]


def completed(study: Study) -> list[FrozenTrial]:
    """Trials that gave a value.

    Raises:
        RuntimeError: If there is none, with the first cause.
    """
    trials = study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,))
    if trials:
        return trials
    others = finished(study)
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


def best(study: Study) -> FrozenTrial:
    """The completed trial of the lowest value.

    Raises:
        RuntimeError: If none completed; see `completed`.
    """
    return min(completed(study), key=lambda trial: trial.values[0])


def owner() -> list[Any]:
    """This process, so that others can tell whether it still lives."""
    return [socket.gethostname(), os.getpid(), psutil.Process().create_time()]


def _has_died(claimed_by: Sequence[Any] | None) -> bool:
    """Whether the process of this host that runs a trial is gone."""
    if claimed_by is None:
        return True  # it died between taking the trial and saying so, both of which it does under the lock
    _, process, started = claimed_by
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


def end_orphans(study: Study) -> list[FrozenTrial]:
    """End trials that say they are running, but whose process is gone; gives those trials. Under the study's lock."""
    silent = _without_heartbeat(study)
    orphans = []
    for trial in study.get_trials(deepcopy=False, states=(TrialState.RUNNING,)):
        claimed_by = trial.user_attrs.get(OWNER)
        elsewhere = claimed_by is not None and claimed_by[0] != socket.gethostname()
        if not (trial._trial_id in silent if elsewhere else _has_died(claimed_by)):
            continue
        if CAUSE in trial.user_attrs:  # it had failed, and died before it could say so
            _write_seal(study, trial._trial_id, TrialState.FAIL, None)
        elif _deaths(study, trial) >= RETRIES:
            cause = f"its process died without a word, {RETRIES + 1} times with these parameters (out of memory?)"
            study._storage.set_trial_user_attr(trial._trial_id, CAUSE, cause)
            _write_seal(study, trial._trial_id, TrialState.FAIL, None)
        study.tell(trial.number, state=TrialState.FAIL)
        orphans.append(trial)
    return orphans


def _without_heartbeat(study: Study) -> set[int]:
    """The ids of running trials whose process has not been heard of for the grace period: all that other hosts tell."""
    storage: Any = study._storage
    beats = isinstance(storage, BaseHeartbeat) and storage.get_heartbeat_interval() is not None
    return set(storage._get_stale_trial_ids(study._study_id)) if beats else set()


def _deaths(study: Study, trial: FrozenTrial) -> int:
    """How often the parameters of `trial` were under way before when their process died."""
    trials = {other.number: other for other in _every_trial(study)}
    deaths = 0
    while (before := trials.get(trial.user_attrs.get(RETRY_OF, -1))) is not None:
        deaths += INTERRUPTED not in before.user_attrs  # who is stopped by hand has not died
        trial = before
    return deaths


def queue_interrupted(study: Study) -> None:
    """Queue the parameters of interrupted trials, each once. Under the study's lock."""
    retried = {trial.user_attrs.get(RETRY_OF) for trial in _every_trial(study)}
    for trial in study.get_trials(deepcopy=False):
        if is_interrupted(trial) and trial.number not in retried:
            # One that died before it had drawn them all still owes those that it was queued with.
            queued = trial.system_attrs.get("fixed_params", {})
            study.enqueue_trial({**queued, **trial.params}, user_attrs={RETRY_OF: trial.number})


# ---------------------------------------------------------------------- running


def run_trials(
    study: Study,
    objective: Callable[[Trial], Any],
    total: int,
    lock: BaseFileLock,
    *,
    sampler: Callable[[int], BaseSampler],
    end: float | None = None,
    idle: Callable[[], None] = lambda: None,
    ended: Callable[[Study, FrozenTrial], None] = lambda study, trial: None,
    orphaned: Callable[[FrozenTrial], None] = lambda trial: None,
) -> None:
    """Run trials until the study has `total` of them, beside other processes that do the same.

    Args:
        study: The study.
        objective: Raises `TrialFailed` for a trial that cannot give a value; any other exception but a pruned trial
            ends the run.
        total: Trials that count in the end; see `finished`.
        lock: The lock of this study; whoever holds it takes a trial.
        sampler: The sampler of a new trial, from how many trials count before it.
        end: The moment on `time.monotonic` after which no trial starts.
        idle: Called while there is nothing to do but wait for other processes.
        ended: Called after each trial of this process.
        orphaned: Called with each trial that was found without its process.
    """
    with _prompt_collection() as collect:
        while end is None or time.monotonic() < end:
            check_stop()
            collect()
            step = _next_step(study, objective, total, lock, sampler, ended, orphaned)
            if step == "done":
                return
            if step == "wait":
                idle()
                time.sleep(POLL)


def _next_step(
    study: Study,
    objective: Callable[[Trial], Any],
    total: int,
    lock: BaseFileLock,
    sampler: Callable[[int], BaseSampler],
    ended: Callable[[Study, FrozenTrial], None],
    orphaned: Callable[[FrozenTrial], None],
) -> Literal["ran", "wait", "done"]:
    """Run one trial, if there is one to take."""
    with lock:
        for orphan in end_orphans(study):
            orphaned(orphan)
        # One look: a trial that ends between two would be missing from both.
        trials = study.get_trials(deepcopy=False)
        done = [trial for trial in trials if counts(trial)]
        hopeless = len(done) >= HOPELESS and all(trial.state == TrialState.FAIL for trial in done)
        if len(done) >= total or hopeless:
            return "done"
        counted = len(done) + sum(trial.state == TrialState.RUNNING for trial in trials)
        if counted >= total:
            return "wait"
        queue_interrupted(study)
        study.sampler = sampler(counted)
        claimed = _Claimed(study, objective, lock)
        try:
            study.optimize(claimed, n_trials=1, catch=(TrialFailed,), callbacks=[ended])
        except Exception:
            if not claimed.taken_away:
                raise
    return "ran"


@contextlib.contextmanager
def _prompt_collection() -> Iterator[Callable[[], object]]:
    """Collect what a trial leaves behind, at once.

    A Trainer and its model refer to each other, so that only the garbage collector frees them, and left to itself it
    comes after tens of trials. What is there before is left out of its search, which makes it quick.
    """
    gc.collect()
    gc.freeze()
    try:
        yield gc.collect
    finally:
        gc.unfreeze()


class _Claimed:
    """An objective that first makes the trial known as this process's own, then lets others take theirs."""

    def __init__(self, study: Study, objective: Callable[[Trial], Any], lock: BaseFileLock) -> None:
        self.study, self.objective, self.lock = study, objective, lock
        self.taken_away = False  # whether others took this process for dead, and its trial for theirs

    def __call__(self, trial: Trial) -> Any:
        trial.set_user_attr(OWNER, owner())
        self.lock.release()
        try:
            result = self.objective(trial)
        except optuna.exceptions.UpdateFinishedTrialError:
            self.taken_away = True
            raise
        except optuna.TrialPruned:
            _write_seal(self.study, trial._trial_id, TrialState.PRUNED, None)
            raise
        except TrialFailed:
            _write_seal(self.study, trial._trial_id, TrialState.FAIL, None)
            raise
        values = [result] if isinstance(result, float) else list(result)
        _write_seal(self.study, trial._trial_id, TrialState.COMPLETE, values)
        return result


def _write_seal(study: Study, trial_id: int, state: TrialState, values: Sequence[float] | None) -> None:
    seal = _seal(study.study_name, study._storage.get_trial(trial_id), state, values)
    study._storage.set_trial_user_attr(trial_id, SEAL, seal)
