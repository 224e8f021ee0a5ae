"""The outputs of a model: its answers, and its training loss."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass  # not frozen, since Lightning sets the fields to move predictions to the CPU
class DACTOutput:
    """The answers of DACT to a batch.

    Args:
        probabilities: ``[batch, classes]``: a_N from `DACT.forward` and `DACT.full_depth`, a_n at
            the exit layer from `DACT.early_exit`. The halting rule guarantees the class of a_N, not
            its probabilities; the margin guarantees neither.
        exit_layer: int64 ``[batch]``, 1-based: the last layer that `DACT.early_exit` ran, or would
            have run.
        layer_probabilities: y, ``[batch, layers, classes]``; None from `DACT.early_exit`.
        h: The confidence of each layer, ``[batch, layers]``; None from `DACT.early_exit`.
        p: The remaining share after each layer, ``[batch, layers]``; None from `DACT.early_exit`.
    """

    probabilities: Tensor
    exit_layer: Tensor
    layer_probabilities: Tensor | None = None
    h: Tensor | None = None
    p: Tensor | None = None


@dataclass(frozen=True)
class Loss:
    """The training loss of a batch and its parts, each a scalar.

    Args:
        loss: ``task_loss + λ · ponder_cost + exit_loss_weight · exit_loss``; call ``backward()`` on
            it.
        task_loss: Negative log-likelihood of a_N, with the teacher's share in its targets.
        exit_loss: Mean cross-entropy of the layers' own classifications, with the same targets,
            plus the term of `consistency`.
        ponder_cost: ρ.
    """

    loss: Tensor
    task_loss: Tensor
    exit_loss: Tensor
    ponder_cost: Tensor
