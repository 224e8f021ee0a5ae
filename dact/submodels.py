"""The two submodels of the DACT unit: small multi-layer perceptrons on the pooled state of a
layer."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dact.checks import Range, check_arguments

Normalization = Literal["none", "batch", "layer"]
Activation = Literal["relu", "leaky_relu", "gelu", "tanh"]
LayerStrategy = Literal["constant", "pyramidal", "inverted_pyramidal", "bow_tie"]

ACTIVATIONS: dict[str, type[nn.Module]] = {
    "relu": nn.ReLU,
    "leaky_relu": nn.LeakyReLU,
    "gelu": nn.GELU,
    "tanh": nn.Tanh,
}


@dataclass(frozen=True)
class SubmodelConfig:
    """The architecture of one submodel, classifier or confidence.

    Args:
        num_layers: Number of hidden layers, 0 or more; 0 is a linear map.
        hidden_units: Width of the widest hidden layer, 1 or more.
        dropout: Share of hidden units dropped in training, in [0, 1).
        normalization: Normalization after each hidden linear map: ``"none"``, ``"batch"`` or
            ``"layer"``.
        activation: Activation: ``"relu"``, ``"leaky_relu"``, ``"gelu"`` or ``"tanh"``.
        layer_strategy: Progression of the widths from input to output; see `hidden_widths`.

    Raises:
        ValueError: If a value is outside its range.
        TypeError: If a count is not an integer.

    Example:
        >>> SubmodelConfig(num_layers=3, layer_strategy="pyramidal").hidden_widths()
        [64, 32, 16]
    """

    num_layers: Annotated[int, Range("[0, inf)")] = 1
    hidden_units: Annotated[int, Range("[1, inf)")] = 64
    dropout: Annotated[float, Range("[0, 1)")] = 0.1
    normalization: Normalization = "none"
    activation: Activation = "gelu"
    layer_strategy: LayerStrategy = "constant"

    def __post_init__(self) -> None:
        check_arguments(SubmodelConfig, vars(self), "SubmodelConfig: ")

    def hidden_widths(self) -> list[int]:
        """Return the widths of the hidden layers from input to output. For 4 layers and 64 units:
        ``constant`` 64, 64, 64, 64; ``pyramidal`` 64, 32, 16, 8; ``inverted_pyramidal`` 8, 16, 32,
        64; ``bow_tie`` 64, 32, 32, 64. No width is below 1."""
        last = self.num_layers - 1
        halvings = {
            "constant": [0 for _ in range(self.num_layers)],
            "pyramidal": list(range(self.num_layers)),
            "inverted_pyramidal": [last - i for i in range(self.num_layers)],
            "bow_tie": [min(i, last - i) for i in range(self.num_layers)],
        }[self.layer_strategy]
        return [max(1, self.hidden_units // 2**times) for times in halvings]

    def build(self, input_size: int, output_size: int) -> nn.Sequential:
        """Return the module, from ``[batch, input_size]`` to ``[batch, output_size]``."""
        layers: list[nn.Module] = []
        for width in self.hidden_widths():
            layers.append(nn.Linear(input_size, width))
            if self.normalization == "batch":
                layers.append(nn.BatchNorm1d(width))
            elif self.normalization == "layer":
                layers.append(nn.LayerNorm(width))
            layers += [ACTIVATIONS[self.activation](), nn.Dropout(self.dropout)]
            input_size = width
        return nn.Sequential(*layers, nn.Linear(input_size, output_size))


class _Stacked(nn.Module):
    """A part of the submodels of all layers; the first dimension of its weights is the layer."""

    def __init__(self, parts: Sequence[Any]) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.stack([part.weight.detach() for part in parts]))
        self.bias = nn.Parameter(torch.stack([part.bias.detach() for part in parts]))

    def alone(self, n: int, x: Tensor) -> Tensor:
        """Apply the part of one layer (0-based): ``[batch, in]`` -> ``[batch, out]``."""
        raise NotImplementedError


class _Linear(_Stacked):
    """Linear maps, ``[layers, batch, in]`` -> ``[layers, batch, out]``."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.baddbmm(self.bias[:, None], x, self.weight.mT)

    def alone(self, n: int, x: Tensor) -> Tensor:
        return F.linear(x, self.weight[n], self.bias[n])


