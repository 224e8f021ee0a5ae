"""The choice of λ in the two-objective study: which one wins, and which one to try next."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal

import numpy as np
from torch import Tensor

from dact.calibration.answers import careful_mean_and_error, mean_and_error
from dact.tuning.outcome import Outcome

LambdaSelection = Literal[
    "promise", "one_standard_error", "max_loss_increase", "knee", "max_layers"
]
MAX_LOSS_INCREASE = 0.02
NOISE_FLOOR = 0.01  # nats


@dataclass(frozen=True)
class Point:
    """A completed trial of the lambda_reg study.

    Args:
        loss, layers: Average task loss and exit layer under early exit.
        outcome: Early exit on each validation example, in one order for all trials.
    """

    lambda_reg: float
    loss: float
    layers: float
    outcome: Outcome


def check_rule(rule: LambdaSelection | None, max_layers: float | None) -> None:
    """Raise a ``ValueError`` unless ``"max_layers"`` and its budget are given together."""
    if (rule == "max_layers") != (max_layers is not None):
        raise ValueError(
            "TuningEngine: lambda_selection='max_layers' and max_layers go together, got "
            f"{rule!r} and {max_layers!r}"
        )


def pareto_front(points: Sequence[Point]) -> list[Point]:
    """Return the points that no other point dominates, by rising layers; of equal points, the one
    with the smallest λ."""
    front: list[Point] = []
    for point in sorted(points, key=lambda p: (p.layers, p.loss, p.lambda_reg)):
        if not front or point.loss < front[-1].loss:
            front.append(point)
    return front


def select_lambda(
    points: Sequence[Point],
    rule: LambdaSelection | None = None,
    *,
    allowed: float | None = None,
    from_best: bool = False,
    max_loss_increase: float = MAX_LOSS_INCREASE,
    max_layers: float | None = None,
) -> Point:
    """Return the winner of the study.

    Args:
        points: All finished trials, at least one.
        rule: ``"promise"``: the fewest layers whose paired loss of accuracy plus its standard error
            is within `allowed`; if there are none, as ``"one_standard_error"``.
            ``"one_standard_error"``: the fewest layers whose task loss is within one paired
            standard error of the best, or 0.01 nats if that is more (after Breiman et al. 1984,
            *Classification and Regression Trees*). ``"max_loss_increase"``: the fewest layers whose
            loss is within a share of the best loss. ``"knee"``: the point of the front farthest
            below the chord between its ends, both objectives scaled to [0, 1] (after Satopää et al.
            2011, *Finding a Kneedle in a Haystack*); with fewer than three points, as
            ``"max_loss_increase"``. ``"max_layers"``: the best loss within a budget of layers. By
            default ``"promise"`` if `allowed` is given, else ``"one_standard_error"``.
        allowed: For ``"promise"``: largest loss of accuracy, as a share.
        from_best: For ``"promise"``: whether losses are measured from the most accurate point
            instead of the whole encoder, whose accuracy no point may reach on frozen states.
        max_loss_increase: For ``"max_loss_increase"``: share of the best loss, 0 or more.
        max_layers: For ``"max_layers"``: budget of layers.

    Raises:
        ValueError: If no point is within the budget.
    """
    front = pareto_front(points)
    best = front[-1]
    rule = rule or ("one_standard_error" if allowed is None else "promise")
    if rule == "promise":
        kept = [] if allowed is None else _within(points, allowed, from_best)
        if kept:
            return min(kept, key=lambda point: (point.layers, point.loss, point.lambda_reg))
        rule = "one_standard_error"

    if rule == "max_layers":
        budget = math.inf if max_layers is None else max_layers
        within = [point for point in front if point.layers <= budget]
        if not within:
            raise ValueError(
                f"no trial uses at most {budget:g} layers; the fewest are {front[0].layers:.2f}: "
                "raise max_layers, or, under another run_tag, search a larger lambda_reg"
            )
        return within[-1]

    if rule == "knee" and len(front) >= 3:
        # On scaled axes, the chord goes from (0, 1) to (1, 0).
        width, height = best.layers - front[0].layers, front[0].loss - best.loss
        return min(front, key=lambda point: point.layers / width + point.loss / height)

    def allowance(point: Point) -> float:
        if rule != "one_standard_error":
            return max_loss_increase * abs(best.loss)
        paired = point.outcome.losses.double() - best.outcome.losses.double()
        return max(NOISE_FLOOR, mean_and_error(paired)[1])

    return next(point for point in front if point.loss - best.loss <= allowance(point))


def _within(points: Sequence[Point], allowed: float, from_best: bool) -> list[Point]:
    """Return the points that satisfy the rule ``"promise"``; see `select_lambda`."""
    lost = [point.outcome.lost.double() for point in points]
    if from_best:
        best = min(lost, key=Tensor.mean)
        lost = [one - best for one in lost]
    errors = (sum(careful_mean_and_error(one)) for one in lost)
    return [point for point, error in zip(points, errors, strict=True) if error <= allowed]


def next_lambda(
    tried: Sequence[tuple[float, float | None]], low: float, high: float, log: bool = True
) -> float:
    """Return the next λ to try, in the middle of the interval where the mean exit layer changes
    most.

    The curve of layers over λ is flat at both ends, where every text uses all layers or only one,
    and trials there are uninformative. The first two trials take the ends. Each later one halves
    the interval with the largest change of the mean exit layer, weighted by its width.

    Args:
        tried: λ and mean exit layer of earlier trials; None while a trial is running or if it
            failed.
        low, high: Range of the next λ, above 0 on a log scale.
        log: Whether to halve on a log scale.
    """
    to, back = (math.log, math.exp) if log else (float, float)
    known = sorted({(value, layers) for value, layers in tried if layers is not None})
    known = known or [(low, 0.0)]
    places = sorted({value for value, _ in tried})
    for end in (low, high):
        if not any(math.isclose(end, value, rel_tol=1e-9) for value in places):
            return end

    layers = np.interp(places, [value for value, _ in known], [layers for _, layers in known])
    # A little weight for width alone, so that a flat curve is searched evenly.
    gaps = [
        ((change + 0.02) * (to(right) - to(left)), left, right)
        for change, (left, right) in zip(np.abs(np.diff(layers)), pairwise(places), strict=True)
    ]
    _, left, right = max(gaps)
    return min(high, max(low, back((to(left) + to(right)) / 2)))
