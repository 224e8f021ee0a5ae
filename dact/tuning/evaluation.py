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
from dact.answers import Dial, LayerAnswers, layer_answers, operating_points, share
from dact.encoders.base import move
from dact.model import DACT
from dact.scores import expected_calibration_error, temper

TOLERANCES = (0.0, 0.05, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)
TIMED_TEXTS = 1024  # texts whose time is taken: more would say little more
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
    timed: bool = True,
) -> Evaluation:
    """Return measurements of early exit and of full depth, by the same code.

    Args:
        model: Model in eval mode, on the device that it should use.
        loader: Labelled batches.
        precision: Function that returns the context of the Trainer's precision.
        timed: Whether to measure texts per second as well, on the first `TIMED_TEXTS` texts.
    """
    with precision():
        answers = layer_answers(model, loader)
    a, p, target = answers.a, answers.p, answers.target
    full = torch.full_like(target, p.shape[1])
    exits = model.exit_layers(a, p, answers.y)
    weights = None if model.class_weights is None else model.class_weights.cpu()
    entry, full_depth = _quality(a, exits, target, weights), _quality(a, full, target, weights)
    if timed:
        entry["texts_per_second"] = _texts_per_second(model, loader, model.halting, precision)
        full_depth["texts_per_second"] = (
            entry["texts_per_second"]
            if model.halting == "never"
            else _texts_per_second(model, loader, "never", precision)
        )
    early = functional.answer_at(a, exits)
    entry |= {"full_depth": full_depth, "agreement": share(early.argmax(1) == a[:, -1].argmax(1))}
    right = early.argmax(1) == target
    scores = early if model.temperatures is None else temper(early, exits, model.temperatures)
    entry["calibration_error"] = expected_calibration_error(scores.max(1).values, right)

    return Evaluation(entry, answers, exits, right)


def dial_curve(model: DACT, answers: LayerAnswers, dial: Dial, settings: Sequence[float]) -> list[dict[str, float]]:
    """Return one record per setting of a dial, with the other dial at full depth."""
    points = operating_points(answers, settings, replace(model.exit_rule, tolerance=0.0, margin=1.0), dial=dial)
    kept = ("accuracy", "mean_exit_layer", "agreement")
    name = dial.removeprefix("halting_")
    return [{name: point.setting, **{key: getattr(point, key) for key in kept}} for point in points]


def _quality(a: Tensor, exits: Tensor, target: Tensor, weights: Tensor | None) -> dict[str, Any]:
    answer = functional.answer_at(a, exits)
    layers, classes = a.shape[1:]
    labels = answer.argmax(1)
    return {
        "accuracy": (labels == target).double().mean().item(),
        "macro_f1": multiclass_f1_score(answer, target, num_classes=classes, average="macro").item(),
        "majority_share": torch.bincount(labels, minlength=classes).max().item() / len(labels),
        "task_loss": functional.task_loss(answer, target, weights).item(),
        "mean_exit_layer": exits.double().mean().item(),
        "exit_histogram": torch.bincount(exits - 1, minlength=layers).tolist(),
    }


def _texts_per_second(
    model: DACT,
    loader: DataLoader[Any],
    halting: functional.HaltingRule,
    precision: Callable[[], AbstractContextManager[Any]],
) -> float:
    """Return the speed of early exit with a halting rule; making the batches is not timed.

    The faster of two passes counts: in the first one, libraries prepare for new shapes.
    """
    before, texts, seconds = model.halting, 0, [0.0, 0.0]
    model.halting = halting
    try:
        with precision():
            for batch in loader:
                batch = move(batch, model.device)
                for turn in range(len(seconds)):
                    start = time.perf_counter()
                    model.early_exit(batch).exit_layer.tolist()  # waits for a GPU as well
                    seconds[turn] += time.perf_counter() - start
                texts += len(batch["input_ids"])
                if texts >= TIMED_TEXTS:
                    break
    finally:
        model.halting = before
    return texts / min(seconds)
