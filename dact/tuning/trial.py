"""One trial: a fit with a new model, datamodule and Trainer, and the value that is read from it."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from lightning.pytorch import Callback
from lightning.pytorch.loggers import TensorBoardLogger
from optuna import TrialPruned
from optuna.trial import BaseTrial
from optuna_integration import PyTorchLightningPruningCallback

from dact.tuning import report
from dact.tuning.fit import fit_settings
from dact.tuning.outcome import OUTCOME, mean_outcome, outcome_of
from dact.tuning.prepared import Prepared
from dact.tuning.search import PLANNED_EPOCHS
from dact.tuning.settings import Settings, Winners
from dact.tuning.space import suggest
from dact.tuning.stages import Stage
from dact.tuning.trainer import MONITOR, Deadline, NonFiniteLoss, StopAtDeadline, TimeIsUp

CAUSE = "cause"  # user attribute: why a trial was pruned, or failed by its own fault


@dataclass(frozen=True)
class Objective:
    """The objective of a stage, which Optuna calls in this process or in another one.

    Args:
        stage: The stage.
        prepared: Shared inputs of all trials.
        winners: Winners of the earlier studies.
        deadline: Deadline at which a running trial is stopped.
        own: Folder in the run for the trials of a custom study, which must not replace the run's.
    """

    stage: Stage
    prepared: Prepared
    winners: Winners
    deadline: Deadline
    own: str = ""

    def __call__(self, trial: BaseTrial) -> Any:
        """Train with the parameters that `trial` suggests, and return its value or values.

        They are read at the epoch of the lowest validation loss.

        Raises:
            TrialPruned: If the study stopped it, or its loss is not finite.
            TimeIsUp: If the deadline stopped it.
        """
        plan = self.prepared.plan
        space = plan.spaces[self.stage.name]
        params = {name: suggest(trial, name, one) for name, one in space.items()}
        chosen = Winners(**plan.winners(self.stage, params)).settings()
        settings = plan.recommended.updated(self.winners.settings()).updated(chosen)
        with self._recorded(trial) as (logger, metrics):
            self._train(trial, settings, logger, metrics)
            return self.stage.read(metrics)

    def _train(
        self, trial: BaseTrial, settings: Settings, logger: Any, metrics: dict[str, float]
    ) -> None:
        """Add the metrics of the best epoch, and of early exit if the stage is about it."""
        prepared, recipe = self.prepared, self.prepared.recipe
        trial.set_user_attr(PLANNED_EPOCHS, settings.num_epochs or recipe.epochs)
        callbacks: list[Callback] = [StopAtDeadline(self.deadline)]
        if self.stage.prunes:
            pruned: Any = trial
            callbacks.append(PyTorchLightningPruningCallback(pruned, monitor=MONITOR))
        outcomes = []
        for repeat in range(self.stage.repeats if prepared.is_frozen else 1):
            seed = recipe.seed + repeat
            model, history = fit_settings(prepared, settings, seed, callbacks, logger)
            if repeat == 0:
                metrics |= history.best
                logger = False
            if self.stage.early_exit:
                assert history.answers is not None
                right = prepared.baseline.right(history.answers.target)
                outcomes.append(outcome_of(history.answers, model, recipe.promise, right))
        if outcomes:
            mean = mean_outcome(outcomes)
            metrics |= mean.metrics(right)
            trial.set_user_attr(OUTCOME, mean.packed())

    @contextlib.contextmanager
    def _recorded(self, trial: BaseTrial) -> Iterator[tuple[TensorBoardLogger, dict[str, float]]]:
        """Log a trial to TensorBoard, with the metrics that the block fills in, and record why it
        was pruned or failed; one that was stopped from outside has no cause."""
        run = self.prepared.run
        folder = run.trial_folder(self.stage, trial.number, self.own)
        logger = TensorBoardLogger(
            folder.parent, name="", version=folder.name, default_hp_metric=False
        )
        name = f"{run.tag}/{folder.relative_to(run.folder)}"
        report.log_parameters(logger.experiment, trial.params, name)
        metrics: dict[str, float] = {}
        succeeded = False
        try:
            yield logger, metrics
            succeeded = True
        except TimeIsUp:
            raise
        except (NonFiniteLoss, TrialPruned) as reason:
            trial.set_user_attr(CAUSE, str(reason))
            raise TrialPruned(str(reason)) from reason
        except Exception as error:
            trial.set_user_attr(CAUSE, f"{type(error).__name__}: {error}".split("\n")[0])
            raise
        finally:
            report.log_outcome(logger.experiment, metrics, succeeded)
            logger.finalize("success" if succeeded else "failed")
