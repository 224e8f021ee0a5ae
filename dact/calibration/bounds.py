"""Confidence bounds that hold at every sample size."""

from __future__ import annotations

import math
from functools import lru_cache
from statistics import NormalDist

from torch import Tensor

# share of the error probability that is spent on the nuisance parameter
NUISANCE_SHARE = 1 / 100
# number of its values that are tried; between them the p-value is at most 0.00002 larger
NUISANCE_POINTS = 128
# added to the discordant examples to order outcomes: 3 to 10 have about equal power, 0 much less
PSEUDO_EXAMPLES = 4
# probability left out at either end of the sum over discordant examples (Bernstein's inequality)
LEFT_OUT = 1e-9


def binomial_upper_bound(faults: int, examples: int, confidence: float) -> float:
    """Return the one-sided upper bound of Clopper & Pearson 1934 on a rate of faults.

    Example:
        >>> round(binomial_upper_bound(0, 100, 0.95), 4)  # 1 - 0.05 ** (1 / 100)
        0.0295
    """
    from scipy.special import betaincinv

    if faults == examples:
        return 1.0
    return float(betaincinv(faults + 1, examples - faults, confidence))


def examples_for_rate(rate: float, confidence: float) -> int:
    """Return the fewest examples without a fault whose `binomial_upper_bound` is at most `rate`:
    log(1 - confidence) / log(1 - rate), rounded up, or 0 for a rate of 0, which takes a proof.

    Example:
        >>> examples_for_rate(0.01, 0.95)
        299
    """
    if rate <= 0:
        return 0
    return 1 if rate >= 1 else math.ceil(math.log(1 - confidence) / math.log1p(-rate))


@lru_cache(4096)  # settings next to each other often have the same counts
def difference_p_value(
    lost: int, gained: int, examples: int, difference: float, error: float
) -> float:
    r"""Return an exact p-value for "the expected paired difference is `difference` or more".

    An example is lost (+1), gained (-1) or neither (0). With the share of discordant examples d as
    nuisance parameter, the number of discordant examples M is binomial(n, d), and given M the lost
    ones are binomial(M, (1 + δ/d)/2) for an expected difference δ. The p-value is the probability
    of the outcomes up to the one seen, maximised over the d in a one-sided Clopper–Pearson
    interval, plus the error probability of that interval (Berger & Boos 1994, *P values maximized
    over a confidence set for the nuisance parameter*). Outcomes are ordered by the approximate
    upper limit lost - gained + z √(M + 4) (Agresti & Coull 1998); any order gives an exact p-value
    (Buehler 1957; for paired proportions Lloyd & Moldovan 2007).

    Args:
        lost: Number of examples that only the reference classifies correctly.
        gained: Number of examples that only the reference classifies wrongly.
        examples: Number of examples.
        difference: δ, in [0, 1].
        error: Error probability that the p-value will be compared with, in (0, 1).

    Example:
        >>> difference_p_value(41, 41, examples=1700, difference=0.01, error=0.05) < 0.05
        True
    """
    import numpy as np
    from scipy.special import bdtr, gammaln, xlog1py, xlogy

    spent = error * NUISANCE_SHARE
    most = binomial_upper_bound(lost + gained, examples, 1 - spent)
    # A difference cannot exceed the share of discordant examples.
    if difference > most:
        return spent
    # closer together where d is small, since there the p-value varies fastest
    discordant = difference + (most - difference) * np.linspace(0, 1, NUISANCE_POINTS)[:, None] ** 2
    log = -math.log(LEFT_OUT)
    first, last = (
        examples * share
        + sign * (log / 3 + math.sqrt(log**2 / 9 + 2 * log * examples * share * (1 - share)))
        for share, sign in ((difference, -1), (most, 1))
    )
    number = np.arange(max(0, math.floor(first)), min(examples, math.ceil(last)) + 1)[None, :]
    ways = gammaln(examples + 1) - gammaln(number + 1) - gammaln(examples - number + 1)
    probability = np.exp(ways + xlogy(number, discordant) + xlog1py(examples - number, -discordant))
    # most lost examples, for each number of discordant ones, up to the outcome seen in that order
    z = NormalDist().inv_cdf(1 - error)
    limit = lost - gained + z * math.sqrt(lost + gained + PSEUDO_EXAMPLES)
    most_lost = np.floor((number + limit - z * np.sqrt(number + PSEUDO_EXAMPLES)) / 2 + 1e-9)
    rate = (1 + difference / discordant.clip(min=1e-300)) / 2
    below = np.where(most_lost < 0, 0.0, bdtr(most_lost.clip(0, number), number, rate))
    return min(1.0, float((probability * below).sum(axis=1).max()) + spent + 2 * LEFT_OUT)


def difference_upper_bound(lost: int, gained: int, examples: int, confidence: float) -> float:
    """Return an upper bound in [0, 1] on the expected paired difference, lost minus gained, by
    inverting `difference_p_value`; `confidence` is the probability with which it holds.

    Example:
        >>> 0.008 < difference_upper_bound(48, 48, examples=2000, confidence=0.95) < 0.01
        True
    """
    error, low, high = 1 - confidence, max(0.0, (lost - gained) / examples), 1.0
    for _ in range(20):
        middle = (low + high) / 2
        refuted = difference_p_value(lost, gained, examples, middle, error) <= error
        low, high = (low, middle) if refuted else (middle, high)
    return high


def mean_upper_bound(exits: Tensor, layers: int, confidence: float) -> float:
    r"""Return the empirical Bernstein upper bound on the mean exit layer (Maurer & Pontil 2009,
    theorem 4), at most N.

    With n ≥ 2 exit layers in 1 … N, sample variance V and δ = 1 - confidence it is
    :math:`\text{mean} + \sqrt{2 V \ln(2/δ) / n} + 7 (N - 1) \ln(2/δ) / (3 (n - 1))`.
    """
    values, log = exits.double(), math.log(2 / (1 - confidence))
    n = len(values)
    spread = (2 * values.var().item() * log / n) ** 0.5 + 7 * (layers - 1) * log / (3 * (n - 1))
    return min(float(layers), values.mean().item() + spread)
