"""The optimizer and the learning rates of a fit."""

from __future__ import annotations

from collections.abc import Iterable
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR
from typing_extensions import override


def schedule(
    rates: Iterable[tuple[Iterable[nn.Parameter], float]],
    weight_decay: float,
    warmup_fraction: float,
    total: float,
    stacked: Iterable[nn.Parameter] = (),
) -> Any:
    """Return AdamW and its schedule, as `LightningModule.configure_optimizers` may return them.

    Args:
        rates: Groups of parameters, each with its peak learning rate.
        weight_decay: Weight decay of the matrices.
        warmup_fraction: Share of the steps over which the learning rate rises; it then falls to 0.
        total: Number of optimizer steps; ``inf`` or -1 if the end of the fit is unknown, so that
            rates are constant.
        stacked: Parameters that stack several layers along their first dimension.
    """
    layered = set(stacked)
    groups: list[dict[str, Any]] = []
    for parameters, rate in rates:
        trained = [one for one in parameters if one.requires_grad]
        matrices = [one for one in trained if one.dim() > 1 + (one in layered)]
        others = [one for one in trained if one.dim() <= 1 + (one in layered)]  # biases and norms
        for chosen, decay in ((matrices, weight_decay), (others, 0.0)):
            if chosen:
                groups.append({"params": chosen, "lr": rate, "weight_decay": decay})
    # One kernel for all tensors: on a CPU several times as fast, but not the default.
    optimizer = torch.optim.AdamW(groups, fused=True)
    # Lightning does not clip gradients if the optimizer unscales them itself; with this flag off,
    # Lightning unscales them.
    optimizer._step_supports_amp_scaling = False
    if not 0 < total < float("inf"):  # Lightning returns -1 for a stream of examples
        return optimizer
    scheduler = WarmupThenDecay(optimizer, warmup_fraction * total, total)
    return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}


class WarmupThenDecay(LambdaLR):
    """A learning rate that rises linearly over `warmup` steps and then falls linearly to 0.

    A parameter group that is added during the fit, for example by Lightning's `BaseFinetuning`,
    follows the same schedule."""

    def __init__(self, optimizer: Optimizer, warmup: float, total: float) -> None:
        super().__init__(optimizer, partial(_factor, warmup=warmup, total=total))

    @override
    def get_lr(self) -> list[Any]:
        factor, groups = self.lr_lambdas[0](self.last_epoch), self.optimizer.param_groups
        return [group.setdefault("initial_lr", group["lr"]) * factor for group in groups]


def _factor(step: int, warmup: float, total: float) -> float:
    if step < warmup:
        return (step + 1) / (warmup + 1)
    return max(0.0, (total - step) / max(1.0, total - warmup))
