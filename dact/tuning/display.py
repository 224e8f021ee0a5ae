"""What the console shows of a tuning run: one live table, then a summary."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lightning.pytorch import Callback, LightningModule, Trainer
from optuna.study import Study
from optuna.trial import BaseTrial, FrozenTrial, TrialState
from rich.console import Console
from rich.live import Live
from rich.progress import BarColumn, Progress, TaskID, TaskProgressColumn, TextColumn, TimeRemainingColumn
from rich.table import Table
from typing_extensions import override

from dact.files import read_json

if TYPE_CHECKING:
    from dact.tuning.engine import TuningEngine

ROWS = 12  # trials in sight
COLOURS = {"COMPLETE": "green", "PRUNED": "yellow", "FAIL": "red", "RUNNING": "cyan", "WAITING": "dim"}


class Display:
    """The live table of a run.

    Args:
        silent: Show nothing, as workers do.
    """

    def __init__(self, silent: bool = False) -> None:
        self.console = Console(quiet=silent)
        self._live: Live | None = None
        self._study: Study | None = None
        self._stage, self._total, self._deadline, self._start = "", 0, 0.0, 0.0

    @contextlib.contextmanager
    def study(self, stage: str, study: Study, total: int, deadline: float | None) -> Iterator[None]:
        """Show the trials of a study while it runs."""
        self._stage, self._study, self._total = stage, study, total
        self._deadline, self._start = deadline or float("inf"), time.monotonic()
        self._before = len(_ended(study))
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
        with Progress(*columns, console=self.console, transient=True) as progress:
            yield _FitProgress(progress, progress.add_task(what, total=None))
        self.console.print(f"{what}: {format_seconds(time.monotonic() - start)}")

    def announce(self, left: Mapping[str, int], seconds: float, time_out: float | None) -> None:
        """How long the run is expected to take."""
        trials = " + ".join(str(max(0, count)) for count in left.values())
        text = f"about {format_seconds(seconds)} for {trials} trials and the final fit, less what pruning saves"
        if time_out is not None:
            text += f"; the studies end after {format_seconds(time_out)} at the latest"
        self.console.print(text, soft_wrap=True)

    def note(self, text: str) -> None:
        """Print something that was found."""
        self.console.print(text, soft_wrap=True)

    def refresh(self) -> None:
        """Draw the table anew."""
        if self._live is not None:
            self._live.update(self._table())

    def trial_started(self, trial: BaseTrial, chosen: Mapping[str, Any]) -> None:
        """Called when a trial has its parameters."""
        self.refresh()

    def trial_ended(self, study: Study, trial: FrozenTrial) -> None:
        """Called by Optuna after each trial."""
        self.refresh()

    def _table(self) -> Table:
        assert self._study is not None
        trials = self._study.get_trials(deepcopy=False)
        ended = _ended(self._study)
        single = len(self._study.directions) == 1
        heads = ["val_loss"] if single else ["task loss", "exit layer"]
        title = f"study {self._stage}: {len(ended)} of {self._total} trials"
        table = Table(title=title, expand=True)
        for head, width in (("trial", 5), ("state", 8), *((head, 10) for head in heads)):
            table.add_column(head, min_width=width, no_wrap=True)
        table.add_column("parameters", ratio=1, overflow="ellipsis", no_wrap=True)
        for trial in trials[-ROWS:]:
            values = [f"{value:.4f}" for value in trial.values] if trial.values else [""] * len(heads)
            state = f"[{COLOURS[trial.state.name]}]{trial.state.name.lower()}[/]"
            parameters = " ".join(f"{name}={_short(value)}" for name, value in trial.params.items())
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
        if here and len(ended) < self._total:
            seconds = (time.monotonic() - self._start) / here * (self._total - len(ended))
            parts.append(f"about {format_seconds(min(seconds, self._deadline - time.monotonic()))} left")
        return ", ".join(parts)

    def summary(self, engine: TuningEngine, folder: Path) -> None:
        """What each study chose, what it is worth, and where everything lies."""
        metrics = read_json(folder / "metrics.json")
        test = metrics["test"]
        full = test["full_depth"]
        chosen = Table(title="chosen", show_header=False)
        for name in ("classifier_config", "confidence_config", "external_config"):
            chosen.add_row(name, " ".join(f"{key}={_short(value)}" for key, value in getattr(engine, name).items()))
        chosen.add_row("lambda_reg", _short(engine.lambda_reg))
        worth = Table("test", "accuracy", "mean layers", "texts/s", title="full depth, early exit and defaults")
        entries = {"full depth": full, "early exit": test}
        defaults = folder / "defaults" / "metrics.json"
        if defaults.is_file():
            entries["early exit, defaults"] = read_json(defaults)["test"]
        for name, entry in entries.items():
            worth.add_row(
                name,
                f"{100 * entry['accuracy']:.2f} %",
                f"{entry['mean_exit_layer']:.2f} of {metrics['layers']}",
                f"{entry['texts_per_second']:,.0f}" if "texts_per_second" in entry else "",
            )
        self.console.print(chosen, worth)
        if "early exit, defaults" in entries:
            assert engine.external_config is not None
            epochs = (engine.external_config["num_epochs"], engine.trainer["max_epochs"])
            self.console.print(_verdict(test, entries["early exit, defaults"], epochs), soft_wrap=True)
        self.console.print(f"agreement with full depth: {100 * test['agreement']:.2f} %")
        self.console.print(f"everything is in {folder.parent}; the model in {folder / 'model'}", soft_wrap=True)
        self.console.print(f"look at it: tensorboard --logdir {folder.parent}", soft_wrap=True)


def _verdict(tuned: Mapping[str, Any], defaults: Mapping[str, Any], epochs: tuple[int, int]) -> str:
    """Whether tuning beat the defaults on test: no worse in accuracy and layers, and better in one of them.

    Args:
        tuned: Its test entry.
        defaults: Likewise.
        epochs: For which both were fitted.
    """
    accuracy = 100 * (tuned["accuracy"] - defaults["accuracy"])
    layers = tuned["mean_exit_layer"] - defaults["mean_exit_layer"]
    beats = accuracy >= 0 >= layers and accuracy != layers
    says = "beats" if beats else "does not beat"
    return (
        f"the tuned configuration {says} the defaults on test: {accuracy:+.2f} points of accuracy, {layers:+.2f} layers"
        + (f" (fits of {epochs[0]} and {epochs[1]} epochs)" if epochs[0] != epochs[1] else "")
    )


class _FitProgress(Callback):
    """Advance a progress bar by the batches of a fit."""

    def __init__(self, progress: Progress, task: TaskID) -> None:
        self.progress, self.task = progress, task

    @override
    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        batches = int(trainer.num_training_batches)
        epochs = trainer.max_epochs or 1
        self.progress.update(self.task, total=epochs * batches, completed=trainer.current_epoch * batches)

    @override
    def on_train_batch_end(self, *args: Any) -> None:
        self.progress.advance(self.task)


def _ended(study: Study) -> list[FrozenTrial]:
    return [trial for trial in study.get_trials(deepcopy=False) if trial.state.is_finished()]


def _short(value: Any) -> str:
    return f"{value:.3g}" if isinstance(value, float) else str(value)


def format_seconds(seconds: float) -> str:
    """``50 s``, ``7 min`` or ``2.5 h``."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"
