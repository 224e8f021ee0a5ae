"""Early exit that really skips the work, on batches that stay full.

A window of examples goes through the encoder layer by layer. Within it, examples of similar length form groups, each of
which is one step's work for the device; the submodels and the halting rule are asked once per layer for the whole
window. Examples that may halt leave; the groups that they leave behind are cut to their longest example and merged with
their neighbours until they are full again. So neither padding nor half-empty batches eat up what early exit saves.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from dact.encoders.base import Batch, LayeredEncoder
from dact.functional import Halting, accumulate_step, at_least_float32
from dact.submodels import Submodels

# Tokens of one step, padding included: where more no longer pays. A CPU is busy with few, and padding costs it time; a
# GPU waits for its launches unless a step is large.
STEP_TOKENS = {"cpu": 2048, "cuda": 65_536}
STEPS_IN_WINDOW = 16


@dataclass(frozen=True)
class Exits:
    """What comes out of a window.

    Args:
        answers: ``[batch, classes]``: a_n at the exit layer n, not a_N.
        layers: The exit layers, int64 ``[batch]``.
        y: ``[batch, layers, classes]``, zeros behind the exit layer; only if asked for.
        h: ``[batch, layers]``, likewise.
    """

    answers: Tensor
    layers: Tensor
    y: Tensor | None = None
    h: Tensor | None = None


@dataclass
class _Group:
    """Examples of similar length that enter a layer together."""

    hidden: Tensor  # [batch, length, hidden]
    mask: Tensor  # [batch, length]
    lengths: list[int]  # in tokens, left padding included
    context: Any = None  # what the layers share; None where it must be asked for

    @property
    def longest(self) -> int:
        return max(self.lengths)


@contextmanager
def evaluating(module: nn.Module) -> Iterator[None]:
    """Put a module into eval mode and back: no dropout decides which class an example gets."""
    training = [part for part in module.modules() if part.training]
    if training:
        module.eval()
    try:
        yield
    finally:
        for part in training:
            part.training = True


@torch.no_grad()
def early_exit(
    encoder: LayeredEncoder,
    classifier: Submodels,
    confidence: Submodels,
    batch: Batch,
    *,
    halting: Halting,
    step_tokens: int | None = None,
    window_tokens: int | None = None,
    record: bool = False,
) -> Exits:
    """Run each example only as deep as it needs.

    Args:
        encoder: The encoder, in eval mode.
        classifier: f, for as many of the encoder's layers as shall be run.
        confidence: g, likewise.
        batch: As the encoder takes it, of any number of examples, in any order.
        halting: When an example leaves.
        step_tokens: Tokens that enter a layer at a time, padding included; by the kind of device if left out. One
            example enters whole.
        window_tokens: Tokens whose hidden states are held at a time: the bound of memory; 16 steps if left out.
        record: Whether to give y and h, too.

    Returns:
        The answers and exit layers, in the order of `batch`.
    """
    mask = encoder.mask(batch)
    batch = {name: entry for name, entry in batch.items() if isinstance(entry, Tensor)}  # nothing else has rows to pick
    if len(mask) == 0:
        raise ValueError("early exit needs at least one example, got a batch of 0")
    step, window = budget(mask.device, step_tokens, window_tokens)
    positions = torch.arange(1, mask.shape[1] + 1, device=mask.device)
    lengths: list[int] = ((mask != 0) * positions).amax(dim=1).tolist()
    order = sorted(range(len(lengths)), key=lengths.__getitem__)
    unit = _Unit(classifier, confidence, halting, record)
    parts = [
        _run_window(encoder, unit, batch, mask, [(row, lengths[row]) for row in rows], step)
        for rows in _cut(order, lengths, window)
    ]
    # Back into the order of the batch.
    back = torch.empty(len(order), dtype=torch.int64)
    back[torch.tensor(order, dtype=torch.int64)] = torch.arange(len(order))
    back = _send(back, mask.device)

    def joined(tensors: Sequence[Tensor | None]) -> Tensor | None:
        return None if tensors[0] is None else torch.cat([t for t in tensors if t is not None])[back]

    answers, layers = joined([part.answers for part in parts]), joined([part.layers for part in parts])
    assert answers is not None
    assert layers is not None
    return Exits(answers, layers, joined([part.y for part in parts]), joined([part.h for part in parts]))


def budget(device: torch.device, step_tokens: int | None, window_tokens: int | None) -> tuple[int, int]:
    """Tokens of a step and of a window, where the user may have left out either."""
    step = step_tokens or STEP_TOKENS.get(device.type, STEP_TOKENS["cuda"])
    return step, window_tokens or STEPS_IN_WINDOW * step


@dataclass(frozen=True)
class _Unit:
    """The DACT unit: what is asked of the pooled states of a layer."""

    classifier: Submodels
    confidence: Submodels
    halting: Halting
    record: bool

    @property
    def num_layers(self) -> int:
        return self.classifier.num_layers

    def ask(self, layer: int, state: Tensor) -> tuple[Tensor, Tensor]:
        """y ``[batch, classes]`` and h ``[batch]`` of pooled states ``[batch, hidden]``, in float32 or more."""
        y = at_least_float32(self.classifier.of_layer(layer)(state)).softmax(dim=-1)
        return y, at_least_float32(self.confidence.of_layer(layer)(state)).sigmoid().squeeze(-1)


def _run_window(
    encoder: LayeredEncoder, unit: _Unit, batch: Batch, mask: Tensor, examples: list[tuple[int, int]], step: int
) -> Exits:
    """Run (row, length) examples, sorted by length; the results have their order."""
    groups = _embed(encoder, batch, mask, examples, step)
    rows = torch.arange(len(examples), device=mask.device)  # where the examples that are left stand in the window
    exits = torch.full_like(rows, unit.num_layers)
    for n in range(1, unit.num_layers + 1):
        states = []
        for group in groups:
            if group.context is None:
                group.context = encoder.context(group.hidden, group.mask)
            group.hidden = encoder.layer(n, group.hidden, group.context)
            states.append(encoder.pool(n, group.hidden, group.mask))
        y, h = unit.ask(n, states[0] if len(states) == 1 else torch.cat(states))
        if n == 1:
            a, p = torch.zeros_like(y), torch.ones_like(h)
            answers = torch.zeros_like(y)
            layers = len(examples), unit.num_layers
            all_y, all_h = (y.new_zeros(*layers, y.shape[1]), h.new_zeros(layers)) if unit.record else (None, None)
        if all_y is not None and all_h is not None:
            all_y[rows, n - 1], all_h[rows, n - 1] = y, h
        a, p = accumulate_step(a, p, y, h)
        if n == unit.num_layers:
            answers[rows] = a
            break
        if unit.halting.rule == "never":
            continue
        done = unit.halting.halts(
            a, p, y, unit.num_layers - n, unit.num_layers
        ).cpu()  # the only wait for a GPU in a layer
        keep = (~done).tolist()
        if all(keep):
            continue
        leaving = _send(done.nonzero().flatten(), rows.device)
        answers[rows[leaving]], exits[rows[leaving]] = a[leaving], n
        if not any(keep):
            break
        staying = _send((~done).nonzero().flatten(), rows.device)
        rows, a, p = rows[staying], a[staying], p[staying]
        groups = _regroup(groups, keep, step)
    return Exits(answers, exits, all_y, all_h)


def _send(index: Tensor, device: torch.device) -> Tensor:
    """An index of the CPU on `device`; the host does not wait until it is there."""
    return index.to(device, non_blocking=True)


def _cut(order: Sequence[int], lengths: Sequence[int], most: int) -> Iterator[list[int]]:
    """Cut `order`, sorted by length, into runs of at most `most` tokens, padding included, or of one example."""
    run: list[int] = []
    for row in order:
        if run and (len(run) + 1) * lengths[row] > most:
            yield run
            run = []
        run.append(row)
    if run:
        yield run


def _embed(
    encoder: LayeredEncoder, batch: Batch, mask: Tensor, examples: list[tuple[int, int]], step: int
) -> list[_Group]:
    """The groups of a window before layer 1, each cut to its longest example."""
    lengths = [length for _, length in examples]
    groups = []
    for run in _cut(range(len(examples)), lengths, step):
        longest, rows = lengths[run[-1]], [examples[i][0] for i in run]
        index = None if rows == list(range(len(mask))) else _send(torch.tensor(rows), mask.device)

        def pick(tensor: Tensor, longest: int = longest, index: Tensor | None = index) -> Tensor:
            cut = tensor[:, :longest] if tensor.shape[:2] == mask.shape else tensor
            return cut if index is None else cut[index]

        hidden = encoder.embed({name: pick(tensor) for name, tensor in batch.items()})
        groups.append(_Group(hidden, pick(mask), [lengths[i] for i in run]))
    return groups


def _regroup(groups: list[_Group], keep: list[bool], step: int) -> list[_Group]:
    """The groups without those that left, merged with their neighbours as far as a step holds them.

    Args:
        groups: In the order of their lengths.
        keep: Which examples stay, over all groups.
        step: Tokens of one step, padding included.
    """
    merged: list[list[_Group]] = []
    start = 0
    for group in groups:
        flags = keep[start : start + len(group.lengths)]
        start += len(group.lengths)
        if not any(flags):
            continue
        left = group if all(flags) else _select(group, [i for i, flag in enumerate(flags) if flag])
        together = [*merged[-1], left] if merged else []
        if together and sum(len(g.lengths) for g in together) * max(g.longest for g in together) <= step:
            merged[-1].append(left)
        else:
            merged.append([left])
    return [parts[0] if len(parts) == 1 else _merge(parts) for parts in merged]


def _select(group: _Group, kept: list[int]) -> _Group:
    lengths = [group.lengths[i] for i in kept]
    longest = max(lengths)
    index = _send(torch.tensor(kept), group.hidden.device)
    return _Group(
        group.hidden[:, :longest].index_select(0, index), group.mask[:, :longest].index_select(0, index), lengths
    )


def _merge(groups: list[_Group]) -> _Group:
    lengths = [length for group in groups for length in group.lengths]
    first = groups[0]
    hidden = first.hidden.new_zeros(len(lengths), max(lengths), first.hidden.shape[2])
    mask = first.mask.new_zeros(len(lengths), max(lengths))
    start = 0
    for group in groups:
        end, width = start + len(group.lengths), group.hidden.shape[1]
        hidden[start:end, :width], mask[start:end, :width] = group.hidden, group.mask
        start = end
    return _Group(hidden, mask, lengths)
