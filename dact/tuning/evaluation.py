"""The entries of metrics.json: measurements of early exit and of full depth on a split."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader
from torchmetrics.functional.classification import multiclass_f1_score

from dact import functional
from dact.calibration.answers import Dial, LayerAnswers, layer_answers, operating_points, share
from dact.calibration.temperature import expected_calibration_error, temper
from dact.encoders.base import Batch, move
from dact.model import DACT

TOLERANCES = (0.0, 0.05, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)
TIMED_TEXTS = 512  # texts whose time is taken: more would say little more …
ROUNDS = 3  # … than the fastest of several rounds does
TIMED_SECONDS = 1.0  # of each split, at least: a few texts take more rounds …
MOST_ROUNDS = 30  # … but no more than these
MARGINS = (1.0, 0.99, 0.95, 0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3, 0.2, 0.1)


@dataclass(frozen=True)
class Evaluation:
    """Measurements of a model on one split.

    Args:
        entry: Entry of metrics.json.
        answers: Answers of all layers to the examples.
        exit_layers: Exit layers, int64 ``[examples]``, 1-based.
        right: Whether the class of early exit is correct, bool ``[examples]``.
    """

    entry: dict[str, Any]
    answers: LayerAnswers
    exit_layers: Tensor
    right: Tensor


@torch.no_grad()
def evaluate(
    model: DACT,
    loader: DataLoader[Any],
    *,
    precision: Callable[[], AbstractContextManager[Any]] = nullcontext,
) -> Evaluation:
    """Return measurements of early exit and of full depth, by the same code.

    Args:
        model: Model in eval mode, on the device that it should use.
        loader: Labelled batches.
        precision: Function that returns the context of the Trainer's precision.
    """
    with precision():
        answers = layer_answers(model, loader)
    a, p, target = answers.a, answers.p, answers.target
    full = torch.full_like(target, p.shape[1])
    exits = model.exit_layers(a, p, answers.y)
    weights = None if model.class_weights is None else model.class_weights.cpu()
    entry, full_depth = _quality(a, exits, target, weights), _quality(a, full, target, weights)
    early = functional.answer_at(a, exits)
    entry |= {"full_depth": full_depth, "agreement": share(early.argmax(1) == a[:, -1].argmax(1))}
    right = early.argmax(1) == target
    scores = early if model.temperatures is None else temper(early, exits, model.temperatures)
    entry["calibration_error"] = expected_calibration_error(scores.max(1).values, right)

    return Evaluation(entry, answers, exits, right)


def dial_curve(
    model: DACT, answers: LayerAnswers, dial: Dial, settings: Sequence[float], baseline: Tensor
) -> list[dict[str, Any]]:
    """Return one record per setting of a dial, with the other dial at full depth.

    Args:
        model: The model.
        answers: Answers of all its layers.
        dial: Name of the dial.
        settings: Settings of the dial.
        baseline: Classes that the baseline gives to the same examples, int64 ``[examples]``.
    """
    halting = replace(model.exit_rule, tolerance=0.0, margin=1.0)
    points = operating_points(answers, settings, halting, dial=dial, baseline=baseline)
    kept = ("accuracy", "mean_exit_layer", "agreement")
    name = dial.removeprefix("halting_")
    return [
        {
            name: point.setting,
            **{key: getattr(point, key) for key in kept},
            "difference_to_baseline": {
                "accuracy": 0 - point.accuracy_loss,
                "standard_error": point.accuracy_loss_error,
            },
        }
        for point in points
    ]


def _quality(a: Tensor, exits: Tensor, target: Tensor, weights: Tensor | None) -> dict[str, Any]:
    answer = functional.answer_at(a, exits)
    layers, classes = a.shape[1:]
    labels = answer.argmax(1)
    return {
        "accuracy": (labels == target).double().mean().item(),
        "macro_f1": multiclass_f1_score(
            answer, target, num_classes=classes, average="macro"
        ).item(),
        "majority_share": torch.bincount(labels, minlength=classes).max().item() / len(labels),
        "task_loss": functional.task_loss(answer, target, weights).item(),
        "mean_exit_layer": exits.double().mean().item(),
        "exit_histogram": torch.bincount(exits - 1, minlength=layers).tolist(),
    }


@torch.no_grad()
def texts_per_second(
    sides: Sequence[tuple[DACT, functional.HaltingRule]],
    loader: DataLoader[Any],
    precision: Callable[[], AbstractContextManager[Any]] = nullcontext,
) -> list[float]:
    """Return the speed of each side on the first `TIMED_TEXTS` texts; making the batches is not
    timed.

    The sides take turns, so that other work of the machine meets all of them, and the fastest round
    of each counts.

    Args:
        sides: Models in eval mode, on the device that they should use, and the halting rule of
            each.
        loader: Batches.
        precision: Function that returns the context of the Trainer's precision.
    """
    batches, texts = [], 0
    for batch in loader:
        batches.append(move(batch, sides[0][0].device))
        texts += len(batch["input_ids"])
        if texts >= TIMED_TEXTS:
            break
    seconds: list[list[float]] = [[] for _ in sides]
    with precision():
        while len(seconds[0]) < ROUNDS or (
            len(seconds[0]) < MOST_ROUNDS and sum(map(sum, seconds)) < len(sides) * TIMED_SECONDS
        ):
            for (model, rule), found in zip(sides, seconds, strict=True):
                found.append(_seconds(model, rule, batches))
    return [texts / min(found) for found in seconds]


def _seconds(model: DACT, rule: functional.HaltingRule, batches: Sequence[Batch]) -> float:
    before, start = model.halting, time.perf_counter()
    model.halting = rule
    try:
        for batch in batches:
            model.early_exit(batch).exit_layer.tolist()  # waits for a GPU as well
    finally:
        model.halting = before
    return time.perf_counter() - start
