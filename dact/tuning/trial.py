"""One trial: a fit with a new model, datamodule and Trainer, and the value that is read from it."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback
from lightning.pytorch.loggers import TensorBoardLogger
from optuna import TrialPruned
from optuna.exceptions import UpdateFinishedTrialError
from optuna.trial import BaseTrial
from optuna_integration import PyTorchLightningPruningCallback
from torch import Tensor

from dact.calibration.answers import LayerAnswers
from dact.model import DACT
from dact.tuning import tensorboard
from dact.tuning.fitting import (
    MONITOR,
    Deadline,
    History,
    NonFiniteLoss,
    StopAtDeadline,
    TimeIsUp,
    fit,
    for_states,
    head_epochs,
    make_trainer,
    seeded,
)
from dact.tuning.outcome import EXIT_HISTOGRAM, Outcome, mean_outcome, outcome_of
from dact.tuning.prepared import Prepared
from dact.tuning.retries import CAUSE, INTERRUPTED, OWNER, owner
from dact.tuning.run import Run, Winners
from dact.tuning.search import PLANNED_EPOCHS
from dact.tuning.space import suggest
from dact.tuning.stages import Stage
from dact.tuning.storage import environment_error
from dact.tuning.trial_loop import TrialFailed


@dataclass(frozen=True)
class Objective:
    """The objective of a stage, which Optuna calls in this process or in another one.

    Args:
        stage: The stage.
        run: The run.
        prepared: Shared inputs of all trials.
        winners: Winners of the earlier studies.
        deadline: Deadline at which a running trial is stopped.
        own: Folder in the run for the trials of a study of the user's own, which must not replace
            files of the run's.
    """

    stage: Stage
    run: Run
    prepared: Prepared
    winners: Winners
    deadline: Deadline
    own: str = ""

    def __call__(self, trial: BaseTrial) -> Any:
        """Train with the parameters that `trial` suggests, and return its value or values at the
        best epoch.

        Raises:
            TrialPruned: If the study stopped it, or its loss is not finite.
            TrialFailed: If it has no value for a reason of its own, such as running out of memory.
            TimeIsUp: If the deadline stopped it.
        """
        trial.set_user_attr(OWNER, owner())
        space = self.prepared.spaces[self.stage.name]
        with _recorded_cause(trial):
            params = {name: suggest(trial, name, dimension) for name, dimension in space.items()}
            chosen = Winners(**self.prepared.winners(self.stage, params)).settings()
            settings = {**self.prepared.initial, **self.winners.settings(), **chosen}
            return self.stage.read(self._train(trial, settings))

    def _train(self, trial: BaseTrial, settings: Mapping[str, Any]) -> dict[str, float]:
        """Return the metrics of the best epoch, or of early exit if the stage is about it."""
        recipe = self.prepared.recipe
        trial.set_user_attr(PLANNED_EPOCHS, settings.get("num_epochs", recipe.epochs))
        callbacks: list[Callback] = [StopAtDeadline(self.deadline)]
        if self.stage.prunes:
            callbacks.append(PyTorchLightningPruningCallback(trial, monitor=MONITOR))
        repeats = self.stage.repeats if recipe.encoder_training == "frozen" else 1
        outcomes = []
        with _logged(self, trial) as (logger, metrics):
            for repeat in range(repeats):
                log = logger if repeat == 0 else False
                found = fit_settings(self.prepared, settings, recipe.seed + repeat, callbacks, log)
                metrics |= {} if repeat else found.history.best
                if self.stage.early_exit:
                    outcomes.append(found.outcome(self.prepared))
            if outcomes:
                mean = mean_outcome(outcomes)
                mean.save(Path(logger.log_dir))
                metrics |= mean.metrics(found.right(self.prepared))
                layers = torch.cat([outcome.exits for outcome in outcomes]).long()
                histogram = torch.bincount(layers - 1, minlength=found.model.num_layers).tolist()
                trial.set_user_attr(EXIT_HISTOGRAM, histogram)
        return metrics


@dataclass(frozen=True)
class Fit:
    """A fit without checkpoints.

    Args:
        model: Model of the last epoch.
        history: Record of all epochs.
    """

    model: DACT
    history: History

    @property
    def known_answers(self) -> LayerAnswers:
        """The answers to the validation examples at the epoch of the lowest val_loss."""
        assert self.history.answers is not None, "no validation ran"
        return self.history.answers

    def outcome(self, prepared: Prepared) -> Outcome:
        """Return the outcome of early exit on the validation examples, at the epoch of the lowest
        val_loss."""
        return outcome_of(
            self.known_answers, self.model, prepared.recipe.promise, self.right(prepared)
        )

    def right(self, prepared: Prepared) -> Tensor | None:
        """Return whether the baseline classifies each validation example correctly; None if that is
        unknown."""
        return prepared.baseline.right(self.known_answers.target)


def fit_settings(
    prepared: Prepared,
    settings: Mapping[str, Any],
    seed: int,
    callbacks: Sequence[Callback] = (),
    logger: Any = False,
) -> Fit:
    """Fit a new model without checkpoints, as trials and their confirmation do.

    Args:
        prepared: Shared inputs of all fits.
        settings: Arguments of model and data; see `Winners.settings`.
        seed: Seed of the fit.
        callbacks: Further callbacks.
        logger: Logger of the Trainer.

    Raises:
        NonFiniteLoss: If val_loss is NaN or infinite.
        ValueError: If no validation ran.
    """
    settings, history = dict(settings), History()
    epochs = settings.pop("num_epochs", prepared.recipe.epochs)
    given, every = prepared.recipe.trainer, [history, *callbacks]
    if prepared.states is not None:
        epochs, given = head_epochs(epochs), for_states(given)
    with seeded(seed):
        model, data = prepared.build(settings, seed=seed)
        trainer = make_trainer(
            given, max_epochs=epochs, logger=logger, callbacks=every, enable_checkpointing=False
        )
        fit(trainer, model, data)
    return Fit(model, history)


@contextlib.contextmanager
def _logged(
    objective: Objective, trial: BaseTrial
) -> Iterator[tuple[TensorBoardLogger, dict[str, float]]]:
    """Log a trial to TensorBoard: its parameters, the metrics that the block fills in, and its
    status."""
    folder = objective.run.trial_folder(objective.stage, trial.number, objective.own)
    logger = TensorBoardLogger(folder.parent, name="", version=folder.name, default_hp_metric=False)
    name = f"{objective.run.tag}/{folder.relative_to(objective.run.folder)}"
    tensorboard.log_parameters(logger.experiment, trial.params, name)
    metrics: dict[str, float] = {}
    succeeded = False
    try:
        yield logger, metrics
        succeeded = True
    finally:
        tensorboard.log_outcome(logger.experiment, metrics, succeeded)
        logger.finalize("success" if succeeded else "failed")


@contextlib.contextmanager
def _recorded_cause(trial: BaseTrial) -> Iterator[None]:
    """Record in a trial why it ended early, and raise the exceptions that `Objective` documents."""
    try:
        yield
    except TrialPruned as reason:
        trial.set_user_attr(CAUSE, str(reason))
        raise
    except NonFiniteLoss as reason:
        trial.set_user_attr(CAUSE, str(reason))
        raise TrialPruned(str(reason)) from reason
    except (TimeIsUp, KeyboardInterrupt):
        trial.set_user_attr(INTERRUPTED, True)
        raise
    except UpdateFinishedTrialError:
        raise  # another process took this one for dead
    except Exception as error:
        if environment_error(error) is not None:
            with contextlib.suppress(Exception):  # the storage may be out of reach
                trial.set_user_attr(INTERRUPTED, True)
            raise
        cause = f"{type(error).__name__}: {error}".split("\n")[0]
        trial.set_user_attr(CAUSE, cause)
        raise TrialFailed(cause) from error
