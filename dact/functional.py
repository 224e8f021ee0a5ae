r"""The arithmetic of DACT, as pure functions on tensors.

For layer :math:`n = 1 \dots N`, with the classifier's output :math:`y_n` (a probability vector) and the
confidence :math:`h_n \in [0, 1]`:

.. math::
    p_0 = 1, \quad p_n = p_{n-1} h_n, \qquad
    a_0 = 0, \quad a_n = p_{n-1} y_n + (1 - p_{n-1}) a_{n-1}, \qquad
    Y = a_N

Source: Eyzaguirre & Soto, *Differentiable Adaptive Computation Time for Visual Reasoning*, CVPR 2020
(arXiv 2004.12770), and Eyzaguirre et al., *DACT-BERT*, arXiv 2109.11745.

Shapes are written ``[batch, layers, classes]``; a layer's number is 1-based wherever it is returned.
"""

from __future__ import annotations

from typing import Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor

HaltingRule = Literal["exact", "paper", "never"]
PonderKind = Literal["p", "h"]

# Below this a probability no longer changes the task loss. It keeps 1 / a and the sums of it finite in float32
# (whose largest number is 3e38), and is far under the smallest probability that a trained softmax gives (e^-69).
SMALLEST_PROBABILITY = 1e-30
WITHOUT_FLOAT64 = {"mps"}  # kinds of devices on which the halting rule cannot be computed; the CPU does it for them


def check_choice(name: str, value: object, choices: object) -> None:
    """Raise a ``ValueError`` unless `value` is one of the strings of the ``Literal`` type `choices`."""
    allowed = get_args(choices)
    if value not in allowed:
        raise ValueError(f"{name} must be one of {', '.join(map(repr, allowed))}, got {value!r}")


def check_tolerance(tolerance: float) -> None:
    """Raise a ``ValueError`` unless `tolerance` is in [0, 1)."""
    if not 0.0 <= tolerance < 1.0:
        raise ValueError(
            f"halting_tolerance must be in [0, 1), got {tolerance}: it is the most probability by which the returned "
            "class may end behind the final winner (0 keeps the full-depth class)"
        )


def check_margin(margin: float) -> None:
    """Raise a ``ValueError`` unless `margin` is in [0, 1]."""
    if not 0.0 <= margin <= 1.0:
        raise ValueError(
            f"halting_margin must be in [0, 1], got {margin}: it is the lead in probability of a layer's first class over "
            "its second above which an example leaves (1 lets none leave for it)"
        )


def _check_layers(name: str, tensor: Tensor, dim: int, shape: str) -> None:
    if tensor.dim() != dim or tensor.shape[1] == 0:
        raise ValueError(f"{name} must have the shape {shape} with at least one layer, got {list(tensor.shape)}")
    if not tensor.is_floating_point():
        raise TypeError(f"{name} must be a floating-point tensor, got {tensor.dtype}")


def at_least_float32(tensor: Tensor) -> Tensor:
    """`tensor` in float32, or as it is where it is float64: half precision is never summed over layers."""
    return tensor if tensor.dtype == torch.float64 else tensor.float()


def accumulate_step(a: Tensor, p: Tensor, y: Tensor, h: Tensor) -> tuple[Tensor, Tensor]:
    """One layer of the recurrence: from (a_{n-1}, p_{n-1}) and (y_n, h_n) to (a_n, p_n).

    Args:
        a: a_{n-1}, ``[batch, classes]``.
        p: p_{n-1}, ``[batch]``, in [0, 1].
        y: y_n, ``[batch, classes]``, each row a probability vector.
        h: h_n, ``[batch]``, in [0, 1].

    Returns:
        a_n ``[batch, classes]`` and p_n ``[batch]``.
    """
    share = p.unsqueeze(-1)
    return share * y + (1 - share) * a, p * h


