"""Ctrl-C and SIGTERM as a KeyboardInterrupt that is never lost.

Python drops an exception that a signal raises inside a finalizer or a weakref callback. So a signal also leaves a mark,
which is looked at between batches and between trials.
"""

from __future__ import annotations

import signal
from typing import Any

from lightning.pytorch import Callback
from typing_extensions import override

_requested = False


def stop_on_signals() -> None:
    """Let Ctrl-C (unless this process ignores it, as in the background of a shell) and SIGTERM stop this process."""
    if signal.getsignal(signal.SIGINT) is not signal.SIG_IGN:
        signal.signal(signal.SIGINT, _request)
    signal.signal(signal.SIGTERM, _request)


def _request(signal_number: int, frame: Any) -> None:
    global _requested
    _requested = True
    raise KeyboardInterrupt


def check_stop() -> None:
    """Raise the KeyboardInterrupt of a signal that came before."""
    if _requested:
        raise KeyboardInterrupt


class Stoppable(Callback):
    """End a fit at the next batch after a signal."""

    @override
    def on_train_batch_start(self, *args: Any) -> None:
        check_stop()

    @override
    def on_validation_batch_start(self, *args: Any, **kwargs: Any) -> None:
        check_stop()
