"""The answers of all layers to labelled examples, and early exit measured on them."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Literal

import torch
from torch import Tensor

from dact import functional, signals
from dact.encoders.base import Batch, move
from dact.functional import Halting
from dact.metrics import count_classes, macro_f1
from dact.model import DACT, labels_of
from dact.tasks import MULTICLASS, Task

Dial = Literal["halting_tolerance", "halting_margin"]


@dataclass(frozen=True, eq=False)
class LayerAnswers:
    """The answers of all layers to labelled examples, on the CPU.

    Args:
        a: ``[examples, layers, classes]``, as `dact.functional.accumulate` returns it.
        p: ``[examples, layers]``, from the same function.
        y: ``[examples, layers, classes]``, the layers' own classifications.
        target: Labels of the examples, int64 ``[examples]``.
        task: Task of the answers.
    """

    a: Tensor
    p: Tensor
    y: Tensor
    target: Tensor
    task: Task = MULTICLASS

    @property
    def num_layers(self) -> int:
        return self.p.shape[1]

    @cached_property
    def classes(self) -> Tensor:
        """The decision after each layer, for classes int64 ``[examples, layers]``."""
        return self.task.decide(self.a)

    def exit_layers(self, halting: Halting) -> Tensor:
        """Return where each example leaves under `halting`, int64 ``[examples]``, 1-based."""
        return halting.exit_layers(self.a, self.p, self.y, self.task)

    def take(self, rows: Tensor) -> LayerAnswers:
        """Return the examples of `rows`, int64 ``[rows]``, in that order."""
        parts = {name: getattr(self, name)[rows] for name in ("a", "p", "y", "target")}
        return replace(self, **parts)


@dataclass(frozen=True, eq=False)
class Measured:
    """Early exit at given layers, measured on labelled examples.

    Args:
        answers: Answers of all layers to the examples.
        exits: Exit layers of the examples, int64 ``[examples]``, 1-based.
    """

    answers: LayerAnswers
    exits: Tensor

    @cached_property
    def probabilities(self) -> Tensor:
        """The answers of early exit, ``[examples, classes]``."""
        return functional.answer_at(self.answers.a, self.exits)

    @cached_property
    def classes(self) -> Tensor:
        """The decisions that early exit returns, for classes int64 ``[examples]``."""
        return functional.answer_at(self.answers.classes, self.exits)

    @property
    def full(self) -> Tensor:
        """The decisions of all layers, for classes int64 ``[examples]``."""
        return self.answers.classes[:, -1]

    @cached_property
    def full_depth(self) -> Measured:
        """The same examples, measured after all layers."""
        return Measured(self.answers, torch.full_like(self.exits, self.answers.num_layers))

    @cached_property
    def right(self) -> Tensor:
        """Whether early exit classifies each example correctly, bool ``[examples]``."""
        return self.answers.task.same(self.classes, self.answers.target)

    @cached_property
    def changed(self) -> Tensor:
        """Whether early exit decides differently from all layers, bool ``[examples]``."""
        return ~self.answers.task.same(self.classes, self.full)

    @cached_property
    def counts(self) -> Tensor:
        """How many examples have, get, and correctly get each class, int64 ``[3, classes]``."""
        task, classes = self.answers.task, self.answers.a.shape[2]
        return count_classes(task, self.classes, self.answers.target, classes)

    @property
    def accuracy(self) -> float:
        """The share of examples that are classified correctly."""
        return share(self.right)

    @property
    def agreement(self) -> float:
        """The share of examples that get the class of all layers."""
        return share(~self.changed)

    @property
    def macro_f1(self) -> float:
        """The mean F1 score of the classes that occur."""
        return macro_f1(self.counts).item()

    @property
    def set_scores(self) -> dict[str, float]:
        """The micro F1 score and the Hamming loss of sets of labels; empty for classes."""
        found = self.answers.task.set_scores(self.counts, len(self.exits))
        return {name: value.item() for name, value in found.items()}

    @property
    def majority_share(self) -> float:
        """The share of examples that get the most frequent decision."""
        _, counts = self.classes.unique(dim=0, return_counts=True)
        return counts.max().item() / len(self.classes)

    @property
    def mean_exit_layer(self) -> float:
        """The mean exit layer, in [1, layers]."""
        return self.exits.double().mean().item()

    @property
    def exit_histogram(self) -> list[int]:
        """The number of examples that leave after each layer, one entry per layer."""
        return (self.exits - 1).bincount(minlength=self.answers.num_layers).tolist()

    def losses(self, class_weights: Tensor | None = None) -> Tensor:
        """Return the task loss of each example, ``[examples]``; see `functional.task_loss`."""
        task, a = self.answers.task, self.probabilities
        likelihoods = task.outcomes(a.float()).clamp_min(functional.SMALLEST_PROBABILITY)
        target = task.targets(self.answers.target, a.shape[1])
        weights = task.weights(class_weights)
        weighted = target if weights is None else target * weights.cpu()
        return -(weighted * likelihoods.log()).sum(dim=1)

    def task_loss(self, class_weights: Tensor | None = None) -> float:
        """Return the mean of `losses`."""
        return self.losses(class_weights).mean().item()

    def difference(self, reference_right: Tensor) -> tuple[float, float]:
        """Return the accuracy minus a reference's accuracy, and the paired standard error;
        `reference_right` says whether the reference is correct, bool ``[examples]``."""
        return mean_and_error(self.right.double() - reference_right.double())


def check_finite(probabilities: Tensor) -> None:
    """Raise a ``ValueError`` if a probability is not a number: `argmax` would take the first
    class."""
    if not probabilities.isfinite().all():
        raise ValueError(
            "the model's answers are not finite: run it in bfloat16 or float32, or train it again "
            "with a smaller learning rate"
        )


@torch.no_grad()
def layer_answers(model: DACT, batches: Iterable[Batch]) -> LayerAnswers:
    """Return the answers of all layers to labelled batches.

    Raises:
        ValueError: If a label is no class, or an answer is not finite.
    """
    parts: dict[str, list[Tensor]] = defaultdict(list)
    for batch in batches:
        signals.check()
        target = labels_of(batch, "calibration or a test")
        # raises for a label that is no class
        model.task.targets(target, model.output_dimension)
        output = model.full_depth(move(batch, model.device))
        assert output.layer_probabilities is not None
        assert output.h is not None
        a, p = functional.accumulate(output.layer_probabilities, output.h)
        check_finite(a)
        found = {"a": a, "p": p, "y": output.layer_probabilities, "target": target.long()}
        for name, tensor in found.items():
            parts[name].append(tensor.cpu())
    joined = {name: torch.cat(tensors) for name, tensors in parts.items()}
    return LayerAnswers(**joined, task=model.task)


def exits_by_setting(
    answers: LayerAnswers, halting: Halting, dial: Dial
) -> Callable[[float], Tensor]:
    """Return a function from settings of a dial to exit layers, int64 ``[examples]``.

    Its results are those of `LayerAnswers.exit_layers`, hundreds of times as fast.
    """
    # With one class per example, both criteria need only the first and second class.
    task, p = answers.task, answers.p
    a, y = task.contenders(answers.a), task.contenders(functional.at_least_float32(answers.y))
    if dial == "halting_tolerance":
        return lambda tolerance: replace(halting, tolerance=tolerance).exit_layers(a, p, y, task)
    latest = replace(halting, margin=1.0).exit_layers(a, p, y, task)
    if halting.rule == "never":
        return lambda margin: latest
    # An example leaves at the first layer where the largest lead so far exceeds the margin: one
    # more than the number of layers where it does not.
    lead = task.lead(y).cummax(dim=1).values  # [examples, layers]

    def exits(margin: float) -> Tensor:
        return torch.minimum(latest, (lead <= margin).sum(dim=1) + 1) if margin < 1 else latest

    return exits


def mean_and_error(values: Tensor) -> tuple[float, float]:
    """Return the mean of `values` ``[examples]`` (two or more) and its standard error."""
    values = values.double()
    return values.mean().item(), values.std().item() / len(values) ** 0.5


def careful_mean_and_error(
    values: Tensor, low: float = -1.0, high: float = 1.0
) -> tuple[float, float]:
    """Return the mean of `values` in [low, high], and their standard error with one value added at
    either end. Without these, a few equal values would have an error of 0 (Bonett & Price 2012,
    *Adjusted Wald Confidence Interval for a Difference of Binomial Proportions*)."""
    more = torch.cat([values.double(), values.new_tensor([low, high], dtype=torch.float64)])
    return values.double().mean().item(), mean_and_error(more)[1]


def share(flags: Tensor) -> float:
    """Return the share of bool `flags` that are set."""
    return flags.double().mean().item()
