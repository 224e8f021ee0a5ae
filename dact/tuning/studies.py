"""The studies in their storage: how they are opened, archived and read."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import optuna
from lightning.pytorch.utilities import rank_zero_warn
from optuna.pruners import BasePruner
from optuna.samplers import BaseSampler
from optuna.storages import BaseStorage
from optuna.study import Study
from optuna.trial import BaseTrial, FrozenTrial, TrialState

from dact.checks import check_type
from dact.saving import plain_data
from dact.tuning.retries import CAUSE, MAX_DEATHS, RETRY_OF, STOPPED, is_counted
from dact.tuning.run import Run
from dact.tuning.stages import STAGES, Stage
from dact.tuning.storage import (
    corrupted,
    describe_storage,
    is_unreachable,
    open_storage,
    root_cause,
)

IDENTITY = "setting"  # user attribute of a study: settings that its trials have in common
LIMITS = "ended_under"  # user attribute of a study: the limits under which its deadline ended it
OF_ONE_STUDY = (
    "search space",
    "submodels",
)  # parts of an identity that studies of a run do not share
FOLLOWS = {
    "head_epochs": "max_epochs",
    "encoder's weights": "seed",
}  # parts of an identity that follow from others
LONGEST_CHANGE = 60  # characters up to which an error gives both values of a setting
ORIGIN = "under"  # user attribute of a study: see `archive_if_outdated`


def check_parts(storage: Any, sampler: Any, pruner: Any, callbacks: Any) -> None:
    """Raise a ``TypeError`` unless these are what an Optuna study takes, or None."""
    for name, value, kind, such_as in (
        ("storage", storage, (str, BaseStorage), "'sqlite:///trials.db'"),
        ("sampler", sampler, BaseSampler, "optuna.samplers.TPESampler()"),
        ("pruner", pruner, BasePruner, "optuna.pruners.MedianPruner()"),
    ):
        if value is not None:
            check_type(f"TuningEngine: {name}", value, kind, such_as)
    if not isinstance(callbacks, Sequence) or not all(map(callable, callbacks)):
        raise TypeError(
            f"TuningEngine: callbacks must be a list of functions of study and trial, got {callbacks!r}"
        )


def check_directions(stage: Stage, trial: BaseTrial) -> None:
    """Raise a ``ValueError`` unless the study of a trial has the objectives of a stage."""
    study = getattr(trial, "study", None)  # a FixedTrial has none
    if study is None:
        return
    directions = [direction.name.lower() for direction in study.directions]
    if directions != list(stage.directions):
        raise ValueError(
            f"the objective of {stage.name} is for a study that optuna.create_study(directions={[*stage.directions]}) "
            f"makes, got one with {directions}"
        )


def own_folder(trial: BaseTrial) -> str:
    """Return the folder in a run for the trials of a study of the user's own, which has the name of
    the study."""
    study = getattr(trial, "study", None)
    return "own" if study is None else f"own/{re.sub(r'[^A-Za-z0-9_-]', '_', study.study_name)}"


def open_study(
    run: Run,
    stage: Stage,
    identity: Mapping[str, Any],
    address: str | BaseStorage | None,
    pruner: BasePruner | None,
) -> Study:
    """Create or load a study, and check that its trials are comparable. The caller holds the lock
    of the run.

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
            directions=stage.directions,
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
        study.set_user_attr(IDENTITY, _as_stored(identity))
        return study
    _check_identity(f"{name} in {where}", stored, identity)
    return study


def check_own(trial: BaseTrial, identity: Mapping[str, Any]) -> None:
    """Warn if a trial of a study of the user's own does not compare with the first one, which
    leaves its identity."""
    study = getattr(trial, "study", None)  # a FixedTrial has none
    if study is None:
        return
    stored = study.user_attrs.get(IDENTITY)
    if stored is None:
        study.set_user_attr(IDENTITY, _as_stored(identity))
    elif changes := _changes(stored, identity):
        rank_zero_warn(
            f"trial {trial.number} of the study {study.study_name} has another {', '.join(changes)} than its first "
            "trial, so that their values do not compare"
        )


def check_run(run: Run, identity: Mapping[str, Any], address: str | BaseStorage | None) -> None:
    """Raise a ``ValueError`` if the run has studies of another identity, whose inputs objectives
    would replace."""
    if address is None and not (run.folder / "studies.db").is_file():
        return
    storage = open_storage(address, run.folder)
    for summary in optuna.get_all_study_summaries(storage, include_best_trial=False):
        if summary.study_name in map(run.study_name, STAGES) and (
            stored := summary.user_attrs.get(IDENTITY)
        ):
            stored = {name: value for name, value in stored.items() if name not in OF_ONE_STUDY}
            _check_identity(summary.study_name, stored, identity)


def _as_stored(content: Any) -> Any:
    return json.loads(json.dumps(plain_data(content), default=str))  # a duration as text


def _check_identity(name: str, stored: Any, identity: Mapping[str, Any]) -> None:
    """Raise a ``ValueError`` if the identity of a study differs from the one that is stored."""
    if changes := _changes(stored, identity):
        raise ValueError(
            f"the study {name} was made with another {', '.join(changes)}; trials of both would not compare. Use "
            f"another run_tag, or the {changes[0].split(' (')[0]} of that time"
        )


