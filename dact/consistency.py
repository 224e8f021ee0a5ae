"""Consistency: two passes of a batch with different dropout masks must give the same classification
(R-Drop)."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from dact.functional import at_least_float32


def twice(batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return a batch with all of its examples, then all of them again: one run of the encoder is
    two passes.

    Args:
        batch: With ``labels`` ``[batch]``. Entries of another length, and those that are no
            tensors, stay as they are.

    Example:
        >>> import torch
        >>> twice({"labels": torch.tensor([0, 1]), "input_ids": torch.tensor([[5, 6], [7, 8]])})["input_ids"].tolist()
        [[5, 6], [7, 8], [5, 6], [7, 8]]
    """
    rows = len(batch["labels"])

    def doubled(entry: Tensor) -> Tensor:
        return (
            torch.cat([entry, entry])
            if isinstance(entry, Tensor) and entry.dim() and len(entry) == rows
            else entry
        )

    return {name: doubled(entry) for name, entry in batch.items()}


def divergence(first: Tensor, second: Tensor) -> Tensor:
    """Return the symmetric Kullback-Leibler divergence between two classifications, mean over batch
    and layers.

    It is half of KL(p‖q) + KL(q‖p) (Liang et al. 2021, *R-Drop: Regularized Dropout for Neural
    Networks*, formula 2). There the likelihoods of both passes are summed. `DACT` takes their mean:
    its weight of 5 is an α of 10 there.

    Args:
        first: Logits of p, ``[batch, layers, classes]``.
        second: Logits of q, of the same shape.

    Returns:
        A scalar, 0 or more, in nats.

    Raises:
        ValueError: If the shapes differ.

    Example:
        >>> import torch
        >>> divergence(torch.tensor([[[0.0, 1.0]]]), torch.tensor([[[1.0, 0.0]]])).item()
        0.46211716532707214
    """
    if first.shape != second.shape:
        raise ValueError(
            f"both passes must have one shape, got {[*first.shape]} and {[*second.shape]}"
        )
    log_p, log_q = (at_least_float32(logits).log_softmax(dim=-1) for logits in (first, second))
    return ((log_p.exp() - log_q.exp()) * (log_p - log_q)).sum(dim=-1).mean() / 2
