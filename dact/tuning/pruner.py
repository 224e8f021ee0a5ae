"""Pruning of the first two studies: a decision as a pure function, and its adapters for Optuna."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

from optuna.pruners import BasePruner, HyperbandPruner, WilcoxonPruner
from optuna.study import Study
from optuna.trial import BaseTrial, FrozenTrial, TrialState
from typing_extensions import override

NOISE = 0.1  # share of a loss by which the same parameters differ from one epoch to the next
# user attribute of a trial: the number of epochs it trains unless it is stopped
PLANNED_EPOCHS = "planned_epochs"


def lags(losses: Sequence[float], others: Sequence[Sequence[float]], min_finished: int) -> bool:
    """Return whether a trial lags so far behind that it should be stopped.

    At each epoch every finished trial has a best loss so far. The better half of these spans the
    range from the best to the median. A trial lags if its own best loss exceeds the median by more
    than that span and by more than a tenth of the median, which is the noise of one epoch. So no
    trial is stopped if all are good. If half of them are bad, the bad ones are stopped.

    Args:
        losses: Losses of the trial, one per validation so far.
        others: Losses of finished trials of the same planned length, one per validation.
        min_finished: Number of finished trials below which no trial is stopped.
    """
    so_far = [min(other[: len(losses)]) for other in others if len(other) >= len(losses)]
    if not losses or len(so_far) < min_finished:
        return False
    ordered = sorted(so_far)
    best, median = ordered[0], ordered[(len(ordered) - 1) // 2]
    return min(losses) > median + max(median - best, NOISE * abs(median))


class LagPruner(BasePruner):
    """Prune trials that lag; see `lags`.

    Args:
        min_finished: Number of finished trials below which no trial is pruned, 2 or more.
    """

    def __init__(self, min_finished: int = 3) -> None:
        self.min_finished = min_finished

    @override
    def prune(self, study: Study, trial: FrozenTrial) -> bool:
        finished = study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,))
        return lags(_losses(trial), [_losses(other) for other in finished], self.min_finished)


def _losses(trial: FrozenTrial) -> list[float]:
    return [value for _, value in sorted(trial.intermediate_values.items())]


class SameLengthPruner(BasePruner):
    """Show another pruner only the trials of the same planned length.

    A trial of three epochs looks better than one of eight at the same epoch, since its learning
    rate has fallen further, and ends worse. Hyperband and Wilcoxon's pruner look at the study in
    ways of their own, and get it whole.

    Args:
        pruner: Any pruner of Optuna.
    """

    def __init__(self, pruner: BasePruner) -> None:
        self.pruner = pruner

    @classmethod
    def around(cls, pruner: BasePruner) -> BasePruner:
        """Return a pruner for one study: a copy of `pruner`, around which is one of this kind where
        it can be."""
        own = copy.deepcopy(pruner)  # Hyperband keeps what it has learned from the first study
        return own if isinstance(own, (HyperbandPruner, WilcoxonPruner)) else cls(own)

    @override
    def prune(self, study: Study, trial: FrozenTrial) -> bool:
        planned, same_length = trial.user_attrs.get(PLANNED_EPOCHS), copy.copy(study)
        same_length.get_trials = lambda *args, **kwargs: [  # type: ignore[method-assign]
            other
            for other in study.get_trials(*args, **kwargs)
            if other.user_attrs.get(PLANNED_EPOCHS) == planned
        ]
        return self.pruner.prune(same_length, trial)


class EveryValidation:
    """A trial that numbers its own reports.

    Optuna's Lightning callback reports under the number of the epoch, and Optuna ignores a second
    report under the same number: with several validations per epoch only the first would count.

    Args:
        trial: The trial that gets the reports.
    """

    def __init__(self, trial: BaseTrial) -> None:
        self._trial, self._reports = trial, 0

    def __getattr__(self, name: str) -> Any:
        return getattr(self._trial, name)

    def report(self, value: float, step: int) -> None:
        """Report `value` under the number of reports so far."""
        self._trial.report(value, self._reports)
        self._reports += 1
