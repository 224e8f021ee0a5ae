"""The console of a tuning run: one live table per study, progress bars for fits, and a summary."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator, Sequence
from typing import Any

from lightning.pytorch import Callback, Trainer
from lightning.pytorch.callbacks import LambdaCallback
from optuna.study import Study
from optuna.trial import FrozenTrial, TrialState
from rich import box
from rich.console import Console, Group
from rich.live import Live
from rich.progress import BarColumn, TaskProgressColumn, TextColumn, TimeRemainingColumn
from rich.progress import Progress as Bars
from rich.table import Table

from dact.tuning.fitting import Deadline
from dact.tuning.retries import OWNER
from dact.tuning.studies import finished

ROWS = 12  # trials in sight
COLOURS = {
    "COMPLETE": "green",
    "PRUNED": "yellow",
    "FAIL": "red",
    "RUNNING": "cyan",
    "WAITING": "dim",
}


class Progress:
    """The console of a run.

    Attributes:
        console: Where everything is printed.
        seconds_per_epoch: Pace of the first fit, which is that of the baseline, or 0; by it the
            time left is estimated.
    """

    def __init__(self) -> None:
        self.console = Console()
        self.seconds_per_epoch = 0.0
        self._live: Live | None = None
        self._study: Study | None = None
        self._stage, self._total, self._later, self._start, self._before = "", 0, 0, 0.0, 0
        self._deadline = self._end = Deadline()
        self._pace = (
            0.0  # seconds per trial, those of the last study until one of this study has ended
        )
        self._trials_after, self._epochs_after = 0, 0.0  # of the fits after the studies

    @contextlib.contextmanager
    def study(
        self, stage: str, study: Study, total: int, later: int, deadline: Deadline, end: Deadline
    ) -> Iterator[None]:
        """Show the trials of a study while it runs.

        Args:
            stage: Name of the stage.
            study: The study.
            total: Total number of its trials.
            later: Number of trials of the studies after it.
            deadline: Its deadline.
            end: Deadline of all studies.
        """
        self._stage, self._study, self._total, self._later = stage, study, total, later
        self._deadline, self._end = deadline, end
        self._start, self._before = time.monotonic(), len(finished(study))
        with Live(self._table(), console=self.console, refresh_per_second=4) as live:
            self._live = live
            try:
                yield
            finally:
                live.update(self._table())
                self._live = None
        if not self.console.is_terminal:
            self.console.print()  # there the last frame ends without a new line

    @contextlib.contextmanager
    def stage(self, what: str) -> Iterator[None]:
        """Show that a step other than a study or a fit is under way."""
        start = time.monotonic()
        with self.console.status(f"{what} …"):
            yield
        self.console.print(f"{what}: {format_seconds(time.monotonic() - start)}")

    @contextlib.contextmanager
    def fit(self, what: str, epochs: int) -> Iterator[Callback]:
        """Show the progress of a fit of some epochs, and yield the callback that reports it."""
        what = f"{what}, {epochs} epoch{'s' * (epochs != 1)}"
        start = time.monotonic()
        columns = (
            TextColumn("{task.description}"),
            BarColumn(),
            TaskProgressColumn(),
            TimeRemainingColumn(),
        )
        with Bars(
            *columns, console=self.console, transient=True, disable=not self.console.is_terminal
        ) as bars:
            task, begun = bars.add_task(what, total=None), 0

            def begin(trainer: Trainer, _: object) -> None:
                nonlocal begun
                begun += 1
                batches = int(trainer.num_training_batches)
                total = (trainer.max_epochs or 1) * batches
                bars.update(task, total=total, completed=trainer.current_epoch * batches)

            yield LambdaCallback(
                on_train_epoch_start=begin, on_train_batch_end=lambda *_: bars.advance(task)
            )
        seconds = time.monotonic() - start
        self.seconds_per_epoch = self.seconds_per_epoch or seconds / max(1, begun)
        self.console.print(f"{what}: {format_seconds(seconds)}")

    def announce(
        self, trials: Sequence[int], time_out: float | None, trials_after: int, epochs_after: float
    ) -> None:
        """Print what the run will do. The time left is shown from the first trial on.

        Args:
            trials: Number of trials of each study.
            time_out: Seconds for the studies, or None.
            trials_after: Number of fits after the studies that take as long as a trial.
            epochs_after: Number of epochs after the studies, in the time that one of the baseline
                takes.
        """
        self._trials_after, self._epochs_after = trials_after, epochs_after
        text = f"{' + '.join(map(str, trials))} trials, then the final fit; the time left is shown from the first trial on"
        if time_out is not None:
            text += (
                f". The studies end after {format_seconds(time_out)}; preparation, confirmation and final fit are not "
                "bounded"
            )
        self.console.print(text, soft_wrap=not self.console.is_terminal)

    def waits_for(self, stage: str, trials: Sequence[FrozenTrial]) -> None:
        """Say what to do about trials whose end would not show; see
        `dact.tuning.retries.unwatched`."""
        for trial in trials:
            self.note(
                f"study {stage}: waits for trial {trial.number}, which runs on {trial.user_attrs[OWNER][0]}, since the "
                "storage has no heartbeats. If that process is gone, end the trial by Optuna's "
                f"study.tell({trial.number}, state=TrialState.FAIL)"
            )

    def note(self, text: str) -> None:
        """Print a line."""
        self.console.print(text, soft_wrap=True)

    def refresh(self, *_: object) -> None:
        """Redraw the table. The arguments are those of an Optuna callback."""
        if self._live is not None:
            self._live.update(self._table())

    def _table(self) -> Group:
        assert self._study is not None
        trials = self._study.get_trials(deepcopy=False)
        ended = finished(self._study)
        single = len(self._study.directions) == 1
        heads = ["val loss"] if single else ["task loss", "exit layer"]
        best = _best(trials, self._study)
        columns = [("trial", 5), ("state", 8), *((head, 6) for head in heads)]
        names = _fitting(trials, self.console.width - 2 - sum(width + 2 for _, width in columns))
        columns += [(_head(name), _width(name, trials)) for name in names]
        table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
        for column, (head, width) in enumerate(columns):
            table.add_column(
                head, width=width, justify="left" if column == 1 else "right", vertical="bottom"
            )
        for trial in trials[-ROWS:]:
            values = (
                [f"{value:.4f}" for value in trial.values] if trial.values else [""] * len(heads)
            )
            state = f"[{COLOURS[trial.state.name]}]{trial.state.name.lower()}[/]"
            parameters = [
                short(trial.params[name]) if name in trial.params else "" for name in names
            ]
            style = "bold" if any(trial.number == one.number for one in best) else ""
            table.add_row(str(trial.number), state, *values, *parameters, style=style)
        title = f"study {self._stage}: {len(ended)} of {self._total} trials"
        return Group(title, table, self._caption(ended, best, single))

    def _caption(self, ended: list[FrozenTrial], best: list[FrozenTrial], single: bool) -> str:
        parts = []
        if best and single:
            parts.append(f"best so far {best[0].values[0]:.4f} (trial {best[0].number})")
        elif best:
            parts.append(f"{len(best)} trial{'s' * (len(best) > 1)} on the Pareto front")
        here = len(ended) - self._before
        if here:
            self._pace = (time.monotonic() - self._start) / here
        if pace := self._pace:
            left = (
                min(pace * max(0, self._total - len(ended)), self._deadline.left)
                + pace * self._later
            )
            left = min(left, self._end.left)
            whole = bool(self._epochs_after and self.seconds_per_epoch)
            left += pace * self._trials_after + self._epochs_after * self.seconds_per_epoch
            parts.append(
                f"about {format_seconds(left)} left for {'the whole run' if whole else 'all trials'}"
            )
        return ", ".join(parts)


def _best(trials: Sequence[FrozenTrial], study: Study) -> list[FrozenTrial]:
    """Return the best of a study's trials, or those on the Pareto front."""
    if len(study.directions) > 1:
        return study.best_trials
    complete = [trial for trial in trials if trial.state == TrialState.COMPLETE]
    return [min(complete, key=lambda trial: trial.values[0])] if complete else []


