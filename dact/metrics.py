"""The metrics of adaptive depth, added up over batches and processes."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from dact.outputs import DACTOutput
from dact.tasks import Task, at_least_float32

# Values of a batch, averaged over examples.
AVERAGED = ("loss", "task_loss", "ponder_cost", "agreement")


def count_classes(task: Task, decisions: Tensor, labels: Tensor, classes: int) -> Tensor:
    """Return how many examples have, get, and correctly get each class, int64 ``[3, classes]``."""
    given, got = task.members(labels, classes), task.members(decisions, classes)
    return torch.stack([given.sum(dim=0), got.sum(dim=0), (given & got).sum(dim=0)])


def macro_f1(counts: Tensor) -> Tensor:
    """Return the mean F1 score of the classes that occur or are answered, from `count_classes`."""
    given, got, hits = counts[:, counts[:2].sum(dim=0) > 0]
    return (2 * hits / (given + got)).mean()


class LoaderMetrics:
    """Sums over the examples of one loader.

    Attributes:
        exits: Examples that left after each layer, int64 ``[layers]``.
        correct: Examples whose decision by a_n is right, int64 ``[layers]``.
        counts: Counts of `count_classes`, int64 ``[3, classes]``.
        right: Examples whose decision by early exit is right, int64.
    """

    def __init__(self, task: Task, classes: int, layers: int, device: torch.device) -> None:
        self.task = task
        self.sums: Tensor | float = 0.0  # of AVERAGED
        self.exits = torch.zeros(layers, dtype=torch.long, device=device)
        self.correct = torch.zeros_like(self.exits)
        self.counts = torch.zeros(3, classes, dtype=torch.long, device=device)
        self.right = self.exits.sum()

    def update(
        self,
        target: Tensor,
        a: Tensor,
        early: DACTOutput,
        loss: Tensor,
        task_loss: Tensor,
        ponder_cost: Tensor,
    ) -> None:
        """Add a batch, given by its labels, the answers a after each layer, the output of early
        exit, and means over the batch."""
        task, layers = self.task, self.task.decide(a)
        decisions = task.decide(early.probabilities)
        agreement = task.same(decisions, layers[:, -1]).float().mean()
        means = torch.stack([loss, task_loss, ponder_cost, agreement.to(loss.dtype)])
        self.sums = self.sums + at_least_float32(means) * len(target)
        self.exits += torch.bincount(early.exit_layer - 1, minlength=len(self.exits))
        self.correct += task.same(layers, target.unsqueeze(1)).sum(dim=0)
        self.right += task.same(decisions, target).sum()
        self.counts += count_classes(task, decisions, target, a.shape[-1])

    def add_up(self, strategy: Any) -> None:
        """Replace each sum by its total over all processes of a Trainer's strategy."""
        for name in ("sums", "exits", "correct", "counts", "right"):
            setattr(self, name, strategy.reduce(getattr(self, name), reduce_op="sum"))

    def compute(self) -> dict[str, Tensor]:
        """Return the metrics by name, all scalars, including ``layer_accuracy/n`` of each layer."""
        examples = self.exits.sum()
        layers = torch.arange(1, len(self.exits) + 1, device=self.exits.device)
        found = dict(zip(AVERAGED, self.sums / examples, strict=True))  # type: ignore[arg-type]
        found["accuracy"] = self.right / examples
        found["macro_f1"] = macro_f1(self.counts)
        found |= self.task.set_scores(self.counts, examples)
        found["exit_layer"] = (self.exits * layers).sum() / examples
        accuracies = enumerate(self.correct / examples, start=1)
        return found | {f"layer_accuracy/{n}": accuracy for n, accuracy in accuracies}