def accumulate(y: Tensor, h: Tensor) -> tuple[Tensor, Tensor]:
    """The answer a_n and the remaining share p_n after each layer.

    Args:
        y: The classifier's output of each layer, ``[batch, layers, classes]``, rows are probability vectors.
        h: The confidence of each layer, ``[batch, layers]``, in [0, 1].

    Returns:
        a ``[batch, layers, classes]`` and p ``[batch, layers]``, in float32 or more. a_n is a probability vector,
        p never increases with n.

    Raises:
        ValueError: If the shapes do not fit each other.
        TypeError: If a tensor is not of floating point.

    Example:
        >>> y = torch.tensor([[[0.8, 0.2], [0.4, 0.6]]])
        >>> h = torch.tensor([[0.5, 0.5]])
        >>> a, p = accumulate(y, h)
        >>> a[0].tolist(), p[0].tolist()
        ([[0.800000011920929, 0.20000000298023224], [0.6000000238418579, 0.4000000059604645]], [0.5, 0.25])
    """
    _check_layers("y", y, 3, "[batch, layers, classes]")
    _check_layers("h", h, 2, "[batch, layers]")
    if y.shape[:2] != h.shape:
        raise ValueError(
            f"y and h must agree in batch and layers, got y {list(y.shape)} [batch, layers, classes] "
            f"and h {list(h.shape)} [batch, layers]"
        )
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
) -> Tensor:
    r"""Whether the answer of an example can no longer change, whatever the remaining layers say.

    With d layers remaining, the largest entry a* of a_n cannot fall below :math:`a^* (1-p_n)^d`, and the runner-up
    a_ru cannot rise above :math:`1 - (1 - a_{ru}) (1-p_n)^d`. An example may halt when d = 0 or

    .. math::
        \text{exact: } & (1 - p_n)^d (1 + a^* - a_{ru}) > 1 - \text{tolerance} \\
        \text{paper: } & a^* (1 - p_n)^d > a_{ru} + p_n d - \text{tolerance}

    (*paper*: eq. 5 of arXiv 2004.12770; safe, but looser.) Both are computed in float64 with a slack of
    4 · num_layers · ε, ε being that of `a`'s dtype: rounding and ties never break the guarantee.

    Args:
        a: a_n, ``[batch, classes]``, each row a probability vector of at least two classes.
        p: p_n, ``[batch]``, in [0, 1].
        remaining: d, how many layers remain: one number, or one per example (int64 ``[batch]``).
        rule: ``"exact"``, ``"paper"``, or ``"never"`` (run every layer).
        tolerance: In [0, 1). The returned class ends at most this much probability behind the final winner.
        num_layers: N, the layers of the encoder, for the slack; at least one more than `remaining` if left out.

    Returns:
        A bool tensor ``[batch]``.

    Raises:
        ValueError: If a shape, the rule, the tolerance or `remaining` is not as described.

    Example:
        >>> can_halt(torch.tensor([[0.9, 0.1], [0.6, 0.4]]), torch.tensor([0.1, 0.1]), remaining=2)
        tensor([ True, False])
    """
    check_choice("rule", rule, HaltingRule)
    check_tolerance(tolerance)
    if a.dim() != 2 or a.shape[1] < 2:
        raise ValueError(f"a must have the shape [batch, classes] with at least two classes, got {list(a.shape)}")
    if p.shape != a.shape[:1]:
        raise ValueError(f"p must have the shape [batch] = {list(a.shape[:1])}, got {list(p.shape)}")
    if isinstance(remaining, Tensor) and remaining.shape != p.shape:
        raise ValueError(
            f"remaining must be one number or have the shape [batch] = {list(p.shape)}, got {list(remaining.shape)}"
        )
    if isinstance(remaining, int) and remaining < 0:
        raise ValueError(f"remaining counts the layers still to run and cannot be negative, got {remaining}")
    if a.device.type in WITHOUT_FLOAT64:
        remaining = remaining.cpu() if isinstance(remaining, Tensor) else remaining
        return can_halt(a.cpu(), p.cpu(), remaining, rule, tolerance, num_layers=num_layers).to(a.device)
    # Filled in on the device: a number that is copied to a GPU makes the host wait.
    d = remaining.to(a.device) if isinstance(remaining, Tensor) else torch.full_like(p, remaining, dtype=torch.int64)
    if rule == "never":
        return d == 0
    # d is on the device; an upper bound of N per example serves where the caller does not know N.
    slack = 4 * torch.finfo(a.dtype).eps * (num_layers if num_layers is not None else d + 1)
    top = a.double().topk(2, dim=1).values
    best, runner_up, p, d = top[:, 0], top[:, 1], p.double(), d.double()
    kept = (1 - p) ** d
    spare = kept * (1 + best - runner_up) - 1
    if rule == "paper":
        # The published bound is never above the exact one; `minimum` keeps it so under rounding too.
        spare = torch.minimum(spare, best * kept - runner_up - p * d)
    return (d == 0) | (spare > slack - tolerance)


