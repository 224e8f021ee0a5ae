"""The interface of layered encoders, which is all that the DACT unit knows about an encoder."""

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
    """A stack of layers that runs in one go (training) or layer by layer on a shrinking batch
    (inference).

    A subclass sets `num_layers` and `hidden_size` and implements `embed`, `layer` and `pool`.
    Override `context` if the layers share more than the hidden state, and `mask` if a batch has no
    ``input_ids``. To load a model with a custom encoder, pass the encoder as ``encoder=``.

    Attributes:
        num_layers: Number of layers N.
        hidden_size: Width of the hidden state.
        vocab_size: Number of token ids, None if unknown.
        max_length: Longest input in tokens, None if there is no bound.
        default_learning_rate: Peak learning rate for fine-tuning.
        counts_columns: Whether positions count from the first column, so that padding on the left
            would shift them.
        step_tokens: Tokens per step of early exit, None for the default of the device.
    """

    num_layers: int
    hidden_size: int
    vocab_size: int | None = None
    max_length: int | None = None
    default_learning_rate: float = 1e-4
    counts_columns: bool = False
    step_tokens: int | None = None

    @abstractmethod
    def embed(self, batch: Batch) -> Tensor:
        """Return the hidden state before layer 1, ``[batch, length, hidden]``."""

    def context(self, hidden: Tensor, mask: Tensor) -> Any:
        """Return what every layer needs next to the hidden state, such as attention biases.

        Args:
            hidden: Hidden state before layer 1 or a later one, ``[batch, length, hidden]``.
            mask: ``[batch, length]``, 1 for tokens and 0 for padding.
        """
        return mask

    def keep(self, context: Any, rows: Tensor, hidden: Tensor, mask: Tensor) -> Any:
        """Return the context of the examples that remain after others have left; override it if
        picking rows of the old context costs less than calling `context` again.

        Args:
            context: Context of all examples, as `context` returned it.
            rows: Rows that remain, int64 ``[remaining]``, ascending.
            hidden: Hidden state of these rows, ``[remaining, length, hidden]``, possibly shorter.
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
        """Return the results of a function for all steps of early exit, in order; override it if
        steps run faster in parallel."""
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
            ValueError: If an example is too long or a token id too high for the encoder, a row is
                all padding, or the batch is padded on the left and positions count from the first
                column.
        """
        check_batch(batch)
        if "input_ids" not in batch:
            raise KeyError(f"a batch needs 'input_ids' [batch, length], got {sorted(batch)}")
        ids = batch["input_ids"]
        if self.max_length is not None and ids.shape[1] > self.max_length:
            raise ValueError(
                f"the batch has {ids.shape[1]} tokens per example, but the encoder takes at most "
                f"{self.max_length}: cut the texts (max_length={self.max_length})"
            )
        mask = batch["attention_mask"] if "attention_mask" in batch else torch.ones_like(ids)
        # One transfer for all three, since each transfer waits for the GPU.
        facts = torch.stack([mask.sum(dim=1).long(), ids.amax(dim=1).long(), mask[:, 0].long()])
        tokens, highest, first = facts.tolist()
        if self.vocab_size is not None and max(highest, default=0) >= self.vocab_size:
            raise ValueError(
                f"the batch has the token id {max(highest)}, but the encoder knows "
                f"0 … {self.vocab_size - 1}: use its own tokenizer, or set its vocab_size"
            )
        if 0 in tokens:
            raise ValueError(
                f"row {tokens.index(0)} of the batch is all padding: each example needs a token"
            )
        if self.counts_columns and 0 in first:
            raise ValueError(
                "the batch is padded on the left, but the positions of this encoder count from the "
                "first column: pad on the right (tokenizer.padding_side = 'right')"
            )
        return mask

    def check_tokens(self, tokenizer: Any, max_length: int | None) -> None:
        """Raise a ``ValueError`` if the data's tokenizer or length does not fit the encoder; None
        is not checked."""
        known = self.vocab_size
        if tokenizer is not None and known is not None and len(tokenizer) > known:
            raise ValueError(
                f"the tokenizer has {len(tokenizer)} token ids, but the encoder only {known}: give "
                "both the same pretrained name, or set the encoder's vocab_size"
            )
        if max_length is not None and self.max_length is not None and max_length > self.max_length:
            raise ValueError(
                f"the data is cut to max_length={max_length} tokens, but the encoder takes at most "
                f"{self.max_length}: lower the max_length of the data"
            )

    def config(self) -> dict[str, Any] | None:
        """Return plain data from which `dact.encoders.from_config` rebuilds this encoder, None if
        it cannot."""
        return None

    def save_files(self, folder: Path) -> None:
        """Write the files that the encoder needs besides the model's weights; most need none."""


def move(batch: Batch, device: torch.device) -> dict[str, Tensor]:
    """Return a batch whose tensors are on a device; other entries stay as they are."""
    return {
        name: entry.to(device) if isinstance(entry, Tensor) else entry
        for name, entry in batch.items()
    }


def check_batch(batch: object) -> None:
    """Raise a ``TypeError`` if a batch is not a dict."""
    if not isinstance(batch, Mapping):
        raise TypeError(
            f"a batch is a dict with 'input_ids' [batch, length], got a {type(batch).__name__}: "
            "make the data yield dicts"
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
    if dtype == torch.float16:  # a sum over thousands of tokens would overflow
        mask, tokens = mask / tokens, torch.ones_like(tokens)
    # [batch, 1, length] @ [batch, length, hidden] -> [batch, hidden]
    total = torch.bmm(mask.to(hidden.dtype).unsqueeze(1), hidden).squeeze(1)
    return total / tokens.to(hidden.dtype)