class _LayerNorm(_Stacked):
    """Layer normalizations, ``[layers, batch, width]`` -> the same shape."""

    def forward(self, x: Tensor) -> Tensor:
        return F.layer_norm(x, x.shape[-1:]) * self.weight[:, None] + self.bias[:, None]

    def alone(self, n: int, x: Tensor) -> Tensor:
        return F.layer_norm(x, x.shape[-1:], self.weight[n], self.bias[n])


class _BatchNorm(_Stacked):
    """Batch normalizations, only applied one layer at a time. A batch of one, which has no
    variance, is normalized by the running statistics."""

    running_mean: Tensor
    running_var: Tensor

    def __init__(self, parts: Sequence[Any]) -> None:
        super().__init__(parts)
        self.register_buffer("running_mean", torch.zeros_like(self.weight.detach()))
        self.register_buffer("running_var", torch.ones_like(self.weight.detach()))

    def alone(self, n: int, x: Tensor) -> Tensor:
        statistics = self.running_mean[n], self.running_var[n]
        learns = self.training and len(x) > 1
        return F.batch_norm(x, *statistics, self.weight[n], self.bias[n], training=learns)


STACKED = {nn.Linear: _Linear, nn.LayerNorm: _LayerNorm, nn.BatchNorm1d: _BatchNorm}


class Submodels(nn.ModuleList):
    """The submodels of all layers of the encoder, or one that all layers share.

    Its modules are the parts of a submodel, each with the weights of all layers in one tensor, such
    as ``[layers, out, in]``, so that a training step takes one product per part.

    Args:
        config: Architecture of the submodels.
        num_layers: N, the number of layers of the encoder.
        hidden_size: Width of a pooled state.
        output_size: Width of the submodel's output.
        share: Whether all layers use the same weights.
    """

    def __init__(
        self,
        config: SubmodelConfig,
        num_layers: int,
        hidden_size: int,
        output_size: int,
        share: bool = False,
    ) -> None:
        copies = 1 if share else num_layers
        built = [config.build(hidden_size, output_size) for _ in range(copies)]
        parts = zip(*built, strict=True)
        super().__init__(
            STACKED[type(same[0])](same) if type(same[0]) in STACKED else same[0] for same in parts
        )
        self.config = config
        self.num_layers = num_layers
        self.share = share

    def answer(self, layer: int, state: Tensor) -> Tensor:
        """Apply the submodel of a layer (1-based): ``[batch, hidden]`` -> ``[batch, output]``."""
        n, x = 0 if self.share else layer - 1, self._matched(state)
        for part in self:
            x = part.alone(n, x) if isinstance(part, _Stacked) else part(x)
        return x

    @property
    def last(self) -> _Stacked:
        """The last linear map."""
        part = self[-1]
        assert isinstance(part, _Stacked)
        return part

    def _matched(self, states: Tensor) -> Tensor:
        """Return states in the precision of the weights, since the encoder's may be lower."""
        return states.to(next(self.parameters()).dtype)

    def forward(self, states: Tensor) -> Tensor:
        """Apply the submodel of each layer: ``[batch, layers, hidden]`` -> ``[batch, layers,
        output]``."""
        if self.share:
            # All layers at once, so that batch normalization collects the statistics that it uses
            # in eval mode.
            return self.answer(1, states.flatten(0, 1)).unflatten(0, states.shape[:2])
        if not self.training or self.config.normalization == "batch":
            # In eval mode each layer runs alone, as in early exit, so that both round alike.
            layers = range(self.num_layers)
            return torch.stack([self.answer(n + 1, states[:, n]) for n in layers], dim=1)
        x = self._matched(states).transpose(0, 1)  # [layers, batch, hidden]
        for part in self:
            x = part(x)
        return x.transpose(0, 1)


def start_at(confidence: Submodels, value: float) -> None:
    """Set every confidence to h = sigmoid(value), whatever the input."""
    nn.init.zeros_(confidence.last.weight)
    nn.init.constant_(confidence.last.bias, value)


def start_undecided(confidence: Submodels) -> None:
    """Start every confidence at h = 0.5^(1/(N-1)), so that p_{N-1} = 0.5 whatever the depth."""
    start = 0.5 ** (1 / max(1, confidence.num_layers - 1))
    start_at(confidence, math.log(start / (1 - start)))
