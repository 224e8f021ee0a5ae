"""The entries of metrics.json: measurements of early exit and of all layers on a split."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from dact.calibration.answers import Dial, LayerAnswers, Measured, exits_by_setting, layer_answers
from dact.calibration.temperature import expected_calibration_error, temper
from dact.encoders.base import Batch, move
from dact.functional import HaltingRule
from dact.model import DACT

TOLERANCES = (0.0, 0.05, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)
MARGINS = (1.0, 0.99, 0.95, 0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3, 0.2, 0.1)
# Speed is measured over the first texts, in the fastest round.
TIMED_TEXTS, ROUNDS = 512, 3
Precision = Callable[[], AbstractContextManager[Any]]  # makes the context of a Trainer's precision


@dataclass(frozen=True)
class Evaluation:
    """Measurements of a model on one split: the entry of metrics.json, and the exits themselves."""

    entry: dict[str, Any]
    measured: Measured


@torch.no_grad()
def evaluate(
    model: DACT,
    batches: Iterable[Batch],
    *,
    precision: Precision = nullcontext,
    baseline: Evaluation | None = None,
) -> Evaluation:
    """Return measurements of early exit and of all layers on labelled batches, by the same code.

    The model must be in eval mode and on its device. With a `baseline` on the same examples, the
    entry has the paired difference in accuracy.
    """
    with precision():
        answers = layer_answers(model, batches)
    early = Measured(answers, answers.exit_layers(model.exit_rule))
    task = model.task
    tempered = temper(early.probabilities, early.exits, model.temperatures, task)
    scores = task.scores(tempered, early.classes).flatten()
    correct = (early.classes == answers.target).flatten()
    entry = {
        **_entry(early, model.class_weights),
        "full_depth": _entry(early.full_depth, model.class_weights),
        "agreement": early.agreement,
        "calibration_error": expected_calibration_error(scores, correct),
    }
    if baseline is not None:
        accuracy, error = early.difference(baseline.measured.right)
        entry["difference_to_baseline"] = {"accuracy": accuracy, "standard_error": error}
    return Evaluation(entry, early)


def _entry(measured: Measured, class_weights: Tensor | None) -> dict[str, Any]:
    return {
        "accuracy": measured.accuracy,
        "macro_f1": measured.macro_f1,
        **measured.set_scores,
        "majority_share": measured.majority_share,
        "task_loss": measured.task_loss(class_weights),
        "mean_exit_layer": measured.mean_exit_layer,
        "exit_histogram": measured.exit_histogram,
    }


def dial_curve(
    model: DACT, answers: LayerAnswers, dial: Dial, settings: Sequence[float]
) -> list[dict[str, Any]]:
    """Return one record per setting of a dial, from the answers of all layers. The other dial is at
    its default: a tolerance of 0, or a margin of 1."""
    halting = replace(model.exit_rule, tolerance=0.0, margin=1.0)
    exits, records = exits_by_setting(answers, halting, dial), []
    for setting in settings:
        measured = Measured(answers, exits(setting))
        record = {dial.removeprefix("halting_"): setting}
        names = ("accuracy", "mean_exit_layer", "agreement")
        records.append(record | {name: getattr(measured, name) for name in names})
    return records


@torch.no_grad()
def texts_per_second(
    sides: Sequence[tuple[DACT, HaltingRule]],
    loader: Iterable[Batch],
    precision: Precision = nullcontext,
) -> list[float]:
    """Return the speed of each side on the first texts, without the time to make their batches.

    A side is a model in eval mode with a halting rule. The sides alternate, so that other work on
    the machine slows all of them equally.
    """
    batches, texts = [], 0
    for batch in loader:
        batches.append(move(batch, sides[0][0].device))
        texts += len(batch["input_ids"])
        if texts >= TIMED_TEXTS:
            break

    seconds: list[list[float]] = [[] for _ in sides]
    with precision():
        for _ in range(ROUNDS):
            for (model, rule), found in zip(sides, seconds, strict=True):
                before, model.halting = model.halting, rule
                start = time.perf_counter()
                for batch in batches:
                    # tolist waits until a GPU has finished
                    model.early_exit(batch).exit_layer.tolist()
                found.append(time.perf_counter() - start)
                model.halting = before
    return [texts / min(found) for found in seconds]