def _fitting(trials: Sequence[FrozenTrial], width: int) -> list[str]:
    """Return the parameters in which trials differ, or those of a single one, as many as fit into
    `width`."""
    single = sum(bool(trial.params) for trial in trials) < 2
    chosen = []
    for name in dict.fromkeys(name for trial in trials for name in trial.params):
        if single or len({str(trial.params[name]) for trial in trials if name in trial.params}) > 1:
            width -= _width(name, trials) + 2
            if width < 0:
                break
            chosen.append(name)
    return chosen


def _head(name: str) -> str:
    """Return the name of a parameter as the head of a narrow column, with one word per line."""
    for long, short_form in (
        ("classifier", "cls"),
        ("confidence", "conf"),
        ("submodel_learning_rate", "head_rate"),
    ):
        name = name.replace(long, short_form)
    return name.replace("num_", "").replace("_", " ")


def _width(name: str, trials: Sequence[FrozenTrial]) -> int:
    """Return the width of a parameter's column."""
    words = [
        *_head(name).split(),
        *(short(trial.params[name]) for trial in trials if name in trial.params),
    ]
    return max(map(len, words))


def short(value: Any) -> str:
    """Return a value in few characters."""
    return f"{value:.2g}" if isinstance(value, float) else str(value)


def format_seconds(seconds: float) -> str:
    """Return ``50 s``, ``7 min`` or ``2.5 h``."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"
