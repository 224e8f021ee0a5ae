"""The answers of all layers to labelled examples, and early exit measured on them."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor
from torchmetrics.functional.classification import multiclass_f1_score

from dact import functional, signals
from dact.encoders.base import Batch, move
from dact.functional import Halting
from dact.model import DACT, labels_of

Dial = Literal["halting_tolerance", "halting_margin"]


@dataclass(frozen=True, eq=False)
class LayerAnswers:
    """The answers of all layers to labelled examples, on the CPU.

    Args:
        a: ``[examples, layers, classes]``, as `dact.functional.accumulate` returns it.
        p: ``[examples, layers]``, from the same function.
        y: ``[examples, layers, classes]``, the layers' own classifications.
        target: Classes of the examples, int64 ``[examples]``.
    """

    a: Tensor
    p: Tensor
    y: Tensor
    target: Tensor

    @property
    def num_layers(self) -> int:
        return self.p.shape[1]

    @cached_property
    def classes(self) -> Tensor:
        """The most probable class after each layer, int64 ``[examples, layers]``."""
        return self.a.argmax(dim=2)

    def exit_layers(self, halting: Halting) -> Tensor:
        """Return where each example leaves under `halting`, int64 ``[examples]``, 1-based."""
        return halting.exit_layers(self.a, self.p, self.y)

    def take(self, rows: Tensor) -> LayerAnswers:
        """Return the examples of `rows`, int64 ``[rows]``, in that order."""
        return LayerAnswers(self.a[rows], self.p[rows], self.y[rows], self.target[rows])


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
        """The classes that early exit returns, int64 ``[examples]``."""
        return functional.answer_at(self.answers.classes, self.exits)

    @property
    def full(self) -> Tensor:
        """The classes that all layers give, int64 ``[examples]``."""
        return self.answers.classes[:, -1]

    @cached_property
    def full_depth(self) -> Measured:
        """The same examples, measured after all layers."""
        return Measured(self.answers, torch.full_like(self.exits, self.answers.num_layers))

    @cached_property
    def right(self) -> Tensor:
        """Whether early exit classifies each example correctly, bool ``[examples]``."""
        return self.classes == self.answers.target

    @property
    def accuracy(self) -> float:
        """The share of examples that are classified correctly."""
        return share(self.right)

    @property
    def agreement(self) -> float:
        """The share of examples that get the class of all layers."""
        return share(self.classes == self.full)

    @property
    def macro_f1(self) -> float:
        """The mean F1 score of the classes that occur."""
        count, target = self.answers.a.shape[2], self.answers.target
        return multiclass_f1_score(self.classes, target, count, average="macro").item()

    @property
    def majority_share(self) -> float:
        """The share of the class that is returned most often."""
        return self.classes.bincount().max().item() / len(self.classes)

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
        target = self.answers.target
        log = self.probabilities.float().clamp_min(functional.SMALLEST_PROBABILITY).log()
        losses = F.nll_loss(log, target, reduction="none")
        return losses if class_weights is None else losses * class_weights.cpu()[target]

    def task_loss(self, class_weights: Tensor | None = None) -> float:
        """Return the mean of `losses`."""
        return self.losses(class_weights).mean().item()

    def difference(self, reference_right: Tensor) -> tuple[float, float]:
        """Return the accuracy minus that of a reference, with its paired standard error;
        `reference_right` is where the reference is right, bool ``[examples]``."""
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
        functional.soft_targets(target, model.output_dimension)
        output = model.full_depth(move(batch, model.device))
        assert output.layer_probabilities is not None
        assert output.h is not None
        a, p = functional.accumulate(output.layer_probabilities, output.h)
        check_finite(a)
        found = {"a": a, "p": p, "y": output.layer_probabilities, "target": target.long()}
        for name, tensor in found.items():
            parts[name].append(tensor.cpu())
    return LayerAnswers(**{name: torch.cat(tensors) for name, tensors in parts.items()})


def exits_by_setting(
    answers: LayerAnswers, halting: Halting, dial: Dial
) -> Callable[[float], Tensor]:
    """Return a function from settings of a dial to exit layers, int64 ``[examples]``.

    It returns what `LayerAnswers.exit_layers` does, hundreds of times as fast.
    """
    # The two criteria need only the first and the second class: [examples, layers, 2].
    a = answers.a.topk(2, dim=-1).values
    y = functional.at_least_float32(answers.y).topk(2, dim=-1).values
    if dial == "halting_tolerance":
        return lambda tolerance: replace(halting, tolerance=tolerance).exit_layers(a, answers.p, y)
    latest = replace(halting, margin=1.0).exit_layers(a, answers.p, y)
    if halting.rule == "never":
        return lambda margin: latest
    # By the margin, an example leaves at the first layer where the largest lead so far exceeds it.
    # That is one more than the number of layers where it does not.
    lead = (y[..., 0] - y[..., 1]).cummax(dim=1).values  # [examples, layers]

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
    """Return the mean of `values` in [low, high] and the standard error that one more value at
    either end would give, since that of a few equal values would be 0 (Bonett & Price 2012,
    *Adjusted Wald Confidence Interval for a Difference of Binomial Proportions*)."""
    more = torch.cat([values.double(), values.new_tensor([low, high], dtype=torch.float64)])
    return values.double().mean().item(), mean_and_error(more)[1]


def share(flags: Tensor) -> float:
    """Return the share of bool `flags` that are set."""
    return flags.double().mean().item()
