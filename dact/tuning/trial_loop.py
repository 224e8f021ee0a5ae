"""The loop that runs the trials of a study.

Any number of processes, on this host or others, may run the trials of one study. They share it by
Optuna's own means: the storage, its heartbeats, and a count of the trials before each new one."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, ExitStack
from typing import Any

from optuna.exceptions import UpdateFinishedTrialError
from optuna.study import Study
from optuna.trial import FrozenTrial, Trial, TrialState

from dact import signals
from dact.tuning.fitting import Deadline, TimeIsUp
from dact.tuning.retries import STOPPED, is_counted, retries_due, sweep, was_ended_by_others

# number of failed trials in one command, with no other outcome ever, after which a study ends
HOPELESS = 5
POLL = 0.5  # seconds between two checks of what other processes do
# checks in a row without a running trial after which a process leaves a study past its deadline
QUIET = 3


class TrialFailed(RuntimeError):
    """A trial has no value, for the cause in the message; the study continues."""


def run_trials(
    study: Study,
    objective: Callable[[Trial], Any],
    n_trials: int,
    lock: Callable[[], AbstractContextManager[Any]],
    *,
    deadline: Deadline | None = None,
    idle: Callable[[], None] = lambda: None,
    callbacks: Sequence[Callable[[Study, FrozenTrial], None]] = (),
    before: int = 0,
    orphaned: Callable[[FrozenTrial], None] = lambda trial: None,
) -> None:
    """Run trials until the study has `n_trials` of them, possibly next to other processes that do
    the same.

    Before each trial a process counts those that have ended or are running, and holds the lock
    until its own has begun: processes that share the folder of the run never start more than
    `n_trials`. A process returns only when no trial is running any more, even after a deadline, so
    that all processes see the same winner.

    Args:
        study: The study, with its sampler and pruner.
        objective: Objective. It raises `TrialFailed` if a trial has no value, and `TimeIsUp` if its
            parameters should be tried again; any other exception, except that of a pruned trial,
            ends the run.
        n_trials: Total number of trials; see `finished`.
        lock: The lock of the run.
        deadline: Deadline after which no trial starts.
        idle: Function that is called while other processes run the last trials.
        callbacks: Optuna callbacks, called after each trial of this process.
        before: Number of trials that had ended when the command began; if they failed, their cause
            may be gone.
        orphaned: Function that is called with each trial whose process is gone.
    """
    deadline = deadline or Deadline()

    def sweep_now() -> None:
        for orphan in sweep(study, lock):
            orphaned(orphan)

    stopped = False
    quiet = 0  # checks in a row at which nothing was running
    sweep_now()
    while True:
        signals.check()
        # One query: a trial that ends between two would be missing from both.
        trials = study.get_trials(deepcopy=False)
        done = [trial for trial in trials if is_counted(trial)]
        running = sum(trial.state == TrialState.RUNNING for trial in trials)
        quiet = 0 if running else quiet + 1
        hopeless = len(done) - before >= HOPELESS and all(
            trial.state == TrialState.FAIL for trial in done
        )
        late = stopped or deadline.left == 0 or study.user_attrs.get(STOPPED) == n_trials
        if (len(done) >= n_trials and not running) or hopeless or (late and quiet >= QUIET):
            return
        if late or _taken(trials) >= n_trials:
            if running or retries_due(trials):
                sweep_now()
            idle()
            time.sleep(POLL if running else POLL / QUIET)
            continue
        ended = _run_one(study, objective, n_trials, lock, callbacks)
        if ended and study._stop_flag:  # a callback or the sampler called Optuna's study.stop()
            stopped = True
            if study.get_trials(
                deepcopy=False, states=(TrialState.COMPLETE,)
            ):  # else the same command may try again
                study.set_user_attr(STOPPED, n_trials)


def _taken(trials: Sequence[FrozenTrial]) -> int:
    """Return how many trials have ended, are running, or are about to be queued again by another
    process."""
    counted = sum(is_counted(trial) or trial.state == TrialState.RUNNING for trial in trials)
    return counted + len(retries_due(trials))


def _run_one(
    study: Study,
    objective: Callable[[Trial], Any],
    n_trials: int,
    lock: Callable[[], AbstractContextManager[Any]],
    callbacks: Sequence[Callable[[Study, FrozenTrial], None]],
) -> bool:
    """Run one trial, which begins under the lock; return False if others began the last one, or
    ended this one."""
    started: list[int] = []
    with ExitStack() as turn:
        turn.enter_context(lock())
        if _taken(study.get_trials(deepcopy=False)) >= n_trials:
            return False

        def tracked(trial: Trial) -> Any:
            turn.close()
            started.append(trial.number)
            return objective(trial)

        try:
            study.optimize(
                tracked,
                n_trials=1,
                catch=(TrialFailed, TimeIsUp),
                callbacks=list(callbacks),
                gc_after_trial=True,  # a Trainer and its model refer to each other
            )
        except (UpdateFinishedTrialError, ValueError) as error:
            # Optuna refuses to finish a trial twice: another process took this one for dead or,
            # without a folder in common, took the same trial from an SQLite queue and completed it.
            told = str(error).startswith("Cannot tell a ")
            if not (started and (told or was_ended_by_others(study, started[0]))):
                raise  # from a sampler or a callback
            return False
    return True
