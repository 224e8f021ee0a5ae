"""The samplers and pruners of the studies: which trial comes next, and which one is stopped."""

from __future__ import annotations

import copy
import time
from collections.abc import Sequence
from typing import Any

import numpy as np
from optuna.distributions import BaseDistribution, FloatDistribution
from optuna.pruners import BasePruner
from optuna.samplers import RandomSampler, TPESampler
from optuna.study import Study
from optuna.trial import FrozenTrial, TrialState
from typing_extensions import override

from dact.tuning.selection import next_lambda

STARTUP_TRIALS = 5  # random trials before TPE takes over
PATIENCE = 5.0  # seconds
# relative change of the loss from one epoch to the next under the same parameters
NOISE = 0.1
MIN_FINISHED = 3  # with fewer finished trials, none is pruned
# user attribute of a trial: the number of epochs it trains unless it is stopped
PLANNED_EPOCHS = "planned_epochs"


class SeededSampler(TPESampler):
    """Sample with TPE, seeded for each trial from its number and the seed of the run.

    A resumed study proposes what an uninterrupted one would, and processes that share a study never
    draw the same parameters.
    """

    def __init__(self, seed: int) -> None:
        super().__init__()
        self.seed = seed

    @override
    def before_trial(self, study: Study, trial: FrozenTrial) -> None:
        seed = np.random.SeedSequence([self.seed, trial.number]).generate_state(1)[0]
        super().__init__(seed=int(seed), n_startup_trials=STARTUP_TRIALS)


class CurveSampler(RandomSampler):
    """Propose λ where the mean exit layer changes most; see `dact.tuning.selection.next_lambda`.

    Processes that share a study wait up to `PATIENCE` seconds until earlier trials have their λ, so
    that no two draw the same. A λ with steps or choices is drawn at random."""

    @override
    def sample_independent(
        self,
        study: Study,
        trial: FrozenTrial,
        param_name: str,
        param_distribution: BaseDistribution,
    ) -> Any:
        name, space = param_name, param_distribution
        if not isinstance(space, FloatDistribution) or space.step is not None:
            return super().sample_independent(study, trial, name, space)

        def undecided() -> bool:
            running = study.get_trials(deepcopy=False, states=(TrialState.RUNNING,))
            return any(one.number < trial.number and name not in one.params for one in running)

        end = time.monotonic() + PATIENCE
        while undecided() and time.monotonic() < end:
            time.sleep(0.02)

        tried = [
            (one.params[name], one.values[1] if one.state == TrialState.COMPLETE else None)
            for one in study.get_trials(deepcopy=False)
            if one.number != trial.number and name in one.params
        ]
        return next_lambda(tried, space.low, space.high, space.log)


def lags(losses: Sequence[float], others: Sequence[Sequence[float]]) -> bool:
    """Return whether a trial should be stopped because its losses per epoch lag behind `others`.

    Only the best losses so far count, and at least `MIN_FINISHED` others are needed. A trial lags
    if its loss exceeds the others' median by more than the distance from their best to their
    median, and by more than a tenth of the median, the noise of one epoch. If all trials are good,
    none is stopped; if half of them are bad, the bad half is.
    """
    so_far = sorted(min(other[: len(losses)]) for other in others if len(other) >= len(losses))
    if len(so_far) < MIN_FINISHED:
        return False
    best, median = so_far[0], so_far[(len(so_far) - 1) // 2]
    return min(losses) > median + max(median - best, NOISE * abs(median))


class LagPruner(BasePruner):
    """Prune trials that lag; see `lags`."""

    @override
    def prune(self, study: Study, trial: FrozenTrial) -> bool:
        finished = study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,))
        losses, *others = (
            [value for _, value in sorted(one.intermediate_values.items())]
            for one in (trial, *finished)
        )
        return lags(losses, others)


class SameLengthPruner(BasePruner):
    """Show another pruner only the trials of the same planned length.

    At the same epoch, a trial of three epochs looks better than one of eight, since its learning
    rate has fallen further, but it ends worse.
    """

    def __init__(self, pruner: BasePruner) -> None:
        self.pruner = copy.deepcopy(pruner)

    @override
    def prune(self, study: Study, trial: FrozenTrial) -> bool:
        planned, same_length = trial.user_attrs.get(PLANNED_EPOCHS), copy.copy(study)
        same_length.get_trials = lambda *args, **kwargs: [  # type: ignore[method-assign]
            other
            for other in study.get_trials(*args, **kwargs)
            if other.user_attrs.get(PLANNED_EPOCHS) == planned
        ]
        return self.pruner.prune(same_length, trial)
