"""The training steps that are compared: DACT's own, a multi-exit's, and both with other weights of
the exits."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from dact import DACT, functional
from dact.encoders.base import Batch
from dact.outputs import Loss

from .methods import Method

DRAWS = 5  # margins per step for the option `weighted`
SHARPNESS = (
    1.0  # β of the weights softmax(−β |n − exit|) at the end of the training; it rises from 0
)
MASKED = 0.1  # share of the tokens that the option `live` hides


class Learner(DACT):
    """DACT with the training loss of a `Method`.

    The plain loss is that of DACT. Texts without a class (a label below 0) learn from the teacher
    alone.

    Args:
        method: What is trained.
        mask_token: Token that hides another one, for the option `live`.
        **arguments: Those of DACT.
    """

    def __init__(self, *, method: Method, mask_token: int | None = None, **arguments: Any) -> None:
        super().__init__(**arguments)
        self.method, self.mask_token = method, mask_token
        self._teacher: list[DACT] = []  # in a list, so that it is no part of this module

    def learn_from(self, teacher: DACT) -> None:
        """Ask this teacher in every step, on the masked view of the texts."""
        if self.mask_token is None:
            raise ValueError("the option live needs a tokenizer with a mask token")
        self._teacher = [teacher.eval()]

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        return super().training_step(
            self._masked_view(batch) if self._teacher else batch, batch_idx
        )

    def loss(self, batch: Batch, lambda_reg: float | None = None) -> Loss:
        """Compute what the method minimises; see `DACT.loss`. Every batch carries ``teacher``."""
        target = functional.soft_targets(
            batch["labels"], self.output_dimension, batch["teacher"], self.distillation
        )
        states = self.encoder(batch)
        logits = functional.at_least_float32(self.classifier(states))
        y = logits.softmax(dim=-1)
        if "detached" in self.method.options:
            states, y = states.detach(), y.detach()
        h = functional.at_least_float32(self.confidence(states)).sigmoid().squeeze(-1)
        a, p = functional.accumulate(y, h)
        by_exit = -(target.unsqueeze(1) * logits.log_softmax(dim=-1)).sum(dim=-1)  # [batch, layers]
        exit_loss = (self._exit_weights(y.detach()) * by_exit).sum(dim=1).mean()
        task_loss = functional.task_loss(a[:, -1], target)
        ponder_cost = functional.ponder_cost(p, h, self.ponder)
        price = self._warm_lambda() if lambda_reg is None else lambda_reg
        loss = task_loss + price * ponder_cost + self.exit_loss_weight * exit_loss
        return Loss(
            exit_loss if self.method.kind == "multi" else loss, task_loss, exit_loss, ponder_cost
        )

    def _exit_weights(self, y: Tensor) -> Tensor:
        """The weight of each exit for each example ``[batch, layers]``; rows sum to 1."""
        examples, layers, _ = y.shape
        if "weighted" not in self.method.options:
            return y.new_full((examples, layers), 1 / layers)
        top = y.topk(2, dim=-1).values
        lead = top[..., 0] - top[..., 1]
        depth = torch.arange(layers, device=y.device)
        sharpness = SHARPNESS * self.steps_done / self.total_steps
        weights = torch.zeros_like(lead)
        for margin in torch.rand(DRAWS).tolist():
            leaves = lead > margin
            leaves[:, -1] = True
            distance = (depth - leaves.int().argmax(dim=1, keepdim=True)).abs()  # [batch, layers]
            weights += (-sharpness * distance).softmax(dim=1) / DRAWS
        return weights

    @torch.no_grad()
    def _masked_view(self, batch: Batch) -> Batch:
        """The batch with some tokens masked (never the first), and the teacher's answers to it."""
        assert self.mask_token is not None
        tokens = batch["input_ids"]
        hidden = (torch.rand(tokens.shape, device=tokens.device) < MASKED) & (
            batch["attention_mask"] > 0
        )
        hidden[:, 0] = False
        view = {**batch, "input_ids": tokens.masked_fill(hidden, self.mask_token)}
        return {**view, "teacher": self._teacher[0].to(tokens.device)(view).probabilities}
