"""The contract of a layered encoder. The DACT unit depends only on it, never on a particular
encoder."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, TypeVar

import torch
from torch import Tensor, nn

Batch = Mapping[str, Tensor]
Pooling = Literal["mean", "first"]
Given = TypeVar("Given")
Made = TypeVar("Made")


class LayeredEncoder(nn.Module, ABC):
    """A stack of layers that can be run in one go (training) or layer by layer on a shrinking batch
    (inference).

    A subclass sets `num_layers` and `hidden_size` and implements three methods: `embed`, `layer`
    and `pool`. Override `context` if the layers share more than the hidden state, `forward` if one
    ordinary forward pass is faster than a loop, and `mask` if a batch has no ``input_ids``. A
    checkpoint can rebuild dact's own encoders only: pass any other one as ``encoder=`` where a
    model is loaded."""

    num_layers: int
    hidden_size: int
    vocab_size: int | None = None  # number of token ids, None if unknown
    default_learning_rate: float = 1e-4  # for fine-tuning, where the user gives none
    max_length: int | None = None  # longest input in tokens, None if there is no bound
    # whether positions count from the first column, which padding on the left would shift
    counts_columns: bool = False
    step_tokens: int | None = (
        None  # tokens of one step of early exit, None for PyTorch's default on the device
    )

    @abstractmethod
    def embed(self, batch: Batch) -> Tensor:
        """Return the hidden state before layer 1, ``[batch, length, hidden]``.

        In early exit the batch has some of the rows, and entries without a row for each example as
        they are."""

    def context(self, hidden: Tensor, mask: Tensor) -> Any:
        """Return what every layer needs next to the hidden state, such as attention biases.

        Args:
            hidden: Hidden state before layer 1 or a later one, ``[batch, length, hidden]``.
            mask: ``[batch, length]``, 1 for tokens and 0 for padding.
        """
        return mask

    def keep(self, context: Any, rows: Tensor, hidden: Tensor, mask: Tensor) -> Any:
        """Return the context of the examples that remain after others have left.

        By default `context` is called again. Override it if picking the rows of the old context
        costs less.

        Args:
            context: Context of all examples, as `context` returned it.
            rows: Rows that remain, int64 ``[remaining]``, ascending.
            hidden: Hidden state of these rows, ``[remaining, length, hidden]``. The length may have
                shrunk.
            mask: Mask of these rows, ``[remaining, length]``.
        """
        return self.context(hidden, mask)

    @abstractmethod
    def layer(self, layer: int, hidden: Tensor, context: Any) -> Tensor:
        """Run one layer (1-based): ``[batch, length, hidden]`` -> the same shape."""

    @abstractmethod
    def pool(self, layer: int, hidden: Tensor, mask: Tensor) -> Tensor:
        """Return the pooled state after a layer (1-based): ``[batch, length, hidden]`` -> ``[batch,
        hidden]``."""

    def for_each(self, function: Callable[[Given], Made], steps: Sequence[Given]) -> Iterable[Made]:
        """Return the results of a function for all steps of early exit, in their order.

        By default the steps run one after the other, since PyTorch uses all cores in each of them.
        Override it if they run faster side by side."""
        return map(function, steps)

    def forward(self, batch: Batch) -> Tensor:
        """Return the pooled states of all layers, ``[batch, layers, hidden]``."""
        return self.first_states(batch, self.num_layers)

    def first_states(self, batch: Batch, num_layers: int) -> Tensor:
        """Run the first layers only, one by one, and return their pooled states, ``[batch,
        num_layers, hidden]``."""
        mask, hidden = self.mask(batch), self.embed(batch)
        context = self.context(hidden, mask)
        states = []
        for n in range(1, num_layers + 1):
            hidden = self.layer(n, hidden, context)
            states.append(self.pool(n, hidden, mask))
        return torch.stack(states, dim=1)

    def mask(self, batch: Batch) -> Tensor:
        """Return which positions hold a token, ``[batch, length]``; all of them without an
        ``attention_mask``.

        Raises:
            TypeError: If the batch is not a dict.
            KeyError: If the batch has no ``input_ids``.
            ValueError: If the ids or the mask have another shape, the encoder does not take so many
                tokens or such an id, a row is all padding, or the batch is padded on the left and
                positions count from the first column.
        """
        check_batch(batch)
        ids = batch.get("input_ids")
        if not isinstance(ids, Tensor):
            raise KeyError(
                f"a batch needs 'input_ids' [batch, length], a tensor, got the keys {sorted(batch)}"
            )
        if ids.dim() != 2 or ids.shape[1] == 0:
            raise ValueError(
                f"input_ids must have the shape [batch, length], got {list(ids.shape)}: give each example a row of one "
                "token or more"
            )
        if self.max_length is not None and ids.shape[1] > self.max_length:
            raise ValueError(
                f"the batch has {ids.shape[1]} tokens per example, but the encoder takes at most {self.max_length}: "
                f"cut the texts (max_length={self.max_length})"
            )
        mask = batch.get("attention_mask")
        if mask is None:
            mask = torch.ones_like(ids)
        if mask.shape != ids.shape:
            raise ValueError(
                f"attention_mask must have the shape of input_ids {list(ids.shape)} [batch, length], got "
                f"{list(mask.shape)}"
            )
        highest = ids.max() if len(ids) else ids.new_zeros(())
        *counts, largest = torch.cat(
            [mask.sum(dim=1).long(), highest.reshape(1)]
        ).tolist()  # a GPU is waited for once
        if self.vocab_size is not None and largest >= self.vocab_size:
            raise ValueError(
                f"the batch has the token id {largest}, but the encoder knows 0 … {self.vocab_size - 1}: use the "
                "tokenizer of the encoder, or set its vocab_size"
            )
        empty = [row for row, tokens in enumerate(counts) if not tokens]
        if empty:
            raise ValueError(
                f"rows {empty} of the batch are all padding: each example needs at least one token"
            )
        if self.counts_columns and not mask[:, 0].all():
            raise ValueError(
                "the batch is padded on the left, where an encoder with absolute positions would answer differently "
                "for each width of the padding: pad on the right (tokenizer.padding_side = 'right')"
            )
        return mask

    def check_tokens(self, tokenizer: Any, max_length: int | None) -> None:
        """Raise a ``ValueError`` if this tokenizer or length of the data, None if unknown, does not
        fit the encoder."""
        if (
            tokenizer is not None
            and self.vocab_size is not None
            and len(tokenizer) > self.vocab_size
        ):
            raise ValueError(
                f"the tokenizer has {len(tokenizer)} token ids, but the encoder only {self.vocab_size}: give both the "
                "same pretrained name, or set the encoder's vocab_size"
            )
        if max_length is not None and self.max_length is not None and max_length > self.max_length:
            raise ValueError(
                f"the data is cut to max_length={max_length} tokens, but the encoder takes at most {self.max_length}: "
                "lower the max_length of the data"
            )

    def config(self) -> dict[str, Any] | None:
        """Return plain data from which `dact.encoders.from_config` builds this encoder, None if
        that is impossible."""
        return None

    def save_files(self, folder: Path) -> None:
        """Write what the encoder needs next to the weights of the model; most encoders need
        nothing."""


def move(batch: Batch, device: torch.device) -> dict[str, Tensor]:
    """Return a batch whose tensors are on a device; other entries, such as lists of ids, stay as
    they are."""
    return {
        name: entry.to(device) if isinstance(entry, Tensor) else entry
        for name, entry in batch.items()
    }


def check_batch(batch: object) -> None:
    """Raise a ``TypeError`` if a batch is not a dict."""
    if not isinstance(batch, Mapping):
        size = f" of {len(batch)}" if isinstance(batch, (tuple, list)) else ""
        raise TypeError(
            f"a batch is a dict with 'input_ids' [batch, length], got a {type(batch).__name__}{size}: make the data "
            "yield dicts"
        )


def pool_tokens(hidden: Tensor, mask: Tensor, pooling: Pooling) -> Tensor:
    """Return the mean of the tokens under the mask, or the first token.

    Args:
        hidden: ``[batch, length, hidden]``.
        mask: ``[batch, length]``, 1 for tokens and 0 for padding, on either side.
        pooling: ``"mean"`` or ``"first"``.

    Returns:
        ``[batch, hidden]``.
    """
    if pooling == "first":
        first = mask.int().argmax(dim=1)  # [batch]: 0 unless padding is on the left
        return hidden[torch.arange(hidden.shape[0], device=hidden.device), first]
    tokens = mask.sum(dim=1, keepdim=True)
    kind = hidden.device.type
    dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else hidden.dtype
    if dtype == torch.float16:  # in which the sum over thousands of tokens overflows
        mask, tokens = mask / tokens, torch.ones_like(tokens)
    # [batch, 1, length] @ [batch, length, hidden] -> [batch, hidden]
    total = torch.bmm(mask.to(hidden.dtype).unsqueeze(1), hidden).squeeze(1)
    return total / tokens.to(hidden.dtype)