def is_clear(y: Tensor, margin: float) -> Tensor:
    """Whether a layer's own classification leads by more than `margin`: its first class over its second.

    The second halting criterion beside `can_halt`. It proves nothing of the layers that remain, but where few layers are
    wanted it picks better than a tolerance (benchmarks/README.md). As a measure of confidence for early exits: "softmax
    response" in Schuster et al., *Confident Adaptive Language Modeling*, NeurIPS 2022 (arXiv 2207.07061).

    Args:
        y: y_n, ``[…, classes]``, probability vectors of at least two classes; compared in float32 or more.
        margin: In [0, 1]; for 1, the answer is no.

    Returns:
        A bool tensor ``[…]``.

    Raises:
        ValueError: If the margin is out of its range.

    Example:
        >>> is_clear(torch.tensor([[0.8, 0.1, 0.1], [0.5, 0.4, 0.1]]), 0.5)
        tensor([ True, False])
    """
    check_margin(margin)
    top = at_least_float32(y).topk(2, dim=-1).values
    return (top[..., 0] - top[..., 1] > margin) & (margin < 1)


def exit_layers(
    a: Tensor,
    p: Tensor,
    rule: HaltingRule = "exact",
    tolerance: float = 0.0,
    *,
    y: Tensor | None = None,
    margin: float = 1.0,
) -> Tensor:
    """The first layer after which each example may halt, by `can_halt` or, unless the rule is "never", by `is_clear`.

    Args:
        a: ``[batch, layers, classes]``, as `accumulate` returns it.
        p: ``[batch, layers]``, as `accumulate` returns it.
        rule: As for `can_halt`.
        tolerance: As for `can_halt`.
        y: ``[batch, layers, classes]``, the classifications of the layers; for a margin below 1.
        margin: As for `is_clear`.

    Returns:
        int64 ``[batch]``, in 1 … layers.

    Raises:
        ValueError: If the shapes do not fit each other, or as for `can_halt` and `is_clear`.
    """
    _check_layers("a", a, 3, "[batch, layers, classes]")
    if a.shape[:2] != p.shape:
        raise ValueError(
            f"a and p must agree in batch and layers, got a {list(a.shape)} [batch, layers, classes] "
            f"and p {list(p.shape)} [batch, layers]"
        )
    batch, layers = p.shape
    remaining = torch.arange(layers - 1, -1, -1, device=p.device).repeat(batch)
    # [batch, layers, classes] -> [batch * layers, classes]: every (example, layer) is one question.
    halts = can_halt(a.flatten(0, 1), p.flatten(), remaining, rule, tolerance, num_layers=layers)
    halts = halts.view(batch, layers)
    check_margin(margin)
    if margin < 1 and rule != "never":
        if y is None or y.shape != a.shape:
            raise ValueError(
                f"a margin of {margin} needs y like a, {list(a.shape)}, got {None if y is None else list(y.shape)}"
            )
        halts = halts | is_clear(y, margin)
    return halts.int().argmax(dim=1) + 1


def answer_at(a: Tensor, exit_layer: Tensor) -> Tensor:
    """a_n at each example's exit layer: what early exit returns.

    Args:
        a: ``[batch, layers, classes]``.
        exit_layer: int64 ``[batch]``, 1-based.

    Returns:
        ``[batch, classes]``.
    """
    return a[torch.arange(len(a), device=a.device), exit_layer - 1]


def ponder_cost(p: Tensor, h: Tensor, kind: PonderKind = "p") -> Tensor:
    """The ponder cost ρ: the mean over the batch of Σ_n p_n (the authors' code) or of Σ_n h_n.

    Args:
        p: ``[batch, layers]``, in [0, 1].
        h: ``[batch, layers]``, in [0, 1].
        kind: ``"p"`` or ``"h"``.

    Returns:
        A scalar in [0, layers].

    Raises:
        ValueError: If the shapes differ or the kind is unknown.

    Example:
        >>> ponder_cost(torch.tensor([[0.5, 0.25]]), torch.tensor([[0.5, 0.5]])).item()
        0.75
    """
    check_choice("ponder", kind, PonderKind)
    _check_layers("p", p, 2, "[batch, layers]")
    if p.shape != h.shape:
        raise ValueError(f"p and h must have one shape [batch, layers], got {list(p.shape)} and {list(h.shape)}")
    return at_least_float32(p if kind == "p" else h).sum(dim=1).mean()


