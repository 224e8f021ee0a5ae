"""What a trial is worth: its state, and the exit layer and the losses of each example."""

from __future__ import annotations

import base64
import contextlib
import zlib
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace

import numpy as np
import torch
from optuna.study import Study
from optuna.trial import FrozenTrial, TrialState
from torch import Tensor

from dact.calibration import LayerAnswers, Measured, Promise, choose_setting
from dact.functional import Halting
from dact.model import DACT

OUTCOME = "outcome"  # user attribute of a trial: its `Outcome`, packed
CAUSE = "cause"  # user attribute: why a trial was pruned, or the error it failed with


def was_interrupted(trial: FrozenTrial) -> bool:
    """Return whether a trial was stopped from outside."""
    return trial.state == TrialState.FAIL and CAUSE not in trial.user_attrs


def finished(study: Study) -> list[FrozenTrial]:
    """Return the trials that count: completed, pruned, or failed with an error of their own."""
    trials = study.get_trials(deepcopy=False)
    return [one for one in trials if one.state.is_finished() and not was_interrupted(one)]


@dataclass(frozen=True, eq=False)
class Outcome:
    """Early exit on the studies' validation examples.

    Args:
        exits: Exit layer of each example, float ``[examples]``; the mean of several fits.
        losses: Task loss of each example, ``[examples]``.
        lost: Paired loss of accuracy of each example, ``[examples]``: 1 if only the whole encoder
            is right, -1 if only early exit is, else 0.
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

    def metrics(self, right: Tensor) -> dict[str, float]:
        """Return the metrics that TensorBoard shows; `right` is as for `outcome_of`."""
        accuracy = (right.double() - self.lost.double()).mean().item()
        return {
            "val_task_loss": self.loss,
            "val_accuracy": accuracy,
            "val_exit_layer": self.layers,
        }

    def packed(self) -> str:
        """Return the outcome as text, for the storage that all machines of a study share."""
        rows = torch.stack([self.exits, self.losses, self.lost]).float().numpy()
        return base64.b64encode(zlib.compress(rows.tobytes())).decode()

    @classmethod
    def unpacked(cls, text: str) -> Outcome:
        """Return the outcome that `packed` returned as text."""
        values = np.frombuffer(zlib.decompress(base64.b64decode(text)), dtype=np.float32)
        return cls(*torch.from_numpy(values.copy()).reshape(3, -1))


def mean_outcome(outcomes: Sequence[Outcome]) -> Outcome:
    """Return the mean outcome, per example, of fits that differ only in their seed."""
    columns = ([getattr(one, field.name) for one in outcomes] for field in fields(Outcome))
    return Outcome(*(torch.stack(column).mean(0) for column in columns))


def outcome_of(
    answers: LayerAnswers, model: DACT, promise: Promise | None, right: Tensor
) -> Outcome:
    """Return the outcome of a model's early exit under a promise.

    Args:
        answers: Answers of all layers to the examples.
        model: Model of the answers.
        promise: Promise that sets the dial, as in the final model, or its estimate if the examples
            are too few for its confidence. None keeps the model's own rule.
        right: Whether the whole encoder classifies each example correctly, bool ``[examples]``.
    """
    measured = Measured(answers, answers.exit_layers(_rule(answers, model, promise)))
    losses = measured.losses(model.class_weights)
    return Outcome(measured.exits.float(), losses, right.float() - measured.right.float())


def _rule(answers: LayerAnswers, model: DACT, promise: Promise | None) -> Halting:
    for tried in () if promise is None else (promise, replace(promise, confidence=None)):
        with contextlib.suppress(ValueError):  # too few examples, or no setting keeps it
            return choose_setting(answers, tried, model.exit_rule).exit_rule
    return model.exit_rule
