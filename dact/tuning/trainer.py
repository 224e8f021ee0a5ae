"""A fresh Trainer for each fit: the record of its epochs, its deadline, and how it resumes."""

from __future__ import annotations

import contextlib
import copy
import gc
import math
import os
import random
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lightning.pytorch import Callback, LightningDataModule, LightningModule, Trainer
from lightning.pytorch.callbacks import (
    Checkpoint,
    ModelCheckpoint,
    ProgressBar,
    StochasticWeightAveraging,
    WeightAveraging,
)
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.loggers.logger import DummyLogger
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
WORKSPACE = "CUBLAS_WORKSPACE_CONFIG"  # set by a deterministic Trainer
# Optimizer steps in which a pretrained encoder learns its task, even from few texts; and steps in
# which it does so if it starts from the whole encoder's weights and learns from it as a teacher.
MIN_STEPS, TAUGHT_STEPS = 250, 150
MOST_TIMES = 7  # largest multiple of the requested epochs


# ---------------------------------------------------------------------- epochs


def enough_epochs(trainer: Mapping[str, Any], data: Any, epochs: int, steps: int) -> int:
    """Return `epochs` or, with few examples, enough epochs for `steps` optimizer steps.

    After too few steps, a pretrained encoder has hardly changed and answers with the majority class
    (Mosbach et al. 2021, *On the Stability of Fine-tuning BERT*).

    The result is at most 7 times `epochs`, and `epochs` if the Trainer limits the training batches.
    `data` must be set up for a fit.
    """
    if trainer.get("limit_train_batches") is not None:
        return epochs
    batches = len(data.train_dataloader())
    per_epoch = math.ceil(batches / (trainer.get("accumulate_grad_batches") or 1))
    return min(max(epochs, math.ceil(steps / per_epoch)), MOST_TIMES * epochs)


class NonFiniteLoss(RuntimeError):
    """The validation loss of a fit is NaN or infinite."""


class History(Callback):
    """Record every logged metric of every epoch, and end the fit when its loss is not finite.

    Attributes:
        epochs: One record per validation.
        answers: Answers of all layers to the validation examples in the epoch of the lowest
            val_loss; None before the first epoch and after a resumption.
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
        if not math.isfinite(metrics[MONITOR]):
            raise NonFiniteLoss(
                f"{MONITOR} is {metrics[MONITOR]} in epoch {trainer.current_epoch}, at "
                f"learning_rate {pl_module.learning_rate:g}: lower it, or learning_rate's high in "
                "search_space, or use precision 32-true, under another run_tag"
            )

        self.epochs.append({"epoch": float(trainer.current_epoch), **metrics})
        if self.best is self.epochs[-1]:
            y, h, target = (torch.cat(parts) for parts in zip(*self._seen, strict=True))
            task: Any = pl_module.task
            self.answers = LayerAnswers(*accumulate(y, h), y, target, task)
        self._seen = []

    @override
    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        # Validation ran before the training metrics of the epoch were complete.
        if self.epochs and self.epochs[-1]["epoch"] == trainer.current_epoch:
            metrics = {n: v.item() for n, v in trainer.callback_metrics.items()}
            self.epochs[-1] |= {n: v for n, v in metrics.items() if not n.startswith("val_")}

    @property
    def best(self) -> dict[str, float]:
        """The metrics of the epoch with the lowest validation loss."""
        return min(self.epochs, key=lambda epoch: epoch[MONITOR])


# ---------------------------------------------------------------------- deadlines


class TimeIsUp(Exception):
    """The deadline of a study passed in the middle of a trial."""


class Deadline:
    """The moment at which the studies end: some seconds from now, or never."""

    def __init__(self, seconds: float | None = None) -> None:
        # All processes of a machine share the monotonic clock, so a deadline is valid in workers.
        self.end = math.inf if seconds is None else time.monotonic() + seconds

    @property
    def left(self) -> float:
        """Seconds left, 0 or more; infinite without an end."""
        return max(0.0, self.end - time.monotonic())


class StopAtDeadline(Callback):
    """Raise `TimeIsUp` in a fit at a deadline."""

    def __init__(self, deadline: Deadline) -> None:
        self.deadline = deadline

    @override
    def on_train_batch_start(self, *args: Any) -> None:
        if self.deadline.left == 0:
            raise TimeIsUp


# ---------------------------------------------------------------------- the Trainer


@contextlib.contextmanager
def isolated() -> Iterator[None]:
    """Restore the caller's random generators, and process-wide settings that Trainers change."""
    failed: BaseException | None = None
    mode, benchmark = torch.get_deterministic_debug_mode(), torch.backends.cudnn.benchmark
    workspace = {name: value for name, value in os.environ.items() if name == WORKSPACE}
    with isolate_rng():  # by itself, it restores nothing after an exception
        try:
            yield
        except BaseException as error:
            failed = error
    torch.set_deterministic_debug_mode(mode)
    torch.backends.cudnn.benchmark = benchmark
    os.environ.pop(WORKSPACE, None)
    os.environ.update(workspace)
    if failed is not None:
        raise failed


