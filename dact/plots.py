"""Figures of exit layers."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def new_figure() -> tuple[Figure, Any]:
    """Make a figure with axes outside of pyplot, whose global state it would change."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6, 4), dpi=120, layout="constrained")
    return figure, figure.subplots()


def depth_against_exit(depths: Tensor, exit_layers: Tensor, num_layers: int) -> Figure:
    """Draw the distribution of exit layers for each depth of the examples, and its mean.

    Args:
        depths: Depth of each example, int64 ``[examples]``, from 0.
        exit_layers: Exit layer of each example, int64 ``[examples]``, in 1 … num_layers.
        num_layers: Number of layers N.
    """
    figure, axes = new_figure()
    deepest = int(depths.max()) + 1
    shares = torch.zeros(num_layers, deepest)
    for depth in range(deepest):
        counts = torch.bincount(exit_layers[depths == depth] - 1, minlength=num_layers).float()
        shares[:, depth] = counts / counts.sum().clamp_min(1)
    extent = (-0.5, deepest - 0.5, 0.5, num_layers + 0.5)
    image = axes.imshow(
        shares.numpy(), origin="lower", aspect="auto", cmap="Blues", vmin=0, vmax=1, extent=extent
    )
    present = sorted(set(depths.tolist()))
    means = [exit_layers[depths == depth].float().mean().item() for depth in present]
    axes.plot(present, means, "o-", color="tab:red", label="mean exit layer")
    axes.set(
        xlabel="depth of the example (steps)",
        ylabel="exit layer",
        xticks=present,
        title="where examples leave",
    )
    axes.set_yticks(range(1, num_layers + 1))
    axes.legend(loc="upper left")
    figure.colorbar(image, label="share of the examples of a depth")
    return figure
