r"""The confidence that reads a layer's answer, and how it is fitted.

On training texts every exit looks right. A confidence trained in the same steps therefore trusts
the first layers too much, and more so in deeper encoders. This one has few inputs, starts from a
line that was fitted on other data, and is fitted to answers to texts set apart."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from dact import functional
from dact.submodels import SubmodelConfig, Submodels, start_at
from dact.tasks import MULTICLASS, Task

# The start, a line in the lead and the entropy of y_n: fitted to the validation texts of nine
# trainings of two encoders, with half of the default price; see benchmarks/README.md.
LEAD, ENTROPY, OFFSET = -1.3, 1.4, 1.5
INPUTS = 3  # two numbers of y_n, and n / N
MOST_EXAMPLES = 2048
STEPS = 60
RATE = 3e-3
WEIGHT_DECAY = 0.1
PRIOR_EXAMPLES = 10.0  # weight of the start, and of a temperature of 1, in examples
LARGEST_TEMPERATURE = 8.0  # and 1/8 is the smallest
PRICE = 0.04  # λ is this over the number of layers by default


def numbers(y: Tensor) -> Tensor:
    """Return the inputs of the confidence from answers ``[…, classes]``: the lead, and the entropy
    as a share of a uniform answer's, ``[…, 2]``."""
    first, second = y.topk(2, dim=-1).values.unbind(dim=-1)
    entropy = torch.special.entr(y).sum(dim=-1) / math.log(y.shape[-1])
    return torch.stack([first - second, entropy], dim=-1)


class AnswerConfidence(Submodels):
    """One confidence for all layers, which reads the layer's answer y_n and its depth n / N.

    Its logit is a line in the `numbers` of y_n plus the submodel's output, which starts at 0. The
    optimizer does not train it; see `fit_confidence`. The line is stored with the weights.

    Args:
        config: Architecture of the submodel.
        num_layers: N, the number of layers.
        task: Task of the answers.
    """

    line: Tensor

    def __init__(self, config: SubmodelConfig, num_layers: int, task: Task = MULTICLASS) -> None:
        super().__init__(config, num_layers, INPUTS, 1, share=True)
        self.task = task
        self.register_buffer("line", torch.tensor([LEAD, ENTROPY, OFFSET]))
        start_at(self, 0.0)
        self.requires_grad_(False)

    def train(self, mode: bool = True) -> AnswerConfidence:
        """Stay in eval mode, since dropout would draw from the generator of encoder and heads."""
        return super().train(False)

    def answer(self, layer: int, y: Tensor) -> Tensor:
        """Return the logit of h_n for the answers of a layer (1-based): ``[batch, classes]`` ->
        ``[batch, 1]``."""
        return self._logits(y, torch.tensor(layer / self.num_layers, device=y.device))

    def forward(self, y: Tensor) -> Tensor:
        """Return the logits of h: ``[batch, layers, classes]`` -> ``[batch, layers, 1]``."""
        depths = torch.arange(1, self.num_layers + 1, device=y.device) / self.num_layers
        return self._logits(y, depths)

    def _logits(self, y: Tensor, depth: Tensor) -> Tensor:
        seen = numbers(self.task.hardest(y))
        inputs = torch.cat([seen, depth.to(seen).expand(seen.shape[:-1]).unsqueeze(-1)], dim=-1)
        line = (seen * self.line[:2]).sum(dim=-1, keepdim=True) + self.line[2]
        with torch.autocast(seen.device.type, enabled=False):
            flat = super().answer(1, inputs.flatten(0, -2))
        return line + flat.unflatten(0, seen.shape[:-1])


def best_temperature(losses: Callable[[float], Tensor]) -> float:
    """Return the temperature in [1/8, 8] that maximizes the likelihood of labels (Guo et al. 2017,
    arXiv 1706.04599), where a temperature of 1 counts as ten further examples.

    `losses` returns the losses of the examples, ``[examples]``, at a temperature.
    """
    from scipy.optimize import minimize_scalar

    def loss(exponent: float) -> float:
        return losses(math.exp(exponent)).sum().item() + PRIOR_EXAMPLES * exponent**2

    most = math.log(LARGEST_TEMPERATURE)
    return math.exp(minimize_scalar(loss, bounds=(-most, most), method="bounded").x)


def fit_confidence(
    confidence: AnswerConfidence,
    y: Tensor,
    target: Tensor,
    lambda_reg: float,
    ponder: functional.PonderKind = "p",
    class_weights: Tensor | None = None,
) -> None:
    """Fit a confidence, from its start, to the loss of DACT: -log a_N[target] + λ ρ. The start
    counts as ten further examples, whose loss is the squared difference from its logits.

    Args:
        confidence: The confidence, which is modified.
        y: Answers of the layers, ``[examples, layers, classes]``.
        target: Targets, ``[examples, outcomes]``.
        lambda_reg: λ.
        ponder: The ponder cost ρ, as for `DACT`.
        class_weights: One weight per outcome.
    """
    task = confidence.task
    # The fit is small; on the CPU it leaves the generators of other devices alone.
    y, target = y.cpu(), target.cpu()
    class_weights = None if class_weights is None else class_weights.cpu()
    with torch.random.fork_rng(devices=[]), torch.enable_grad():
        torch.default_generator.manual_seed(0)
        fresh = AnswerConfidence(confidence.config, confidence.num_layers, task)
        super(AnswerConfidence, fresh).train().requires_grad_(True)
        learner = torch.optim.AdamW(fresh.parameters(), RATE, weight_decay=WEIGHT_DECAY)
        start = fresh(y).detach()
        for step in range(STEPS):
            learner.param_groups[0]["lr"] = RATE * (1 - step / STEPS)
            logits = fresh(y)
            h = logits.squeeze(-1).sigmoid()
            a, p = functional.accumulate(task.outcomes(y), h)
            loss = functional.task_loss(a[:, -1], target, class_weights)
            loss = loss + lambda_reg * functional.ponder_cost(p, h, ponder)
            loss = loss + PRIOR_EXAMPLES / len(y) * (logits - start).square().mean()
            learner.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            learner.step()
    confidence.load_state_dict(fresh.state_dict())
