"""The metrics of validation and test, per loader, and their logging."""

from __future__ import annotations

from collections.abc import Set
from typing import Any

import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.utilities.rank_zero import rank_zero_warn  # type: ignore[attr-defined]
from torch import Tensor, nn
from torchmetrics import MeanMetric

from dact import functional
from dact.encoders.base import Batch, check_batch
from dact.functional import Halting, PonderKind
from dact.metrics import AVERAGED, SCALARS, collapse, evaluation_metrics
from dact.outputs import DACTOutput


class MetricLogging(LightningModule):
    """The part of DACT that computes and logs metrics.

    Metrics of the first loader are ``val_loss`` and so on; those of further loaders end in
    ``/dataloader_idx_1`` and so on."""

    output_dimension: int
    num_layers: int
    lambda_reg: float
    exit_rule: Halting
    ponder: PonderKind
    class_weights: Tensor | None
    _shown_settings: Set[str] = frozenset()  # hyper-parameters that `show_settings` has saved
    exit_histogram: Tensor | None = None  # of the first loader of the last evaluation

    def on_fit_end(self) -> None:
        value = self.trainer.callback_metrics.get("val_exit_layer")
        if value is None or self.num_layers == 1 or self.exit_rule.rule == "never":
            return
        warning = collapse(value.item(), self.num_layers, self.lambda_reg, self.exit_rule.margin)
        if warning is not None:
            rank_zero_warn(warning)

    def make_metrics(self) -> None:
        """Make the metrics; the constructor calls this when it knows classes and layers."""
        # One set each: sanity checks and a test inside a fit must not add to the counts of
        # validation.
        self.val_metrics = evaluation_metrics(self.output_dimension, self.num_layers)
        self.test_metrics = evaluation_metrics(self.output_dimension, self.num_layers)
        self.more_metrics = nn.ModuleDict()  # of further loaders, as they come

    def show_settings(self, settings: dict[str, Any]) -> None:
        """Give the loggers the settings of the model, except for names that the datamodule has:
        they want one value.

        Hyper-parameters that a subclass has saved stay as they are.
        """
        taken = getattr(getattr(self._trainer, "datamodule", None), "hparams", {})
        settings["encoder"] = {
            k: v for k, v in (settings["encoder"] or {}).items() if not isinstance(v, dict)
        }
        own = self.hparams.keys() - self._shown_settings
        for name in self._shown_settings & self.hparams.keys() & taken.keys():
            del self.hparams[name]
        shown = {name: value for name, value in settings.items() if name not in {*taken, *own}}
        self._shown_settings = set(shown)
        self.save_hyperparameters(shown)

    def _metrics_of(self, stage: str, loader: int) -> tuple[str, Any]:
        """Return the metrics of one loader and the attribute that holds them."""
        if loader == 0:
            return f"{stage}_metrics", getattr(self, f"{stage}_metrics")
        name = f"{stage}{loader}"
        if name not in self.more_metrics:
            self.more_metrics[name] = evaluation_metrics(self.output_dimension, self.num_layers).to(
                self.device
            )
            _reset(self.more_metrics[name])
        return f"more_metrics.{name}", self.more_metrics[name]

    def measure(
        self, stage: str, batch: Batch, full: DACTOutput, early: DACTOutput | None, loader: int
    ) -> dict[str, Tensor]:
        """Update and log the metrics of full depth and of early exit, which is derived from `full`
        if `early` is None.

        Returns:
            The loss, the exit layers ``[batch]``, y ``[batch, layers, classes]`` and h ``[batch,
            layers]``, for callbacks.
        """
        target = labels_of(batch, stage)
        soft = functional.soft_targets(target, self.output_dimension)
        assert full.layer_probabilities is not None
        assert full.h is not None
        assert full.p is not None
        a, _ = functional.accumulate(full.layer_probabilities, full.h)
        early = early or DACTOutput(functional.answer_at(a, full.exit_layer), full.exit_layer)
        if (target == functional.UNLABELLED).any():
            raise ValueError(
                f"a batch for {stage} has the label {functional.UNLABELLED}: only training takes unlabelled examples"
            )
        ponder_cost = functional.ponder_cost(full.p, full.h, self.ponder)
        loss = (
            functional.task_loss(a[:, -1], soft, self.class_weights) + self.lambda_reg * ponder_cost
        )
        task_loss = functional.task_loss(early.probabilities, soft, self.class_weights)
        agreement = (early.probabilities.argmax(dim=1) == a[:, -1].argmax(dim=1)).float().mean()

        attribute, metrics = self._metrics_of(stage, loader)
        for name, value in zip(AVERAGED, (loss, task_loss, ponder_cost, agreement), strict=True):
            # One value per example: without its NaN check, torchmetrics takes no weights.
            metrics[name].update(value.expand(len(target)))
        metrics["exit_layer"].update(early.exit_layer.float())
        metrics["exit_histogram"].update(
            torch.bincount(early.exit_layer - 1, minlength=self.num_layers)
        )
        metrics["correct"].update((a.argmax(dim=2) == target.unsqueeze(1)).sum(dim=0))
        for name in ("accuracy", "macro_f1"):
            metrics[name].update(early.probabilities, target)
        for name in SCALARS:
            self.log(
                f"{stage}_{name}{_suffix(loader)}",
                metrics[name],
                on_step=False,
                on_epoch=True,
                prog_bar=loader == 0 and name in ("loss", "accuracy", "exit_layer"),
                metric_attribute=f"{attribute}.{name}",
                add_dataloader_idx=False,
            )
        return {
            "loss": loss,
            "exit_layer": early.exit_layer,
            "layer_probabilities": full.layer_probabilities,
            "h": full.h,
        }

    def _begin_evaluation(self, stage: str) -> None:
        """Reset all metrics: Lightning resets only scalars, and after `validate` to tensors that no
        fit can update."""
        for loader in self._loaders(stage):
            _reset(self._metrics_of(stage, loader)[1])

    def _end_evaluation(self, stage: str) -> None:
        """Log the accuracy per layer, and keep the exit histogram of the first loader for
        callbacks."""
        for loader in self._loaders(stage):
            metrics = self._metrics_of(stage, loader)[1]
            if not metrics[
                "correct"
            ].update_called:  # fewer loaders than before, or a step that does not `measure`
                self.exit_histogram = self.exit_histogram if loader else None
                continue
            # torchmetrics turns a vector of one entry into a scalar: an encoder of one layer.
            exits, correct = (
                metrics[name].compute().reshape(-1) for name in ("exit_histogram", "correct")
            )
            if not loader:
                self.exit_histogram = exits.clone()
            values = enumerate(correct / exits.sum(), start=1)
            names = {f"{stage}_layer_accuracy{_suffix(loader)}/{n}": value for n, value in values}
            self.log_dict(
                names, on_step=False, on_epoch=True, sync_dist=False, add_dataloader_idx=False
            )

    def _loaders(self, stage: str) -> list[int]:
        return [
            0,
            *(
                int(name.removeprefix(stage))
                for name in self.more_metrics
                if name.startswith(stage)
            ),
        ]

    def on_validation_epoch_start(self) -> None:
        self._begin_evaluation("val")

    def on_test_epoch_start(self) -> None:
        self._begin_evaluation("test")

    def on_validation_epoch_end(self) -> None:
        self._end_evaluation("val")

    def on_test_epoch_end(self) -> None:
        self._end_evaluation("test")


