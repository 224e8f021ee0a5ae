"""When a text leaves, and with which answer: rules over what all layers said, and what is fitted to
them afterwards.

A *rule* turns y and h of some texts into a `Policy`; one number, the margin, then trades layers for
accuracy. A *fit* makes a rule from validation texts, so that the constants of a rule never see a
test text."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn.functional import binary_cross_entropy_with_logits

from dact import functional

BUDGETS = (1.5, 2.0, 2.5, 3.0, 3.5)  # mean layers
ALL_LEAVE = -1e9  # a margin at which all texts leave after the first layer
BASES = tuple(
    round(0.4 * 1.15**step, 3) for step in range(16)
)  # c of the margin schedule, 0.4 … 3.3


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
        """The last layer that is run for each text, int64 ``[texts]``, 1-based."""
        return (self.proven | (self.score > margin)).int().argmax(dim=1) + 1

    def margin_for(self, budget: float) -> float:
        """The largest margin at which these texts take at most `budget` layers in the mean."""
        candidates = torch.cat([self.score.new_tensor([ALL_LEAVE]), self.score.flatten().unique()])
        low, high = 0, len(candidates)
        while high - low > 1:
            middle = (low + high) // 2
            within = self.exits(candidates[middle].item()).double().mean() <= budget
            low, high = (middle, high) if within else (low, middle)
        return candidates[low].item()


Rule = Callable[[Tensor, Tensor], Policy]  # of y [texts, layers, classes] and h [texts, layers]
Fit = Callable[
    [Tensor, Tensor, Tensor], Rule
]  # of validation texts: y, h and their classes [texts]


def lead(answers: Tensor) -> Tensor:
    """Return the first class's probability less the second's, float64 ``[…]``, rounded as the
    package rounds it."""
    first, second = answers.topk(2, dim=-1).values.unbind(dim=-1)
    return (first - second).double()


def log_of(probabilities: Tensor) -> Tensor:
    """Return the logarithm, finite also where a probability is 0; see
    `functional.SMALLEST_PROBABILITY`."""
    return probabilities.clamp_min(functional.SMALLEST_PROBABILITY).log()


def last_alone(score: Tensor) -> Tensor:
    proven = torch.zeros_like(score, dtype=torch.bool)
    proven[:, -1] = True
    return proven


# ---------------------------------------------------------------------- rules without a fit


def by_lead(y: Tensor, h: Tensor) -> Policy:
    """The multi-exit: y_n, by its lead (CALM's softmax response)."""
    return Policy(lead(y), y, last_alone(h))


def by_entropy(y: Tensor, h: Tensor) -> Policy:
    """The multi-exit: y_n, by its entropy (DeeBERT)."""
    return Policy((y.double() * log_of(y.double())).sum(dim=-1), y, last_alone(h))


def by_margin(y: Tensor, h: Tensor) -> Policy:
    """DACT: a_n, by the lead of y_n or by the proof."""
    a, p = functional.accumulate(y, h)
    return Policy(lead(y), a, _spare(a, p) > 1)


def by_tolerance(y: Tensor, h: Tensor) -> Policy:
    """DACT: a_n, by the exact rule with a tolerance, which is 1 less the margin here."""
    a, p = functional.accumulate(y, h)
    score = _spare(a, p)
    return Policy(score, a, last_alone(score))


def by_lead_of_a(y: Tensor, h: Tensor) -> Policy:
    """DACT: a_n, by its own lead or by the proof."""
    a, p = functional.accumulate(y, h)
    return Policy(lead(a), a, _spare(a, p) > 1)


def by_agreement(y: Tensor, h: Tensor) -> Policy:
    """DACT: a_n, by the lead of y_n where y_n and a_n have the same class, or by the proof."""
    a, p = functional.accumulate(y, h)
    agree = y.argmax(dim=-1) == a.argmax(dim=-1)
    return Policy(torch.where(agree, lead(y), lead(y).new_tensor(-0.5)), a, _spare(a, p) > 1)


def by_mean(y: Tensor, h: Tensor) -> Policy:
    """The multi-exit with the plain geometric mean of the exits so far, by the lead of that."""
    counts = torch.arange(1, y.shape[1] + 1).view(1, -1, 1)
    answers = (log_of(y).cumsum(dim=1) / counts).softmax(dim=-1)
    return Policy(lead(answers), answers, last_alone(h))


def _spare(a: Tensor, p: Tensor) -> Tensor:
    """The left side of the exact halting rule; above 1 the class can no longer change."""
    a, p = a.double(), p.double()
    remaining = torch.arange(p.shape[1] - 1, -1, -1)
    spare = (1 - p) ** remaining * (1 + lead(a))
    spare[:, -1] = 2.0
    return spare - 4 * p.shape[1] * torch.finfo(torch.float32).eps


# ---------------------------------------------------------------------- fits on validation texts


def plain(rule: Rule) -> Fit:
    return lambda y, h, target: rule


def scheduled(fit: Fit, by_hits: bool = True) -> Fit:
    """The threshold of layer n is 1 − (1 − margin) c^(n−1), with the c that is best in the mean
    over the budgets.

    What leaves is worth its hits or, with less noise, its confidence at one temperature per layer.
    """

    def fitted(y: Tensor, h: Tensor, target: Tensor) -> Rule:
        rule = fit(y, h, target)
        policy = rule(y, h)
        if by_hits:
            worth = (
                policy.answers.argmax(dim=-1) == target.unsqueeze(1)
            ).float()  # [texts, layers]
        else:
            worth = calibrated(policy.answers, target)(policy.answers).amax(dim=-1)

        def value(base: float) -> float:
            bent = bend(policy, base)
            budgets = [budget for budget in BUDGETS if budget < y.shape[1]]
            exits = [bent.exits(bent.margin_for(budget)) for budget in budgets]
            return sum(worth.gather(1, exit.unsqueeze(1) - 1).mean().item() for exit in exits)

        base = max(BASES, key=value)
        return lambda y, h: bend(rule(y, h), base)

    return fitted


def bend(policy: Policy, base: float) -> Policy:
    """The policy under the margin schedule: leaving at 1 − (1 − margin) c^(n−1) is leaving with
    this score at margin."""
    depth = torch.arange(policy.score.shape[1])
    return replace(policy, score=1 - (1 - policy.score) / base**depth)


def calibrated(answers: Tensor, target: Tensor) -> Callable[[Tensor], Tensor]:
    """Answers at one temperature per layer, which is fitted by the likelihood."""
    log_answers = log_of(answers)
    slope = torch.zeros(1, answers.shape[1], 1, requires_grad=True)  # the log of 1 / temperature
    minimise([slope], lambda: likelihood_loss(slope.exp() * log_answers, target))
    fitted = slope.detach().exp()
    return lambda answers: (fitted * log_of(answers)).softmax(dim=-1)


def scaled(rule: Rule, with_bias: bool = True) -> Fit:
    """The rule on softmax(w_n log y_n + b_n), with one w and one b per class for each exit, fitted
    by the likelihood.

    It can be folded into the last linear map of each classifier, so it costs nothing and leaves the
    proof as it is."""

    def fitted(y: Tensor, h: Tensor, target: Tensor) -> Rule:
        log_weights = torch.zeros(1, y.shape[1], 1, requires_grad=True)
        bias = torch.zeros(y.shape[1:], requires_grad=with_bias)

        def scale(y: Tensor) -> Tensor:
            return log_weights.exp() * log_of(y) + bias

        def loss() -> Tensor:
            return likelihood_loss(scale(y), target) + 1e-3 * (
                log_weights.square().sum() + bias.square().sum()
            )

        minimise([log_weights, bias] if with_bias else [log_weights], loss)

        def scaled_rule(y: Tensor, h: Tensor) -> Policy:
            with torch.no_grad():
                return rule(scale(y).softmax(dim=-1), h)

        return scaled_rule

    return fitted


def mixed(rule: Rule) -> Fit:
    """What leaves by its margin has the answer softmax(Σ_{i≤n} w_ni log y_i + b_n) and leaves by
    its lead; what is proven keeps its own."""

    def fitted(y: Tensor, h: Tensor, target: Tensor) -> Rule:
        layers, classes = y.shape[1:]
        allowed = torch.ones(layers, layers).tril()
        start = torch.eye(layers) * 0.5 + allowed / (2 * allowed.sum(dim=1, keepdim=True))
        weights, bias = (
            start.clone().requires_grad_(),
            torch.zeros(layers, classes, requires_grad=True),
        )

        def mix(y: Tensor) -> Tensor:
            return torch.einsum("tic,ni->tnc", log_of(y), weights * allowed) + bias

        def loss() -> Tensor:
            drift = ((weights - start) * allowed).square().sum() + bias.square().sum()
            return likelihood_loss(mix(y), target) + 1e-3 * drift

        minimise([weights, bias], loss)

        def mixed_rule(y: Tensor, h: Tensor) -> Policy:
            policy = rule(y, h)
            with torch.no_grad():
                answers = mix(y).softmax(dim=-1)
            kept = policy.proven & ~last_alone(policy.score)
            return Policy(
                lead(answers),
                torch.where(kept.unsqueeze(-1), policy.answers, answers),
                policy.proven,
            )

        return mixed_rule

    return fitted


def gated(rule: Rule) -> Fit:
    """The rule, but what leaves is what gains least by going on: a text for which the last layer is
    right, and this one not.

    The chance of that is a logistic function of the lead and its square, with slopes for all layers
    and an offset for each."""

    def fitted(y: Tensor, h: Tensor, target: Tensor) -> Rule:
        right = rule(y, h).answers.argmax(dim=-1) == target.unsqueeze(1)
        gains = (right[:, -1:] & ~right)[:, :-1].float()
        slopes, offsets = (
            torch.tensor([2.0, 0.0], requires_grad=True),
            torch.zeros(y.shape[1] - 1, requires_grad=True),
        )

        def staying(y: Tensor) -> Tensor:
            ahead = lead(y)[:, :-1].float()
            return slopes[0] * ahead + slopes[1] * ahead.square() + offsets

        minimise(
            [slopes, offsets],
            lambda: (
                binary_cross_entropy_with_logits(-staying(y), gains) + 1e-3 * slopes.square().sum()
            ),
        )

        def gated_rule(y: Tensor, h: Tensor) -> Policy:
            policy = rule(y, h)
            with torch.no_grad():
                score = staying(y).double()
            return replace(
                policy,
                score=torch.cat([score, score.new_full((len(score), 1), float("inf"))], dim=1),
            )

        return gated_rule

    return fitted


def likelihood_loss(logits: Tensor, target: Tensor) -> Tensor:
    """The cross-entropy of logits ``[texts, layers, classes]``, summed over the layers, mean over
    the texts."""
    return -logits.log_softmax(dim=-1)[torch.arange(len(target)), :, target].sum(dim=1).mean()


def minimise(parameters: list[Tensor], loss: Callable[[], Tensor]) -> None:
    optimizer = torch.optim.LBFGS(parameters, max_iter=200, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        optimizer.zero_grad()
        value = loss()
        value.backward()
        return value

    optimizer.step(closure)


FITS: dict[
    str, dict[str, Fit]
] = {  # by kind of training; the first is the plain rule that everything is compared with
    "dact": {
        "margin": plain(by_margin),
        "tolerance": plain(by_tolerance),
        "lead of a": plain(by_lead_of_a),
        "margin where y and a agree": plain(by_agreement),
        "y alone": plain(by_lead),
        "margin, one temperature per exit": scaled(by_margin, with_bias=False),
        "margin, scheduled by confidence": scheduled(plain(by_margin), by_hits=False),
        "margin, scheduled": scheduled(plain(by_margin)),
        "scaled exits, y alone": scaled(by_lead),
        "scaled exits, scheduled": scheduled(scaled(by_margin)),
        "scaled exits": scaled(by_margin),
        "mix": mixed(by_margin),
        "mix, scheduled": scheduled(mixed(by_margin)),
        "margin, by gain": gated(by_margin),
    },
    "multi": {
        "lead": plain(by_lead),
        "entropy": plain(by_entropy),
        "mean of the exits": plain(by_mean),
        "lead, one temperature per exit": scaled(by_lead, with_bias=False),
        "lead, scheduled by confidence": scheduled(plain(by_lead), by_hits=False),
        "lead, scheduled": scheduled(plain(by_lead)),
        "scaled exits, scheduled": scheduled(scaled(by_lead)),
        "scaled exits": scaled(by_lead),
        "mix": mixed(by_lead),
        "mix, scheduled": scheduled(mixed(by_lead)),
        "lead, by gain": gated(by_lead),
    },
}
PAIRED = (
    "margin",
    "lead",
    "scaled exits",
    "mix",
    "margin, by gain",
    "lead, by gain",
)  # rules of which the record has every test text


# ---------------------------------------------------------------------- what is possible


def oracle(answers: Tensor, target: Tensor) -> dict[str, float]:
    """What one could do who knows which layers are right, from answers ``[texts, layers,
    classes]``.

    Returns:
        ``accuracy``: the share of the texts, in %, that some layer has right, and ``layers``: the
        mean number of the first such layer (1 where there is none). ``layers for the class of
        all``: the mean number of the first layer that has the class of the last one.
    """
    classes = answers.argmax(dim=-1)
    right, same = classes == target.unsqueeze(1), classes == classes[:, -1:]
    return {
        "accuracy": 100 * right.any(dim=1).double().mean().item(),
        "layers": (right.int().argmax(dim=1) + 1).double().mean().item(),
        "layers for the class of all": (same.int().argmax(dim=1) + 1).double().mean().item(),
    }
