"""Early exit that skips the remaining layers and keeps batches full.

A window of examples goes through the encoder layer by layer, in groups of similar length. A group
enters a layer in one step; the submodels and the halting rule run once per layer for the window.
After each layer, the examples that may halt leave, and the remaining groups are cut to their
longest example and merged with their neighbours until they are full again."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from dact.encoders.base import Batch, LayeredEncoder
from dact.functional import Halting, accumulate_step
from dact.outputs import DACTOutput
from dact.tasks import MULTICLASS, Task

# In half precision on a CPU, oneDNN takes about a millisecond to prepare each new shape. Rounding
# lengths up to multiples of this one gives fewer shapes: 1.4 to 1.8 times as fast on VADER.
LENGTH_UNIT = 4
# Tokens per step, padding included. Larger steps are no faster and waste time on padding; smaller
# steps waste time on launching kernels on a GPU.
STEP_TOKENS = {"cpu": 2048, "cuda": 65_536}
STEPS_IN_WINDOW = 16

Unit = Callable[[int, Tensor], tuple[Tensor, Tensor]]
Indices = npt.NDArray[np.int64]  # the host tracks the places of examples in NumPy arrays


@dataclass
class _Group:
    """Examples of similar length that enter a layer together."""

    hidden: Tensor  # [examples, length, hidden]
    mask: Tensor  # [examples, length]
    lengths: Indices  # tokens, left padding included; ascending
    # Shared by the layers; None until it is first needed.
    context: Any = None


@contextmanager
def evaluating(module: nn.Module) -> Iterator[None]:
    """Put a module into eval mode for the block, then restore the mode of each part."""
    if not module.training:
        yield
        return
    training = [part for part in module.modules() if part.training]
    module.eval()
    try:
        yield
    finally:
        for part in training:
            part.training = True


@torch.no_grad()
def early_exit(
    encoder: LayeredEncoder,
    unit: Unit,
    num_layers: int,
    batch: Batch,
    *,
    halting: Halting,
    task: Task = MULTICLASS,
    step_tokens: int | None = None,
    window_tokens: int | None = None,
    record: bool = False,
) -> DACTOutput:
    """Run only as many layers as each example needs.

    Args:
        encoder: Encoder in eval mode.
        unit: Function from a layer (1-based) and its states ``[batch, hidden]`` to y_n ``[batch,
            classes]`` and h_n ``[batch]``.
        num_layers: N, the number of encoder layers to run.
        batch: Inputs of the encoder, for any number of examples in any order.
        halting: Rule by which examples leave.
        task: Task of the answers.
        step_tokens: Number of tokens that enter a layer in one step, padding included (a longer
            example enters alone); chosen by the encoder or the device if left out.
        window_tokens: Number of tokens whose hidden states are held in memory at a time; 16 steps
            by default.
        record: Whether to return y and h as well, with zeros after the exit layer.

    Raises:
        ValueError: If the batch is empty, or an example is all padding.
    """
    mask = encoder.mask(batch)
    if len(mask) == 0:
        raise ValueError("early exit needs at least one example, got a batch of 0")
    of_device = STEP_TOKENS.get(mask.device.type, STEP_TOKENS["cuda"])
    step = step_tokens or encoder.step_tokens or of_device
    window = window_tokens or STEPS_IN_WINDOW * (step_tokens or of_device)
    positions = torch.arange(1, mask.shape[1] + 1, device=mask.device)
    lengths = ((mask != 0) * positions).amax(dim=1).cpu().numpy()
    if _prepares_shapes(encoder, mask.device):
        lengths = np.minimum(-(-lengths // LENGTH_UNIT) * LENGTH_UNIT, mask.shape[1])
    order = lengths.argsort(kind="stable")
    results = _Results(len(lengths), num_layers, record)
    for rows in _cut(order, lengths[order], window):
        runs = [*_cut(rows, lengths[rows], step)]
        groups = [
            *encoder.for_each(lambda run: _embed(encoder, batch, mask, run, lengths[run]), runs)
        ]
        _run_window(encoder, unit, halting, task, groups, rows, results, step)
    return results.output(mask.device)


def _prepares_shapes(encoder: LayeredEncoder, device: torch.device) -> bool:
    """Return whether new shapes cost time: in half precision on a CPU."""
    dtype = next((parameter.dtype for parameter in encoder.parameters()), torch.float32)
    return device.type == "cpu" and (
        torch.is_autocast_enabled("cpu") or dtype in (torch.bfloat16, torch.float16)
    )


class _Results:
    """The results of early exit, by row of the batch; later layers overwrite earlier ones."""

    def __init__(self, batch: int, num_layers: int, record: bool) -> None:
        self.layers = np.ones(batch, dtype=np.int64)
        self.num_layers = num_layers
        self.record = record
        self.answers = self.y = self.h = torch.empty(0)

    def store(self, layer: int, rows: Indices, a: Tensor, y: Tensor, h: Tensor) -> None:
        index, batch = _send(rows, a.device), len(self.layers)
        if not len(self.answers):
            self.answers = a.new_zeros(batch, a.shape[1])
            if self.record:
                self.y = y.new_zeros(batch, self.num_layers, y.shape[1])
                self.h = h.new_zeros(batch, self.num_layers)
        self.answers[index] = a
        self.layers[rows] = layer
        if self.record:
            self.y[index, layer - 1], self.h[index, layer - 1] = y, h

    def output(self, device: torch.device) -> DACTOutput:
        y, h = (self.y, self.h) if self.record else (None, None)
        return DACTOutput(self.answers, _send(self.layers, device), y, h)


def _run_window(
    encoder: LayeredEncoder,
    unit: Unit,
    halting: Halting,
    task: Task,
    groups: list[_Group],
    rows: Indices,
    results: _Results,
    step: int,
) -> None:
    """Run the groups of a window, in the order of their lengths, until all examples have left.

    `rows` holds the row of each example in the batch, over all groups."""
    num_layers = results.num_layers
    for n in range(1, num_layers + 1):
        states = [*encoder.for_each(partial(_run_layer, encoder, n), groups)]
        state = states[0] if len(states) == 1 else torch.cat(states)  # [batch, hidden]
        y, h = unit(n, state)
        if n == 1:
            a, p = torch.zeros_like(y), torch.ones_like(h)
        a, p = accumulate_step(a, p, y, h)
        if results.record or n == num_layers:
            results.store(n, rows, a, y, h)
        if n == num_layers or halting.rule == "never":
            continue
        halts = halting.halts(a, p, y, num_layers - n, num_layers, task)
        staying = (~halts.cpu().numpy()).nonzero()[0]  # the only wait for a GPU in a layer
        if len(staying) == len(rows):
            continue
        results.store(n, rows, a, y, h)
        if len(staying) == 0:
            return
        index = _send(staying, a.device)
        rows, a, p = rows[staying], a.index_select(0, index), p.index_select(0, index)
        groups = _regroup(encoder, groups, staying, index, step)


def _run_layer(encoder: LayeredEncoder, layer: int, group: _Group) -> Tensor:
    """Run one layer on a group in place; return the pooled states ``[batch, hidden]``."""
    if group.context is None:
        group.context = encoder.context(group.hidden, group.mask)
    group.hidden = encoder.layer(layer, group.hidden, group.context)
    return encoder.pool(layer, group.hidden, group.mask)


def _send(index: Indices, device: torch.device) -> Tensor:
    """Copy an index of the host to `device` without waiting for the transfer, and return it."""
    return torch.from_numpy(index).to(device, non_blocking=True)


def _cut(rows: Indices, lengths: Indices, most: int) -> Iterator[Indices]:
    """Cut rows, sorted by length, into runs of at most `most` tokens with padding, or one row."""
    start = 0
    for end, length in enumerate(lengths.tolist()):
        if end > start and (end + 1 - start) * length > most:
            yield rows[start:end]
            start = end
    yield rows[start:]


def _embed(
    encoder: LayeredEncoder, batch: Batch, mask: Tensor, rows: Indices, lengths: Indices
) -> _Group:
    """Embed rows of a batch, sorted by length, cut to the longest of them."""
    longest = int(lengths[-1])
    index = None if np.array_equal(rows, np.arange(len(mask))) else _send(rows, mask.device)

    def pick(tensor: Tensor) -> Tensor:
        cut = tensor[:, :longest] if tensor.shape[:2] == mask.shape else tensor
        return cut if index is None else cut.index_select(0, index)

    # Entries that do not have one row per example are passed whole, as in `forward`.
    picked = {
        name: pick(entry) if isinstance(entry, Tensor) and len(mask) in entry.shape[:1] else entry
        for name, entry in batch.items()
    }
    return _Group(encoder.embed(picked), pick(mask), lengths)


def _regroup(
    encoder: LayeredEncoder, groups: list[_Group], staying: Indices, index: Tensor, step: int
) -> list[_Group]:
    """Return the groups without the examples that have left; neighbours that fit into one step are
    merged.

    `staying` holds the positions of the remaining examples, ascending, over all groups; `index` is
    its copy on the device of the groups."""
    merged: list[list[_Part]] = []
    start = first = 0  # the group's first position, and where its positions begin in `staying`
    for group in groups:
        last = int(staying.searchsorted(start + len(group.lengths)))
        if last > first:
            rows = index[first:last] - start if start else index[first:last]
            part = _Part(group, rows, group.lengths[staying[first:last] - start])
            count = sum(len(p.lengths) for p in merged[-1]) + len(part.lengths) if merged else 0
            # The last group is the longest.
            if merged and count * part.lengths[-1] <= step:
                merged[-1].append(part)
            else:
                merged.append([part])
        start, first = start + len(group.lengths), last
    return [_shrink(encoder, parts[0]) if len(parts) == 1 else _merge(parts) for parts in merged]


@dataclass
class _Part:
    """The remaining examples of a group: their rows, int64, and their lengths, ascending."""

    group: _Group
    rows: Tensor
    lengths: Indices

    def pick(self, tensor: Tensor) -> Tensor:
        """Return the remaining rows of ``[batch, length, …]``, cut to the longest of them."""
        cut = tensor[:, : self.lengths[-1]]
        return cut if len(self.lengths) == len(tensor) else cut.index_select(0, self.rows)


def _shrink(encoder: LayeredEncoder, part: _Part) -> _Group:
    if len(part.lengths) == len(part.group.lengths):
        return part.group
    hidden, mask = part.pick(part.group.hidden), part.pick(part.group.mask)
    context = encoder.keep(part.group.context, part.rows, hidden, mask)
    return _Group(hidden, mask, part.lengths, context)


def _merge(parts: list[_Part]) -> _Group:
    lengths = np.concatenate([part.lengths for part in parts])
    first = parts[0].group
    hidden = first.hidden.new_zeros(len(lengths), int(lengths[-1]), first.hidden.shape[2])
    mask = first.mask.new_zeros(hidden.shape[:2])
    start = 0
    for part in parts:
        end, width = start + len(part.lengths), part.lengths[-1]
        hidden[start:end, :width] = part.pick(part.group.hidden)
        mask[start:end, :width] = part.pick(part.group.mask)
        start = end
    return _Group(hidden, mask, lengths)
