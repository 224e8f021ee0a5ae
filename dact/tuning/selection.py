"""Which λ to take from the two-objective study, and which λ to try next. Pure functions."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal

LambdaSelection = Literal["max_loss_increase", "knee", "max_layers"]


@dataclass(frozen=True)
class Point:
    """What one trial of the lambda_reg study measured.

    Args:
        lambda_reg: Its λ.
        loss: The average task loss under early exit.
        layers: The average exit layer.
    """

    lambda_reg: float
    loss: float
    layers: float


def pareto_front(points: Sequence[Point]) -> list[Point]:
    """The points that no other point beats in one objective without losing in the other, from few layers to many.

    Of equal points, the one with the smallest λ stays.
    """
    front: list[Point] = []
    for point in sorted(points, key=lambda p: (p.layers, p.loss, p.lambda_reg)):
        if not front or point.loss < front[-1].loss:
            front.append(point)
    return front


def select_lambda(
    points: Sequence[Point],
    rule: LambdaSelection = "max_loss_increase",
    *,
    max_loss_increase: float = 0.02,
    max_layers: float | None = None,
) -> Point:
    """The winner of the study.

    Args:
        points: All finished trials, at least one.
        rule: ``"max_loss_increase"``: the fewest layers whose loss is within a share of the best loss. ``"knee"``: the
            point of the front farthest below the chord between its ends, both objectives scaled to [0, 1] (after
            Satopää et al. 2011, *Finding a Kneedle in a Haystack*); with fewer than three points, as
            ``"max_loss_increase"``. ``"max_layers"``: the best loss within a budget of layers.
        max_loss_increase: That share, 0 or more.
        max_layers: That budget.

    Raises:
        ValueError: If there is no point, or none within the budget.
    """
    if not points:
        raise ValueError("select_lambda needs at least one finished trial")
    front = pareto_front(points)
    if rule == "max_layers":
        if max_layers is None:
            raise ValueError("lambda_selection='max_layers' needs max_layers, the budget of layers")
        within = [point for point in front if point.layers <= max_layers]
        if not within:
            raise ValueError(
                f"no trial uses at most {max_layers:g} layers; the fewest are {front[0].layers:.2f}: raise max_layers, or "
                "the upper end of lambda_reg in search_space"
            )
        return within[-1]
    if rule == "knee" and len(front) >= 3:
        return max(front, key=lambda point: _distance_below_chord(point, front[0], front[-1]))
    best = front[-1].loss
    allowed = best + max_loss_increase * abs(best)
    return next(point for point in front if point.loss <= allowed)


def _distance_below_chord(point: Point, first: Point, last: Point) -> float:
    """Proportional to the distance from the chord between the ends of the front, which scale to (0, 1) and (1, 0)."""
    x = (point.layers - first.layers) / (last.layers - first.layers)
    y = (point.loss - last.loss) / (first.loss - last.loss)
    return 1 - x - y


def next_lambda(tried: Sequence[tuple[float, float | None]], low: float, high: float, log: bool = True) -> float:
    """Where the curve of layers over λ bends: the middle of the interval that hides the largest change.

    The curve is flat at both ends, where every example uses all layers or one; trials there tell nothing. So the first
    two trials take the ends, and each further one halves the interval with the largest change of the mean exit layer,
    weighed by its width.

    Args:
        tried: λ and mean exit layer of earlier trials; None while a trial is running or where it failed.
        low: Lower end of λ, above 0 on a log scale.
        high: Upper end of λ.
        log: Halve on a log scale.

    Returns:
        The next λ in [low, high].
    """
    to, back = (math.log, math.exp) if log else (float, float)
    known = sorted({(value, layers) for value, layers in tried if layers is not None})
    places = sorted({value for value, _ in tried})
    for end in (low, high):
        if not any(math.isclose(end, value, rel_tol=1e-9) for value in places):
            return end
    gaps = []
    for left, right in pairwise(places):
        change = abs(_interpolate(known, right) - _interpolate(known, left)) if known else 0.0
        width = to(right) - to(left)
        # A little weight for width alone, so that a flat curve is searched evenly.
        gaps.append(((change + 0.02) * width, left, right))
    _, left, right = max(gaps)
    return min(high, max(low, back((to(left) + to(right)) / 2)))


def _interpolate(known: Sequence[tuple[float, float]], value: float) -> float:
    """The mean exit layer at `value`, linear between the neighbours that are known."""
    below = [entry for entry in known if entry[0] <= value]
    above = [entry for entry in known if entry[0] >= value]
    if not below or not above:
        return (below[-1] if below else above[0])[1]
    (x0, y0), (x1, y1) = below[-1], above[0]
    return y0 if x0 == x1 else y0 + (y1 - y0) * (value - x0) / (x1 - x0)
