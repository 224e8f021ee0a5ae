"""A fresh Trainer for each fit: the record of its epochs, its deadline, and how it resumes."""

from __future__ import annotations

import contextlib
import copy
import math
import os
import time
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import (
    Callback,
    LightningDataModule,
    LightningModule,
    Trainer,
    seed_everything,
)
from lightning.pytorch.callbacks import (
    Checkpoint,
    DeviceStatsMonitor,
    GradientAccumulationScheduler,
    LearningRateMonitor,
    ModelCheckpoint,
    ProgressBar,
    StochasticWeightAveraging,
    WeightAveraging,
)
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.plugins import CheckpointIO
from lightning.pytorch.utilities.seed import isolate_rng
from torch import Tensor
from typing_extensions import override

from dact.calibration import LayerAnswers
from dact.callbacks import AverageLastSteps
from dact.files import DurableCheckpointIO
from dact.functional import accumulate
from dact.model import DACT
from dact.signals import StopOnSignal

MONITOR = "val_loss"
# Epochs on frozen states per epoch of the final fit: with fewer the submodels have not learned,
# and with the largest number they have, however long the encoder is trained.
HEAD_EPOCHS, MOST_HEAD_EPOCHS = 3, 12
# Optimizer steps in which a pretrained encoder learns its task, also from few texts, and in which
# one does that starts from the whole encoder's weights and has it as a teacher.
MIN_STEPS, TAUGHT_STEPS = 250, 150
MOST_TIMES = 7  # times the epochs that are asked for
GRACE = 10.0  # seconds that a validation may take beyond a deadline
PROCESS_VARIABLES = ("PL_GLOBAL_SEED", "PL_SEED_WORKERS", "CUBLAS_WORKSPACE_CONFIG")


# ---------------------------------------------------------------------- epochs


def enough_epochs(trainer: Mapping[str, Any], data: Any, epochs: int, steps: int) -> int:
    """Return `epochs` or, on few examples, as many as make `steps` optimizer steps.

    Few epochs of few steps leave a pretrained encoder where it began, and it answers with the
    majority class (Mosbach et al. 2021, *On the Stability of Fine-tuning BERT*).

    Args:
        trainer: Arguments of the Trainer.
        data: Datamodule that is set up for a fit.
        epochs: Number of epochs.
        steps: Number of optimizer steps.

    Returns:
        The number of epochs, at most `MOST_TIMES` as many as asked for.
    """
    batches, limit = len(data.train_dataloader()), trainer.get("limit_train_batches")
    if limit is not None:
        batches = min(batches, limit) if isinstance(limit, int) else int(limit * batches)
    accumulated = trainer.get("accumulate_grad_batches") or 1
    for callback in as_list(trainer.get("callbacks")):
        if isinstance(callback, GradientAccumulationScheduler):
            accumulated = max(callback.scheduling.values())
    per_epoch = max(1, math.ceil(batches / int(accumulated)))
    return min(max(epochs, math.ceil(steps / per_epoch)), MOST_TIMES * epochs)


def head_epochs(epochs: int) -> int:
    """Return the number of epochs on frozen states that stands for a fit of this many epochs."""
    return min(HEAD_EPOCHS * epochs, MOST_HEAD_EPOCHS)


class NonFiniteLoss(RuntimeError):
    """The validation loss of a fit is NaN or infinite."""


class History(Callback):
    """Record every logged metric of every epoch, and end the fit when its loss is not finite.

    Attributes:
        epochs: One record per validation.
        answers: Answers of all layers to the validation examples in the epoch of the lowest
            val_loss; None before the first epoch and after a resumption.

    Raises:
        NonFiniteLoss: From the fit, if val_loss is NaN or infinite.
        KeyError: From the fit, if the model logs no val_loss.
        ValueError: From the fit, if no validation ran.
    """

    def __init__(self) -> None:
        self.epochs: list[dict[str, float]] = []
        self.answers: LayerAnswers | None = None
        self._seen: list[tuple[Tensor, Tensor, Tensor]] = []

    @override
    def on_validation_start(self, *args: Any) -> None:
        self._seen = []

    @override
    def on_validation_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, *args: Any
    ) -> None:
        answers = outputs["layer_probabilities"], outputs["h"], batch["labels"].long()
        self._seen.append(tuple(tensor.cpu() for tensor in answers))  # type: ignore[arg-type]

    @override
    def state_dict(self) -> dict[str, Any]:
        return {"epochs": self.epochs}

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.epochs = list(state_dict["epochs"])

    @override
    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.sanity_checking:
            return
        metrics = {n: v.item() for n, v in trainer.callback_metrics.items() if n.startswith("val_")}
        if MONITOR not in metrics:
            logged = ", ".join(sorted(metrics)) or "nothing"
            raise KeyError(f"the model logs no {MONITOR}; it logs {logged}")
        if not math.isfinite(metrics[MONITOR]):
            raise NonFiniteLoss(f"{MONITOR} is {metrics[MONITOR]} in epoch {trainer.current_epoch}")

        self.epochs.append({"epoch": float(trainer.current_epoch), **metrics})
        if self.best is self.epochs[-1]:
            y, h, target = (torch.cat(parts) for parts in zip(*self._seen, strict=True))
            self.answers = LayerAnswers(*accumulate(y, h), y, target)
        self._seen = []

    @override
    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        # Only now do the training metrics belong to this epoch; its validation came before.
        if self.epochs and self.epochs[-1]["epoch"] == trainer.current_epoch:
            metrics = {n: v.item() for n, v in trainer.callback_metrics.items()}
            self.epochs[-1] |= {n: v for n, v in metrics.items() if not n.startswith("val_")}

    @override
    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if not self.epochs:
            raise ValueError(
                f"no validation ran in {trainer.max_epochs} epochs: change the Trainer's "
                "check_val_every_n_epoch, limit_val_batches, max_steps or max_time"
            )

    @property
    def best(self) -> dict[str, float]:
        """The metrics of the epoch with the lowest validation loss."""
        return min(self.epochs, key=lambda epoch: epoch[MONITOR])


