"""When a text leaves, and with which answer: rules over what all layers said.

A *rule* turns y and h of some texts into a `Policy`; one number, the margin, then trades layers for
accuracy."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from dact import functional

ALL_LEAVE = -1e9  # a margin at which all texts leave after the first layer


@dataclass(frozen=True)
class Policy:
    """What a rule says of some texts.

    Args:
        score: ``[texts, layers]``, float64; a text leaves after the first layer whose score is
            above the margin.
        answers: ``[texts, layers, classes]``, the answer of what leaves after each layer.
        proven: bool ``[texts, layers]``: leaves there whatever the margin; true for the last layer.
    """

    score: Tensor
    answers: Tensor
    proven: Tensor

    def exits(self, margin: float) -> Tensor:
        """Return the last layer that is run for each text, int64 ``[texts]``, 1-based."""
        return (self.proven | (self.score > margin)).int().argmax(dim=1) + 1

    def margin_for(self, budget: float) -> float:
        """Return the largest margin at which these texts take at most `budget` layers on
        average."""
        candidates = torch.cat([self.score.new_tensor([ALL_LEAVE]), self.score.flatten().unique()])
        low, high = 0, len(candidates)
        while high - low > 1:
            middle = (low + high) // 2
            within = self.exits(candidates[middle].item()).double().mean() <= budget
            low, high = (middle, high) if within else (low, middle)
        return candidates[low].item()


Rule = Callable[[Tensor, Tensor], Policy]  # of y [texts, layers, classes] and h [texts, layers]


def lead(answers: Tensor) -> Tensor:
    """Return the first class's probability less the second's, float64 ``[…]``, rounded as the
    package rounds it."""
    first, second = answers.topk(2, dim=-1).values.unbind(dim=-1)
    return (first - second).double()


def by_lead(y: Tensor, h: Tensor) -> Policy:
    """The multi-exit: y_n, by its lead (CALM's softmax response)."""
    return Policy(lead(y), y, _last_alone(h))


def by_margin(y: Tensor, h: Tensor) -> Policy:
    """DACT: a_n, by the lead of y_n or by the proof."""
    a, p = functional.accumulate(y, h)
    return Policy(lead(y), a, _spare(a, p) > 1)


def by_tolerance(y: Tensor, h: Tensor) -> Policy:
    """DACT: a_n, by the exact rule with a tolerance, which is 1 less the margin here."""
    a, p = functional.accumulate(y, h)
    score = _spare(a, p)
    return Policy(score, a, _last_alone(score))


def _last_alone(score: Tensor) -> Tensor:
    proven = torch.zeros_like(score, dtype=torch.bool)
    proven[:, -1] = True
    return proven


def _spare(a: Tensor, p: Tensor) -> Tensor:
    """The left side of the exact halting rule; above 1 the class can no longer change."""
    a, p = a.double(), p.double()
    remaining = torch.arange(p.shape[1] - 1, -1, -1)
    spare = (1 - p) ** remaining * (1 + lead(a))
    spare[:, -1] = 2.0
    return spare - 4 * p.shape[1] * torch.finfo(torch.float32).eps


# by kind of training; the first is the plain rule that everything is compared with
RULES: dict[str, dict[str, Rule]] = {
    "dact": {"margin": by_margin, "tolerance": by_tolerance, "y alone": by_lead},
    "multi": {"lead": by_lead},
}
