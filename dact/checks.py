"""Checks of arguments against the ranges in their annotations; each error is one line."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from numbers import Integral, Real
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin, get_type_hints

from torch import Tensor


@dataclass(frozen=True, repr=False)
class Range:
    """The interval of a number, in an annotation: ``Annotated[float, Range("[0, 1)")]``.

    Args:
        interval: Interval in mathematical notation: ``"[0, 1)"`` holds 0 and not 1, ``"(0, inf)"``
            all finite numbers above 0, ``"(0, inf]"`` infinity as well.
        hint: Meaning of the number, appended to the message.
    """

    interval: str
    hint: str = ""

    def __repr__(self) -> str:
        return self.interval  # as the help of a command line shows it


def check_arguments(owner: Callable[..., Any], given: Mapping[str, Any], prefix: str = "") -> None:
    """Check the arguments of a function or dataclass against the ranges, literals and plain classes
    in its annotations. `given` may hold other names as well; messages begin with `prefix`.

    Raises:
        TypeError: If a value has the wrong type.
        ValueError: If a value is outside its range.
    """
    for name, hint in _annotations(owner).items():
        options = get_args(hint) if get_origin(hint) in (Union, UnionType) else (hint,)
        kinds = [option for option in options if option is not NoneType]
        if name not in given or len(kinds) > 1 or (given[name] is None and len(options) > 1):
            continue
        kind, what, value = kinds[0], f"{prefix}{name}", given[name]
        if get_origin(kind) is Annotated:
            number, limits = get_args(kind)
            check_range(what, value, limits.interval, limits.hint, integer=number is int)
        elif get_origin(kind) is Literal:
            check_choice(what, value, kind)
        elif get_origin(kind) is None and kind is not float and not isinstance(value, kind):
            raise TypeError(f"{what} must be an object such as {kind.__name__}, got {value!r}")


_annotations = cache(lambda owner: get_type_hints(owner, include_extras=True))


def check_choice(name: str, value: object, choices: object) -> None:
    """Raise a ``ValueError`` unless `value` is in the ``Literal`` type `choices`."""
    allowed = get_args(choices)
    if value not in allowed:
        raise ValueError(f"{name} must be one of {', '.join(map(repr, allowed))}, got {value!r}")


def check_count(
    name: str, value: object, least: int = 1, most: int | None = None, hint: str = ""
) -> None:
    """Raise an error unless `value` is an integer in least … most; see `check_range`."""
    interval = f"[{least}, inf)" if most is None else f"[{least}, {most}]"
    check_range(name, value, interval, hint, integer=True)


def check_range(
    name: str, value: object, interval: str, hint: str = "", integer: bool = False
) -> None:
    """Raise an error unless `value` is a number in the interval of a `Range`; NaN never is.

    Raises:
        TypeError: If `value` is not a number, or not an integer if `integer` is True.
        ValueError: If it is outside the interval.

    Example:
        >>> check_range("dropout", 1.0, "[0, 1)")
        Traceback (most recent call last):
            ...
        ValueError: dropout must be in [0, 1), got 1.0
    """
    if not isinstance(value, Integral if integer else Real) or isinstance(value, bool):
        raise TypeError(f"{name} must be {'an integer' if integer else 'a number'}, got {value!r}")
    number = float(value)
    low, high = (float(end) for end in interval[1:-1].split(","))
    above = number >= low if interval[0] == "[" else number > low
    below = number <= high if interval[-1] == "]" else number < high
    if above and below:
        return
    allowed = f"in {low:g} … {high:g}" if integer else f"in {interval}"
    if math.isinf(high):
        allowed = f"{low:g} or more" if interval[0] == "[" else f"above {low:g}"
    raise ValueError(f"{name} must be {allowed}, got {value}" + (f": {hint}" if hint else ""))


def check_probabilities(name: str, rows: Tensor) -> Tensor:
    """Return `rows`, ``[batch, classes]``, or raise a ``ValueError`` unless each sums to 1."""
    is_one = (rows.sum(dim=1, keepdim=True) - 1).abs() < 0.05
    wrong = rows[~((rows >= 0) & is_one).all(dim=1)]
    if len(wrong):
        values = wrong[0].tolist()
        raise ValueError(f"{name} must hold probabilities, rows that sum to 1, got {values}")
    return rows