def labels_of(batch: Batch, stage: str) -> Tensor:
    """Return the labels of a batch, or raise an error that says what the batch is."""
    check_batch(batch)
    labels, ids = batch.get("labels"), batch.get("input_ids")
    if not isinstance(labels, Tensor):
        raise KeyError(
            f"a batch for {stage} needs 'labels' [batch], a tensor, got the keys {sorted(batch)}"
        )
    if isinstance(ids, Tensor) and labels.dim() and len(labels) != len(ids):
        raise ValueError(
            f"labels must be one integer per example, [{len(ids)}], got {list(labels.shape)}"
        )
    return labels


def teacher_of(batch: Batch, share: float) -> Tensor | None:
    """Return the teacher's probabilities of a batch, or None if its share is 0.

    Raises:
        KeyError: If the batch has none.
    """
    if share > 0 and "teacher" not in batch:
        raise KeyError(
            f"distillation={share:g} needs 'teacher' [batch, classes] in training batches, got the keys "
            f"{sorted(batch)}: give the data a teacher, or set distillation to 0"
        )
    return batch["teacher"] if share > 0 else None


def _reset(metrics: Any) -> None:
    """Reset metrics, in single precision at least: a sum in half precision soon stops growing."""
    for metric in metrics.values():
        if isinstance(metric, MeanMetric) and metric.weight.dtype in (
            torch.float16,
            torch.bfloat16,
        ):
            metric.set_dtype(torch.float32)
        metric.reset()


def _suffix(loader: int) -> str:
    """Return the suffix by which Lightning names the metrics of further loaders, empty for the
    first."""
    return f"/dataloader_idx_{loader}" if loader else ""
