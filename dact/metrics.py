"""The metrics of adaptive depth, added up over batches and processes."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from dact.functional import at_least_float32
from dact.outputs import DACTOutput

# Values of a batch, averaged over examples.
AVERAGED = ("loss", "task_loss", "ponder_cost", "agreement")


class LoaderMetrics:
    """Sums over the examples of one loader.

    Attributes:
        exits: Examples that left after each layer, int64 ``[layers]``.
        correct: Examples whose class by a_n is right, int64 ``[layers]``.
        confusion: Examples by label and returned class, int64 ``[classes, classes]``.
    """

    def __init__(self, classes: int, layers: int, device: torch.device) -> None:
        self.sums: Tensor | float = 0.0  # of AVERAGED
        self.exits = torch.zeros(layers, dtype=torch.long, device=device)
        self.correct = torch.zeros_like(self.exits)
        self.confusion = torch.zeros(classes, classes, dtype=torch.long, device=device)

    def update(
        self,
        target: Tensor,
        a: Tensor,
        early: DACTOutput,
        loss: Tensor,
        task_loss: Tensor,
        ponder_cost: Tensor,
    ) -> None:
        """Add a batch: its classes int64 ``[batch]``, the answers a after each layer and those of
        early exit, and means over the batch."""
        answers, classes = early.probabilities.argmax(dim=1), len(self.confusion)
        agreement = (answers == a[:, -1].argmax(dim=1)).float().mean()
        means = torch.stack([loss, task_loss, ponder_cost, agreement.to(loss.dtype)])
        self.sums = self.sums + at_least_float32(means) * len(target)
        self.exits += torch.bincount(early.exit_layer - 1, minlength=len(self.exits))
        self.correct += (a.argmax(dim=2) == target.unsqueeze(1)).sum(dim=0)
        pairs = torch.bincount(target.long() * classes + answers, minlength=classes**2)
        self.confusion += pairs.reshape(classes, classes)

    def add_up(self, strategy: Any) -> None:
        """Replace the sums by those of all processes of a Trainer's strategy."""
        for name in ("sums", "exits", "correct", "confusion"):
            setattr(self, name, strategy.reduce(getattr(self, name), reduce_op="sum"))

    def compute(self) -> dict[str, Tensor]:
        """Return the metrics by name: scalars, among them ``layer_accuracy/n`` of each layer."""
        examples, hits = self.exits.sum(), self.confusion.diag()
        # Classes that neither occur nor are returned do not count, as in torchmetrics.
        both = self.confusion.sum(dim=0) + self.confusion.sum(dim=1)
        layers = torch.arange(1, len(self.exits) + 1, device=self.exits.device)
        found = dict(zip(AVERAGED, self.sums / examples, strict=True))  # type: ignore[arg-type]
        found["accuracy"] = hits.sum() / examples
        found["macro_f1"] = (2 * hits[both > 0] / both[both > 0]).mean()
        found["exit_layer"] = (self.exits * layers).sum() / examples
        accuracies = enumerate(self.correct / examples, start=1)
        return found | {f"layer_accuracy/{n}": accuracy for n, accuracy in accuracies}
