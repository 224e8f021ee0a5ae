"""Ctrl-C and SIGTERM as a flag that is checked between batches.

Python drops an exception that a signal handler raises inside a finalizer or a weakref callback, so
the handler only sets a flag. `check` raises a KeyboardInterrupt for it where no work is
unfinished."""

from __future__ import annotations

import signal
from typing import Any

from lightning.pytorch import Callback

_requested = False


def install() -> None:
    """Make Ctrl-C and SIGTERM request a stop of the command or worker that owns this process; a
    second signal raises KeyboardInterrupt at once."""
    global _requested
    _requested = False
    # A shell's background jobs ignore SIGINT.
    if signal.getsignal(signal.SIGINT) is not signal.SIG_IGN:
        signal.signal(signal.SIGINT, _request)
    signal.signal(signal.SIGTERM, _request)


def _request(signal_number: int, frame: Any) -> None:
    global _requested
    again, _requested = _requested, True
    if again:
        raise KeyboardInterrupt


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
