"""The built-in encoder, which is small, trained from scratch and needs no download."""

from __future__ import annotations

import math
from typing import Annotated, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dact.checks import Range, check_arguments
from dact.encoders.base import Batch, LayeredEncoder, Pooling, pool_tokens

# Added to the attention logits of hidden positions. It is finite, so that a row of padding does not
# give NaN, and it fits into float16.
HIDDEN_FROM_VIEW = -1e4


class TransformerEncoder(LayeredEncoder):
    """A pre-norm transformer encoder (Vaswani et al. 2017, arXiv 1706.03762) with linear position
    biases.

    The biases are those of ALiBi (Press et al. 2022, arXiv 2108.12409), in both directions: half of
    the heads look back and half look ahead, each with its own slope. Inputs may have any length.

    Args:
        vocab_size: Number of token ids, 2 or more.
        num_layers: Number of layers N, 1 or more.
        hidden_size: Width of the hidden state, a multiple of `num_heads`.
        num_heads: Number of attention heads, even.
        pooling: ``"mean"`` of the tokens or the ``"first"`` token.
        feedforward_size: Width inside the feed-forward part; 4 times `hidden_size` by default.
        dropout: Dropout probability in [0, 1).
        slopes: Steepest and flattest slope of the biases per token of distance, above 0. The slopes
            of the heads are spaced geometrically between them.

    Raises:
        ValueError: If a value is outside its range.

    Example:
        >>> encoder = TransformerEncoder(vocab_size=100, num_layers=3, hidden_size=16, num_heads=2)
        >>> encoder({"input_ids": torch.tensor([[5, 6, 7]])}).shape
        torch.Size([1, 3, 16])
    """

    slopes: Tensor

    def __init__(
        self,
        vocab_size: Annotated[int, Range("[2, inf)")],
        num_layers: Annotated[int, Range("[1, inf)")] = 6,
        hidden_size: Annotated[int, Range("[1, inf)")] = 64,
        num_heads: Annotated[int, Range("[1, inf)")] = 4,
        *,
        pooling: Pooling = "mean",
        feedforward_size: Annotated[int, Range("[1, inf)")] | None = None,
        dropout: Annotated[float, Range("[0, 1)")] = 0.0,
        slopes: tuple[float, float] = (2.0, 0.25),
    ) -> None:
        given = {n: v for n, v in locals().items() if n not in ("self", "__class__")}
        check_arguments(TransformerEncoder.__init__, given, "TransformerEncoder: ")
        super().__init__()
        self._config = {**given, "slopes": list(slopes)}
        if num_heads % 2 or hidden_size % num_heads:
            raise ValueError(
                "TransformerEncoder: num_heads must be even and divide hidden_size, got "
                f"{num_heads} heads for {hidden_size}"
            )
        self.num_layers = num_layers
        self.hidden_size = hidden_size
        self.vocab_size = vocab_size
        self.pooling = pooling
        feedforward_size = feedforward_size or 4 * hidden_size
        self.tokens = nn.Embedding(vocab_size, hidden_size)
        nn.init.normal_(self.tokens.weight, std=0.05)
        self.layers = nn.ModuleList(
            _Layer(hidden_size, num_heads, feedforward_size, dropout) for _ in range(num_layers)
        )
        # Pre-norm layers return an unnormalised sum: one norm serves the exits of all layers.
        self.norm = nn.LayerNorm(hidden_size)
        steepest, flattest = (math.log(slope) for slope in slopes)
        spread = torch.linspace(steepest, flattest, num_heads // 2).exp()
        self.register_buffer("slopes", spread, persistent=False)

    def embed(self, batch: Batch) -> Tensor:
        return self.tokens(batch["input_ids"])

    def context(self, hidden: Tensor, mask: Tensor) -> Tensor:
        """Return the attention bias from distance, direction and padding, ``[batch, heads, length,
        length]``."""
        positions = torch.arange(hidden.shape[1], device=hidden.device)
        # [length, length], key minus query
        distance = positions.unsqueeze(0) - positions.unsqueeze(1)
        falling = -self.slopes.view(-1, 1, 1) * distance.abs()  # [heads / 2, length, length]
        back = falling.masked_fill(distance > 0, HIDDEN_FROM_VIEW)
        ahead = falling.masked_fill(distance < 0, HIDDEN_FROM_VIEW)
        padding = (mask == 0)[:, None, None, :]  # [batch, 1, 1, length]
        return torch.cat([back, ahead]).unsqueeze(0).masked_fill(padding, HIDDEN_FROM_VIEW)

    def keep(self, context: Tensor, rows: Tensor, hidden: Tensor, mask: Tensor) -> Tensor:
        length = hidden.shape[1]
        return context[..., :length, :length].index_select(0, rows)

    def layer(self, layer: int, hidden: Tensor, context: Tensor) -> Tensor:
        return self.layers[layer - 1](hidden, context)

    def pool(self, layer: int, hidden: Tensor, mask: Tensor) -> Tensor:
        return pool_tokens(self.norm(hidden), mask, self.pooling)

    def config(self) -> dict[str, Any] | None:
        if type(self) is not TransformerEncoder:
            # A subclass may pool or embed in another way.
            return None
        return {"type": "TransformerEncoder", **self._config}


class _Layer(nn.Module):
    """Attention with a bias, then a feed-forward part. PyTorch's own layer is not used, since its
    fast path in eval mode ignores a bias per head."""

    def __init__(
        self, hidden_size: int, num_heads: int, feedforward_size: int, dropout: float
    ) -> None:
        super().__init__()
        self.num_heads, self.dropout = num_heads, dropout
        self.attention_norm = nn.LayerNorm(hidden_size)
        self.queries_keys_values = nn.Linear(hidden_size, 3 * hidden_size)
        self.attention_output = nn.Linear(hidden_size, hidden_size)
        self.feedforward = nn.Sequential(
            nn.LayerNorm(hidden_size),
            nn.Linear(hidden_size, feedforward_size),
            nn.GELU(),
            nn.Dropout(dropout),
            nn.Linear(feedforward_size, hidden_size),
            nn.Dropout(dropout),
        )

    def forward(self, hidden: Tensor, bias: Tensor) -> Tensor:
        # [batch, length, 3 * hidden] -> three of [batch, heads, length, hidden / heads]
        projected = self.queries_keys_values(self.attention_norm(hidden))
        parts = projected.unflatten(-1, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4)
        queries, keys, values = parts
        dropout = self.dropout if self.training else 0.0
        attended = F.scaled_dot_product_attention(
            queries, keys, values, bias.to(parts.dtype), dropout
        )
        attended = self.attention_output(attended.transpose(1, 2).flatten(2))
        hidden = hidden + F.dropout(attended, self.dropout, self.training)
        return hidden + self.feedforward(hidden)
