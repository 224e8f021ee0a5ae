"""One trial: a fresh model, datamodule and Trainer, and what is read from them."""

from __future__ import annotations

import contextlib
import copy
import math
import time
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, LightningDataModule, LightningModule, Trainer, seed_everything
from lightning.pytorch.callbacks import Checkpoint, DeviceStatsMonitor, LearningRateMonitor, ProgressBar
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.plugins import CheckpointIO
from optuna import TrialPruned
from optuna.exceptions import UpdateFinishedTrialError
from optuna.trial import BaseTrial
from optuna_integration import PyTorchLightningPruningCallback
from typing_extensions import override

from dact.files import DurableCheckpointIO
from dact.model import DACT
from dact.tuning import tensorboard
from dact.tuning.environment import environment_error
from dact.tuning.stopping import Stoppable
from dact.tuning.strategies import PLANNED_EPOCHS

MONITOR = "val_loss"
CAUSE = "cause"  # user attribute of a trial that did not finish: why
EXIT_HISTOGRAM = "exit_histogram"  # user attribute: validation examples that left after each layer
INTERRUPTED = "interrupted"  # user attribute of a trial that somebody stopped: to be run again


class TrialFailed(RuntimeError):
    """A trial cannot give a value, for the cause that this says; the study goes on."""


class DeadlineExceeded(Exception):
    """Raised inside a validation that runs past the deadline."""


class History(Callback):
    """Keep every logged metric of every epoch, and end the trial where its loss is no finite number."""

    def __init__(self) -> None:
        self.epochs: list[dict[str, float]] = []
        self.exit_histograms: list[list[int]] = []

    @override
    def state_dict(self) -> dict[str, Any]:
        return {"epochs": self.epochs, "exit_histograms": self.exit_histograms}

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.epochs, self.exit_histograms = state_dict["epochs"], state_dict["exit_histograms"]

    @override
    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.sanity_checking:
            return
        metrics = {name: value.item() for name, value in trainer.callback_metrics.items()}
        if MONITOR not in metrics:
            raise KeyError(f"the model logs no {MONITOR}; it logs {', '.join(sorted(metrics)) or 'nothing'}")
        if not math.isfinite(metrics[MONITOR]):
            raise TrialPruned(f"{MONITOR} is {metrics[MONITOR]} after epoch {trainer.current_epoch}")
        self.epochs.append({"epoch": float(trainer.current_epoch), **metrics})
        assert isinstance(pl_module, DACT)
        self.exit_histograms.append(pl_module.exit_histogram.tolist())

    @property
    def _best(self) -> int:
        return min(range(len(self.epochs)), key=lambda index: self.epochs[index][MONITOR])

    @property
    def best(self) -> dict[str, float]:
        """The metrics of the epoch with the lowest validation loss."""
        return self.epochs[self._best]

    @property
    def best_exit_histogram(self) -> list[int]:
        """How many validation examples left after each layer, in that epoch."""
        return self.exit_histograms[self._best]


class Deadline(Callback):
    """Stop a fit at a moment: after the current batch and one validation, or within a validation that takes long.

    Args:
        end: The moment, on the clock of `time.monotonic`.
        grace: Seconds that a validation may take past it.
    """

    def __init__(self, end: float, grace: float = 10.0) -> None:
        self.end, self.grace, self.hit = end, grace, False

    @override
    def on_train_batch_end(self, trainer: Trainer, *args: Any) -> None:
        if time.monotonic() >= self.end:
            self.hit = trainer.should_stop = True

    @override
    def on_validation_batch_end(self, *args: Any, **kwargs: Any) -> None:
        if time.monotonic() >= self.end + self.grace:
            self.hit = True
            raise DeadlineExceeded


@dataclass(frozen=True)
class TrialSetting:
    """What all trials of a study share.

    Args:
        stage: ``submodels``, ``training`` or ``lambda_reg``.
        folder: Where the trials log.
        trainer: Arguments of the Trainer.
        seed: The same for all trials, so that they differ by their parameters alone.
        deadline: The moment on `time.monotonic` at which a trial is stopped, or None.
    """

    stage: str
    folder: Path
    trainer: Mapping[str, Any]
    seed: int
    deadline: float | None


def trial_folder(number: int) -> str:
    """The name of the folder in which a trial logs."""
    return f"trial_{number:04d}"


def make_trainer(arguments: Mapping[str, Any], **fixed: Any) -> Trainer:
    """A fresh Trainer: the user's arguments under dact's, callbacks copied so that no fit sees those of another."""
    given = {**arguments}
    # dact shows progress, keeps checkpoints and logs by itself, and not every fit of a run does.
    replaced: tuple[type, ...] = (Checkpoint, ProgressBar)
    if not fixed.get("logger"):
        replaced += (LearningRateMonitor, DeviceStatsMonitor)
    callbacks = [one for one in _as_list(given.pop("callbacks", None)) if not isinstance(one, replaced)]
    callbacks = copy.deepcopy(callbacks)
    plugins = _as_list(given.pop("plugins", None))
    if not any(isinstance(plugin, CheckpointIO) for plugin in plugins):
        plugins.append(DurableCheckpointIO())
    quiet = {"enable_progress_bar": False, "enable_model_summary": False, "num_sanity_val_steps": 0}
    callbacks += [Stoppable(), *fixed.pop("callbacks", [])]
    return Trainer(**{**quiet, **given, "logger": False, **fixed, "callbacks": callbacks, "plugins": plugins})


