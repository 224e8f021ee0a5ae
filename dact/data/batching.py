"""From examples to batches: token ids in few bytes, padded batches, and an order that needs little
padding."""

from __future__ import annotations

import random
from array import array
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import Dataset, DistributedSampler, Sampler

from dact.data.examples import Examples
from dact.data.tokenizers import PORTION, PreTrainedTokenizerBase

# One integer per example in items and batches.
COLUMNS = ("row", "labels", "depth")
# Batches that are sorted by length together.
GROUP = 50


@dataclass(frozen=True)
class Encoded(Dataset[dict[str, Any]]):
    """The usable examples of a split as token ids, 4 to 5 bytes a token.

    An item is a dict of its token arrays ``[length]``, its ``row`` in the split, and its ``labels``
    and ``depth`` if the data has them. The attention mask is made with the batch.

    Args:
        tokens: ``input_ids`` (int32) and the tokenizer's other values per token, such as
            ``token_type_ids`` (int8), each ``[tokens of all examples]``.
        offsets: Start of each example in `tokens` and the end of the last, int64
            ``[examples + 1]``.
        columns: ``row``, ``labels`` and ``depth``, each int64 ``[examples]``.
    """

    tokens: dict[str, NDArray[Any]]
    offsets: NDArray[np.int64]
    columns: dict[str, NDArray[np.int64]]

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def __getitem__(self, index: int) -> dict[str, Any]:
        # An IndexError ends an iteration.
        index = range(len(self))[index]
        start, end = self.offsets[index], self.offsets[index + 1]
        item: dict[str, Any] = {name: values[start:end] for name, values in self.tokens.items()}
        return item | {name: int(values[index]) for name, values in self.columns.items()}

    @property
    def lengths(self) -> list[int]:
        """Number of tokens of each example."""
        return np.diff(self.offsets).tolist()

    def take(self, indices: Sequence[int]) -> Encoded:
        """Return the examples of `indices`, in that order."""
        chosen = np.asarray(indices, dtype=np.int64)
        lengths = np.diff(self.offsets)[chosen]
        offsets = np.concatenate([[0], np.cumsum(lengths)])
        # Place of each token in the old order, int64 [tokens].
        places = np.arange(offsets[-1]) + np.repeat(self.offsets[chosen] - offsets[:-1], lengths)
        tokens = {name: values[places] for name, values in self.tokens.items()}
        return Encoded(tokens, offsets, {name: c[chosen] for name, c in self.columns.items()})


def encode(
    examples: Examples, tokenizer: PreTrainedTokenizerBase, max_length: int
) -> tuple[Encoded, list[int]]:
    """Tokenize the usable examples.

    Args:
        examples: Examples of a split.
        tokenizer: Tokenizer that is used only here: the call changes its limits.
        max_length: Number of tokens to which longer examples are cut.

    Returns:
        The token ids and, for each example that was cut, its number of tokens before the cut.
    """
    rows: Sequence[int] = range(len(examples))
    if examples.reasons is not None:
        rows = [row for row, reason in enumerate(examples.reasons) if reason is None]
        examples = examples.take(rows)
    given = [examples.texts] if examples.pairs is None else [examples.texts, examples.pairs]
    options: dict[str, Any] = {"return_attention_mask": False}
    tokens = {"input_ids": array("i")}
    lengths, cut = [0], []
    for start in range(0, len(rows), PORTION):
        texts = [column[start : start + PORTION] for column in given]
        encoding = tokenizer(*texts, truncation=True, max_length=max_length, **options)
        for name, found in encoding.items():
            values = tokens.setdefault(name, array("b" if name == "token_type_ids" else "i"))
            for example in found:
                values.extend(example)
        lengths += map(len, encoding["input_ids"])
        full = [row for row, ids in enumerate(encoding["input_ids"]) if len(ids) == max_length]
        if full:
            # Only the whole text tells whether it was cut, and by how much.
            again = [[column[row] for row in full] for column in texts]
            whole = tokenizer(*again, verbose=False, **options)
            cut += [len(ids) for ids in whole["input_ids"] if len(ids) > max_length]
    arrays = {name: np.frombuffer(v, dtype=f"i{v.itemsize}") for name, v in tokens.items()}
    columns = {"row": rows, "labels": examples.labels, "depth": examples.depths}
    known = {name: np.asarray(v, np.int64) for name, v in columns.items() if v is not None}
    return Encoded(arrays, np.cumsum(lengths, dtype=np.int64), known), cut


