"""What the commands print: epochs, measurements, and whether a promise holds on test examples."""

from __future__ import annotations

import logging
import math
import sys
import time
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import RichProgressBar
from typing_extensions import override

from dact.calibration import Promise
from dact.calibration.answers import Measured, careful_mean_and_error, mean_and_error
from dact.model_card import what_is_promised

# The metrics of an epoch that are shown, and their decimals.
SHOWN = {"train_loss": 3, "val_loss": 3, "val_accuracy": 3, "val_exit_layer": 2}
SAID: set[str] = set()  # the warnings of this process


def quiet() -> None:
    """Hide what other libraries log for every fit, and the source line and repetitions of each
    warning, in a command-line process."""
    for name in ("lightning.pytorch", "lightning.fabric", "lightning"):
        for handler in logging.getLogger(name).handlers:
            handler.addFilter(_is_worth_reading)
    for noise in ("lightning", "torch", "jsonargparse", "optuna"):
        warnings.filterwarnings("ignore", module=noise)
    for category in (DeprecationWarning, FutureWarning):
        warnings.filterwarnings("ignore", category=category)
    warnings.showwarning = _show_once  # type: ignore


def _show_once(message: Warning | str, *_: Any) -> None:
    """Print a warning once a process, however many fits read the same data."""
    if str(message) not in SAID:
        SAID.add(str(message))
        print(f"warning: {message}", file=sys.stderr)


def _is_worth_reading(record: logging.LogRecord) -> bool:
    """Return whether a record is an error, or was logged by code outside of Lightning."""
    return record.levelno > logging.WARNING or "lightning" not in record.pathname


class Bar(RichProgressBar):
    """A progress bar of one line; `EpochLines` shows the metrics."""

    @override
    def get_metrics(self, trainer: Trainer, pl_module: LightningModule) -> dict[str, Any]:
        return {}

    @override
    def _get_train_description(self, current_epoch: int) -> str:
        # Lightning counts from 0.
        return f"Epoch {current_epoch + 1}".ljust(len(self.validation_description))

    @override
    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        # Later output would otherwise run into the bar.
        self._stop_progress()


class EpochLines(Callback):
    """Print the classes of the data, a note if the calibration examples are too few for the default
    promise, and the metrics of each epoch on one line."""

    def __init__(self, calibrates: bool) -> None:
        self.calibrates = calibrates
        self._started = 0.0

    @override
    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        data = trainer.datamodule  # type: ignore[attr-defined]
        if classes := getattr(data, "describe_classes", str)():
            _say(trainer, classes)
        aside = getattr(data, "calibration_dataloader", lambda: None)()
        if self.calibrates and aside is not None and (short := Promise().shortage(data)):
            _say(trainer, f"the margin will be the lowest that changes no text set aside: {short}")

    @override
    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._started = time.monotonic()

    @override
    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        metrics = {name: float(trainer.callback_metrics.get(name, "nan")) for name in SHOWN}
        epoch = f"epoch {trainer.current_epoch + 1}"
        if not math.isfinite(trainer.callback_metrics.get("val_loss", 0.0)):
            raise RuntimeError(
                f"the fit broke: val_loss is {metrics['val_loss']} after {epoch}. Try a smaller "
                "learning_rate, or trainer.precision 32-true, under another run_tag"
            )
        last = f"/{trainer.max_epochs}" if (trainer.max_epochs or -1) > 0 else ""
        short = {"val_accuracy": "accuracy", "val_exit_layer": "layers"}
        values = [
            f"{short.get(name, name)} {metrics[name]:.{digits}f}"
            for name, digits in SHOWN.items()
            if not math.isnan(metrics[name])
        ]
        seconds = time.monotonic() - self._started
        _say(trainer, f"{epoch}{last}: {' '.join(values)}, {seconds:.0f} s")


def _say(trainer: Trainer, text: str) -> None:
    if trainer.is_global_zero:  # above a progress bar, which redirects standard output
        print(text, flush=True)


