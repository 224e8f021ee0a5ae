"""Console lines of the commands: one per epoch, the result of a fit, and whether a promise holds on
a test."""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Mapping
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import RichProgressBar
from lightning.pytorch.utilities.rank_zero import rank_zero_warn  # type: ignore[attr-defined]
from torch import Tensor
from typing_extensions import override

from dact.agreement import names_of_classes
from dact.data.base import TextDataModule
from dact.model import DACT

FEW_STEPS = 100  # of the optimizer, in which few models learn a task
SHOWN = {
    "train_loss": 3,
    "val_loss": 3,
    "val_accuracy": 3,
    "val_exit_layer": 2,
}  # metrics of an epoch, and decimals


class Bar(RichProgressBar):
    """A progress bar of one line; the metrics of an epoch have a line of their own, see
    `EpochLines`."""

    @override
    def get_metrics(self, trainer: Trainer, pl_module: LightningModule) -> dict[str, Any]:
        return {}

    @override
    def _get_train_description(self, current_epoch: int) -> str:
        last = "" if self.trainer.max_epochs in (None, -1) else f"/{self.trainer.max_epochs}"
        return f"Epoch {current_epoch + 1}{last}".ljust(
            len(self.validation_description)
        )  # Lightning counts from 0

    @override
    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._stop_progress()  # before other callbacks print: they would write into the bar


class EpochLines(Callback):
    """Print the metrics of each epoch on one line and, at the end of a fit, those of the epoch that
    its model is of.

    Warn if all validation examples get one class.

    Args:
        monitor: Metric that chooses the epoch; ``"epoch"`` for the last one.
        mode: ``"min"`` or ``"max"``.
    """

    def __init__(self, monitor: str = "epoch", mode: str = "max") -> None:
        self.monitor, self.sign = monitor, 1 if mode == "min" else -1
        self._started = 0.0
        self._labels: Tensor | None = None  # [classes], number of validation examples of each class
        self._predicted: Tensor | None = (
            None  # [classes], number of validation examples that got the class
        )
        self._best: tuple[float, int, dict[str, float], Tensor, Tensor] | None = None

    @override
    def state_dict(self) -> dict[str, Any]:
        return {"best": self._best}

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._best = state_dict["best"]

    @override
    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        data = getattr(trainer, "datamodule", None)
        if isinstance(data, TextDataModule) and (text := data.describe_classes()):
            _say(trainer, text)

    @override
    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._started = time.monotonic()

    @override
    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if isinstance(pl_module, DACT):
            counts: Any = pl_module.val_metrics["macro_f1"]  # the counts per class of this process
            self._labels, self._predicted = (
                (counts.tp + counts.fn).cpu(),
                (counts.tp + counts.fp).cpu(),
            )

    @override
    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        metrics = {
            name: value.item()
            for name, value in trainer.callback_metrics.items()
            if value.numel() == 1
        }
        metrics["epoch"] = trainer.current_epoch
        if not math.isfinite(loss := metrics.get("val_loss", 0.0)):
            raise RuntimeError(
                f"the fit broke: val_loss is {loss} after epoch {trainer.current_epoch + 1}. Try a smaller "
                "learning_rate, or trainer.precision 32-true, under another run_tag"
            )
        values = [
            f"{_short(name)} {metrics[name]:.{digits}f}"
            for name, digits in SHOWN.items()
            if name in metrics
        ]
        last = f"/{trainer.max_epochs}" if (trainer.max_epochs or -1) > 0 else ""
        seconds = time.monotonic() - self._started
        # Less than 80 characters.
        _say(
            trainer, f"epoch {trainer.current_epoch + 1}{last}: {' '.join(values)}, {seconds:.0f} s"
        )
        if self.monitor in metrics and self._labels is not None and self._predicted is not None:
            score = self.sign * metrics[self.monitor]
            if self._best is None or score < self._best[0]:
                self._best = (
                    score,
                    trainer.current_epoch + 1,
                    metrics,
                    self._labels,
                    self._predicted,
                )

    @override
    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._best is None or not isinstance(pl_module, DACT):
            return
        _, epoch, metrics, labels, predicted = self._best
        chosen, names = "last" if self.monitor == "epoch" else "best", names_of_classes(pl_module)
        largest = int(labels.argmax())
        share = 100 * labels[largest].item() / max(1, int(labels.sum()))
        _say(
            trainer,
            f"{chosen} epoch {epoch}: accuracy {100 * metrics['val_accuracy']:.2f} % where {names[largest]!r}, the "
            f"largest class, is {share:.2f} %, macro F1 {metrics['val_macro_f1']:.3f}, "
            f"{metrics['val_exit_layer']:.2f} of {pl_module.num_layers} layers",
        )
        if (predicted > 0).sum() == 1:
            remedies = ["more epochs", "another learning_rate"]
            if trainer.global_step < FEW_STEPS:
                remedies[:0] = ["a smaller batch_size"]
            remedies += ["class_weights: balanced"] * (pl_module.class_weights is None)
            remedies += ["monitor: val_macro_f1"] * (self.monitor != "val_macro_f1")
            rank_zero_warn(
                f"all validation examples get the class {names[int(predicted.argmax())]!r}: after "
                f"{trainer.global_step} steps of the optimizer the model tells no classes apart yet. Try "
                f"{', or '.join(remedies)}"
            )


