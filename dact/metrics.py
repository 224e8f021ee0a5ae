"""Metrics of adaptive depth. They are torchmetrics metrics, so that they add up over batches and
processes."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torchmetrics import Metric
from torchmetrics.aggregation import MeanMetric
from torchmetrics.classification import MulticlassAccuracy, MulticlassF1Score


class LayerCounts(Metric):
    """Add up counts of examples per layer.

    Args:
        num_layers: Number of layers of the model, N.

    Example:
        >>> counts = LayerCounts(num_layers=3)
        >>> counts.update(torch.tensor([1, 0, 2]))
        >>> counts.compute()
        tensor([1, 0, 2])
    """

    full_state_update = False
    counts: Tensor

    def __init__(self, num_layers: int, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.add_state(
            "counts", default=torch.zeros(num_layers, dtype=torch.long), dist_reduce_fx="sum"
        )

    def update(self, counts: Tensor) -> None:
        """Add the counts of a batch, int64 ``[layers]``."""
        self.counts += counts

    def compute(self) -> Tensor:
        """Return the sums, int64 ``[layers]``."""
        return self.counts


AVERAGED = (
    "loss",
    "task_loss",
    "ponder_cost",
    "agreement",
)  # values of a batch, averaged over examples
SCALARS = (*AVERAGED, "accuracy", "macro_f1", "exit_layer")


def evaluation_metrics(classes: int, layers: int) -> nn.ModuleDict:
    """Return the metrics of one evaluation: `SCALARS`, and per layer ``exit_histogram`` and the
    ``correct`` a_n."""
    # By default a mean ignores NaN, which would hide a broken model.
    means = {name: MeanMetric(nan_strategy="disable") for name in (*AVERAGED, "exit_layer")}
    return nn.ModuleDict(
        {
            **means,
            "accuracy": MulticlassAccuracy(classes, average="micro", validate_args=False),
            "macro_f1": MulticlassF1Score(classes, average="macro", validate_args=False),
            "exit_histogram": LayerCounts(layers),
            "correct": LayerCounts(layers),
        }
    )


def collapse(mean_exit_layer: float, layers: int, lambda_reg: float, margin: float) -> str | None:
    """Return a warning for a model that always leaves after the first or after the last layer, None
    for any other."""
    if mean_exit_layer == 1.0:
        where, remedy = "the first layer", f"Try a smaller lambda_reg than {lambda_reg:g}"
        remedy += ", or a larger halting_margin" if margin < 1 else ""
    elif mean_exit_layer == float(layers):
        where, remedy = f"all {layers} layers", f"Try a larger lambda_reg than {lambda_reg:g}"
        remedy += f", or a halting_margin below {margin:g}"
    else:
        return None
    return f"the depth has collapsed: every validation example uses {where}. {remedy}"
