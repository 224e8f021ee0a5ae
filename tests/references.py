"""Naive twins of the arithmetic: one example at a time, in plain Python, written from the formulas
alone."""

from __future__ import annotations

import math
from fractions import Fraction


def accumulate(y, h):
    """(a_1 … a_N, p_1 … p_N) of one example: y is [layers][classes], h is [layers]."""
    previous_p, previous_a = 1.0, [0.0] * len(y[0])
    a, p = [], []
    for y_n, h_n in zip(y, h, strict=True):
        pairs = zip(y_n, previous_a, strict=True)
        a_n = [previous_p * y_c + (1 - previous_p) * a_c for y_c, a_c in pairs]
        p_n = previous_p * h_n
        a.append(a_n)
        p.append(p_n)
        previous_a, previous_p = a_n, p_n
    return a, p


def margin(a_n, p_n, d, rule):
    """By how much the winner is sure to lead at the end, in exact arithmetic on the given
    numbers."""
    a_n, p_n = [Fraction(x) for x in a_n], Fraction(p_n)
    runner_up, best = sorted(a_n)[-2:]
    if rule == "exact":
        return (1 - p_n) ** d * (1 + best - runner_up) - 1
    return best * (1 - p_n) ** d - (runner_up + p_n * d)


def can_halt(a_n, p_n, d, rule, tolerance):
    """The rule itself, without slack."""
    return d == 0 or (rule != "never" and margin(a_n, p_n, d, rule) > -Fraction(tolerance))


def exit_layer(a, p, rule, tolerance):
    layers = len(p)
    for n in range(1, layers + 1):
        if can_halt(a[n - 1], p[n - 1], layers - n, rule, tolerance):
            return n
    raise AssertionError("d = 0 always halts")


def ponder_cost(p, h, kind):
    """Mean over examples of the sum over layers; p and h are [batch][layers]."""
    return sum(sum(row) for row in (p if kind == "p" else h)) / len(p)


def task_loss(a, target, weights=None):
    """Mean over examples of -log a[target]; a is [batch][classes]."""
    weights = weights or [1.0] * len(a[0])
    return sum(-weights[t] * math.log(row[t]) for row, t in zip(a, target, strict=True)) / len(a)


def worst_continuation(a_n, p_n, d):
    """a_N if all remaining layers say the runner-up with full confidence (y = runner-up, h = 1)."""
    order = sorted(range(len(a_n)), key=lambda c: a_n[c])
    runner_up = order[-2]
    a, p = list(a_n), p_n
    for _ in range(d):
        a = [p * (1.0 if c == runner_up else 0.0) + (1 - p) * a_c for c, a_c in enumerate(a)]
    return a


def binomial_upper_bound(faults, examples, confidence):
    """The rate at which so few faults or fewer have a probability of 1 - confidence, by halving."""
    low, high = 0.0, 1.0
    for _ in range(60):
        rate = (low + high) / 2
        few = sum(outcome_probability(k, 0, examples, rate, 0.0) for k in range(faults + 1))
        low, high = (rate, high) if few > 1 - confidence else (low, rate)
    return high


def outcome_probability(i, j, examples, lost, gained):
    """That i of so many examples are lost and j are gained."""
    ways = math.comb(examples, i) * math.comb(examples - i, j)
    return ways * lost**i * gained**j * (1 - lost - gained) ** (examples - i - j)


def is_clear(probabilities, margin):
    """Whether one layer's first class leads by more than the margin."""
    second, first = sorted(probabilities)[-2:]
    return margin < 1 and first - second > margin


def distillation_loss(probabilities, teacher):
    """The cross-entropy of one example's answer to what the teacher says."""
    return -sum(t * math.log(q) for q, t in zip(probabilities, teacher, strict=True))


def symmetric_divergence(first, second):
    """Half of the sum of both Kullback-Leibler divergences between one example's answers."""
    pairs = zip(first + second, second + first, strict=True)
    return sum(p * (math.log(p) - math.log(q)) for p, q in pairs) / 2


def brier_score(probabilities, target):
    """The mean squared distance between probabilities and class, example by example."""
    distances = []
    for row, wanted in zip(probabilities.tolist(), target.tolist(), strict=True):
        distances.append(sum((p - (label == wanted)) ** 2 for label, p in enumerate(row)))
    return sum(distances) / len(distances)


def label_margin(a_n, p_n, d, thresholds, rule):
    """By how much the label that is least sure to stay on its side of its threshold is sure to, in
    exact arithmetic on the given numbers."""
    p_n, sure = Fraction(p_n), []
    for a_l, t in zip(map(Fraction, a_n), map(Fraction, thresholds), strict=True):
        lower, upper = a_l * (1 - p_n) ** d, 1 - (1 - a_l) * (1 - p_n) ** d
        if rule == "paper":
            upper = max(upper, a_l + p_n * d)
        sure.append(lower - t if a_l > t else t - upper)
    return min(sure)


def label_lead(y_n, thresholds):
    """How far the label that is nearest to its threshold is from it, as a share of the largest
    distance on its side."""
    pairs = zip(y_n, thresholds, strict=True)
    return min((q - t) / (1 - t) if q > t else (t - q) / t for q, t in pairs)


def label_loss(a, labels, weights):
    """Mean over the examples with a known label of the binary cross-entropy, summed over labels."""
    total, examples = 0.0, 0
    for row, wanted in zip(a, labels, strict=True):
        known = [(q, t, w) for q, t, w in zip(row, wanted, weights, strict=True) if t != -100]
        total -= sum(w * math.log(q) if t else math.log(1 - q) for q, t, w in known)
        examples += bool(known)
    return total / max(examples, 1)