def task_loss(a: Tensor, target: Tensor, class_weights: Tensor | None = None) -> Tensor:
    """The negative log-likelihood of an answer that already is a probability, -log a[target], mean over the batch.

    It is never a cross-entropy over a second softmax. Probabilities below 1e-30 count as 1e-30, so that values and
    gradients stay finite.

    Args:
        a: ``[batch, classes]``, each row a probability vector; computed in float32 or more.
        target: int64 ``[batch]``, in 0 … classes - 1.
        class_weights: ``[classes]``, multiplies the loss of each example by the weight of its class. The mean is
            over examples, not over weights, so that it does not depend on how examples fall into batches.

    Returns:
        A scalar.

    Raises:
        ValueError: If the shapes do not fit each other.

    Example:
        >>> round(task_loss(torch.tensor([[0.5, 0.5]]), torch.tensor([1])).item(), 4)
        0.6931
    """
    if a.dim() != 2 or target.shape != a.shape[:1]:
        raise ValueError(
            f"a must have the shape [batch, classes] and target [batch], got {list(a.shape)} and {list(target.shape)}"
        )
    return weighted_mean(F.nll_loss(log_of(a), target, reduction="none"), target, class_weights)


def exit_loss(logits: Tensor, target: Tensor, class_weights: Tensor | None = None) -> Tensor:
    """Deep supervision: the cross-entropy of every layer's own classification, mean over batch and layers.

    Args:
        logits: The classifier's logits, ``[batch, layers, classes]``; y is their softmax.
        target: int64 ``[batch]``.
        class_weights: As for `task_loss`.

    Returns:
        A scalar.
    """
    _check_layers("logits", logits, 3, "[batch, layers, classes]")
    # [batch, layers, classes] -> [batch, classes, layers], where cross_entropy expects the classes.
    targets = target.unsqueeze(1).expand(-1, logits.shape[1])
    losses = F.cross_entropy(at_least_float32(logits).transpose(1, 2), targets, reduction="none")
    return weighted_mean(losses.mean(dim=1), target, class_weights)


def distillation_loss(log_probabilities: Tensor, teacher: Tensor) -> Tensor:
    r"""The cross-entropy :math:`-\sum_k t_k \log q_k` to a teacher's probabilities t (Hinton et al. 2015, arXiv
    1503.02531, at temperature 1), mean over the batch and, where there are, the layers.

    Args:
        log_probabilities: ``[batch, classes]`` or ``[batch, layers, classes]``; computed in float32 or more.
        teacher: ``[batch, classes]``, each row a probability vector.

    Returns:
        A scalar.

    Raises:
        ValueError: If the shapes do not fit each other.
    """
    log_probabilities, teacher = at_least_float32(log_probabilities), at_least_float32(teacher)
    if log_probabilities.dim() == 3:
        teacher = teacher.unsqueeze(1)  # [batch, 1, classes]
    if log_probabilities.dim() not in (2, 3) or (log_probabilities.shape[0], log_probabilities.shape[-1]) != (
        teacher.shape[0],
        teacher.shape[-1],
    ):
        raise ValueError(
            "teacher must have the shape [batch, classes] of the answers it is for, got "
            f"{list(teacher.shape)} and {list(log_probabilities.shape)}"
        )
    return -(teacher * log_probabilities).sum(dim=-1).mean()


def log_of(a: Tensor) -> Tensor:
    """The log of probabilities, in float32 or more; those below 1e-30 count as 1e-30."""
    return at_least_float32(a).clamp_min(SMALLEST_PROBABILITY).log()


def weighted_mean(losses: Tensor, target: Tensor, class_weights: Tensor | None) -> Tensor:
    """The mean over the batch of `losses` ``[batch]``, each times the weight of its target class."""
    return (losses if class_weights is None else losses * class_weights[target]).mean()
