"""dact's own sampler and pruner for Optuna: thin adapters around decisions that are pure functions."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from optuna.distributions import BaseDistribution, FloatDistribution
from optuna.pruners import BasePruner
from optuna.samplers import BaseSampler
from optuna.study import Study
from optuna.trial import FrozenTrial, TrialState
from typing_extensions import override

from dact.tuning.selection import next_lambda

NOISE = 0.1  # share of a loss by which the same parameters differ from one epoch to the next
PLANNED_EPOCHS = "planned_epochs"  # user attribute of a trial: how many epochs it would train if nobody stopped it


class CurveSampler(BaseSampler):
    """Draw lambda_reg where the mean exit layer changes most; see `dact.tuning.selection.next_lambda`.

    It draws nothing at random: the same trials lead to the same next one.
    """

    @override
    def infer_relative_search_space(self, study: Study, trial: FrozenTrial) -> dict[str, BaseDistribution]:
        return {}

    @override
    def sample_relative(
        self, study: Study, trial: FrozenTrial, search_space: dict[str, BaseDistribution]
    ) -> dict[str, Any]:
        return {}

    @override
    def sample_independent(
        self, study: Study, trial: FrozenTrial, param_name: str, param_distribution: BaseDistribution
    ) -> float:
        assert isinstance(param_distribution, FloatDistribution)
        others = [t for t in study.get_trials(deepcopy=False) if t.number != trial.number and param_name in t.params]
        tried = [(t.params[param_name], t.values[1] if t.state == TrialState.COMPLETE else None) for t in others]
        distribution = param_distribution
        return next_lambda(tried, distribution.low, distribution.high, distribution.log)


def lags(own: Sequence[float], others: Sequence[Sequence[float]], least: int) -> bool:
    """Whether a trial lags so far behind that it is better stopped.

    At each epoch the finished trials have a best loss so far. Their better half spans from the best to the median; a
    trial lags when it is farther above the median than that span, and farther than a tenth of the median (the noise of
    one epoch). So a uniformly good field loses nobody, and a field with a bad half loses that half.

    Args:
        own: The losses of the trial, one per epoch so far.
        others: The losses of finished trials of the same planned length, one per epoch.
        least: How many finished trials it takes to judge.
    """
    so_far = [min(losses[: len(own)]) for losses in others if len(losses) >= len(own)]
    if not own or len(so_far) < least:
        return False
    ordered = sorted(so_far)
    best, median = ordered[0], ordered[(len(ordered) - 1) // 2]
    return min(own) > median + max(median - best, NOISE * abs(median))


class LagPruner(BasePruner):
    """Prune trials that lag; see `lags`.

    Args:
        least: How many finished trials it takes to judge, 2 or more.
    """

    def __init__(self, least: int = 3) -> None:
        self.least = least

    @override
    def prune(self, study: Study, trial: FrozenTrial) -> bool:
        finished = study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,))
        return lags(_losses(trial), [_losses(other) for other in finished], self.least)


def _losses(trial: FrozenTrial) -> list[float]:
    return [value for _, value in sorted(trial.intermediate_values.items())]


class SameLengthPruner(BasePruner):
    """Let another pruner see only trials of the same planned length.

    A trial of three epochs looks better than one of eight at the same epoch, since its learning rate has fallen further,
    and ends worse.

    Args:
        pruner: Any pruner of Optuna.
    """

    def __init__(self, pruner: BasePruner) -> None:
        self.pruner = pruner

    @override
    def prune(self, study: Study, trial: FrozenTrial) -> bool:
        return self.pruner.prune(_SameLength(study, trial.user_attrs.get(PLANNED_EPOCHS)), trial)  # type: ignore[arg-type]


class _SameLength:
    """A study in which only trials of one planned length exist."""

    def __init__(self, study: Study, planned: int | None) -> None:
        self._study, self._planned = study, planned

    def __getattr__(self, name: str) -> Any:
        return getattr(self._study, name)

    def get_trials(self, *args: Any, **kwargs: Any) -> list[FrozenTrial]:
        trials = self._study.get_trials(*args, **kwargs)
        return [trial for trial in trials if trial.user_attrs.get(PLANNED_EPOCHS) == self._planned]
