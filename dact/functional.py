r"""The arithmetic of DACT, as pure functions on tensors.

For layer :math:`n = 1 \dots N`, with the classifier's output :math:`y_n` (a probability vector) and
the confidence :math:`h_n \in [0, 1]`:

.. math::
    p_0 = 1, \quad p_n = p_{n-1} h_n, \qquad
    a_0 = 0, \quad a_n = p_{n-1} y_n + (1 - p_{n-1}) a_{n-1}, \qquad
    Y = a_N

y and a are ``[batch, layers, classes]``, each row a probability vector of at least two classes; h
and p are ``[batch, layers]``, in [0, 1]. Tensors of one layer lack the second dimension. Layers are
numbered from 1. Results are in float32 or more.

Source: Eyzaguirre & Soto, *Differentiable Adaptive Computation Time for Visual Reasoning*, CVPR
2020 (arXiv 2004.12770), and Eyzaguirre et al., *DACT-BERT*, arXiv 2109.11745."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Annotated, Literal

import torch
from torch import Tensor

from dact.checks import Range, check_arguments, check_choice
from dact.tasks import MULTICLASS, Task
from dact.tasks import SMALLEST_PROBABILITY as SMALLEST_PROBABILITY
from dact.tasks import UNLABELLED as UNLABELLED
from dact.tasks import HaltingRule as HaltingRule
from dact.tasks import at_least_float32 as at_least_float32

PonderKind = Literal["p", "h"]
Tolerance = Annotated[
    float,
    Range(
        "[0, 1)", "it is the largest probability by which the class may end behind the final winner"
    ),
]
Margin = Annotated[
    float, Range("[0, 1]", "it is the lead above which an example leaves; 1 turns it off")
]

WITHOUT_FLOAT64 = {"mps"}  # types of devices for which the CPU computes the halting rule


@dataclass(frozen=True)
class Halting:
    """The rule by which examples halt: a provable criterion, and a margin beside it.

    Args:
        rule: As for `can_halt`; ``"never"`` runs every layer, whatever the margin.
        tolerance: As for `can_halt`, in [0, 1).
        margin: As for `is_clear`, in [0, 1]; 1 turns it off.

    Example:
        >>> Halting(margin=0.5).exit_layers(
        ...     a=torch.tensor([[[0.8, 0.2], [0.6, 0.4]]]),
        ...     p=torch.tensor([[0.9, 0.1]]),
        ...     y=torch.tensor([[[0.8, 0.2], [0.4, 0.6]]]),
        ... )
        tensor([1])
    """

    rule: HaltingRule = "exact"
    tolerance: Tolerance = 0.0
    margin: Margin = 1.0

    def __post_init__(self) -> None:
        check_arguments(Halting, vars(self), "Halting: ")

    def with_dial(self, name: str, value: float) -> Halting:
        """Return this rule with another value of one dial, ``"halting_tolerance"`` or
        ``"halting_margin"``."""
        return replace(self, **{name.removeprefix("halting_"): value})  # type: ignore[arg-type]

    def halts(
        self,
        a: Tensor,
        p: Tensor,
        y: Tensor,
        remaining: int | Tensor,
        num_layers: int,
        task: Task = MULTICLASS,
    ) -> Tensor:
        """Return which examples leave after a layer, bool ``[…]``; shapes are not checked.

        Args:
            a, p, y: a_n and y_n ``[…, classes]``, and p_n ``[…]``.
            remaining: Number of remaining layers, or int64 ``[…]``.
            num_layers: N, the number of layers of the model.
            task: Task of the answers.
        """
        halts = _provable(a, p, remaining, self, num_layers, task)
        if self.margin == 1 or self.rule == "never":
            return halts
        return halts | (task.lead(y) > self.margin)

    def exit_layers(self, a: Tensor, p: Tensor, y: Tensor, task: Task = MULTICLASS) -> Tensor:
        """Return the first layer after which each example leaves, int64 ``[batch]``."""
        remaining = torch.arange(p.shape[1] - 1, -1, -1, device=p.device)  # [layers]
        return self.halts(a, p, y, remaining, p.shape[1], task).int().argmax(dim=1) + 1


def accumulate_step(a: Tensor, p: Tensor, y: Tensor, h: Tensor) -> tuple[Tensor, Tensor]:
    """Return (a_n, p_n), one step of the recurrence from (a_{n-1}, p_{n-1}) and (y_n, h_n)."""
    share = p.unsqueeze(-1)
    return share * y + (1 - share) * a, p * h


def accumulate(y: Tensor, h: Tensor) -> tuple[Tensor, Tensor]:
    """Return the answers a and the remaining shares p after each layer, from y and h.

    Example:
        >>> y = torch.tensor([[[0.75, 0.25], [0.25, 0.75]]])
        >>> a, p = accumulate(y, torch.tensor([[0.5, 0.5]]))
        >>> a[0].tolist(), p[0].tolist()
        ([[0.75, 0.25], [0.5, 0.5]], [0.5, 0.25])
    """
    y, h = at_least_float32(y), at_least_float32(h)
    a_n, p_n = torch.zeros_like(y[:, 0]), torch.ones_like(h[:, 0])
    a, p = [], []
    for n in range(h.shape[1]):
        a_n, p_n = accumulate_step(a_n, p_n, y[:, n], h[:, n])
        a.append(a_n)
        p.append(p_n)
    return torch.stack(a, dim=1), torch.stack(p, dim=1)


def can_halt(
    a: Tensor,
    p: Tensor,
    remaining: int | Tensor,
    rule: HaltingRule = "exact",
    tolerance: float = 0.0,
    num_layers: int | None = None,
    task: Task = MULTICLASS,
) -> Tensor:
    r"""Return whether the class of an example can no longer change, whatever the remaining layers
    answer.

    With d layers remaining, the largest entry a* of a_n cannot fall below :math:`a^* (1-p_n)^d`,
    and the runner-up a_ru cannot rise above :math:`1 - (1 - a_{ru}) (1-p_n)^d`. An example may halt
    when d = 0 or

    .. math::
        \text{exact: } & (1 - p_n)^d (1 + a^* - a_{ru}) > 1 - \text{tolerance} \\
        \text{paper: } & a^* (1 - p_n)^d > a_{ru} + p_n d - \text{tolerance}

    (*paper*: eq. 5 of arXiv 2004.12770; safe, but looser.) Both are computed in float64 with a
    slack of 4 · num_layers · ε, where ε is the machine epsilon of `a`'s dtype, so that rounding and
    ties never break the guarantee.

    Args:
        a, p: a_n ``[batch, classes]`` and p_n ``[batch]``.
        remaining: d, the number of remaining layers: one for all examples, or int64 ``[batch]``.
        rule: ``"exact"``, ``"paper"``, or ``"never"`` (run every layer).
        tolerance: Largest probability, in [0, 1), by which the returned class may end behind the
            final winner.
        num_layers: N, for the slack; `remaining` + 1 by default.
        task: Task of the answers.

    Returns:
        A bool tensor ``[batch]``.

    Example:
        >>> can_halt(torch.tensor([[0.9, 0.1], [0.6, 0.4]]), torch.tensor([0.1, 0.1]), remaining=2)
        tensor([ True, False])
    """
    return _provable(a, p, remaining, Halting(rule, tolerance), num_layers, task)


def _provable(
    a: Tensor,
    p: Tensor,
    remaining: int | Tensor,
    halting: Halting,
    num_layers: int | None,
    task: Task,
) -> Tensor:
    """Return what `can_halt` returns, without its checks, for a ``[…, classes]`` and p ``[…]``."""
    if a.device.type in WITHOUT_FLOAT64:
        remaining = remaining.cpu() if isinstance(remaining, Tensor) else remaining
        return _provable(a.cpu(), p.cpu(), remaining, halting, num_layers, task).to(a.device)
    d = remaining.to(a.device) if isinstance(remaining, Tensor) else int(remaining)
    last = d == 0
    if halting.rule == "never" or last is True:
        return torch.as_tensor(last, device=a.device).expand(p.shape)
    slack = 4 * torch.finfo(a.dtype).eps * (num_layers if num_layers is not None else d + 1)
    halts = task.proof(a, p, d, halting.rule) > slack - halting.tolerance
    return halts if last is False else halts | last


def is_clear(y: Tensor, margin: float) -> Tensor:
    """Return whether the first class of y_n ``[…, classes]`` leads its second by more than
    `margin`, bool ``[…]``; at a margin of 1 no example is clear.

    This second halting criterion proves nothing about the remaining layers. It is the "softmax
    response" of Schuster et al., *Confident Adaptive Language Modeling*, NeurIPS 2022 (arXiv
    2207.07061).

    Example:
        >>> is_clear(torch.tensor([[0.8, 0.1, 0.1], [0.5, 0.4, 0.1]]), 0.5)
        tensor([ True, False])
    """
    return (MULTICLASS.lead(y) > Halting(margin=margin).margin) & (margin < 1)


def exit_layers(
    a: Tensor,
    p: Tensor,
    rule: HaltingRule = "exact",
    tolerance: float = 0.0,
    *,
    y: Tensor | None = None,
    margin: float = 1.0,
) -> Tensor:
    """Return the first layer after which each example may halt, int64 ``[batch]``, by `can_halt` or
    `is_clear`. A margin below 1 needs y; the rule ``"never"`` ignores the margin."""
    halting = Halting(rule, tolerance, margin)
    if margin < 1 and rule != "never" and y is None:
        raise ValueError(f"a margin of {margin} needs y, the classifications of the layers")
    return halting.exit_layers(a, p, a if y is None else y)


def answer_at(a: Tensor, exit_layer: Tensor) -> Tensor:
    """Return a_n ``[batch, classes]`` at each example's exit layer, int64 ``[batch]``."""
    return a[torch.arange(len(a), device=a.device), exit_layer - 1]


