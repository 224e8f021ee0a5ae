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

from dact import functional
from dact.calibration.answers import (
    Dial,
    LayerAnswers,
    Measured,
    exits_by_setting,
    layer_answers,
)
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
    measured = Measured(answers, answers.exit_layers(model.exit_rule))
    entry = _entry(measured, model.class_weights)
    entry |= {
        "full_depth": _entry(measured.full_depth, model.class_weights),
        "agreement": measured.agreement,
    }
    scores = temper(measured.probabilities, measured.exits, model.temperatures)
    entry["calibration_error"] = expected_calibration_error(scores.amax(1), measured.right)
    return Evaluation(entry, answers, measured.exits, measured.right)


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
    exits = exits_by_setting(answers, halting, dial)
    records = []
    for setting in settings:
        measured = Measured(answers, exits(setting))
        accuracy, error = measured.difference(baseline == answers.target)
        records.append(
            {
                dial.removeprefix("halting_"): setting,
                "accuracy": measured.accuracy,
                "mean_exit_layer": measured.mean_exit_layer,
                "agreement": measured.agreement,
                "difference_to_baseline": {"accuracy": accuracy, "standard_error": error},
            }
        )
    return records


def _entry(measured: Measured, class_weights: Tensor | None) -> dict[str, Any]:
    return {
        "accuracy": measured.accuracy,
        "macro_f1": measured.macro_f1,
        "majority_share": measured.majority_share,
        "task_loss": measured.task_loss(class_weights),
        "mean_exit_layer": measured.mean_exit_layer,
        "exit_histogram": measured.exit_histogram,
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
