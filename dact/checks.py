"""Checks of arguments. Each error is one line that says what was expected, what was given, and the
remedy."""

from __future__ import annotations

import math
from collections.abc import Sequence
from numbers import Integral, Real
from typing import Any, get_args

from torch import Tensor

MOST_LAYERS = 1000  # a file that asks for more is refused before they are built


def check_choice(name: str, value: object, choices: object) -> None:
    """Raise a ``ValueError`` unless `value` is one of the strings of the ``Literal`` type
    `choices`."""
    allowed = get_args(choices)
    if value not in allowed:
        raise ValueError(f"{name} must be one of {', '.join(map(repr, allowed))}, got {value!r}")


def check_count(
    name: str, value: object, least: int = 1, most: int | None = None, hint: str = ""
) -> None:
    """Raise an error unless `value` is a whole number in least … most.

    Args:
        name: Name of the argument, with its class where that helps.
        value: Value that was given.
        least: Smallest value allowed.
        most: Largest value allowed; no bound if None.
        hint: What the number means or what to do, appended to the message.

    Raises:
        TypeError: If `value` is not an integer (a bool is not one).
        ValueError: If it is outside its range.
    """
    if not isinstance(value, Integral) or isinstance(value, bool):
        raise TypeError(f"{name} must be an integer, got {value!r}")
    if int(value) < least or (most is not None and int(value) > most):
        allowed = f"{least} or more" if most is None else f"in {least} … {most}"
        raise ValueError(_with_hint(f"{name} must be {allowed}, got {value}", hint))


def check_range(name: str, value: object, interval: str, hint: str = "") -> None:
    """Raise an error unless `value` is a number in `interval`.

    Args:
        name: Name of the argument, with its class where that helps.
        value: Value that was given; NaN is in no interval.
        interval: Interval in mathematical notation: ``"[0, 1)"`` holds 0 and not 1, ``"(0, inf)"``
            all finite numbers above 0, ``"(0, inf]"`` infinity as well.
        hint: What the number means or what to do, appended to the message.

    Raises:
        TypeError: If `value` is not a number.
        ValueError: If it is outside the interval.

    Example:
        >>> check_range("dropout", 1.0, "[0, 1)")
        Traceback (most recent call last):
            ...
        ValueError: dropout must be in [0, 1), got 1.0
    """
    if not isinstance(value, Real) or isinstance(value, bool):
        raise TypeError(f"{name} must be a number, got {value!r}")
    number = float(value)
    low, high = (float(end) for end in interval[1:-1].split(","))
    above = number >= low if interval[0] == "[" else number > low
    below = number <= high if interval[-1] == "]" else number < high
    if not (above and below):
        allowed = f"in {interval}"
        if math.isinf(high):
            allowed = f"{low:g} or more" if interval[0] == "[" else f"above {low:g}"
        raise ValueError(_with_hint(f"{name} must be {allowed}, got {value}", hint))


def check_type(name: str, value: object, kind: type | tuple[type, ...], such_as: str) -> None:
    """Raise a ``TypeError`` unless `value` is an object of `kind`, of which the code `such_as` is
    an example."""
    if not isinstance(value, kind):
        raise TypeError(f"{name} must be an object such as {such_as}, got {value!r}")


def check_class_names(name: str, value: Sequence[Any] | None) -> None:
    """Raise a ``ValueError`` unless `value` is None or has distinct names."""
    if value is not None and len({str(one) for one in value}) < len(value):
        raise ValueError(f"{name} must be distinct, got {', '.join(map(str, value))}")


def check_tolerance(tolerance: float) -> None:
    """Raise a ``ValueError`` unless `tolerance` is in [0, 1)."""
    check_range(
        "halting_tolerance",
        tolerance,
        "[0, 1)",
        "it is the largest probability by which the returned class may end behind the final winner (0 keeps the "
        "full-depth class)",
    )


def check_margin(margin: float) -> None:
    """Raise a ``ValueError`` unless `margin` is in [0, 1]."""
    check_range(
        "halting_margin",
        margin,
        "[0, 1]",
        "it is the lead in probability of a layer's first class over its second above which an example leaves (1 turns "
        "it off)",
    )


def _with_hint(message: str, hint: str) -> str:
    return f"{message}: {hint}" if hint else message


def check_probabilities(name: str, rows: Tensor) -> Tensor:
    """Return rows of probabilities, ``[batch, classes]``; raise a ``ValueError`` if they are none,
    up to bfloat16."""
    is_one = (rows.sum(dim=1, keepdim=True) - 1).abs() < 0.05
    wrong = rows[~((rows >= 0) & is_one).all(dim=1)]
    if len(wrong):
        values = ", ".join(f"{value:.3g}" for value in wrong[0].tolist())
        raise ValueError(
            f"{name} must hold probabilities, rows that sum to 1, got {values}: logits need a softmax"
        )
    return rows
