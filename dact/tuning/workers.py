"""Several processes on one study."""

from __future__ import annotations

import multiprocessing
import os
import sys
import threading
import time
from multiprocessing.context import SpawnProcess
from typing import TYPE_CHECKING, Any

import torch
from optuna.study import Study

from dact.console import quiet
from dact.tuning import studies
from dact.tuning.stopping import check_stop, stop_on_signals
from dact.tuning.studies import POLL, RETRIES

if TYPE_CHECKING:
    from dact.tuning.engine import TuningEngine

PATIENCE = 8.0  # seconds that a stopped worker has to end its trial


def run_side_by_side(engine: TuningEngine, stage: str, study: Study, end: float | None) -> None:
    """Run the trials of a study in `engine.workers` processes; one that dies is replaced.

    Raises:
        RuntimeError: If a worker ended with an error, which the message holds, or if they die without getting on.
    """
    context = multiprocessing.get_context("spawn")
    errors = context.SimpleQueue()
    threads = max(1, torch.get_num_threads() // engine.workers)

    def start() -> SpawnProcess:
        # No daemon: the data may have processes of its own. (The clock of `end` is that of the whole machine.)
        process = context.Process(target=_work, args=(engine, stage, end, threads, errors))
        process.start()
        return process

    processes = [start() for _ in range(engine.workers)]
    deaths, done = 0, 0
    try:
        while processes:
            time.sleep(POLL)
            check_stop()
            engine.display.refresh()
            ended = [process for process in processes if not process.is_alive()]
            died = sum(process.exitcode != 0 for process in ended)
            processes = [process for process in processes if process not in ended]
            if not errors.empty():
                raise RuntimeError(errors.get())
            if died:
                now_done = len(studies.finished(study))
                deaths, done = (deaths + died if now_done == done else died), now_done
                if deaths > engine.workers * (RETRIES + 1):
                    codes = ", ".join(str(process.exitcode) for process in ended)
                    raise RuntimeError(f"the workers of {study.study_name} keep dying (exit codes {codes})")
                processes += [start() for _ in range(died)]
    finally:
        _stop(processes)


def _stop(processes: list[SpawnProcess]) -> None:
    for process in processes:
        process.terminate()
    end = time.monotonic() + PATIENCE
    for process in processes:
        process.join(max(0.0, end - time.monotonic()))
        if process.is_alive():
            process.kill()
            process.join()


def _work(engine: TuningEngine, stage: str, end: float | None, threads: int, errors: Any) -> None:
    """One worker: take trials from the study until there are none left."""
    stop_on_signals()
    threading.Thread(target=_end_with_parent, daemon=True).start()
    quiet()
    torch.set_num_threads(threads)
    try:
        engine.work(stage, end)
    except KeyboardInterrupt:
        sys.exit(130)
    except Exception as error:
        errors.put(str(error))
        sys.exit(1)


def _end_with_parent() -> None:
    """A killed command must not leave workers behind that go on with its study."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)
