"""Callbacks that draw exits, average weights and save the finished model."""

from __future__ import annotations

import copy
import math
from pathlib import Path
from typing import Annotated, Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import Checkpoint, ModelCheckpoint, WeightAveraging
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities.rank_zero import rank_zero_info  # type: ignore[attr-defined]
from torch.optim.swa_utils import AveragedModel
from typing_extensions import override

from dact.agreement import tokenizer_of
from dact.checks import Range, check_arguments
from dact.files import DurableCheckpointIO
from dact.model import DACT
from dact.saving import adopt

Share = Annotated[float, Range("(0, 1]", "it is a share of the optimizer steps")]
LAST = "last.ckpt"  # checkpoint of the last epoch, from which a fit resumes


class ExitPlots(Callback):
    """Draw a TensorBoard histogram of the exit layers after each validation epoch, over the
    examples of the first loader."""

    @override
    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        boards = [log.experiment for log in trainer.loggers if isinstance(log, TensorBoardLogger)]
        counts = getattr(pl_module, "exit_histogram", None)
        # A subclass whose step measures something else has no histogram.
        if not boards or not trainer.is_global_zero or trainer.sanity_checking or counts is None:
            return
        layers = torch.arange(1, len(counts) + 1).repeat_interleave(counts.cpu())
        edges = [n + 0.5 for n in range(len(counts) + 1)]
        boards[0].add_histogram("exit_layer", layers, trainer.current_epoch, bins=edges)


class AverageLastSteps(WeightAveraging):
    """Average the weights over the last steps of a fit, in place of the weights of the last step.

    This is stochastic weight averaging (Izmailov et al. 2018, *Averaging Weights Leads to Wider
    Optima and Better Generalization*) at the model's own learning rate. From the first of these
    steps on, validation and checkpoints use the mean. The weights of a fit that ends earlier, or
    whose number of steps is unknown, are not averaged.

    Args:
        share: Share of the optimizer steps, in (0, 1], over which the weights are averaged.

    Raises:
        ValueError: At the start of a fit, if a checkpoint callback has ``save_weights_only=True``:
            it would save the weights of the last step.
    """

    def __init__(self, share: Share = 0.2) -> None:
        check_arguments(AverageLastSteps.__init__, {"share": share}, "AverageLastSteps: ")
        super().__init__()
        self.share = share
        self._before = math.inf  # number of steps after which the mean begins

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        kept = trainer.checkpoint_callbacks
        if stage == "fit" and any(getattr(one, "save_weights_only", False) for one in kept):
            raise ValueError(
                "AverageLastSteps: a checkpoint callback with save_weights_only=True would keep "
                "the weights of the last step: leave that option out"
            )
        self._average_model = None  # made later, on the model's device
        self._latest_update_step = 0

    @override
    def on_load_checkpoint(
        self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        # Outside a fit, the checkpoint's weights are already the mean.
        if trainer.state.fn == TrainerFn.FITTING and "averaging_state" in checkpoint:
            self._average_model = AveragedModel(pl_module)
            super().on_load_checkpoint(trainer, pl_module, checkpoint)

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        steps = trainer.estimated_stepping_batches
        self._before = (1 - self.share) * steps if 0 < steps < math.inf else math.inf
        # If epochs were added, a mean that began too early is discarded.
        if trainer.global_step <= self._before:
            self._average_model, self._latest_update_step = None, 0
        if self._average_model is not None:
            self._average_model.to(pl_module.device)

    @override
    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, *arguments: Any
    ) -> None:
        if self._average_model is None and trainer.global_step > self._before:
            self._average_model = AveragedModel(pl_module)
        if self._average_model is not None:
            super().on_train_batch_end(trainer, pl_module, *arguments)

    @override
    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        # After a validation, the confidence of the mean is fitted already.
        if self._average_model is not None and isinstance(pl_module, DACT):
            self._swap_models(pl_module)
            pl_module.learn_confidence()
            self._swap_models(pl_module)

    @override
    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._average_model is not None:
            super().on_train_end(trainer, pl_module)

    @override
    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        # Needed again for a fit that was already complete when it was resumed.
        if self._average_model is not None:
            self._copy_average_to_current(pl_module)
            self._average_model = None

    @override
    def on_save_checkpoint(
        self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        if self._average_model is not None:
            super().on_save_checkpoint(trainer, pl_module, checkpoint)


class LastCheckpoint(Checkpoint):
    """Write ``last.ckpt`` after each epoch, next to the checkpoints of `best`.

    Lightning's ``save_last=True`` writes it only in epochs that are the best so far, and loggers
    would upload the files of a second `ModelCheckpoint` under the name of the best one."""

    def __init__(self, best: ModelCheckpoint) -> None:
        self.best = best

    @override
    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if not trainer.fast_dev_run:  # type: ignore[attr-defined]
            trainer.save_checkpoint(f"{self.best.dirpath}/{LAST}")


class SavePretrained(Callback):
    """Write ``model/`` next to the checkpoints after a fit, with the weights of the best
    checkpoint, or with the last weights if there is none."""

    @override
    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        directory = _fit_folder(trainer)
        writes = trainer.is_global_zero and not trainer.fast_dev_run  # type: ignore[attr-defined]
        if directory is None or not writes or not isinstance(pl_module, DACT):
            return
        best = getattr(trainer.checkpoint_callback, "best_model_path", "")
        model = pl_module
        if best:
            model = copy.deepcopy(pl_module)
            checkpoint = DurableCheckpointIO().load_checkpoint(best, "cpu", weights_only=True)
            adopt(model, checkpoint)
            model.load_state_dict(checkpoint["state_dict"])
        folder = Path(directory) / "model"
        save_with_tokenizer(model, trainer.datamodule, folder)  # type: ignore[attr-defined]
        chosen = "" if best else ", with its last weights: no epoch was chosen"
        rank_zero_info(f"The model is in {folder}{chosen}")


def save_with_tokenizer(model: DACT, data: Any, folder: Path, **card: Any) -> None:
    """Write a model/ folder with the tokenizer of the data; `card` is as for `save_pretrained`."""
    model.save_pretrained(folder, **card)
    tokenizer = tokenizer_of(data)
    if tokenizer is not None:
        tokenizer.save_pretrained(str(folder))


def _fit_folder(trainer: Trainer) -> str | None:
    """Return the folder of a fit: the parent of ``checkpoints``, or else the first logger's."""
    # Most loggers share one log_dir among all fits.
    checkpoints = str(getattr(trainer.checkpoint_callback, "dirpath", None) or "")
    if "://" not in checkpoints and Path(checkpoints).name == "checkpoints":
        return str(Path(checkpoints).parent)
    return trainer.log_dir
