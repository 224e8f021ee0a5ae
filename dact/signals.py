"""Ctrl-C and SIGTERM as a flag that is checked between batches.

Python drops an exception that a signal handler raises inside a finalizer or a weakref callback, so
the handler only sets a flag. `check` turns the flag into a KeyboardInterrupt at a place where
nothing is half done."""

from __future__ import annotations

import contextlib
import signal
from collections.abc import Iterator
from typing import Any

from lightning.pytorch import Callback

_requested = False
_at_once = False


def install() -> None:
    """Make Ctrl-C and SIGTERM request a stop. This is for commands and workers, which own their
    process.

    A SIGINT that this process ignores, as in the background of a shell, stays ignored. A second
    signal raises KeyboardInterrupt at once, for work that has no batches."""
    global _requested
    _requested = False
    if signal.getsignal(signal.SIGINT) is not signal.SIG_IGN:
        signal.signal(signal.SIGINT, _request)
    signal.signal(signal.SIGTERM, _request)


def _request(signal_number: int, frame: Any) -> None:
    global _requested
    again, _requested = _requested, True
    if again or _at_once:
        raise KeyboardInterrupt


@contextlib.contextmanager
def at_once() -> Iterator[None]:
    """Let the first signal raise KeyboardInterrupt, in a block that may wait for input without
    end."""
    global _at_once
    _at_once = True
    try:
        check()  # of a signal before
        yield
    finally:
        _at_once = False


def stop_requested() -> bool:
    """Return whether a signal has come since `install`."""
    return _requested


def check() -> None:
    """Raise KeyboardInterrupt if a signal has come since `install`."""
    if _requested:
        raise KeyboardInterrupt


class StopOnSignal(Callback):
    """Raise KeyboardInterrupt at the start of the next batch after a signal."""

    def _check(self, *args: Any, **kwargs: Any) -> None:
        check()

    on_train_batch_start = on_validation_batch_start = on_test_batch_start = (
        on_predict_batch_start
    ) = _check
