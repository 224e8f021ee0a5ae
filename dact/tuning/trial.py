"""One trial: a fit with a new model, datamodule and Trainer, and the value that is read from it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from lightning.pytorch import Callback
from lightning.pytorch.loggers import TensorBoardLogger
from optuna import TrialPruned
from optuna.trial import BaseTrial
from optuna_integration import PyTorchLightningPruningCallback

from dact.tuning.fit import fit_settings
from dact.tuning.outcome import CAUSE, OUTCOME, mean_outcome, outcome_of
from dact.tuning.prepared import Prepared
from dact.tuning.search import PLANNED_EPOCHS
from dact.tuning.settings import Settings
from dact.tuning.space import suggest
from dact.tuning.stages import Stage
from dact.tuning.trainer import MONITOR, Deadline, NonFiniteLoss, StopAtDeadline, TimeIsUp

# fits per trial of early exit on frozen states, where a fit takes seconds; only the seed differs
REPEATS = 3


@dataclass(frozen=True)
class Objective:
    """The objective of a stage, which Optuna calls in this process or in another one.

    Args:
        before: Settings that won the earlier studies.
        deadline: Deadline at which a running trial is stopped.
        own: Folder in the run for the trials of a custom study, apart from the run's own trials.
    """

    stage: Stage
    prepared: Prepared
    before: Settings
    deadline: Deadline
    own: str = ""

    def __call__(self, trial: BaseTrial) -> Any:
        """Train with the parameters that `trial` suggests, and return its value or values.

        Values are read at the epoch of the lowest validation loss. The trial is logged to
        TensorBoard, and stores why it was pruned or failed, unless it was stopped from outside.

        Raises:
            TrialPruned: If the study stopped the trial, or its loss is not finite.
            TimeIsUp: If the deadline stopped the trial.
        """
        stage, plan, run = self.stage, self.prepared.plan, self.prepared.run
        space = plan.spaces[stage.name]
        params = {name: suggest(trial, name, one) for name, one in space.items()}
        chosen = Settings.of_winners(plan.winners(stage, params))
        settings = plan.recommended.updated(self.before).updated(chosen)

        folder = run.trial_folder(stage, trial.number, self.own)
        logger = TensorBoardLogger(folder.parent, "", folder.name, default_hp_metric=False)
        metrics: dict[str, float] = {}
        succeeded = False
        try:
            metrics = self._train(trial, settings, logger)
            succeeded = True
            return stage.read(metrics)
        except (NonFiniteLoss, TrialPruned) as reason:
            trial.set_user_attr(CAUSE, str(reason))
            raise TrialPruned(str(reason)) from reason
        except Exception as error:
            if not isinstance(error, TimeIsUp):
                trial.set_user_attr(CAUSE, f"{type(error).__name__}: {error}".split("\n")[0])
            raise
        finally:
            logger.finalize("success" if succeeded else "failed")
            self.prepared.log(folder, settings, metrics, succeeded)

    def _train(self, trial: BaseTrial, settings: Settings, logger: Any) -> dict[str, float]:
        """Return the metrics of the best epoch, and of early exit if the stage measures it."""
        prepared, recipe = self.prepared, self.prepared.recipe
        trial.set_user_attr(PLANNED_EPOCHS, settings.num_epochs or recipe.epochs)
        callbacks: list[Callback] = [StopAtDeadline(self.deadline)]
        if not self.stage.early_exit:
            pruned: Any = trial
            callbacks.append(PyTorchLightningPruningCallback(pruned, monitor=MONITOR))
            return fit_settings(prepared, settings, recipe.seed, callbacks, logger)[1].best

        metrics: dict[str, float] = {}
        outcomes = []
        for repeat in range(REPEATS if prepared.is_frozen else 1):
            seed = recipe.seed + repeat
            model, history = fit_settings(prepared, settings, seed, callbacks, logger)
            metrics, logger = metrics or history.best, False
            assert history.answers is not None
            right = prepared.right(history.answers.target)
            outcomes.append(outcome_of(history.answers, model, recipe.promise, right))
        mean = mean_outcome(outcomes)
        trial.set_user_attr(OUTCOME, mean.packed())
        return {**metrics, **mean.metrics(right)}