def measurements(measured: Measured, names: Sequence[str], split: str) -> str:
    """Return the measurements of early exit on a split as lines, with the names of the classes."""
    task, depth, count = measured.answers.task, measured.answers.num_layers, len(names)
    given, got, hits = measured.counts
    total = given + got
    f1 = {names[n]: 2 * hits[n] / total[n] for n in range(count) if total[n]}
    scores = measured.set_scores.items()
    sets = [f"{n.replace('_', ' ').replace('f1', 'F1')} {value:.3f}" for n, value in scores]
    always, confused = ("", "") if sets else _confusions(measured, names)
    left = [f"{layer}: {number}" for layer, number in enumerate(measured.exit_histogram, 1)]
    lines = [
        f"examples   {len(measured.exits)} of the {split} split",
        f"accuracy   {100 * measured.accuracy:.2f} %, all {depth} layers "
        f"{100 * measured.full_depth.accuracy:.2f} %{always}",
        f"agreement  {100 * measured.agreement:.2f} % get the answer of all {depth} layers",
        f"macro F1   {', '.join([f'{measured.macro_f1:.3f}', *sets])}",
        f"F1         {', '.join(f'{name} {value:.3f}' for name, value in f1.items())}",
        *([f"confused   {confused}"] if confused else []),
        f"layers     {measured.mean_exit_layer:.2f} of {depth}; after layer {', '.join(left)} left",
        f"(F1: harmonic mean of precision and recall; {task.explained}; all numbers are of early "
        f"exit, except those of all {depth} layers)",
    ]
    if depth > 1 and measured.mean_exit_layer == 1:
        lines.append("Every text leaves after layer 1. Try a smaller lambda_reg or a larger margin")
    if depth > 1 and measured.mean_exit_layer == depth:
        lines.append("No text leaves early. Try more validation texts, or a smaller margin")
    if measured.majority_share == 1:
        lines.append(
            f"All examples get {_one_answer(measured, names)}. Try more epochs, a smaller "
            "batch_size, another learning_rate, or class_weights: balanced"
        )
    return "\n".join(lines)


def _confusions(measured: Measured, names: Sequence[str]) -> tuple[str, str]:
    """Return the accuracy of the largest class alone, and the two most frequent confusions."""
    target, count = measured.answers.target, len(names)
    # [true class, answered class]
    confusion = torch.bincount(target * count + measured.classes, minlength=count**2)
    confusion = confusion.view(count, count)
    sizes = confusion.sum(1)
    always = f", always {names[int(sizes.argmax())]!r} {100 * sizes.max() / len(target):.2f} %"
    wrong = confusion.fill_diagonal_(0).flatten().sort(descending=True, stable=True)
    most = zip(wrong.values[:2].tolist(), wrong.indices[:2].tolist(), strict=True)
    pairs = [f"{names[at // count]} as {names[at % count]} ({n})" for n, at in most if n]
    return always, ", ".join(pairs)


def _one_answer(measured: Measured, names: Sequence[str]) -> str:
    members = measured.answers.task.members(measured.classes[:1], len(names))[0].tolist()
    found = [repr(name) for name, is_in in zip(names, members, strict=True) if is_in]
    return f"the {measured.answers.task.nouns} {', '.join(found) or 'of an empty set'}"


def promise_line(calibration: Mapping[str, Any], measured: Measured) -> str:
    """Return a line that says whether the promise of `DACT.calibration` holds on test examples."""
    kind = "estimate" if calibration.get("estimate") else "promise"
    if calibration.get("baseline_accuracy") is not None:
        return f"the {kind} was made against another model, which is not measured here"
    # On test examples gains always count, even for an estimate from few examples.
    promise = Promise(**{**calibration["promise"], "confidence": 0.95})
    values, layers = promise.values(measured), measured.answers.num_layers
    what = what_is_promised(calibration["promise"], f"all {layers} layers", layers)
    if promise.max_layers is not None:
        (mean, error), scale = mean_and_error(values), 1
    else:
        low = -1.0 if promise.min_agreement is None else 0.0
        (mean, error), scale = careful_mean_and_error(values, low), 100
    shown = mean if promise.min_agreement is None else 1 - mean
    limit = promise.most
    verdict = "does not hold" if mean > limit + 2 * error else "is within its error"
    verdict = "holds" if mean <= limit else verdict
    return (
        f"{kind} of {promise.dial} {calibration[promise.dial]:.8g}: {what}. Here it is "
        f"{scale * shown:.2f} (standard error {scale * error:.2f}): it {verdict} on these "
        f"{len(values)} examples"
    )
