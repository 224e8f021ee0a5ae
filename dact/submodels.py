"""The two submodels of the DACT unit: small multi-layer perceptrons on the pooled state of a
layer."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dact.checks import MOST_LAYERS, check_choice, check_count, check_range

Normalization = Literal["none", "batch", "layer"]
Activation = Literal["relu", "leaky_relu", "gelu", "tanh"]
LayerStrategy = Literal["constant", "pyramidal", "inverted_pyramidal", "bow_tie"]

ACTIVATIONS: dict[str, type[nn.Module]] = {
    "relu": nn.ReLU,
    "leaky_relu": nn.LeakyReLU,
    "gelu": nn.GELU,
    "tanh": nn.Tanh,
}

STACKABLE = {
    nn.Linear,
    nn.LayerNorm,
    nn.Dropout,
    *ACTIVATIONS.values(),
}  # parts that act on each example alone
HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


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
        layer_strategy: Progression of the widths from input to output; see `hidden_widths` for an
            example of each.

    Raises:
        ValueError: If a value is outside its range.
        TypeError: If a count is not an integer.

    Example:
        >>> SubmodelConfig(num_layers=3, hidden_units=64, layer_strategy="pyramidal").hidden_widths()
        [64, 32, 16]
    """

    num_layers: int = 1
    hidden_units: int = 64
    dropout: float = 0.1
    normalization: Normalization = "none"
    activation: Activation = "gelu"
    layer_strategy: LayerStrategy = "constant"

    def __post_init__(self) -> None:
        check_count("SubmodelConfig: num_layers", self.num_layers, least=0, most=MOST_LAYERS)
        check_count("SubmodelConfig: hidden_units", self.hidden_units)
        check_range("SubmodelConfig: dropout", self.dropout, "[0, 1)")
        check_choice("SubmodelConfig: normalization", self.normalization, Normalization)
        check_choice("SubmodelConfig: activation", self.activation, Activation)
        check_choice("SubmodelConfig: layer_strategy", self.layer_strategy, LayerStrategy)

    def hidden_widths(self) -> list[int]:
        """Return the widths of the hidden layers from input to output; each step halves or doubles,
        never below 1.

        With ``hidden_units=64`` and ``num_layers=4``:

        - ``constant``: 64, 64, 64, 64
        - ``pyramidal`` (shrinks towards the output): 64, 32, 16, 8
        - ``inverted_pyramidal`` (grows): 8, 16, 32, 64
        - ``bow_tie`` (shrinks, then grows): 64, 32, 32, 64
        """
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
                layers.append(_BatchNorm(width))
            elif self.normalization == "layer":
                layers.append(nn.LayerNorm(width))
            layers += [ACTIVATIONS[self.activation](), nn.Dropout(self.dropout)]
            input_size = width
        return nn.Sequential(*layers, nn.Linear(input_size, output_size))


class _BatchNorm(nn.BatchNorm1d):
    """Batch normalization that uses its running statistics for a batch of one example, which has no
    variance."""

    def forward(self, input: Tensor) -> Tensor:
        if self.training and len(input) == 1:
            return F.batch_norm(
                input, self.running_mean, self.running_var, self.weight, self.bias, eps=self.eps
            )
        return super().forward(input)


class Submodels(nn.ModuleList):
    """One submodel for each layer of the encoder, or one that all layers share.

    Args:
        config: Architecture of the submodels.
        num_layers: N, the number of layers of the encoder.
        hidden_size: Width of a pooled state.
        output_size: Width of the submodel's output.
        share: Whether all layers use the same weights. Batch normalization then has one set of
            statistics, taken over the states of all layers together.
    """

    def __init__(
        self,
        config: SubmodelConfig,
        *,
        num_layers: int,
        hidden_size: int,
        output_size: int,
        share: bool = False,
    ) -> None:
        super().__init__(
            config.build(hidden_size, output_size) for _ in range(1 if share else num_layers)
        )
        self.config = config
        self.num_layers = num_layers

    def of_layer(self, layer: int) -> nn.Module:
        """Return the submodel of a layer (1-based)."""
        return self[(layer - 1) % len(self)]

    def answer(self, layer: int, state: Tensor) -> Tensor:
        """Apply the submodel of a layer (1-based): ``[batch, hidden]`` -> ``[batch, output]``."""
        return self.of_layer(layer)(self._matched(state))

    def _matched(self, states: Tensor) -> Tensor:
        """Return states in the precision of the weights: that of an encoder may be lower."""
        weight = next((weight for weight in self.parameters() if weight.is_floating_point()), None)
        return (
            states if weight is None else states.to(weight.dtype)
        )  # there is none if they are quantized

    def forward(self, states: Tensor) -> Tensor:
        """Apply the submodel of each layer: ``[batch, layers, hidden]`` -> ``[batch, layers,
        output]``."""
        states = self._matched(states)
        if len(self) < self.num_layers:
            # All layers at once, so that batch normalization learns the statistics that it uses in
            # eval mode.
            return self[0](states.flatten(0, 1)).unflatten(0, states.shape[:2])
        if self.training and self._can_be_stacked():
            return self._stacked(states)
        return torch.stack(
            [self.of_layer(n + 1)(states[:, n]) for n in range(self.num_layers)], dim=1
        )

    def _can_be_stacked(self) -> bool:
        """Whether the submodels are of one kind, which `_stacked` knows, and have no hook that it
        would pass over."""
        if any(type(submodel) is not nn.Sequential for submodel in self):
            return False
        kinds = {
            tuple((type(part), part.extra_repr()) for part in submodel.children())
            for submodel in self
        }
        parts = [part for submodel in self for part in submodel.children()]
        if len(kinds) > 1 or any(
            type(part) not in STACKABLE or getattr(part, "bias", part) is None for part in parts
        ):
            return False
        return not any(getattr(module, hooks) for module in (*self, *parts) for hooks in HOOKS)

    def _stacked(self, states: Tensor) -> Tensor:
        """Compute what `forward` does with one product per depth of the submodels, instead of one
        per layer.

        Training steps of small networks cost what their calls cost. In eval mode each layer is
        called alone, as it is where inference stops early, so that both round alike."""
        x = states.transpose(0, 1)  # [layers, batch, hidden]
        for parts in zip(*self, strict=True):  # type: ignore[call-overload]
            first = parts[0]
            if not list(first.parameters()):
                x = first(x)  # an activation or dropout
                continue
            weight = torch.stack(
                [part.weight for part in parts]
            )  # [layers, out, in], or [layers, width] of a norm
            bias = torch.stack([part.bias for part in parts])[:, None]
            if isinstance(first, nn.Linear):
                x = torch.baddbmm(bias, x, weight.mT)
            else:
                x = F.layer_norm(x, first.normalized_shape, eps=first.eps) * weight[:, None] + bias
        return x.transpose(0, 1)


def start_undecided(confidence: Submodels) -> None:
    """Start every confidence at h = 0.5^(1/(N-1)), so that p_{N-1} = 0.5 whatever the depth.

    The last linear map starts with zero weights and that logit as its bias, so that the value holds
    for every input. With N = 1 the confidence decides nothing, and starts at 0.5."""
    start = 0.5 ** (1 / max(1, confidence.num_layers - 1))
    for submodel in confidence:
        last = submodel[-1]  # type: ignore[index]
        nn.init.zeros_(last.weight)
        nn.init.constant_(last.bias, math.log(start / (1 - start)))