def ponder_cost(p: Tensor, h: Tensor, kind: PonderKind = "p") -> Tensor:
    """Return the ponder cost ρ, a scalar: the mean over the batch of Σ_n p_n (``"p"``, the authors'
    code) or of Σ_n h_n (``"h"``).

    Example:
        >>> ponder_cost(torch.tensor([[0.5, 0.25]]), torch.tensor([[0.5, 0.5]])).item()
        0.75
    """
    check_choice("ponder", kind, PonderKind)
    return at_least_float32(p if kind == "p" else h).sum(dim=1).mean()


def soft_targets(
    labels: Tensor, classes: int, teacher: Tensor | None = None, share: float = 0.0
) -> Tensor:
    r"""Mix labels with a teacher's probabilities: :math:`q = (1 - s)\, \text{onehot} + s\, t`.

    For an example labelled -100, which means no label, the teacher's share is 1. Without a teacher
    it has no target, and its row is all zeros.

    Args:
        labels: int64 ``[batch]``, in 0 … classes - 1, or -100.
        classes: Number of classes.
        teacher: t, ``[batch, classes]``, each row a probability vector.
        share: s, the teacher's share of the target, in [0, 1].

    Returns:
        q, ``[batch, classes]``.

    Raises:
        ValueError: If a label is out of range or the teacher holds no probabilities.

    Example:
        >>> teacher = torch.tensor([[0.5, 0.5], [0.75, 0.25]])
        >>> soft_targets(torch.tensor([1, -100]), 2, teacher, share=0.5).tolist()
        [[0.25, 0.75], [0.75, 0.25]]
    """
    return MULTICLASS.targets(labels, classes, teacher, share)