def _changes(stored: Any, identity: Mapping[str, Any]) -> list[str]:
    """Return in what an identity differs from one that is stored: names, with both values where
    they can be read."""
    found = dict(_differences(stored if isinstance(stored, Mapping) else {}, _as_stored(identity)))
    texts = {
        name: f"{now} instead of {then}"
        for name, (then, now) in found.items()
        if FOLLOWS.get(name) not in found
    }
    return [
        f"{name} ({text})" if len(text) <= LONGEST_CHANGE else name for name, text in texts.items()
    ]


def _differences(
    then: Mapping[str, Any], now: Mapping[str, Any], prefix: str = ""
) -> Iterator[tuple[str, Any]]:
    """Yield the paths, such as ``model.learning_rate``, at which two trees of dicts differ, with
    both values."""
    for name in sorted({*then, *now}):
        old, new = then.get(name), now.get(name)
        if isinstance(old, Mapping) and isinstance(new, Mapping):
            yield from _differences(old, new, f"{prefix}{name}.")
        elif old != new:
            yield prefix + name, (old, new)


def start_with(study: Study, first_trials: Sequence[Mapping[str, Any]]) -> None:
    """Queue the first trials of a new study. The caller holds the lock of the run.

    Args:
        study: The study.
        first_trials: Parameters of its first trials.
    """
    if len(study.get_trials(deepcopy=False)) < len(
        first_trials
    ):  # some exist if a kill came between two of them
        for params in first_trials:
            study.enqueue_trial(dict(params), skip_if_exists=True)


def reloaded(study: Study) -> Study:
    """Return the study of this name as it is now: another process may have archived the one that
    was opened."""
    return optuna.load_study(
        study_name=study.study_name, storage=study._storage, pruner=study.pruner
    )


def end(study: Study, n_trials: int, time_out: float | None, alone: bool) -> None:
    """Record that a deadline ended a study under these limits, unless no trial has a value yet."""
    if study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,)):
        study.set_user_attr(LIMITS, _as_stored([n_trials, time_out, alone]))


def trials_left(study: Study, n_trials: int, time_out: float | None, alone: bool) -> int:
    """Return how many trials a study lacks; none if a deadline, a callback or its sampler ended it
    under these limits.

    Args:
        study: The study.
        n_trials: Total number of trials.
        time_out: Seconds of all studies together.
        alone: Whether this study may take all of them, and not only its share.
    """
    *limits, had_all = study.user_attrs.get(LIMITS, [None, None, False])
    is_closed = limits == [n_trials, time_out] and (had_all or not alone)
    is_closed = is_closed or study.user_attrs.get(STOPPED) == n_trials
    return 0 if is_closed else max(0, n_trials - len(finished(study)))


def archive_if_outdated(study: Study, origin: str) -> tuple[Study, int]:
    """Return a study whose trials all ran under the current winners of the studies before it.

    A study that ran under other winners is kept under another name, and a new one takes its place.
    The caller holds the lock of the run.

    Args:
        study: The study.
        origin: Digest of the winners of the studies before it, and of how its trials are measured.

    Returns:
        The study to continue, and the number of trials that are ignored from now on.
    """
    stored = study.user_attrs.get(ORIGIN)
    if stored is None:
        study.set_user_attr(ORIGIN, origin)
    if stored in (None, origin):
        return study, 0
    trials = study.get_trials(deepcopy=False)
    storage, name, pruner = study._storage, study.study_name, study.pruner
    known = {
        summary.study_name
        for summary in optuna.get_all_study_summaries(storage, include_best_trial=False)
    }
    number = next(
        number for number in range(1, len(known) + 2) if f"{name}/outdated_{number}" not in known
    )
    identity, directions = study.user_attrs.get(IDENTITY), study.directions
    if trials:
        optuna.copy_study(
            from_study_name=name,
            from_storage=storage,
            to_storage=storage,
            to_study_name=f"{name}/outdated_{number}",
        )
    optuna.delete_study(study_name=name, storage=storage)
    study = optuna.create_study(
        study_name=name, storage=storage, directions=directions, pruner=pruner
    )
    study.set_user_attr(IDENTITY, identity)
    study.set_user_attr(ORIGIN, origin)
    for trial in trials[:2]:  # the first trials are the same
        if "fixed_params" in trial.system_attrs and RETRY_OF not in trial.user_attrs:
            study.enqueue_trial(trial.system_attrs["fixed_params"], skip_if_exists=True)
    return study, sum(is_counted(trial) for trial in trials)


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
            "fewer epochs under another run_tag"
        )
    raise RuntimeError(
        f"{study.study_name}: none of its {len(others)} trials finished. The first cause: trial {others[0].number}: "
        f"{_cause(others[0])}. Once it is removed, run the same command again, with a larger n_trials if all were used"
    )


def _cause(trial: FrozenTrial) -> str:
    died = f"its process died without a word, {MAX_DEATHS} times with these parameters (out of memory?)"
    return str(trial.user_attrs.get(CAUSE, died if trial.state == TrialState.FAIL else "pruned"))
