"""The outcome of early exit: where each example leaves, and what it loses, at the margin that the
promise would set."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from dact.calibration import Promise, choose_setting
from dact.calibration.answers import LayerAnswers, Measured
from dact.files import read_tensors, write_tensors
from dact.functional import Halting
from dact.model import DACT

FILE = "validation.safetensors"
MEASURE = 3  # version of `outcome_of`: outcomes of an earlier one do not compare
EXIT_HISTOGRAM = (
    "exit_histogram"  # user attribute of a trial: number of examples that left after each layer
)


@dataclass(frozen=True, eq=False)
class Outcome:
    """Early exit on the studies' validation examples.

    Args:
        exits: Exit layer of each example, float ``[examples]``; of several fits, their mean.
        losses: Task loss of each example, ``[examples]``.
        lost: Paired loss of accuracy of each example, ``[examples]``: 1 if only the baseline is
            right, -1 if only early exit is right, else 0. If the baseline's answers are unknown, 1
            where early exit is wrong.
    """

    exits: Tensor
    losses: Tensor
    lost: Tensor

    @property
    def loss(self) -> float:
        """The average task loss."""
        return self.losses.double().mean().item()

    @property
    def layers(self) -> float:
        """The average exit layer, in [1, layers]."""
        return self.exits.double().mean().item()

    def metrics(self, right: Tensor | None) -> dict[str, float]:
        """Return the metrics that TensorBoard shows.

        Args:
            right: As for `outcome_of`.
        """
        reference = 1.0 if right is None else right.double().mean().item()
        accuracy = reference - self.lost.double().mean().item()
        return {"val_task_loss": self.loss, "val_accuracy": accuracy, "val_exit_layer": self.layers}

    def save(self, folder: Path) -> None:
        """Write the outcome into the folder of its trial."""
        write_tensors(
            folder / FILE, {"exits": self.exits, "losses": self.losses, "lost": self.lost}
        )

    @classmethod
    def read(cls, folder: Path) -> Outcome | None:
        """Return what `save` wrote, or None if the file is missing.

        Raises:
            ValueError: If it is corrupted.
        """
        path = folder / FILE
        return cls(**read_tensors(path)[0]) if path.is_file() else None


def mean_outcome(outcomes: list[Outcome]) -> Outcome:
    """Return the mean, example by example, of fits that differ only by their seed."""
    names = ("exits", "losses", "lost")
    return Outcome(
        *(torch.stack([getattr(one, name) for one in outcomes]).mean(0) for name in names)
    )


def outcome_of(
    answers: LayerAnswers, model: DACT, promise: Promise | None, right: Tensor | None
) -> Outcome:
    """Return the outcome of a model's early exit under a promise.

    Args:
        answers: Answers of all layers to the examples.
        model: The model, for its halting rule and class weights.
        promise: Promise that sets the dial, as in the final model; by estimate if these are too few
            examples for its confidence. None for the model's own rule.
        right: Whether the baseline classifies each example correctly, bool ``[examples]``; None if
            that is unknown.
    """
    return outcome_at(_rule(answers, model, promise), answers, model, right)


def outcome_at(rule: Halting, answers: LayerAnswers, model: DACT, right: Tensor | None) -> Outcome:
    """Return the outcome of early exit by `rule`; the other arguments are those of `outcome_of`."""
    measured = Measured(answers, answers.exit_layers(rule))
    reference = torch.ones(len(measured.right)) if right is None else right.float()
    losses = measured.losses(model.class_weights)
    return Outcome(measured.exits.float(), losses, reference - measured.right.float())


def _rule(answers: LayerAnswers, model: DACT, promise: Promise | None) -> Halting:
    for tried in () if promise is None else (promise, replace(promise, confidence=None)):
        with contextlib.suppress(ValueError):  # too few examples, or no setting keeps it
            return choose_setting(answers, tried, model.exit_rule).exit_rule
    return model.exit_rule