def _short(name: str) -> str:
    """Return the name of a metric without its stage, such as ``accuracy``; the losses keep their
    stage."""
    return (
        name if name.endswith("loss") else name.removeprefix("val_").replace("exit_layer", "layers")
    )


def _say(trainer: Trainer, text: str) -> None:
    """Print above a progress bar, if there is one."""
    if not trainer.is_global_zero:
        return
    bar = trainer.progress_bar_callback
    if isinstance(bar, RichProgressBar) and bar.progress is not None and sys.stdout.isatty():
        bar.progress.console.print(text, highlight=False, markup=False, soft_wrap=True)
    else:
        print(text, flush=True)


def show_metrics(trainer: Trainer, model: DACT, verbose: bool, promise: bool = False) -> None:
    """Print the metrics of an evaluation, unless it is not `verbose`, and whether the promise of
    the model holds."""
    if not trainer.is_global_zero:
        return
    metrics = {
        name: value.item() for name, value in trainer.callback_metrics.items() if value.numel() == 1
    }
    width = max(map(len, metrics), default=0)
    for name, value in metrics.items() if verbose else ():
        print(f"{name.ljust(width)}  {value:.6g}")
    if promise and model.calibration is not None and model.exit_histogram is not None:
        print(
            promise_line(model.calibration, metrics, model.num_layers, model.exit_histogram.cpu())
        )


def promise_line(
    calibration: Mapping[str, Any], metrics: Mapping[str, float], layers: int, counts: Tensor
) -> str:
    """Return a line that says whether a promise holds on test labels, with the standard error of
    the measurement.

    Args:
        calibration: Content of `DACT.calibration`.
        metrics: Logged metrics of a test.
        layers: Number of layers.
        counts: Number of test examples that left after each layer, ``[layers]``.
    """
    promise = calibration["promise"]
    if calibration.get("baseline_accuracy") is not None:
        return f"the promise of {promise['dial']} was made against a baseline, which is not measured here"
    examples = int(counts.sum())
    agreement = metrics["test_agreement"]
    if promise.get("max_accuracy_loss") is not None:
        loss = metrics[f"test_layer_accuracy/{layers}"] - metrics["test_accuracy"]
        # An example counts for or against early exit only if its class differs from that of full
        # depth. As in `careful_mean_and_error`, one more is lost and one gained: a few without a
        # fault are no evidence.
        differ = (examples * (1 - agreement) + 2) / (examples + 2)
        error = (max(0.0, differ - loss**2) / (examples + 2)) ** 0.5
        excess = loss - promise["max_accuracy_loss"]
        what = (
            f"at most {100 * promise['max_accuracy_loss']:g} points of accuracy below full depth. Here it is "
            f"{100 * loss:.2f} points (standard error at most {100 * error:.2f})"
        )
    elif promise.get("min_agreement") is not None:
        agreed = (examples * agreement + 1) / (
            examples + 2
        )  # one more that agrees, and one that does not
        error = (agreed * (1 - agreed) / (examples + 2)) ** 0.5
        excess = promise["min_agreement"] - agreement
        what = (
            f"at least {100 * promise['min_agreement']:g} % agreement with full depth. Here it is "
            f"{100 * agreement:.2f} % (standard error {100 * error:.2f})"
        )
    else:
        exits = counts.double()
        mean = metrics["test_exit_layer"]
        squares = sum(n**2 * count for n, count in enumerate(exits.tolist(), start=1)) / examples
        error = (max(0.0, squares - mean**2) / examples) ** 0.5
        excess = mean - promise["max_layers"]
        what = f"at most {promise['max_layers']:g} layers. Here it is {mean:.2f} (standard error {error:.2f})"
    verdict = (
        "holds"
        if excess <= 0
        else "is within its error"
        if excess <= 2 * error
        else "does not hold"
    )
    dial = promise["dial"]
    kind = "estimate" if calibration.get("estimate") else "promise"
    return f"{kind} of {dial} {calibration[dial]:.8g}: {what}: it {verdict} on these {examples} examples"
