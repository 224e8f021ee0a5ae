"""What the console shows of a tuning run: one live table per study, bars for fits, and a summary."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from optuna.study import Study
from optuna.trial import FrozenTrial, TrialState
from rich.console import Console
from rich.live import Live
from rich.progress import BarColumn, TaskID, TaskProgressColumn, TextColumn, TimeRemainingColumn
from rich.progress import Progress as Bars
from rich.table import Table
from typing_extensions import override

from dact.files import read_json
from dact.tuning.deadline import Deadline
from dact.tuning.studies import finished

ROWS = 12  # trials in sight
COLOURS = {"COMPLETE": "green", "PRUNED": "yellow", "FAIL": "red", "RUNNING": "cyan", "WAITING": "dim"}


class Progress:
    """The console of a run."""

    def __init__(self) -> None:
        self.console = Console()
        self._live: Live | None = None
        self._study: Study | None = None
        self._stage, self._total, self._later, self._start, self._before = "", 0, 0, 0.0, 0
        self._deadline = Deadline()

    @contextlib.contextmanager
    def study(self, stage: str, study: Study, total: int, later: int, deadline: Deadline) -> Iterator[None]:
        """Show the trials of a study while it runs.

        Args:
            stage: Name of the stage.
            study: The study.
            total: Total number of its trials.
            later: Number of trials of the studies after it.
            deadline: Its deadline.
        """
        self._stage, self._study, self._total, self._later, self._deadline = stage, study, total, later, deadline
        self._start, self._before = time.monotonic(), len(finished(study))
        with Live(self._table(), console=self.console, refresh_per_second=4) as live:
            self._live = live
            try:
                yield
            finally:
                live.update(self._table())
                self._live = None

    @contextlib.contextmanager
    def stage(self, what: str) -> Iterator[None]:
        """Show that something other than a study is under way."""
        start = time.monotonic()
        with self.console.status(f"{what} …"):
            yield
        self.console.print(f"{what}: {format_seconds(time.monotonic() - start)}")

    @contextlib.contextmanager
    def fit(self, what: str) -> Iterator[Callback]:
        """Show how far a fit is, by the callback that this gives."""
        start = time.monotonic()
        columns = (TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(), TimeRemainingColumn())
        with Bars(*columns, console=self.console, transient=True) as bars:
            yield _FitProgress(bars, bars.add_task(what, total=None))
        self.console.print(f"{what}: {format_seconds(time.monotonic() - start)}")

    def announce(self, trials: Sequence[int], time_out: float | None) -> None:
        """Say what the run will do; how long it takes is shown from the first trial on."""
        text = (
            f"{' + '.join(map(str, trials))} trials, then the final fit; the time left is shown from the first trial on"
        )
        if time_out is not None:
            text += (
                f". The studies end after {format_seconds(time_out)}; what they share and the final fit are not bounded"
            )
        self.note(text)

    def note(self, text: str) -> None:
        """Print a line."""
        self.console.print(text, soft_wrap=True)

    def refresh(self, *_: object) -> None:
        """Draw the table anew; takes what Optuna gives to a callback."""
        if self._live is not None:
            self._live.update(self._table())

    def _table(self) -> Table:
        assert self._study is not None
        trials = self._study.get_trials(deepcopy=False)
        ended = finished(self._study)
        single = len(self._study.directions) == 1
        heads = ["val_loss"] if single else ["task loss", "exit layer"]
        table = Table(title=f"study {self._stage}: {len(ended)} of {self._total} trials", expand=True)
        for head, width in (("trial", 5), ("state", 8), *((head, 10) for head in heads)):
            table.add_column(head, min_width=width, no_wrap=True)
        table.add_column("parameters", ratio=1, overflow="ellipsis", no_wrap=True)
        shown = trials[-ROWS:]
        differing = _differing(trials)
        for trial in shown:
            values = [f"{value:.4f}" for value in trial.values] if trial.values else [""] * len(heads)
            state = f"[{COLOURS[trial.state.name]}]{trial.state.name.lower()}[/]"
            parameters = " ".join(
                f"{short_name(name)}={short(value)}" for name, value in trial.params.items() if name in differing
            )
            table.add_row(str(trial.number), state, *values, parameters)
        table.caption = self._caption(ended, single)
        return table

    def _caption(self, ended: list[FrozenTrial], single: bool) -> str:
        assert self._study is not None
        parts = []
        complete = [trial for trial in ended if trial.state == TrialState.COMPLETE]
        if complete and single:
            best = min(complete, key=lambda trial: trial.values[0])
            parts.append(f"best so far {best.values[0]:.4f} (trial {best.number})")
        elif complete:
            parts.append(f"{len(self._study.best_trials)} trials on the Pareto front")
        here = len(ended) - self._before
        if here:
            pace = (time.monotonic() - self._start) / here
            left = min(pace * max(0, self._total - len(ended)), self._deadline.left) + pace * self._later
            parts.append(f"about {format_seconds(left)} left for all trials")
        return ", ".join(parts)

    def summary(self, folder: Path, verdict: str) -> None:
        """Show what the final model is worth, how it compares, and where everything is.

        Args:
            folder: Folder of the final fit.
            verdict: What the confirmation found.
        """
        metrics = read_json(folder / "metrics.json")
        test, layers = metrics["test"], metrics["layers"]
        baseline = metrics["baseline"]
        self.note(headline(metrics))
        table = Table("test", "accuracy", "macro F1", "largest class", "layers", "texts/s", box=None, pad_edge=False)
        rows = {
            "baseline": (baseline["test"], float(baseline["layers"])),
            "full depth": (test["full_depth"], float(layers)),
            "early exit": (test, test["mean_exit_layer"]),
        }
        defaults = folder / "defaults" / "metrics.json"
        if defaults.is_file():
            entry = read_json(defaults)["test"]
            rows["defaults"] = (entry, entry["mean_exit_layer"])
        for name, (entry, mean) in rows.items():
            speed = f"{entry['texts_per_second']:,.0f}" if "texts_per_second" in entry else ""
            largest = f"{entry['majority_share']:.0%}" if "majority_share" in entry else ""
            accuracy, macro_f1 = f"{100 * entry['accuracy']:.2f} %", f"{entry['macro_f1']:.3f}"
            table.add_row(name, accuracy, macro_f1, largest, f"{mean:.2f}", speed)
        self.console.print(table)
        points = Table(
            "margin", "layers", "accuracy", "agreement", box=None, pad_edge=False, title="estimates on validation"
        )
        for point in metrics["margin_curve"]:
            values = (point["accuracy"], point["agreement"])
            shares = (f"{100 * value:.2f} %" for value in values)
            points.add_row(f"{point['margin']:g}", f"{point['mean_exit_layer']:.2f}", *shares)
        self.console.print(points)
        if metrics["validation"]["majority_share"] == 1.0:
            self.note(
                "warning: all validation examples get one class: try class_weights, more epochs, or another "
                "learning_rate"
            )
        self.note(verdict)
        self.note(f"everything is in {folder.parent}; look at it: tensorboard --logdir {folder.parent}")


def headline(metrics: Mapping[str, Any]) -> str:
    """Return the sentence that a person wants, from the content of metrics.json."""
    test, baseline = metrics["test"], metrics["baseline"]
    text = f"{100 * test['accuracy']:.2f} % accuracy on test"
    difference = test.get("difference_to_baseline")
    if difference is not None:
        points, error = 100 * difference["accuracy"], 100 * difference["standard_error"]
        text += f", {points:+.2f} ± {error:.2f} points against the baseline of {baseline['layers']} layers"
    speed = test["texts_per_second"] / baseline["test"]["texts_per_second"]
    text += f", at {test['mean_exit_layer']:.2f} layers and {speed:.1f} times its speed"
    calibration = metrics.get("calibration")
    if calibration is None:
        return f"{text}, with the class of its own full depth by proof"
    promise = calibration["promise"]
    kept = next(
        meaning.format(promise[name])
        for name, meaning in (
            ("max_accuracy_loss", "at most {0:.2%} of accuracy below its own full depth"),
            ("min_agreement", "at least {0:.2%} agreement with its own full depth"),
            ("max_layers", "at most {0:g} layers"),
        )
        if promise[name] is not None
    )
    if promise["confidence"] is None:
        return f"{text}, by the estimate of {kept}"
    return f"{text}, under the promise of {kept} with {promise['confidence']:.0%} confidence"


class _FitProgress(Callback):
    """Advance a progress bar by the batches of a fit."""

    def __init__(self, bars: Bars, task: TaskID) -> None:
        self.bars, self.task = bars, task

    @override
    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        batches = int(trainer.num_training_batches)
        epochs = trainer.max_epochs or 1
        self.bars.update(self.task, total=epochs * batches, completed=trainer.current_epoch * batches)

    @override
    def on_train_batch_end(self, *args: Any) -> None:
        self.bars.advance(self.task)


def _differing(trials: Sequence[FrozenTrial]) -> set[str]:
    """Return the parameters in which trials differ, all of them where there is one trial."""
    names = {name for trial in trials for name in trial.params}
    if sum(bool(trial.params) for trial in trials) < 2:
        return names
    return {name for name in names if len({str(trial.params[name]) for trial in trials if name in trial.params}) > 1}


def short(value: Any) -> str:
    """Return a value in few characters."""
    return f"{value:.3g}" if isinstance(value, float) else str(value)


def short_name(name: str) -> str:
    """Return the name of a parameter in fewer characters, still to be recognised."""
    return name.replace("classifier_", "cls_").replace("confidence_", "conf_")


def format_seconds(seconds: float) -> str:
    """Return ``50 s``, ``7 min`` or ``2.5 h``."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"