# ---------------------------------------------------------------------- deadlines


class TimeIsUp(Exception):
    """The deadline of a study passed in the middle of a trial."""

    def __init__(self) -> None:
        super().__init__("time_out ended the study in the middle of this trial")


class Deadline:
    """The moment at which the studies end.

    Args:
        seconds: Seconds from now, or None for no end.
    """

    def __init__(self, seconds: float | None = None) -> None:
        # All processes of a machine share the monotonic clock, so workers may be sent a deadline.
        self.end = math.inf if seconds is None else time.monotonic() + seconds

    @property
    def left(self) -> float:
        """Seconds that are left, 0 or more; infinite if there is no end."""
        return max(0.0, self.end - time.monotonic())


class StopAtDeadline(Callback):
    """Stop a fit at a deadline: before the next batch of training, or within a long validation.

    Args:
        deadline: The deadline, which a validation may pass by `GRACE` seconds.

    Raises:
        TimeIsUp: From the fit, if training was not complete.
    """

    def __init__(self, deadline: Deadline) -> None:
        self.deadline = deadline

    @override
    def on_train_batch_start(self, trainer: Trainer, *args: Any) -> None:
        if self.deadline.left == 0:
            raise TimeIsUp

    @override
    def on_validation_batch_end(self, *args: Any, **kwargs: Any) -> None:
        if time.monotonic() >= self.deadline.end + GRACE:
            raise TimeIsUp


# ---------------------------------------------------------------------- the process


@contextlib.contextmanager
def isolated() -> Iterator[None]:
    """Restore the caller's random generators, and what a Trainer sets for its process."""
    failed: BaseException | None = None
    deterministic = torch.are_deterministic_algorithms_enabled()
    warn_only = torch.is_deterministic_algorithms_warn_only_enabled()
    benchmark = torch.backends.cudnn.benchmark
    kept = {name: os.environ.get(name) for name in PROCESS_VARIABLES}
    with isolate_rng():  # by itself, it restores nothing after an exception
        try:
            yield
        except BaseException as error:
            failed = error
    torch.use_deterministic_algorithms(deterministic, warn_only=warn_only)
    torch.backends.cudnn.benchmark = benchmark
    for name, value in kept.items():
        os.environ.pop(name, None)
        if value is not None:
            os.environ[name] = value
    if failed is not None:
        raise failed


@contextlib.contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Seed all random generators for the block, and restore the caller's at its end."""
    with isolated():
        seed_everything(seed, workers=True, verbose=False)
        yield


# ---------------------------------------------------------------------- the Trainer


def make_trainer(arguments: Mapping[str, Any], **fixed: Any) -> Trainer:
    """Return a fresh Trainer with the user's arguments and copies of the user's callbacks.

    dact shows progress, keeps checkpoints and logs by itself. So progress bars and checkpoint
    callbacks are left out, and without a logger the callbacks that need one.

    Args:
        arguments: The user's arguments.
        **fixed: Arguments that replace them; ``callbacks`` are added.
    """
    given = dict(arguments)
    left_out: tuple[type, ...] = (Checkpoint, ProgressBar)
    if not fixed.get("logger"):
        left_out += (LearningRateMonitor, DeviceStatsMonitor)
    callbacks = [c for c in as_list(given.pop("callbacks", None)) if not isinstance(c, left_out)]
    # Copies: callbacks keep what a Trainer gives them, and a plugin keeps its loss scale.
    plugins = copy.deepcopy(as_list(given.pop("plugins", None)))
    if not any(isinstance(plugin, CheckpointIO) for plugin in plugins):
        plugins.append(DurableCheckpointIO())
    if "strategy" in given:
        given["strategy"] = copy.deepcopy(given["strategy"])
    defaults = {"enable_model_summary": False, "num_sanity_val_steps": 0}
    added = fixed.pop("callbacks", [])
    fixed["enable_progress_bar"] = False
    fixed["callbacks"] = [*copy.deepcopy(callbacks), StopOnSignal(), *added]
    return Trainer(**{**defaults, **given, "logger": False, **fixed, "plugins": plugins})


