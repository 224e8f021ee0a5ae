"""Callbacks that draw exits, average weights and save the finished model."""

from __future__ import annotations

import copy
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import Checkpoint, ModelCheckpoint, WeightAveraging
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities.rank_zero import rank_zero_info  # type: ignore[attr-defined]
from torch import Tensor
from torch.optim.swa_utils import AveragedModel
from typing_extensions import override

from dact import plots
from dact.agreement import tokenizer_of
from dact.checks import check_range
from dact.files import read_checkpoint
from dact.model import DACT
from dact.optimization import optimizer_steps
from dact.saving import adopt

LAST = "last.ckpt"  # checkpoint of the last epoch, from which a fit resumes


class ExitPlots(Callback):
    """Draw the exit layers of the examples of the first loader for TensorBoard after each
    validation epoch.

    It draws a histogram of exit layers and, if batches have an entry ``depth``, a figure of depth
    against exit layer."""

    def __init__(self) -> None:
        self._depths: list[Tensor] = []
        self._exits: list[Tensor] = []

    @override
    def on_validation_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._depths, self._exits = [], []

    @override
    def on_validation_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        if (
            dataloader_idx == 0
            and isinstance(outputs, Mapping)
            and "depth" in batch
            and "exit_layer" in outputs
        ):
            self._depths.append(batch["depth"].cpu())
            self._exits.append(outputs["exit_layer"].cpu())

    @override
    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        writer = next(
            (log.experiment for log in trainer.loggers if isinstance(log, TensorBoardLogger)), None
        )
        if (
            writer is None
            or not trainer.is_global_zero
            or trainer.sanity_checking
            or not isinstance(pl_module, DACT)
        ):
            return
        if pl_module.exit_histogram is None:  # a step of one's own measures something else
            return
        counts = pl_module.exit_histogram.cpu()
        layers = torch.arange(1, len(counts) + 1).repeat_interleave(counts)
        edges = [n + 0.5 for n in range(len(counts) + 1)]
        writer.add_histogram("exit_layer", layers, trainer.current_epoch, bins=edges)
        if self._depths:
            figure = plots.depth_against_exit(
                torch.cat(self._depths), torch.cat(self._exits), len(counts)
            )
            writer.add_figure("depth against exit layer", figure, trainer.current_epoch, close=True)


