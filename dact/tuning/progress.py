"""The console of a tuning run: one live table per study, and bars for fits."""

from __future__ import annotations

import contextlib
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from typing import Any

from lightning.pytorch import Callback, Trainer
from lightning.pytorch.callbacks import LambdaCallback
from optuna.study import Study
from optuna.trial import TrialState
from rich import box
from rich.console import Console, Group
from rich.live import Live
from rich.progress import Progress as Bars
from rich.table import Table

from dact.tuning.outcome import finished
from dact.tuning.trainer import Deadline

ROWS = 12  # trials shown
WIDTH = 8  # characters of a parameter's column
COLOURS = {"COMPLETE": "green", "PRUNED": "yellow", "FAIL": "red", "RUNNING": "cyan"}
SHORT = {"classifier": "cls", "confidence": "conf", "submodel_learning_rate": "head_rate"}


class Progress:
    """The console of a run."""

    def __init__(self) -> None:
        self.console = Console()
        self.started = time.monotonic()
        self._redraw: Callable[[], None] = lambda: None

    @contextlib.contextmanager
    def study(self, stage: str, study: Study, total: int, deadline: Deadline) -> Iterator[None]:
        """Show the trials of a study of `total` trials while it runs."""
        start, before = time.monotonic(), len(finished(study))

        def frame() -> Group:
            ended, parts = len(finished(study)), [_best_so_far(study)]
            if before < ended < total:
                pace = (time.monotonic() - start) / (ended - before)
                left = min(pace * max(0, total - ended), deadline.left)
                parts.append(f"about {format_seconds(left)} left")
            title = f"study {stage}: {ended} of {total} trials"
            return Group(title, _table(study, self.console.width), ", ".join(filter(None, parts)))

        with Live(frame(), console=self.console, refresh_per_second=4) as live:
            self._redraw = lambda: live.update(frame())
            try:
                yield
            finally:
                self._redraw()
                self._redraw = lambda: None
        if not self.console.is_terminal:
            self.console.print()  # the last frame ends without a newline there

    def refresh(self, *_: object) -> None:
        """Redraw the table; the arguments of an Optuna callback are ignored."""
        self._redraw()

    @contextlib.contextmanager
    def stage(self, what: str) -> Iterator[None]:
        """Show a step that is neither a study nor a fit while it runs."""
        start = time.monotonic()
        with self.console.status(f"{what} …"):
            yield
        self.console.print(f"{what}: {format_seconds(time.monotonic() - start)}")

    @contextlib.contextmanager
    def fit(self, what: str, epochs: int, asked: int | None = None) -> Iterator[Callback]:
        """Show the progress of a fit of `epochs` epochs, and yield the callback that reports it;
        `asked` is the number of epochs that the user gave, if it may differ."""
        what = f"{what}, {epochs} epoch{'s' * (epochs != 1)}"
        if asked is not None and asked != epochs:
            what += f" instead of {asked} since texts are few"
        start, on_terminal = time.monotonic(), self.console.is_terminal
        with Bars(console=self.console, transient=True, disable=not on_terminal) as bars:
            task = bars.add_task(what, total=epochs)

            def show(trainer: Trainer, *others: Any) -> None:
                batch = (others[-1] + 1) / trainer.num_training_batches
                bars.update(task, completed=trainer.current_epoch + batch)

            yield LambdaCallback(on_train_batch_end=show)
        self.console.print(f"{what}: {format_seconds(time.monotonic() - start)}")

    def note(self, text: str) -> None:
        """Print a line."""
        self.console.print(text, soft_wrap=True)


def _best_so_far(study: Study) -> str:
    if not study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,)):
        return ""
    if len(study.directions) > 1:
        return f"{len(study.best_trials)} on the Pareto front"
    return f"best so far {study.best_value:.4f} (trial {study.best_trial.number})"


def _table(study: Study, width: int) -> Table:
    """Return a table of a study's last trials, and of the parameters that differ, if they fit."""
    trials, single = study.get_trials(deepcopy=False), len(study.directions) == 1
    heads = ["val loss"] if single else ["task loss", "exit layer"]
    values: dict[str, set[str]] = defaultdict(set)
    for trial in trials:
        for name, value in trial.params.items():
            values[name].add(_short(value))
    differing = [name for name, found in values.items() if len(found) > 1 or len(trials) == 1]
    names = differing[: (width - 32) // (WIDTH + 1)]

    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for head, taken in (("trial", 5), ("state", 8), *((head, 6) for head in heads)):
        table.add_column(head, width=taken, vertical="bottom", justify="right")
    for name in names:
        table.add_column(_head(name), width=WIDTH, vertical="bottom", justify="right")
    best = {trial.number for trial in study.best_trials}
    for trial in trials[-ROWS:]:
        state, style = trial.state.name, "bold" if trial.number in best else ""
        shown = [str(trial.number), f"[{COLOURS.get(state, 'dim')}]{state.lower()}[/]"]
        shown += [f"{value:.4f}" for value in trial.values or []] or [""] * len(heads)
        shown += [_short(trial.params.get(name, "")) for name in names]
        table.add_row(*shown, style=style)
    return table


def _head(name: str) -> str:
    """Return a parameter's name, shortened for a narrow column."""
    for long, brief in SHORT.items():
        name = name.replace(long, brief)
    return name.replace("num_", "").replace("_", " ")


def _short(value: Any) -> str:
    return f"{value:.2g}" if isinstance(value, float) else str(value)


def format_seconds(seconds: float) -> str:
    """Return ``50 s``, ``7 min`` or ``2.5 h``."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"
