"""Samplers of the studies. Their draws depend only on the seed, the number of the trial and the
trials before it."""

from __future__ import annotations

import time

import numpy as np
from optuna.distributions import BaseDistribution, FloatDistribution
from optuna.samplers import RandomSampler, TPESampler
from optuna.study import Study
from optuna.trial import FrozenTrial, TrialState
from typing_extensions import override

from dact.tuning.selection import next_lambda

STARTUP_TRIALS = 5  # random trials before TPE takes over
PATIENCE = 5.0  # seconds to wait for the λ of a trial that another process has just taken


class SeededSampler(TPESampler):
    """Sample with TPE, seeded for each trial from the trial's number.

    So a resumed study proposes what it would have proposed without the stop, processes that share a
    study never draw the same, and neighbouring seeds have nothing in common.

    Args:
        seed: Seed of the run.
    """

    def __init__(self, seed: int) -> None:
        super().__init__()
        self.seed = seed

    @override
    def before_trial(self, study: Study, trial: FrozenTrial) -> None:
        seed = np.random.SeedSequence([self.seed, trial.number]).generate_state(1)[0]
        super().__init__(seed=int(seed), n_startup_trials=STARTUP_TRIALS)


class CurveSampler(RandomSampler):
    """Draw lambda_reg where the mean exit layer changes most; see
    `dact.tuning.selection.next_lambda`.

    Nothing is drawn at random: the same trials lead to the same next one. Processes that share a
    study take turns in the order of their trial numbers, so that no two draw the same λ."""

    @override
    def sample_independent(
        self,
        study: Study,
        trial: FrozenTrial,
        param_name: str,
        param_distribution: BaseDistribution,
    ) -> float:
        assert isinstance(param_distribution, FloatDistribution)
        end = time.monotonic() + PATIENCE
        while _undecided(study, trial, param_name) and time.monotonic() < end:
            time.sleep(0.02)
        others = [
            t
            for t in study.get_trials(deepcopy=False)
            if t.number != trial.number and param_name in t.params
        ]
        tried = [
            (t.params[param_name], t.values[1] if t.state == TrialState.COMPLETE else None)
            for t in others
        ]
        return next_lambda(
            tried, param_distribution.low, param_distribution.high, param_distribution.log
        )


def _undecided(study: Study, trial: FrozenTrial, name: str) -> bool:
    """Return whether an earlier trial is running that has not drawn its λ yet."""
    running = study.get_trials(deepcopy=False, states=(TrialState.RUNNING,))
    return any(other.number < trial.number and name not in other.params for other in running)
