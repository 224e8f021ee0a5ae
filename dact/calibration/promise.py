"""Promises about early exit: what each bounds, and the evidence that it needs."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Annotated, ClassVar

from torch import Tensor

from dact.calibration import bounds
from dact.calibration.answers import Dial, Measured, careful_mean_and_error, mean_and_error
from dact.checks import Range, check_arguments
from dact.functional import Halting

# Settings that are tried, from the most layers to the fewest. The first has no effect.
SETTINGS: dict[str, tuple[float, ...]] = {
    "halting_tolerance": tuple(step / 100 for step in range(100)),
    # Geometric towards 1, where a confident classifier has most examples, up to the last number
    # below 1 in float32.
    "halting_margin": (
        1.0,
        1 - 2**-24,
        *(1 - digit * 10**-power for power in range(7, 2, -1) for digit in (1, 2, 5)),
        *(step / 100 for step in range(99, -1, -1)),
    ),
}

# Multiple of the examples an estimate needs from which gained examples offset lost ones in it:
# among fewer, luck with a few gains would hide what is lost.
MANY = 4


@dataclass(frozen=True)
class Kind(ABC):
    """A kind of promise: one value per example, and an upper bound on their mean.

    Args:
        most: Largest mean that the promise allows.
        confidence: Probability with which the bound holds; None for an estimate, the mean plus one
            standard error.
    """

    most: float
    confidence: float | None
    # whether the first setting of a dial keeps the promise by proof
    by_proof: ClassVar[bool] = True
    # share of the error probability that a nuisance parameter takes
    spent: ClassVar[float] = 0.0
    # standard error of an estimate without a fault, times the number of examples
    no_fault: ClassVar[float] = 0.0

    @abstractmethod
    def values(self, measured: Measured, baseline: Tensor | None) -> Tensor:
        """Return the value of each example, ``[examples]``; `baseline` is as for `calibrate`."""

    @abstractmethod
    def bound(self, values: Tensor, layers: int) -> float:
        """Return the upper bound on the mean of `values`, for a model of so many layers."""

    def keeps(self, values: Tensor, layers: int) -> bool:
        """Return whether the bound is within the promise."""
        return self.bound(values, layers) <= self.most

    def examples_needed(self) -> int:
        """Return what `Promise.examples_needed` returns."""
        if self.confidence is None:
            return 2
        error = (1 - self.confidence) * (1 - self.spent)
        return bounds.examples_for_rate(self.most, 1 - error)

    def examples_for_an_estimate(self) -> int:
        """Return the fewest examples without a fault by which an estimate moves the dial."""
        return max(2, math.ceil(self.no_fault / max(self.most, 1e-9) - 1.5))


class AccuracyLoss(Kind):
    """The loss of accuracy below all layers, or below a baseline: 1, 0 or -1 per example."""

    spent, no_fault = bounds.NUISANCE_SHARE, math.sqrt(2)

    def values(self, measured: Measured, baseline: Tensor | None) -> Tensor:
        reference = measured.full if baseline is None else baseline
        lost = (reference == measured.answers.target).int() - measured.right.int()
        few = self.confidence is None and len(lost) < MANY * self.examples_for_an_estimate()
        return lost.clip(min=0) if few and baseline is None else lost

    def bound(self, values: Tensor, layers: int) -> float:
        if self.confidence is None:
            return sum(careful_mean_and_error(values))
        return bounds.difference_upper_bound(*_discordant(values), len(values), self.confidence)

    def keeps(self, values: Tensor, layers: int) -> bool:
        if self.confidence is None:
            return super().keeps(values, layers)
        # Comparing the p-value takes a twentieth of the time that inverting the test takes.
        counts, error = _discordant(values), 1 - self.confidence
        return bounds.difference_p_value(*counts, len(values), self.most, error) <= error


def _discordant(values: Tensor) -> tuple[int, int]:
    """Return how many examples are lost and how many are gained."""
    return int((values > 0).sum()), int((values < 0).sum())


class Disagreement(Kind):
    """The share of examples that do not get the class of all layers: 1 or 0 per example."""

    no_fault = 1.0

    def values(self, measured: Measured, baseline: Tensor | None) -> Tensor:
        return measured.classes != measured.full

    def bound(self, values: Tensor, layers: int) -> float:
        if self.confidence is None:
            return sum(careful_mean_and_error(values, low=0.0))
        return bounds.binomial_upper_bound(int(values.sum()), len(values), self.confidence)


class Layers(Kind):
    """The exit layer."""

    by_proof = False

    def values(self, measured: Measured, baseline: Tensor | None) -> Tensor:
        return measured.exits

    def bound(self, values: Tensor, layers: int) -> float:
        if self.confidence is None:
            return sum(mean_and_error(values))
        return bounds.mean_upper_bound(values, layers, self.confidence)

    def examples_needed(self) -> int:
        return 2


KINDS: dict[str, type[Kind]] = {
    "max_accuracy_loss": AccuracyLoss,
    "min_agreement": Disagreement,
    "max_layers": Layers,
}


@dataclass(frozen=True)
class Promise:
    """A bound that early exit must keep: exactly one of the first three arguments.

    Args:
        max_accuracy_loss: Largest loss of accuracy below all layers (the same model without early
            exit) or a baseline, as a share in [0, 1): 0.005 is half a point.
        min_agreement: Smallest share of examples that get the class of all layers, in (0, 1].
        max_layers: Largest mean exit layer, 1 or more.
        confidence: Probability with which the promise is guaranteed for new examples of the same
            kind, in (0, 1). None (null) asks for an estimate, without a guarantee: the measured
            value keeps the promise with one standard error to spare.
        dial: Setting that is moved. By ``halting_margin`` an example leaves where a layer's lead,
            the probability of its first class less that of its second, is larger; by
            ``halting_tolerance`` where its class is proved up to that probability.

    Raises:
        ValueError: If not exactly one is given, or a value is outside its range.
        TypeError: If a value is not a number.
    """

    max_accuracy_loss: Annotated[float, Range("[0, 1)", "0.01 is one point")] | None = None
    min_agreement: Annotated[float, Range("(0, 1]", "0.95 is 95 %")] | None = None
    max_layers: Annotated[float, Range("[1, inf]")] | None = None
    confidence: Annotated[float, Range("(0, 1)", "None (null) asks for an estimate")] | None = 0.95
    dial: Dial = "halting_margin"

    def __post_init__(self) -> None:
        given = [name for name in KINDS if getattr(self, name) is not None]
        if len(given) != 1:
            found = " and ".join(given) or "none of them"
            raise ValueError(f"a promise is one of {', '.join(KINDS)}, got {found}")
        check_arguments(Promise, vars(self))

    @property
    def name(self) -> str:
        """The name of the argument that was given."""
        return next(name for name in KINDS if getattr(self, name) is not None)

    @property
    def value(self) -> float:
        """The value of that argument."""
        return getattr(self, self.name)  # type: ignore[no-any-return]

    @property
    def kind(self) -> Kind:
        """The values and the bound of this promise."""
        most = 1 - self.value if self.name == "min_agreement" else self.value
        return KINDS[self.name](most, self.confidence)

    @property
    def text(self) -> str:
        """The promise with its confidence, for messages."""
        promised = f"{self.name}={self.value:g}"
        if self.confidence is None:
            return f"estimate for {promised}"
        return f"{promised} with confidence {self.confidence:g}"

    def examples_needed(self) -> int:
        """Return the fewest examples that support this promise if early exit makes no fault on
        them: 2 for an estimate or `max_layers`, 0 for an allowance of 0, which a proof keeps."""
        return self.kind.examples_needed()

    def check(self, halting: Halting) -> None:
        """Raise a ``ValueError`` if a model of this halting rule has no dial to move, or lets
        examples leave by the other dial without evidence."""
        if halting.rule == "never":
            raise ValueError("a model with halting='never' has no dial: give it halting='exact'")
        for name, first in (("halting_tolerance", 0.0), ("halting_margin", 1.0)):
            value = getattr(halting, name.removeprefix("halting_"))
            if self.kind.by_proof and name != self.dial and value != first:
                raise ValueError(
                    f"{self.dial} is calibrated from all layers on, but the model has "
                    f"{name}={value:g}: set it to {first:g}, or calibrate it instead (dial: {name})"
                )


# what `dact fit` and `dact tune` keep unless told otherwise
DEFAULT_PROMISE = Promise(max_accuracy_loss=0.01)
