"""One trial: a new model, datamodule and Trainer, and what is read from them."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from lightning.pytorch import Callback
from lightning.pytorch.loggers import TensorBoardLogger
from optuna import TrialPruned
from optuna.exceptions import UpdateFinishedTrialError
from optuna.trial import BaseTrial
from optuna_integration import PyTorchLightningPruningCallback

from dact.tuning import tensorboard
from dact.tuning.pruner import PLANNED_EPOCHS, EveryValidation
from dact.tuning.run import Run, Winners
from dact.tuning.shared import Shared
from dact.tuning.space import Dimension
from dact.tuning.stages import Stage
from dact.tuning.studies import (
    CAUSE,
    EXIT_HISTOGRAM,
    INTERRUPTED,
    OWNER,
    TrialFailed,
    TrialInterrupted,
    environment_error,
    owner,
)
from dact.tuning.training import (
    MONITOR,
    Deadline,
    History,
    NonFiniteLoss,
    StopAtDeadline,
    TimeIsUp,
    fit,
    make_trainer,
    seeded,
    without_collapse_warning,
)


@dataclass(frozen=True)
class Objective:
    """The objective of a stage: what Optuna calls, in this process or in another one.

    Args:
        stage: The stage.
        run: The run.
        shared: What its trials share.
        space: Dimension of each parameter.
        winners: Winners of the studies before.
        deadline: Deadline at which a trial in flight is stopped.
    """

    stage: Stage
    run: Run
    shared: Shared
    space: Mapping[str, Dimension]
    winners: Winners
    deadline: Deadline

    def __call__(self, trial: BaseTrial) -> Any:
        """Train with the parameters that `trial` suggests, and return its value or values at the best epoch.

        Raises:
            TrialPruned: If the study stopped it, or its loss is not finite.
            TrialFailed: If it cannot give a value, for a reason of its own such as memory that ran out.
            TrialInterrupted: If the deadline stopped it.
        """
        trial.set_user_attr(OWNER, owner())
        with _recorded_cause(trial):
            params = {name: dimension.suggest(trial, name) for name, dimension in self.space.items()}
            settings = {**self.winners.settings(), **Winners(**self.stage.parse(params)).settings()}
            epochs = settings.pop("num_epochs", self.shared.recipe.epochs)
            return self.stage.read(self._train(trial, settings, epochs).best)

    def _train(self, trial: BaseTrial, settings: Mapping[str, Any], epochs: int) -> History:
        trial.set_user_attr(PLANNED_EPOCHS, epochs)
        history = History()
        callbacks: list[Callback] = [history, StopAtDeadline(self.deadline)]
        if self.stage.prunes:
            callbacks.append(PyTorchLightningPruningCallback(EveryValidation(trial), monitor=MONITOR))  # type: ignore[arg-type]
        with seeded(self.shared.recipe.seed), _logged(self, trial, history) as logger:
            model, data = self.shared.build(settings)
            trainer = make_trainer(
                self.shared.recipe.trainer,
                max_epochs=epochs,
                logger=logger,
                callbacks=callbacks,
                enable_checkpointing=False,
            )
            with without_collapse_warning():
                fit(trainer, model, data)
            if not history.epochs:
                raise ValueError(
                    f"no validation ran in {epochs} epochs, and a trial has no value without one: let the Trainer's "
                    "check_val_every_n_epoch and limit_val_batches allow for it"
                )
        trial.set_user_attr(EXIT_HISTOGRAM, history.best_exit_histogram)
        return history


def trial_folder(number: int) -> str:
    """Return the name of the folder in which a trial logs."""
    return f"trial_{number:04d}"


@contextlib.contextmanager
def _logged(objective: Objective, trial: BaseTrial, history: History) -> Iterator[TensorBoardLogger]:
    """Log a trial to TensorBoard with its parameters, its best metrics and its status."""
    folder, version = objective.run.folder / objective.stage.name, trial_folder(trial.number)
    logger = TensorBoardLogger(folder, name="", version=version, default_hp_metric=False)
    tensorboard.log_parameters(logger.experiment, trial.params, f"{objective.stage.name}/{version}")
    succeeded = False
    try:
        yield logger
        succeeded = True
    finally:
        tensorboard.log_outcome(logger.experiment, history.best if history.epochs else {}, succeeded)
        logger.finalize("success" if succeeded else "failed")


@contextlib.contextmanager
def _recorded_cause(trial: BaseTrial) -> Iterator[None]:
    """Store with a trial why it ended early, and raise what Optuna should see; see `Objective`."""
    try:
        yield
    except TrialPruned as reason:
        trial.set_user_attr(CAUSE, str(reason))
        raise
    except NonFiniteLoss as reason:
        trial.set_user_attr(CAUSE, str(reason))
        raise TrialPruned(str(reason)) from reason
    except TimeIsUp as error:
        trial.set_user_attr(INTERRUPTED, True)
        raise TrialInterrupted("time_out ended the study in the middle of this trial") from error
    except KeyboardInterrupt:
        trial.set_user_attr(INTERRUPTED, True)
        raise
    except UpdateFinishedTrialError:
        raise  # others took this process for dead
    except Exception as error:
        if environment_error(error) is not None:
            with contextlib.suppress(Exception):  # the storage may be what cannot be reached
                trial.set_user_attr(INTERRUPTED, True)
            raise
        cause = f"{type(error).__name__}: {error}".split("\n")[0]
        trial.set_user_attr(CAUSE, cause)
        raise TrialFailed(cause) from error
