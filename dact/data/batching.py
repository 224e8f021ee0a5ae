"""From examples to batches: tokens, padding, and an order that needs little padding."""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset, DistributedSampler

from dact.data.examples import Examples
from dact.data.tokenizers import Array, PreTrainedTokenizerBase, flat_tokens, pad

# Number of batches whose examples are sorted by length together.
GROUP = 50
Item = dict[str, Any]


class Encoded(Dataset[Item]):
    """Tokenized examples with all tokens in one array, which takes a fraction of the memory.

    Args:
        lengths: Number of tokens of each example, ``[examples]``.
        tokens: ``input_ids`` and the tokenizer's other values per token, ``[all tokens]``.
        columns: Integers, or tuples of them, of each example by name, such as ``labels``.
    """

    def __init__(
        self, lengths: Array, tokens: Mapping[str, Array], columns: Mapping[str, Sequence[int]]
    ) -> None:
        self.lengths, self.tokens, self.columns = lengths, tokens, columns
        self.ends = np.cumsum(lengths)

    def __len__(self) -> int:
        return len(self.lengths)

    def __getitem__(self, row: int) -> Item:
        place = slice(self.ends[row] - self.lengths[row], self.ends[row])
        tokens = {name: values[place] for name, values in self.tokens.items()}
        return {**tokens, **{name: values[row] for name, values in self.columns.items()}}


def encode(
    examples: Examples, tokenizer: PreTrainedTokenizerBase, max_length: int
) -> tuple[Encoded, Array]:
    """Tokenize examples.

    Returns:
        The examples with ``row`` and, if the data has them, ``labels``; and the full number of
        tokens of each example that was cut.
    """
    columns = {"row": range(len(examples)), "labels": examples.labels}
    known = {name: values for name, values in columns.items() if values}
    options = {"truncation": True, "max_length": max_length}
    encoded = Encoded(*flat_tokens(tokenizer, *examples.columns, **options), known)
    # Only the whole text tells whether it was cut, and by how much.
    full = examples.take(np.flatnonzero(encoded.lengths == max_length).tolist())
    whole, _ = flat_tokens(tokenizer, *full.columns, verbose=False)
    return encoded, whole[whole > max_length]


def collate(
    items: Sequence[Item], padding: Mapping[str, int], teacher: Tensor | None = None
) -> dict[str, Tensor]:
    """Return a batch of items, padded on the right to the longest of them: ``input_ids``,
    ``attention_mask`` and other values per token ``[batch, length]``, ``row`` ``[batch]`` and
    ``labels`` ``[batch]`` or ``[batch, labels]``, all int64, and ``teacher`` ``[batch, classes]``.

    Args:
        items: Examples of an `Encoded`.
        padding: Padding value of each token array by name; 0 for other names.
        teacher: Class probabilities of all examples, ``[examples, classes]``.
    """
    columns = {name: [item[name] for item in items] for name in items[0]}
    tokens = {name: one for name, one in columns.items() if isinstance(one[0], np.ndarray)}
    lengths = np.array([len(ids) for ids in tokens["input_ids"]])
    flat = {name: np.concatenate(values) for name, values in tokens.items()}
    batch = pad(lengths, flat, padding)
    batch |= {name: torch.tensor(columns[name]) for name in columns.keys() - tokens.keys()}
    if teacher is not None:
        batch["teacher"] = teacher[batch["row"]]
    return batch


class LengthGroupedSampler(DistributedSampler[int]):
    """A random order in which the examples of a batch have similar lengths, which saves padding.

    The examples are shuffled and sorted by length within groups of 50 batches; then the batches are
    shuffled. The order depends only on the seed and the epoch. Processes share each batch, so that
    none waits for longer texts. If examples do not divide equally, the last one is repeated.

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
        # The base class needs only the number of examples.
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
