"""From examples to batches: tokens, padding, and an order that needs little of it."""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import DistributedSampler

from dact.data.examples import Examples
from dact.data.tokenizers import PORTION, PreTrainedTokenizerBase

# Batches that are sorted by length together.
GROUP = 50
Item = dict[str, Any]


def encode(
    examples: Examples, tokenizer: PreTrainedTokenizerBase, max_length: int
) -> tuple[list[Item], list[int]]:
    """Tokenize examples.

    Args:
        examples: Examples of a split.
        tokenizer: Tokenizer that is used only here: the call changes its limits.
        max_length: Number of tokens to which longer examples are cut.

    Returns:
        The examples and, for each that was cut, its number of tokens before the cut. An example has
        ``input_ids`` and the tokenizer's other values per token, int32 or int8 ``[length]``, its
        ``row`` in the split, and its ``labels`` and ``depth`` if the data has them.
    """
    columns = {"labels": examples.labels, "depth": examples.depths}
    known = {name: values for name, values in columns.items() if values is not None}
    options: dict[str, Any] = {"return_attention_mask": False}
    items: list[Item] = []
    cut: list[int] = []
    for start in range(0, len(examples), PORTION):
        texts = [column[start : start + PORTION] for column in examples.columns]
        encoding = tokenizer(*texts, truncation=True, max_length=max_length, **options)
        for row, ids in enumerate(zip(*encoding.values(), strict=True), start):
            tokens = {name: _small(name, one) for name, one in zip(encoding, ids, strict=True)}
            items.append({**tokens, "row": row, **{name: c[row] for name, c in known.items()}})
        full = [row for row, ids in enumerate(encoding["input_ids"]) if len(ids) == max_length]
        if full:
            # Only the whole text tells whether it was cut, and by how much.
            again = ([column[row] for row in full] for column in texts)
            whole = tokenizer(*again, verbose=False, **options)
            cut += [len(ids) for ids in whole["input_ids"] if len(ids) > max_length]
    return items, cut


def _small(name: str, values: list[int]) -> Any:
    """Return values per token in 4 bytes each, or in 1 for token types."""
    return np.array(values, np.int8 if name == "token_type_ids" else np.int32)


def collate(
    items: Sequence[Mapping[str, Any]], padding: Mapping[str, int], teacher: Tensor | None = None
) -> dict[str, Tensor]:
    """Return a batch of items, padded on the right to the longest of them.

    Args:
        items: Examples as `encode` returns them.
        padding: Value that pads each token array; 0 for those that are not named.
        teacher: Class probabilities of all examples, ``[examples, classes]``.

    Returns:
        ``input_ids``, ``attention_mask`` and other token arrays ``[batch, length]``, ``row``,
        ``labels`` and ``depth`` ``[batch]``, all int64, and ``teacher`` ``[batch, classes]``.
    """
    batch: dict[str, Tensor] = {}
    for name in items[0]:
        if isinstance(items[0][name], int):
            batch[name] = torch.tensor([item[name] for item in items])
        else:
            values = [torch.from_numpy(item[name]) for item in items]
            filler = padding.get(name, 0)
            batch[name] = pad_sequence(values, batch_first=True, padding_value=filler).long()
    lengths = torch.tensor([len(item["input_ids"]) for item in items])
    batch["attention_mask"] = (torch.arange(int(lengths.max())) < lengths[:, None]).long()
    if teacher is not None:
        batch["teacher"] = teacher[batch["row"]]
    return batch


class LengthGroupedSampler(DistributedSampler[int]):
    """A random order in which the examples of a batch have similar lengths, so that little padding
    is computed.

    The examples are shuffled, sorted by length within groups of 50 batches, and the batches are
    shuffled. The order depends only on the seed and the epoch, so that a resumed run continues as
    if it had never stopped. Several processes take part in each batch, so that none waits for
    another with longer texts; a few examples are repeated if they cannot be shared equally.

    Args:
        lengths: Number of tokens of each example.
        batch_size: Number of examples per batch and process.
        seed: Seed for the shuffling.
        num_replicas: Number of processes.
        rank: Number of this process, from 0.
    """

    def __init__(
        self,
        lengths: Sequence[int],
        batch_size: int,
        seed: int,
        num_replicas: int = 1,
        rank: int = 0,
    ) -> None:
        # Only the number of examples counts.
        super().__init__(range(len(lengths)), num_replicas, rank, seed=seed)  # type: ignore[arg-type]
        self.lengths, self.batch_size = lengths, batch_size * num_replicas

    def __iter__(self) -> Iterator[int]:
        generator, count = random.Random(f"{self.seed}/{self.epoch}"), len(self.lengths)
        order = generator.sample(range(count), count)
        size, batches = self.batch_size, []
        for start in range(0, count, GROUP * size):
            group = sorted(order[start : start + GROUP * size], key=lambda row: self.lengths[row])
            batches += [group[i : i + size] for i in range(0, len(group), size)]
        # A short batch stays last: the DataLoader cuts the order into batches from its beginning.
        last = [batches.pop()] if batches and len(batches[-1]) < size else []
        generator.shuffle(batches)
        rows = [row for batch in batches + last for row in batch]
        rows += (rows[-1:] * self.num_replicas)[: -count % self.num_replicas]
        return iter(rows[self.rank :: self.num_replicas])