@contextlib.contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Seed all random generators for the block, and restore the caller's at its end."""
    with isolated():
        random.seed(seed)
        np.random.seed(seed)
        torch.manual_seed(seed)
        yield


def make_trainer(arguments: Mapping[str, Any], *callbacks: Callback, **fixed: Any) -> Trainer:
    """Return a fresh Trainer with the user's arguments and copies of the user's callbacks.

    The user's progress bars and checkpoint callbacks are left out, since dact has its own. `fixed`
    replaces the user's arguments.
    """
    # A copy, since callbacks keep the state of a fit, and a plugin keeps its loss scale.
    given = copy.deepcopy({**arguments, "logger": False, "enable_progress_bar": False})
    kept = [
        c for c in as_list(given.get("callbacks")) if not isinstance(c, (Checkpoint, ProgressBar))
    ]
    given["callbacks"] = [*kept, StopOnSignal(), *callbacks]
    given["plugins"] = [*as_list(given.get("plugins")), DurableCheckpointIO()]
    given["enable_checkpointing"] = any(isinstance(one, Checkpoint) for one in callbacks)
    defaults = {"enable_model_summary": False, "num_sanity_val_steps": 0}
    return Trainer(**{**defaults, **given, **fixed})


def averages(trainer: Mapping[str, Any]) -> bool:
    """Return whether one of the user's callbacks averages weights."""
    kinds = (StochasticWeightAveraging, WeightAveraging)
    return any(isinstance(callback, kinds) for callback in as_list(trainer.get("callbacks")))


def as_list(value: Any) -> list[Any]:
    """Return a Trainer argument that may be None, one object or several as a list."""
    if value is None:
        return []
    return list(value) if isinstance(value, (list, tuple)) else [value]


def fit(
    arguments: Mapping[str, Any],
    model: DACT,
    data: LightningDataModule,
    *callbacks: Callback,
    epochs: int,
    logger: Any = None,
    ckpt_path: Path | None = None,
) -> History:
    """Fit a model with data that only this fit uses, and return the record of its epochs.

    The fit resumes from the checkpoint `ckpt_path`, and logs nothing without a logger.

    Raises:
        NonFiniteLoss: If val_loss is NaN or infinite.
    """
    history = History()
    # One of the user's callbacks may need a logger.
    fixed = {"max_epochs": epochs, "logger": logger or DummyLogger()}
    trainer = make_trainer(arguments, history, *callbacks, **fixed)
    try:
        trainer.fit(model, datamodule=data, ckpt_path=ckpt_path, weights_only=True)
    except SystemExit as error:
        # Lightning exits this way on Ctrl-C.
        raise KeyboardInterrupt from error
    return history


def resumable_fit(
    arguments: Mapping[str, Any],
    model: DACT,
    data: LightningDataModule,
    checkpoints: Path,
    *callbacks: Callback,
    epochs: int,
    monitor: str | None = None,
    average: bool = False,
) -> History:
    """Fit with a checkpoint after every epoch, and resume from it if an earlier call was stopped.

    The fit is logged to TensorBoard in the parent of `checkpoints`.

    Args:
        checkpoints: Folder of ``last.ckpt`` and of ``best.ckpt``, the epoch to keep.
        monitor: Metric whose lowest value chooses the epoch to keep; None for the last epoch.
        average: Whether to average the weights of the last steps, unless one of the user's
            callbacks averages weights.
    """
    gc.collect()  # frees an earlier fit, whose Trainer and model refer to each other
    log, averaged, added = checkpoints.parent, averages(arguments), list(callbacks)
    logger = TensorBoardLogger(log.parent, name="", version=log.name, default_hp_metric=False)
    if average and not averaged:
        added.append(AverageLastSteps())
    # Two callbacks: ``save_last`` would write last.ckpt only in epochs that are the best so far.
    # With save_weights_only, Lightning would save the raw weights instead of an average.
    names: dict[str, Any] = {"dirpath": checkpoints, "enable_version_counter": False}
    if monitor is not None:
        best = {**names, "filename": "best", "save_weights_only": not averaged}
        added.append(ModelCheckpoint(**best, monitor=monitor))
    added.append(ModelCheckpoint(**names, filename="last", save_on_train_epoch_end=True))
    last = checkpoints / "last.ckpt"
    resumed = last if last.is_file() else None
    history = fit(arguments, model, data, *added, epochs=epochs, logger=logger, ckpt_path=resumed)
    if monitor is None:
        model.trainer.save_checkpoint(checkpoints / "best.ckpt", weights_only=True)
    logger.finalize("success")
    return history