def task_loss(a: Tensor, target: Tensor, class_weights: Tensor | None = None) -> Tensor:
    r"""Return the negative log-likelihood of answers, :math:`-\sum_k w_k q_k \log a_k`, mean over
    the batch; 0 if no example has a target.

    With a teacher in the targets q this is distillation at temperature 1 (Hinton et al. 2015, arXiv
    1503.02531).

    Args:
        a: Answers, ``[batch, classes]``; probabilities below 1e-30 count as 1e-30.
        target: q, as returned by `soft_targets`, or classes, int64 ``[batch]``. Examples without a
            target (a row of zeros, or -100) are left out.
        class_weights: w, ``[classes]``. The mean is over examples and not over weights, so that it
            does not depend on how the examples are batched.

    Example:
        >>> round(task_loss(torch.tensor([[0.5, 0.5]]), torch.tensor([1])).item(), 4)
        0.6931
    """
    log_a = at_least_float32(a).clamp_min(SMALLEST_PROBABILITY).log()
    return _cross_entropy(log_a, target, class_weights)


def exit_loss(
    logits: Tensor,
    target: Tensor,
    class_weights: Tensor | None = None,
    task: Task = MULTICLASS,
) -> Tensor:
    """Return the cross-entropy of every layer's own classification (deep supervision), mean over
    batch and layers.

    Args:
        logits: Logits of y, ``[batch, layers, classes]``.
        target, class_weights: As for `task_loss`.
        task: Task of the logits.
    """
    log_y = task.log_likelihoods(at_least_float32(logits))
    # The loss is linear in log y, so the mean over layers can come first.
    return _cross_entropy(log_y.mean(dim=1), target, class_weights)


def _cross_entropy(log_y: Tensor, target: Tensor, class_weights: Tensor | None) -> Tensor:
    """Return the mean over the examples that have a target; `log_y` is ``[batch, classes]``."""
    classes = log_y.shape[-1]
    target = soft_targets(target, classes) if target.dim() == 1 else at_least_float32(target)
    with_target = target.any(dim=1).sum().clamp_min(1)
    weighted = target if class_weights is None else target * class_weights
    return -(weighted * log_y).sum() / with_target


def twice(batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return a batch concatenated with itself, so that one run of the encoder makes two passes with
    different dropout masks."""
    found, rows = dict(batch), len(batch["labels"])
    for name, entry in batch.items():
        if isinstance(entry, Tensor) and entry.dim() and len(entry) == rows:
            found[name] = torch.cat([entry, entry])
    return found


def divergence(first: Tensor, second: Tensor, task: Task = MULTICLASS) -> Tensor:
    """Return half of KL(p‖q) + KL(q‖p) in nats, mean over batch and layers, from logits of two
    classifications, each ``[batch, layers, classes]``.

    Source: Liang et al. 2021, *R-Drop: Regularized Dropout for Neural Networks*, formula 2. The
    paper sums the likelihoods of both passes. `DACT` takes their mean, so its weight of 5 is an α
    of 10 in the paper.
    """
    both = (at_least_float32(logits) for logits in (first, second))
    log_p, log_q = map(task.log_likelihoods, both)
    return ((log_p.exp() - log_q.exp()) * (log_p - log_q)).sum(dim=-1).mean() / 2