def _as_list(value: Any) -> list[Any]:
    if value is None:
        return []
    return list(value) if isinstance(value, (list, tuple)) else [value]


def fit(
    trainer: Trainer,
    model: DACT,
    data: LightningDataModule | None = None,
    *,
    loaders: tuple[Any, Any] = (None, None),
    ckpt_path: str | None = None,
    final: bool = False,
) -> None:
    """`Trainer.fit`, in which Ctrl-C and SIGTERM stay a KeyboardInterrupt (Lightning makes a SystemExit of them).

    Args:
        trainer: A fresh one.
        model: A model of its own.
        data: A datamodule of its own.
        loaders: Those of training and validation, where there is no datamodule.
        ckpt_path: A checkpoint to go on from.
        final: Whether a collapsed depth is worth a warning: a study tries extremes on purpose.
    """
    with warnings.catch_warnings():
        if not final:
            warnings.filterwarnings("ignore", message="the depth has collapsed.*")
        try:
            trainer.fit(model, *loaders, data, ckpt_path, True)
        except SystemExit as error:
            raise KeyboardInterrupt from error


def run_trial(
    trial: BaseTrial,
    setting: TrialSetting,
    model: DACT,
    data: LightningDataModule,
    *,
    epochs: int,
    prune: bool,
) -> dict[str, float]:
    """Train one trial and return the metrics of its best epoch.

    Args:
        trial: Reports to its study after every epoch if `prune`.
        setting: What all trials of the study share.
        model: A model of its own.
        data: A datamodule of its own.
        epochs: How many epochs the trial trains.
        prune: Whether the study may stop it.

    Raises:
        TrialPruned: If the study or the deadline stopped it, or its loss is no finite number.
        KeyboardInterrupt: If the user stopped it.
    """
    trial.set_user_attr(PLANNED_EPOCHS, epochs)
    history = History()
    callbacks: list[Callback] = [history]
    if prune:
        callbacks.append(PyTorchLightningPruningCallback(trial, monitor=MONITOR))  # type: ignore[arg-type]
    deadline = None if setting.deadline is None else Deadline(setting.deadline)
    if deadline is not None:
        callbacks.append(deadline)
    version = trial_folder(trial.number)
    logger = TensorBoardLogger(setting.folder, name="", version=version, default_hp_metric=False)
    tensorboard.log_parameters(logger.experiment, trial.params, f"{setting.stage}/{version}")
    trainer = make_trainer(
        setting.trainer, max_epochs=epochs, logger=logger, callbacks=callbacks, enable_checkpointing=False
    )
    succeeded, cut = False, False
    try:
        try:
            fit(trainer, model, data)
        except DeadlineExceeded:
            cut = True
        if deadline is not None and deadline.hit:
            cut = cut or trainer.global_step < trainer.estimated_stepping_batches
        if cut:
            raise TrialPruned("time_out ended the study in the middle of this trial")
        if not history.epochs:
            raise ValueError(
                f"no validation ran in {epochs} epochs, and a trial has no value without one: let the Trainer's "
                "check_val_every_n_epoch and limit_val_batches allow for it"
            )
        trial.set_user_attr(EXIT_HISTOGRAM, history.best_exit_histogram)
        succeeded = True
    finally:
        tensorboard.log_outcome(logger.experiment, history.best if history.epochs else {}, succeeded)
        logger.finalize("success" if succeeded else "failed")
    return history.best


@contextlib.contextmanager
def recorded_cause(trial: BaseTrial) -> Iterator[None]:
    """Keep with the trial why it ended early.

    Raises:
        TrialFailed: If the trial failed for a reason of its own, such as memory that ran out.
        TrialPruned: As it came.
        KeyboardInterrupt, OSError, …: As they came, where the reason lies outside of the trial: then it runs again.
    """
    try:
        yield
    except KeyboardInterrupt:
        trial.set_user_attr(INTERRUPTED, True)
        raise
    except TrialPruned as reason:
        trial.set_user_attr(CAUSE, str(reason))
        raise
    except Exception as error:
        if environment_error(error) is not None:
            with contextlib.suppress(Exception):  # the storage may be what is out of reach
                trial.set_user_attr(INTERRUPTED, True)
            raise
        if isinstance(error, UpdateFinishedTrialError):
            raise  # others took this process for dead
        cause = f"{type(error).__name__}: {error}".split("\n")[0]
        trial.set_user_attr(CAUSE, cause)
        raise TrialFailed(cause) from error


def seed_trial(seed: int) -> None:
    """The same start for every trial, before its model is built."""
    seed_everything(seed, workers=True, verbose=False)