def for_states(trainer: Mapping[str, Any]) -> dict[str, Any]:
    """Return arguments of the Trainer for frozen states, in whose batches numbers mean nothing."""
    given = {**trainer, "limit_val_batches": None}
    if isinstance(trainer.get("val_check_interval"), int):
        given |= {"val_check_interval": None, "check_val_every_n_epoch": 1}
    return given


def averages(trainer: Mapping[str, Any]) -> bool:
    """Return whether a callback of the user averages weights."""
    kinds = (StochasticWeightAveraging, WeightAveraging)
    return any(isinstance(callback, kinds) for callback in as_list(trainer.get("callbacks")))


def as_list(value: Any) -> list[Any]:
    """Return a Trainer argument that may be None, one object or several as a list."""
    if value is None:
        return []
    return list(value) if isinstance(value, (list, tuple)) else [value]


def fit(
    trainer: Trainer, model: DACT, data: LightningDataModule, ckpt_path: str | None = None
) -> None:
    """Call `Trainer.fit`, and raise KeyboardInterrupt after Ctrl-C instead of Lightning's
    SystemExit.

    It does not warn that all texts leave at one layer: studies try extremes on purpose.
    """
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*every validation example.*")
            trainer.fit(model, datamodule=data, ckpt_path=ckpt_path, weights_only=True)
    except SystemExit as error:
        raise KeyboardInterrupt from error


def resumable_fit(
    arguments: Mapping[str, Any],
    model: DACT,
    data: LightningDataModule,
    checkpoints: Path,
    *callbacks: Callback,
    epochs: int,
    log: Path | None = None,
    keep: str | None = None,
    monitor: str | None = None,
    average: bool = False,
) -> History:
    """Fit with a checkpoint after every epoch, and resume from it if an earlier call was stopped.

    Args:
        arguments: Arguments of the Trainer.
        model: Model that only this fit uses.
        data: Datamodule that only this fit uses.
        checkpoints: Folder of ``last.ckpt`` and the checkpoint that `keep` names.
        *callbacks: Further callbacks.
        epochs: Number of epochs.
        log: Folder of a TensorBoard log, or None.
        keep: Name, without ``.ckpt``, of a second checkpoint; None for no such one.
        monitor: Metric whose lowest value chooses the epoch of `keep`; None for the last epoch.
        average: Whether to average the weights of the last steps, unless a callback of the user
            averages weights.

    Raises:
        NonFiniteLoss: If val_loss is NaN or infinite.
        ValueError: If no validation ran.
    """
    logger: Any = False
    if log is not None:
        logger = TensorBoardLogger(log.parent, name="", version=log.name, default_hp_metric=False)
    every: dict[str, Any] = {"save_on_train_epoch_end": True, "enable_version_counter": False}
    # Two callbacks: ``save_last`` would write last.ckpt only in epochs in which the best is
    # written.
    kept = [ModelCheckpoint(checkpoints, "last", **every)]
    if keep is not None and monitor is not None:
        # With save_weights_only, Lightning would save the raw weights instead of an average.
        weights_only = not averages(arguments)
        best = ModelCheckpoint(
            checkpoints,
            keep,
            monitor=monitor,
            save_weights_only=weights_only,
            enable_version_counter=False,
        )
        kept.insert(0, best)
    averaging = [AverageLastSteps()] if average and not averages(arguments) else []
    history, last = History(), checkpoints / "last.ckpt"
    trainer = make_trainer(
        arguments,
        max_epochs=epochs,
        logger=logger,
        callbacks=[history, *callbacks, *averaging, *kept],
        enable_checkpointing=True,
    )
    try:
        fit(trainer, model, data, ckpt_path=str(last) if last.is_file() else None)
    except NonFiniteLoss as error:
        raise NonFiniteLoss(
            f"{error}, at learning_rate {model.learning_rate:g}: lower it, or learning_rate's high "
            "in search_space, or use precision 32-true, under another run_tag"
        ) from error
    if keep is not None and monitor is None:
        trainer.save_checkpoint(checkpoints / f"{keep}.ckpt", weights_only=True)
    if logger:
        logger.finalize("success")
    return history
