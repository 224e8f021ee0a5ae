"""Early exit that really skips the work, on batches that stay full.

A window of examples goes through the encoder layer by layer. Within a window, examples of similar length form groups. A
group is what enters a layer in one step. The submodels and the halting rule are asked once per layer for the whole
window. After each layer, the examples that may halt leave. The remaining groups are cut to their longest example and
merged with their neighbours until they are full again. So neither padding nor half-empty batches cost what early exit
saves.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from dact.encoders.base import Batch, LayeredEncoder
from dact.functional import Halting, accumulate_step, at_least_float32
from dact.submodels import Submodels

# Tokens of one step, padding included, beyond which larger steps bring no more speed. On a CPU small steps are fast
# enough, and large ones waste time on padding. A GPU spends its time launching kernels unless a step is large.
STEP_TOKENS = {"cpu": 2048, "cuda": 65_536}
STEPS_IN_WINDOW = 16


@dataclass(frozen=True)
class Exits:
    """Answers and exit layers of a batch.

    Args:
        answers: ``[batch, classes]``: a_n at the exit layer n, not a_N.
        layers: Exit layers, int64 ``[batch]``, 1-based.
        y: ``[batch, layers, classes]``, zeros after the exit layer; None unless recorded.
        h: ``[batch, layers]``, zeros after the exit layer; None unless recorded.
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
    context: Any = None  # what the layers share; None until the encoder is asked for it

    @property
    def longest(self) -> int:
        return max(self.lengths)


