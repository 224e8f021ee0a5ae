"""A fit: a fresh Trainer, the record of its epochs, its deadline, and how it resumes."""

from __future__ import annotations

import contextlib
import copy
import hashlib
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

from dact.calibration.answers import LayerAnswers
from dact.callbacks import AverageLastSteps
from dact.files import DurableCheckpointIO
from dact.functional import accumulate
from dact.model import DACT
from dact.signals import StopOnSignal

MONITOR = "val_loss"
# epochs on frozen states per epoch of the final fit; with fewer, the submodels have not learned …
HEAD_EPOCHS = 3
MOST_HEAD_EPOCHS = 12  # … and with this many they have, however long the encoder is trained
MIN_STEPS = (
    250  # optimizer steps in which a pretrained encoder learns its task, also from few texts …
)
TAUGHT_STEPS = (
    150  # … and one that starts from the baseline's encoder and has the baseline as a teacher
)
MOST_TIMES = 7  # of the epochs that are asked for, on few examples
GRACE = 10.0  # seconds that a validation may go on after a deadline
PROCESS_VARIABLES = ("PL_GLOBAL_SEED", "PL_SEED_WORKERS", "CUBLAS_WORKSPACE_CONFIG")


def enough_epochs(trainer: Mapping[str, Any], data: Any, epochs: int, steps: int) -> int:
    """Return `epochs` or, on few examples, as many as make `steps` optimizer steps, but at most
    `MOST_TIMES` as many.

    Few epochs of few steps leave a pretrained encoder where it began, and it answers with the
    majority class (Mosbach et al. 2021, *On the Stability of Fine-tuning BERT*).

    Args:
        trainer: Arguments of the Trainer.
        data: Datamodule that is set up for a fit.
        epochs: Number of epochs.
        steps: Number of optimizer steps.
    """
    limit = trainer.get("overfit_batches") or trainer.get("limit_train_batches")
    batches = len(data.train_dataloader())
    if limit is not None:
        batches = min(batches, limit) if isinstance(limit, int) else int(limit * batches)
    schedulers = [
        one
        for one in as_list(trainer.get("callbacks"))
        if isinstance(one, GradientAccumulationScheduler)
    ]
    accumulated = (
        max(schedulers[0].scheduling.values())
        if schedulers
        else trainer.get("accumulate_grad_batches") or 1
    )
    per_epoch = max(1, -(-batches // int(accumulated)))  # the last ones step as well
    return min(max(epochs, -(-steps // per_epoch)), MOST_TIMES * epochs)


def head_epochs(epochs: int) -> int:
    """Return the number of epochs on frozen states that stand for a fit of this many epochs."""
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
        ValueError: From the fit, if no validation ran, or the model's validation_step returns no
            answers.
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
        if not (isinstance(outputs, Mapping) and outputs.keys() >= {"layer_probabilities", "h"}):
            raise ValueError(
                f"{type(pl_module).__name__}.validation_step must return what that of DACT returns: "
                f"layer_probabilities and h; it returns {type(outputs).__name__}"
            )
        self._seen.append(
            (outputs["layer_probabilities"].cpu(), outputs["h"].cpu(), batch["labels"].cpu().long())
        )

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
        metrics = {
            name: value.item()
            for name, value in trainer.callback_metrics.items()
            if _of_validation(name)
        }
        if MONITOR not in metrics:
            raise KeyError(
                f"the model logs no {MONITOR}; it logs {', '.join(sorted(metrics)) or 'nothing'}"
            )
        if not math.isfinite(metrics[MONITOR]):
            raise NonFiniteLoss(
                f"{MONITOR} is {metrics[MONITOR]} after epoch {trainer.current_epoch}"
            )
        self.epochs.append({"epoch": float(trainer.current_epoch), **metrics})
        if self._best == len(self.epochs) - 1:
            y, h, target = (torch.cat(parts) for parts in zip(*self._seen, strict=True))
            self.answers = LayerAnswers(*accumulate(y, h), y, target)
        self._seen = []

    @override
    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        # Only now do the training metrics belong to this epoch; its validation came before.
        if self.epochs and self.epochs[-1]["epoch"] == trainer.current_epoch:
            metrics = {name: value.item() for name, value in trainer.callback_metrics.items()}
            self.epochs[-1] |= {
                name: value for name, value in metrics.items() if not _of_validation(name)
            }

    @override
    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if not self.epochs:
            raise ValueError(
                f"no validation ran in {trainer.max_epochs} epochs, and a fit has no value without one: change the "
                "Trainer's check_val_every_n_epoch or limit_val_batches, or a max_steps or max_time that is too short"
            )

    @property
    def _best(self) -> int:
        return min(range(len(self.epochs)), key=lambda index: self.epochs[index][MONITOR])

    @property
    def best(self) -> dict[str, float]:
        """The metrics of the epoch with the lowest validation loss."""
        return self.epochs[self._best]


class TimeIsUp(Exception):
    """The deadline of a study passed in the middle of a trial, whose parameters are tried again
    later."""

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


def _of_validation(name: str) -> bool:
    return name.startswith("val_")


@contextlib.contextmanager
def isolated() -> Iterator[None]:
    """Restore the caller's random generators, and what a Trainer sets for its process, also after
    an exception."""
    failed: BaseException | None = None
    deterministic = torch.are_deterministic_algorithms_enabled()
    warn_only, benchmark = (
        torch.is_deterministic_algorithms_warn_only_enabled(),
        torch.backends.cudnn.benchmark,
    )
    kept = {name: os.environ.get(name) for name in PROCESS_VARIABLES}
    with isolate_rng():  # by itself, it restores them only after a block that succeeds
        try:
            yield
        except BaseException as error:
            failed = error
    torch.use_deterministic_algorithms(deterministic, warn_only=warn_only)
    torch.backends.cudnn.benchmark = benchmark
    _restore(kept)
    if failed is not None:
        raise failed


@contextlib.contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Seed all random generators for the block, and restore the caller's generators and variables
    at its end."""
    with isolated():
        seed_everything(seed, workers=True, verbose=False)
        yield


def _restore(variables: Mapping[str, str | None]) -> None:
    for name, value in variables.items():
        if value is None:
            os.environ.pop(name, None)
        else:
            os.environ[name] = value


def make_trainer(arguments: Mapping[str, Any], **fixed: Any) -> Trainer:
    """Return a fresh Trainer with the user's arguments, which dact's replace, and copies of the
    user's callbacks.

    dact shows progress, keeps checkpoints and logs by itself. So progress bars and checkpoint
    callbacks are left out, and without a logger the callbacks that need one."""
    given = {**arguments}
    left_out: tuple[type, ...] = (Checkpoint, ProgressBar)
    if not fixed.get("logger"):
        left_out += (LearningRateMonitor, DeviceStatsMonitor)
    callbacks = [
        callback
        for callback in as_list(given.pop("callbacks", None))
        if not isinstance(callback, left_out)
    ]
    # Copies, since both keep what a Trainer gives them, and a plugin what its fit has learned, such
    # as a loss scale.
    plugins = copy.deepcopy(as_list(given.pop("plugins", None)))
    if "strategy" in given:
        given["strategy"] = copy.deepcopy(given["strategy"])
    if not any(isinstance(plugin, CheckpointIO) for plugin in plugins):
        plugins.append(DurableCheckpointIO())
    defaults = {"enable_model_summary": False, "num_sanity_val_steps": 0}
    fixed["enable_progress_bar"] = False
    callbacks = [*copy.deepcopy(callbacks), StopOnSignal(), *fixed.pop("callbacks", [])]
    return Trainer(
        **{
            **defaults,
            **given,
            "logger": False,
            **fixed,
            "callbacks": callbacks,
            "plugins": plugins,
        }
    )


def for_states(trainer: Mapping[str, Any]) -> dict[str, Any]:
    """Return arguments of the Trainer for frozen states, whose batches are others: numbers of
    batches mean nothing."""
    given = {**trainer, "limit_val_batches": None}
    if isinstance(trainer.get("val_check_interval"), int):  # None: Lightning says 1.0 aloud
        given |= {
            "val_check_interval": None,
            "check_val_every_n_epoch": trainer.get("check_val_every_n_epoch") or 1,
        }
    return given


def averages(trainer: Mapping[str, Any]) -> bool:
    """Return whether a callback of the user's averages weights."""
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
    """Call `Trainer.fit`, and raise KeyboardInterrupt after Ctrl-C, which Lightning turns into
    SystemExit.

    It does not warn of a collapsed depth: studies try extremes on purpose, and the summary says it
    of the final model."""
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="the depth has collapsed.*")
            trainer.fit(model, datamodule=data, ckpt_path=ckpt_path, weights_only=True)
    except SystemExit as error:
        raise KeyboardInterrupt from error


def resumable_fit(
    arguments: Mapping[str, Any],
    model: DACT,
    data: LightningDataModule,
    checkpoints: Path,
    *callbacks: Callback,
    what: str = "the fit",
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
        what: Name of the fit in errors.
        epochs: Number of epochs.
        log: Folder of a TensorBoard log, or None.
        keep: Name, without ``.ckpt``, of a second checkpoint, without an optimizer unless a
            callback of the user's averages weights; None for no such one.
        monitor: Metric whose lowest value chooses the epoch of `keep`; None for the last epoch.
        average: Whether to average the weights of the last steps, unless a callback of the user's
            averages weights.

    Raises:
        NonFiniteLoss: If val_loss is NaN or infinite; the message says what to change.
        RuntimeError: If PyTorch says that the device is out of memory; the message says what helps.
        ValueError: If no validation ran.
    """
    logger = (
        None
        if log is None
        else TensorBoardLogger(log.parent, name="", version=log.name, default_hp_metric=False)
    )
    # Two callbacks, since ``save_last`` writes last.ckpt only in epochs in which the best is
    # written.
    kept = [
        ModelCheckpoint(
            checkpoints, "last", enable_version_counter=False, save_on_train_epoch_end=True
        )
    ]
    if keep is not None and monitor is not None:
        best = ModelCheckpoint(
            checkpoints,
            keep,
            monitor=monitor,
            # Of weights alone, Lightning saves those of the last step, and not the mean of a
            # callback of the user's.
            save_weights_only=not averages(arguments),
            enable_version_counter=False,
        )
        kept.insert(0, best)
    history, last = History(), checkpoints / "last.ckpt"
    averaging = [AverageLastSteps()] if average and not averages(arguments) else []
    every = [history, *callbacks, *averaging, *kept]
    trainer = make_trainer(
        arguments,
        max_epochs=epochs,
        logger=logger or False,
        callbacks=every,
        enable_checkpointing=True,
    )
    try:
        fit(trainer, model, data, ckpt_path=str(last) if last.is_file() else None)
    except NonFiniteLoss as error:
        raise NonFiniteLoss(
            f"{what} broke: {error}. Its learning rate is {model.learning_rate:g}: lower that of the model or "
            "learning_rate's high in search_space, or use precision 32-true, under another run_tag"
        ) from error
    except torch.OutOfMemoryError as error:
        passes = (
            "consistency: 0 of tuner and model, so that a step takes one pass; or, "
            if model.consistency
            else ""
        )
        raise RuntimeError(
            f"{what} ran out of memory: use {passes}under another run_tag, a smaller batch_size, shorter texts "
            f"(data.max_length) or precision bf16-mixed. The device says: {error}"
        ) from error
    if keep is not None and monitor is None:
        trainer.save_checkpoint(checkpoints / f"{keep}.ckpt", weights_only=True)
    if logger is not None:
        logger.finalize("success")
    return history


def checkpoints_of(folder: Path, origin: str) -> Path:
    """Return the folder of an unfinished fit's checkpoints, from which a fit of another origin does
    not resume."""
    return folder / f"fit_{hashlib.sha256(origin.encode()).hexdigest()[:16]}"
