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
from dact.tuning.run import Winners
from dact.tuning.training import Deadline

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
        self._start, self._before = time.monotonic(), len(_ended(study))
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
        ended = _ended(self._study)
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

    def summary(self, folder: Path, winners: Winners, default_epochs: int) -> None:
        """Show what each study chose, what it is worth, and where everything is.

        Args:
            folder: Folder of the final fit.
            winners: What the studies chose.
            default_epochs: Number of epochs of the fit with the defaults.
        """
        metrics = read_json(folder / "metrics.json")
        test = metrics["test"]
        chosen = Table(title="chosen", show_header=False)
        for name in ("classifier_config", "confidence_config", "external_config"):
            config = getattr(winners, name)
            chosen.add_row(name, " ".join(f"{key}={short(value)}" for key, value in config.items()))
        chosen.add_row("lambda_reg", short(winners.lambda_reg))
        worth = Table("test", "accuracy", "mean layers", "texts/s", title="full depth, early exit and defaults")
        entries = {"full depth": test["full_depth"], "early exit": test}
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
            assert winners.external_config is not None
            epochs = (winners.external_config["num_epochs"], default_epochs)
            self.note(verdict(test, entries["early exit, defaults"], epochs))
        self.console.print(f"agreement with full depth: {100 * test['agreement']:.2f} %")
        self.note(f"everything is in {folder.parent}; the model in {folder / 'model'}")
        self.note(f"look at it: tensorboard --logdir {folder.parent}")


def verdict(tuned: Mapping[str, Any], defaults: Mapping[str, Any], epochs: tuple[int, int]) -> str:
    """Return whether tuning beat the defaults on test: no worse in accuracy and layers, and better in one of them.

    Args:
        tuned: Test entry of the tuned model.
        defaults: Test entry of the defaults: what the factories make without tuning.
        epochs: Number of epochs of the two fits.
    """
    accuracy = 100 * (tuned["accuracy"] - defaults["accuracy"])
    layers = tuned["mean_exit_layer"] - defaults["mean_exit_layer"]
    beats = accuracy >= 0 >= layers and accuracy != layers
    return (
        f"the tuned configuration {'beats' if beats else 'does not beat'} the defaults on test: {accuracy:+.2f} points of "
        f"accuracy, {layers:+.2f} layers"
        + (f" (fits of {epochs[0]} and {epochs[1]} epochs)" if epochs[0] != epochs[1] else "")
    )


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


def _ended(study: Study) -> list[FrozenTrial]:
    return [trial for trial in study.get_trials(deepcopy=False) if trial.state.is_finished()]


def _differing(trials: Sequence[FrozenTrial]) -> set[str]:
    """Return the parameters in which trials differ, all of them where there is one trial."""
    names = {name for trial in trials for name in trial.params}
    if len(trials) < 2:
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
