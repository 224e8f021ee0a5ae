"""Promises about early exit: what each bounds, and the evidence that it needs."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Annotated, Any

from torch import Tensor

from dact.calibration import bounds
from dact.calibration.answers import Dial, Measured, careful_mean_and_error, mean_and_error
from dact.checks import Range, check_arguments
from dact.functional import Halting

# Settings that are tried, from the most layers to the fewest. The first has no effect.
SETTINGS: dict[str, tuple[float, ...]] = {
    "halting_tolerance": tuple(step / 100 for step in range(100)),
    # Geometric towards 1, where a confident classifier has most examples.
    "halting_margin": (
        1.0,
        1 - 2**-24,
        *(1 - digit * 10**-power for power in range(7, 2, -1) for digit in (1, 2, 5)),
        *(step / 100 for step in range(99, -1, -1)),
    ),
}

# An estimate counts gains against losses from this multiple of the examples that it needs.
MANY = 4


KINDS = ("max_accuracy_loss", "min_agreement", "max_layers")


@dataclass(frozen=True)
class Promise:
    """A bound that early exit must keep: one of the first three arguments, by default the first.

    Args:
        max_accuracy_loss: Largest loss of accuracy against all layers (the same model without early
            exit) or a baseline, as a share in [0, 1): 0.01, one point, if no bound is given.
        min_agreement: Smallest share of examples that get the class of all layers, in (0, 1].
        max_layers: Largest mean exit layer, 1 or more.
        confidence: Probability, in (0, 1), with which the promise is guaranteed for new examples of
            the same kind. None (null) asks for an estimate: the measured value keeps the promise
            with one standard error to spare.
        dial: Setting to move, ``"halting_margin"`` or ``"halting_tolerance"``.

    Raises:
        ValueError: If several bounds are given, or a value is outside its range.
        TypeError: If a value is not a number.
    """

    max_accuracy_loss: Annotated[float, Range("[0, 1)", "0.01 is one point")] | None = None
    min_agreement: Annotated[float, Range("(0, 1]", "0.95 is 95 %")] | None = None
    max_layers: Annotated[float, Range("[1, inf]")] | None = None
    confidence: Annotated[float, Range("(0, 1)", "None (null) asks for an estimate")] | None = 0.95
    dial: Dial = "halting_margin"

    def __post_init__(self) -> None:
        given = [name for name in KINDS if getattr(self, name) is not None]
        if len(given) > 1:
            raise ValueError(f"a promise is one of {', '.join(KINDS)}, got {' and '.join(given)}")
        if not given:
            object.__setattr__(self, "max_accuracy_loss", 0.01)
        check_arguments(Promise, vars(self))

    @property
    def name(self) -> str:
        """The name of the bound."""
        return next(name for name in KINDS if getattr(self, name) is not None)

    @property
    def most(self) -> float:
        """The largest mean of `values` that keeps the promise."""
        value: float = getattr(self, self.name)
        return value if self.min_agreement is None else 1 - value

    @property
    def text(self) -> str:
        """The promise with its confidence, for messages."""
        promised = f"{self.name}={getattr(self, self.name):g}"
        if self.confidence is None:
            return f"estimate for {promised}"
        return f"{promised} with confidence {self.confidence:g}"

    def values(self, measured: Measured, baseline: Tensor | None = None) -> Tensor:
        """Return the value of each example, ``[examples]``, whose mean is bounded: 1, 0 or -1 for
        lost, kept or gained accuracy; 1 or 0 for a changed or kept class; or the exit layer.

        `baseline` is as for `calibrate`."""
        if self.max_layers is not None:
            return measured.exits
        if self.min_agreement is not None:
            return measured.changed
        reference = measured.full if baseline is None else baseline
        answers = measured.answers
        lost = answers.task.same(reference, answers.target).int() - measured.right.int()
        few = self.confidence is None and len(lost) < MANY * self.examples_for_an_estimate()
        return lost.clip(min=0) if few and baseline is None else lost

    def bound(self, values: Tensor, layers: int) -> float:
        """Return the upper bound on the mean of `values` for a model with `layers` layers; for an
        estimate, the mean plus one standard error."""
        if self.max_layers is not None:
            if self.confidence is None:
                return sum(mean_and_error(values))
            return bounds.mean_upper_bound(values, layers, self.confidence)
        if self.confidence is None:
            low = -1.0 if self.min_agreement is None else 0.0
            return sum(careful_mean_and_error(values, low))
        if self.min_agreement is not None:
            return bounds.binomial_upper_bound(int(values.sum()), len(values), self.confidence)
        return bounds.difference_upper_bound(*_discordant(values), len(values), self.confidence)

    def keeps(self, values: Tensor, layers: int) -> bool:
        """Return whether the bound on the mean of `values` is within the promise."""
        if self.max_accuracy_loss is None or self.confidence is None:
            return self.bound(values, layers) <= self.most
        # Comparing the p-value takes a twentieth of the time of inverting the test.
        counts, error = _discordant(values), 1 - self.confidence
        return bounds.difference_p_value(*counts, len(values), self.most, error) <= error

    def examples_needed(self) -> int:
        """Return the fewest examples that support this promise if early exit makes no fault on
        them: 2 for an estimate or `max_layers`, 0 for an allowance of 0, which is kept by proof."""
        if self.confidence is None or self.max_layers is not None:
            return 2
        error = 1 - self.confidence
        if self.max_accuracy_loss is not None:
            error *= 1 - bounds.NUISANCE_SHARE
        return bounds.examples_for_rate(self.most, 1 - error)

    def shortage(self, data: Any) -> str:
        """Return a message if a datamodule has too few examples for it, else an empty string."""
        examples = sum(len(batch["labels"]) for batch in calibration_batches(data)[0])
        needed = self.examples_needed()
        if self.confidence is None:
            needed = self.examples_for_an_estimate()
        if examples >= needed:
            return ""
        return f"{self.text} takes {needed} examples or more, and there are {examples}"

    def examples_for_an_estimate(self) -> int:
        """Return the fewest examples with which an estimate without a fault moves the dial."""
        # standard error of an estimate without a fault, times the number of examples
        no_fault = {"max_accuracy_loss": math.sqrt(2), "min_agreement": 1.0}.get(self.name, 0.0)
        return max(2, math.ceil(no_fault / max(self.most, 1e-9) - 1.5))

    def check(self, halting: Halting) -> None:
        """Raise a ``ValueError`` if a model with this halting rule has no dial to move, or if the
        other dial lets examples leave without evidence."""
        if halting.rule == "never":
            raise ValueError("a model with halting='never' has no dial: give it halting='exact'")
        for name, first in (("halting_tolerance", 0.0), ("halting_margin", 1.0)):
            value = getattr(halting, name.removeprefix("halting_"))
            if self.max_layers is None and name != self.dial and value != first:
                raise ValueError(
                    f"{self.dial} is calibrated starting from all layers, but the model has "
                    f"{name}={value:g}: set it to {first:g}, or calibrate it instead (dial: {name})"
                )


def calibration_batches(data: Any) -> tuple[Iterable[Any], bool]:
    """Return the batches set aside, or else those of validation, which chose the checkpoint."""
    aside = getattr(data, "calibration_dataloader", lambda: None)()
    return (data.val_dataloader(), True) if aside is None else (aside, False)


def _discordant(values: Tensor) -> tuple[int, int]:
    """Return how many examples are lost and how many are gained."""
    return int((values > 0).sum()), int((values < 0).sum())