def collate(
    items: Sequence[Mapping[str, Any]], padding: Mapping[str, int], teacher: Tensor | None = None
) -> dict[str, Tensor]:
    """Return a batch of items, padded on the right to the longest of them.

    Args:
        items: Examples of `Encoded`.
        padding: Value that pads each token array; 0 for those that are not named.
        teacher: Class probabilities ``[training examples, classes]``, of which the batch gets its
            rows.

    Returns:
        ``input_ids``, ``attention_mask`` and other token arrays ``[batch, length]``, ``row``,
        ``labels`` and ``depth`` ``[batch]``, all int64, and ``teacher`` ``[batch, classes]``.
    """
    batch: dict[str, Tensor] = {}
    for name in items[0]:
        if name in COLUMNS:
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


class LengthGroupedSampler(Sampler[int]):
    """A random order in which the examples of a batch have similar lengths, so that little padding
    is computed.

    The examples are shuffled, sorted by length within groups of 50 batches, and the batches are
    shuffled. The order depends only on the seed and the epoch, so that a resumed run continues as
    if it had never stopped.

    Args:
        lengths: Number of tokens of each example.
        batch_size: Number of examples per batch.
        seed: Seed for the shuffling.
    """

    def __init__(self, lengths: Sequence[int], batch_size: int, seed: int) -> None:
        self.lengths, self.batch_size, self.seed, self.epoch = lengths, batch_size, seed, 0

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch whose order comes next; the Trainer calls this before each epoch."""
        self.epoch = epoch

    def __len__(self) -> int:
        return len(self.lengths)

    def __iter__(self) -> Iterator[int]:
        generator = random.Random(f"{self.seed}/{self.epoch}")
        order = generator.sample(range(len(self)), len(self))
        size, batches = self.batch_size, []
        for start in range(0, len(order), GROUP * size):
            group = sorted(order[start : start + GROUP * size], key=lambda row: self.lengths[row])
            batches += [group[i : i + size] for i in range(0, len(group), size)]
        # A short batch stays last: the DataLoader cuts the order into batches from its beginning.
        last = [batches.pop()] if batches and len(batches[-1]) < size else []
        generator.shuffle(batches)
        for batch in batches + last:
            yield from batch


class SharedLengthGroupedSampler(DistributedSampler[int]):
    """The share of one of several processes in an order of `LengthGroupedSampler`.

    All of them take part in each batch, so that none waits for another with longer texts. A few
    examples are repeated if they cannot be shared equally.

    Args:
        lengths, batch_size, seed: As for `LengthGroupedSampler`, with the batches of one process.
        num_replicas: Number of processes.
        rank: Number of this one, from 0.
    """

    def __init__(
        self, lengths: Sequence[int], batch_size: int, seed: int, num_replicas: int, rank: int
    ) -> None:
        # Only the number of examples counts.
        super().__init__(range(len(lengths)), num_replicas, rank)  # type: ignore[arg-type]
        self.whole = LengthGroupedSampler(lengths, batch_size * num_replicas, seed)

    def __iter__(self) -> Iterator[int]:
        self.whole.set_epoch(self.epoch)
        rows = list(self.whole)
        rows += (rows[-1:] * self.num_replicas)[: -len(rows) % self.num_replicas]
        return iter(rows[self.rank :: self.num_replicas])