@contextmanager
def evaluating(module: nn.Module) -> Iterator[None]:
    """Put a module into eval mode for the block, so that dropout changes no answer, and restore each part's mode."""
    # Without a look for duplicates, which would hash every module: a metric hashes its whole state.
    training = [part for _, part in module.named_modules(remove_duplicate=False) if part.training]
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
        encoder: Encoder in eval mode.
        classifier: f; its number of layers is the number of the encoder's layers to run.
        confidence: g, of as many layers.
        batch: Inputs of the encoder, for any number of examples in any order.
        halting: Rule by which examples leave.
        step_tokens: Tokens that enter a layer in one step, padding included. A longer example enters alone. By default
            it depends on the kind of device.
        window_tokens: Tokens whose hidden states are held in memory at a time; 16 steps by default.
        record: Whether to return y and h as well.

    Returns:
        Answers and exit layers, in the order of `batch`.

    Raises:
        ValueError: If the batch is empty, or an example is all padding.
    """
    mask = encoder.mask(batch)
    batch = {name: entry for name, entry in batch.items() if isinstance(entry, Tensor)}  # nothing else has rows to pick
    if len(mask) == 0:
        raise ValueError("early exit needs at least one example, got a batch of 0")
    step, window = budget(mask.device, step_tokens, window_tokens)
    positions = torch.arange(1, mask.shape[1] + 1, device=mask.device)
    lengths: list[int] = ((mask != 0) * positions).amax(dim=1).tolist()
    order = sorted(range(len(lengths)), key=lengths.__getitem__)
    unit = _Unit(classifier, confidence, halting)
    results = _Results(len(lengths), unit.num_layers, record)
    for rows in _cut(order, lengths, window):
        _run_window(encoder, unit, _embed(encoder, batch, mask, rows, lengths, step), rows, results, step)
    return results.exits(mask.device)


def budget(device: torch.device, step_tokens: int | None, window_tokens: int | None) -> tuple[int, int]:
    """Return the tokens of a step and of a window; None stands for the default of the device."""
    step = step_tokens or STEP_TOKENS.get(device.type, STEP_TOKENS["cuda"])
    return step, window_tokens or STEPS_IN_WINDOW * step


@dataclass(frozen=True)
class _Unit:
    """The DACT unit: what is asked of the pooled states of a layer."""

    classifier: Submodels
    confidence: Submodels
    halting: Halting

    @property
    def num_layers(self) -> int:
        return self.classifier.num_layers

    def ask(self, layer: int, state: Tensor) -> tuple[Tensor, Tensor]:
        """Return y ``[batch, classes]`` and h ``[batch]`` of pooled states ``[batch, hidden]``, in float32 or more."""
        y = at_least_float32(self.classifier.of_layer(layer)(state)).softmax(dim=-1)
        return y, at_least_float32(self.confidence.of_layer(layer)(state)).sigmoid().squeeze(-1)


class _Results:
    """What the examples of a batch got, filled in as they leave. Rows are those of the batch."""

    def __init__(self, batch: int, num_layers: int, record: bool) -> None:
        self._layers = [num_layers] * batch  # kept by the host, which learns anyway who leaves
        self._shape = batch, num_layers
        self._record = record
        self._answers: Tensor | None = None
        self._y: Tensor | None = None
        self._h: Tensor | None = None

    def add_layer(self, layer: int, rows: list[int], y: Tensor, h: Tensor) -> None:
        """Record y and h of the examples that entered a layer, if they are asked for."""
        if not self._record:
            return
        if self._y is None or self._h is None:
            self._y, self._h = y.new_zeros(*self._shape, y.shape[1]), h.new_zeros(self._shape)
        index = _send(torch.tensor(rows), y.device)
        self._y[index, layer - 1], self._h[index, layer - 1] = y, h

    def add_answers(self, layer: int, index: Tensor, rows: list[int], answers: Tensor) -> None:
        """Store the answers of the examples that leave after a layer; `index` holds their rows on the device."""
        if self._answers is None:
            self._answers = answers.new_zeros(self._shape[0], answers.shape[1])
        self._answers[index] = answers
        for row in rows:
            self._layers[row] = layer

    def exits(self, device: torch.device) -> Exits:
        assert self._answers is not None
        return Exits(self._answers, _send(torch.tensor(self._layers), device), self._y, self._h)


def _run_window(
    encoder: LayeredEncoder, unit: _Unit, groups: list[_Group], rows: list[int], results: _Results, step: int
) -> None:
    """Run the groups of a window until all of its examples have left.

    Args:
        encoder: Encoder whose layers are run.
        unit: What is asked after each layer.
        groups: Examples of the window before layer 1.
        rows: Row of each example in the batch, over all groups.
        results: Where answers and exit layers are stored.
        step: Tokens of one step, padding included.
    """
    for n in range(1, unit.num_layers + 1):
        states = [_run_layer(encoder, n, group) for group in groups]
        y, h = unit.ask(n, states[0] if len(states) == 1 else torch.cat(states))
        results.add_layer(n, rows, y, h)
        if n == 1:
            a, p = torch.zeros_like(y), torch.ones_like(h)
        a, p = accumulate_step(a, p, y, h)
        if n == unit.num_layers:
            results.add_answers(n, _send(torch.tensor(rows), y.device), rows, a)
            return
        if unit.halting.rule == "never":
            continue
        remaining = unit.num_layers - n
        done = unit.halting.halts(a, p, y, remaining, unit.num_layers).tolist()  # the only wait for a GPU in a layer
        if True not in done:
            continue
        leaving = [i for i, halts in enumerate(done) if halts]
        left = [rows[i] for i in leaving]
        index = _send(torch.tensor([leaving, left]), y.device)
        results.add_answers(n, index[1], left, a.index_select(0, index[0]))
        if len(leaving) == len(rows):
            return
        staying = [i for i, halts in enumerate(done) if not halts]
        index = _send(torch.tensor(staying), y.device)
        rows = [rows[i] for i in staying]
        a, p = a.index_select(0, index), p.index_select(0, index)
        groups = _regroup(encoder, groups, staying, index, step)


def _run_layer(encoder: LayeredEncoder, layer: int, group: _Group) -> Tensor:
    """Run one layer on a group, in place, and return the pooled states ``[batch, hidden]``."""
    if group.context is None:
        group.context = encoder.context(group.hidden, group.mask)
    group.hidden = encoder.layer(layer, group.hidden, group.context)
    return encoder.pool(layer, group.hidden, group.mask)


def _send(index: Tensor, device: torch.device) -> Tensor:
    """Return an index of the CPU on `device`, without waiting until it is there."""
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
    encoder: LayeredEncoder, batch: Batch, mask: Tensor, rows: list[int], lengths: list[int], step: int
) -> list[_Group]:
    """Embed the rows of a window, sorted by length, in groups that are each cut to their longest example."""
    groups = []
    for run in _cut(rows, lengths, step):
        longest = lengths[run[-1]]
        index = None if run == list(range(len(mask))) else _send(torch.tensor(run), mask.device)

        def pick(tensor: Tensor, longest: int = longest, index: Tensor | None = index) -> Tensor:
            cut = tensor[:, :longest] if tensor.shape[:2] == mask.shape else tensor
            return cut if index is None else cut[index]

        hidden = encoder.embed({name: pick(tensor) for name, tensor in batch.items()})
        groups.append(_Group(hidden, pick(mask), [lengths[row] for row in run]))
    return groups


def _regroup(
    encoder: LayeredEncoder, groups: list[_Group], staying: list[int], index: Tensor, step: int
) -> list[_Group]:
    """Drop the examples that have left, and merge neighbouring groups as far as one step holds them.

    Args:
        encoder: Encoder that made the contexts of the groups.
        groups: Groups in the order of their lengths.
        staying: Positions of the examples that stay, ascending, over all groups.
        index: The same on the device of the groups.
        step: Tokens of one step, padding included.
    """
    merged: list[list[_Part]] = []
    start = first = 0  # the group's first position, and where its positions begin in `staying`
    for group in groups:
        end = start + len(group.lengths)
        last = bisect_left(staying, end, first)
        if last > first:
            lengths = [group.lengths[position - start] for position in staying[first:last]]
            part = _Part(group, index[first:last] - start if start else index[first:last], lengths)
            together = [*merged[-1], part] if merged else []
            if together and sum(len(p.lengths) for p in together) * max(p.longest for p in together) <= step:
                merged[-1].append(part)
            else:
                merged.append([part])
        start, first = end, last
    return [_shrink(encoder, parts[0]) if len(parts) == 1 else _merge(parts) for parts in merged]


@dataclass(frozen=True)
class _Part:
    """What stays of a group."""

    group: _Group
    rows: Tensor  # int64: the rows of the group that stay
    lengths: list[int]

    @property
    def longest(self) -> int:
        return max(self.lengths)

    @property
    def is_whole(self) -> bool:
        return len(self.lengths) == len(self.group.lengths)

    def pick(self, tensor: Tensor) -> Tensor:
        """Return the rows that stay of ``[batch, length, …]``, cut to the longest of them."""
        longest = self.longest
        cut = tensor[:, :longest] if longest < tensor.shape[1] else tensor
        return cut if self.is_whole else cut.index_select(0, self.rows)


def _shrink(encoder: LayeredEncoder, part: _Part) -> _Group:
    if part.is_whole:
        return part.group
    hidden, mask = part.pick(part.group.hidden), part.pick(part.group.mask)
    return _Group(hidden, mask, part.lengths, encoder.keep(part.group.context, part.rows, hidden, mask))


def _merge(parts: list[_Part]) -> _Group:
    lengths = [length for part in parts for length in part.lengths]
    first = parts[0].group
    hidden = first.hidden.new_zeros(len(lengths), max(lengths), first.hidden.shape[2])
    mask = first.mask.new_zeros(len(lengths), max(lengths))
    start = 0
    for part in parts:
        end, width = start + len(part.lengths), part.longest
        hidden[start:end, :width], mask[start:end, :width] = part.pick(part.group.hidden), part.pick(part.group.mask)
        start = end
    return _Group(hidden, mask, lengths)