class AverageLastSteps(WeightAveraging):
    """Keep the mean of the weights over the last steps of a fit, instead of those of the last step.

    The mean is that of stochastic weight averaging (Izmailov et al. 2018, *Averaging Weights Leads
    to Wider Optima and Better Generalization*), under the learning rate that the model has. From
    the first of these steps on, validation and checkpoints have it as well. A fit that ends before,
    or whose number of steps is not known, keeps its weights.

    Args:
        share: Share of the optimizer steps whose weights are averaged, in (0, 1].

    Raises:
        ValueError: From the fit, if another callback keeps checkpoints of the weights alone, which
            would not be the mean.
    """

    def __init__(self, share: float = 0.2) -> None:
        check_range(
            "AverageLastSteps: share", share, "(0, 1]", "it is a share of the optimizer steps"
        )
        super().__init__()
        self.share = share
        self._before = math.inf  # number of steps after which the mean begins

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if stage == "fit" and any(
            getattr(one, "save_weights_only", False) for one in trainer.checkpoint_callbacks
        ):
            raise ValueError(
                "AverageLastSteps: a checkpoint callback with save_weights_only=True keeps the weights of the last "
                "step instead of their mean: leave that option out"
            )
        self._average_model = None  # it begins later, on the device of the model
        self._latest_update_step = 0

    @override
    def on_load_checkpoint(
        self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        if (
            trainer.state.fn == TrainerFn.FITTING and "averaging_state" in checkpoint
        ):  # elsewhere the mean is all
            self._average_model = AveragedModel(pl_module)
            super().on_load_checkpoint(trainer, pl_module, checkpoint)

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        steps = optimizer_steps(trainer)
        self._before = (1 - self.share) * steps if 0 < steps < math.inf else math.inf
        if (
            trainer.global_step <= self._before
        ):  # a mean that began under an earlier end, before epochs were added
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
    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._average_model is not None:
            super().on_train_end(trainer, pl_module)

    @override
    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._average_model is not None:  # again, for a fit that was complete when it resumed
            self._copy_average_to_current(pl_module)
            self._average_model = None

    @override
    def on_save_checkpoint(
        self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        if self._average_model is not None:
            super().on_save_checkpoint(trainer, pl_module, checkpoint)


class MovableCheckpoint(ModelCheckpoint):
    """A `ModelCheckpoint` that remembers the best score in a fit that resumes after its folder was
    moved.

    Lightning's forgets it, and would overwrite the best checkpoint in the next epoch.
    """

    _resumed_from: str | None = None

    @property
    @override
    def state_key(self) -> str:
        return super().state_key.replace(
            type(self).__qualname__, "ModelCheckpoint", 1
        )  # as other checkpoints have it

    @override
    def on_load_checkpoint(
        self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        self._resumed_from = None if trainer.ckpt_path is None else str(trainer.ckpt_path)

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        before, now = state_dict.get("dirpath"), self.dirpath
        folder = os.path.dirname(self._resumed_from or "")

        def moved(path: str) -> str:
            return f"{now}{path[len(before) :]}" if before and path.startswith(before) else path

        # Else the checkpoint of another fit is only where this one starts.
        if (
            now
            and before != now
            and (folder == now or os.path.realpath(folder) == os.path.realpath(now))
        ):
            paths = ("best_model_path", "kth_best_model_path", "last_model_path")
            state_dict = {
                **state_dict,
                **{name: moved(state_dict[name]) for name in paths if name in state_dict},
                "best_k_models": {
                    moved(path): score for path, score in state_dict["best_k_models"].items()
                },
                "dirpath": now,
            }
        super().load_state_dict(state_dict)


class LastCheckpoint(Checkpoint):
    """Write ``last.ckpt`` after each epoch, next to the checkpoints of another callback.

    Lightning's ``save_last=True`` writes it only in epochs that are the best so far. Loggers that
    upload checkpoints would upload each file of a second `ModelCheckpoint`, under the name of the
    best one.

    Args:
        best: The other callback, which comes first.
    """

    def __init__(self, best: ModelCheckpoint) -> None:
        self.best = best

    @override
    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if not trainer.fast_dev_run:  # type: ignore[attr-defined]
            trainer.save_checkpoint(f"{self.best.dirpath}/{LAST}")


class SavePretrained(Callback):
    """Write ``model/`` (weights, configuration, tokenizer, class names) next to the checkpoints
    after a fit.

    The weights are those of the best checkpoint, or the last ones if the trainer keeps no
    checkpoint."""

    @override
    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        directory = _fit_folder(trainer)
        if (
            not trainer.is_global_zero
            or directory is None
            or getattr(trainer, "fast_dev_run", False)
            or not isinstance(pl_module, DACT)
        ):
            return
        best = getattr(trainer.checkpoint_callback, "best_model_path", "")
        model = pl_module
        if best:
            try:
                model = type(pl_module).load_from_checkpoint(best)
            except (
                ValueError
            ):  # an encoder of one's own, or one that was changed, which no checkpoint can rebuild
                model, checkpoint = copy.deepcopy(pl_module), read_checkpoint(Path(best))
                adopt(model, checkpoint)
                model.load_state_dict(checkpoint["state_dict"])
        folder = Path(directory) / "model"
        save_with_tokenizer(model, trainer.datamodule, folder)  # type: ignore[attr-defined]
        chosen = "" if best else ", with its last weights: no epoch was chosen"
        rank_zero_info(f"The model is in {folder}{chosen}")


def save_with_tokenizer(model: DACT, data: Any, folder: Path, **card: Any) -> None:
    """Write a model/ folder: the model, and the tokenizer of its datamodule if there is one.

    Args:
        model: The model.
        data: The datamodule.
        folder: Folder to write to.
        **card: Content of the model card; see `DACT.save_pretrained`.
    """
    model.save_pretrained(folder, **card)
    tokenizer = tokenizer_of(data)
    if tokenizer is not None:
        tokenizer.save_pretrained(str(folder))


def _fit_folder(trainer: Trainer) -> str | None:
    """Return the folder of a fit: the parent of ``checkpoints``, or else where the first logger
    writes."""
    # Only TensorBoard and csv loggers have a log_dir per fit; other loggers have one folder for all
    # fits.
    checkpoints = getattr(trainer.checkpoint_callback, "dirpath", None)
    if (
        checkpoints is not None
        and "://" not in str(checkpoints)
        and Path(checkpoints).name == "checkpoints"
    ):
        return str(Path(checkpoints).parent)
    return trainer.log_dir
