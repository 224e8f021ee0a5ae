"""Early exit that really skips the work: an example that has left the batch enters no further layer."""

from __future__ import annotations

import torch
from torch import Tensor

from dact.encoders.base import Batch, LayeredEncoder
from dact.functional import HaltingRule, accumulate_step, at_least_float32, can_halt
from dact.submodels import Submodels


@torch.no_grad()
def early_exit(
    encoder: LayeredEncoder,
    classifier: Submodels,
    confidence: Submodels,
    batch: Batch,
    *,
    rule: HaltingRule,
    tolerance: float,
) -> tuple[Tensor, Tensor]:
    """Run each example only as deep as it needs.

    Args:
        encoder: The encoder, in eval mode.
        classifier: f, one per layer.
        confidence: g, one per layer.
        batch: As the encoder takes it.
        rule: The halting rule, as for `dact.functional.can_halt`.
        tolerance: In [0, 1), as for `dact.functional.can_halt`.

    Returns:
        The answers ``[batch, classes]`` (a_n at the exit layer n, not a_N) and the exit layers, int64 ``[batch]``.
    """
    layers = encoder.num_layers
    mask, hidden = encoder.mask(batch), encoder.embed(batch)
    context = encoder.context(hidden, mask)
    rows = torch.arange(len(hidden), device=hidden.device)  # where the examples that are left stood in the batch
    exits = torch.full_like(rows, layers)
    answers, a, p = hidden.new_empty(0), hidden.new_empty(0), hidden.new_empty(0)
    for n in range(1, layers + 1):
        hidden = encoder.layer(n, hidden, context)
        state = encoder.pool(n, hidden, mask)
        y = at_least_float32(classifier.of_layer(n)(state)).softmax(dim=-1)
        h = at_least_float32(confidence.of_layer(n)(state)).sigmoid().squeeze(-1)
        if n == 1:  # only now the number of classes is known
            answers, a, p = torch.empty_like(y), torch.zeros_like(y), torch.ones_like(h)
        a, p = accumulate_step(a, p, y, h)
        done = can_halt(a, p, layers - n, rule, tolerance, num_layers=layers)
        leaving = done.nonzero().flatten()
        if len(leaving) == 0:
            continue
        answers[rows[leaving]], exits[rows[leaving]] = a[leaving], n
        staying = (~done).nonzero().flatten()
        if len(staying) == 0:
            break
        rows, a, p, hidden, mask = rows[staying], a[staying], p[staying], hidden[staying], mask[staying]
        context = encoder.context(hidden, mask)
    return answers, exits
