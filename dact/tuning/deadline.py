"""The deadline of the studies, and how it stops a fit."""

from __future__ import annotations

import math
import time
from typing import Any

from lightning.pytorch import Callback, Trainer
from typing_extensions import override


class TimeIsUp(Exception):
    """The deadline of a study passed in the middle of a trial."""


class Deadline:
    """The moment at which the studies end.

    Args:
        seconds: Seconds from now, or None for no end.
    """

    def __init__(self, seconds: float | None = None) -> None:
        # All processes of a machine share the monotonic clock, so workers may be sent a deadline.
        self.end = math.inf if seconds is None else time.monotonic() + seconds

    @property
    def left(self) -> float:
        """Seconds that are left, 0 or more; infinite if there is no end."""
        return max(0.0, self.end - time.monotonic())

    def share(self, parts: int) -> Deadline:
        """Return the deadline of the first of `parts` equal parts of the time that is left."""
        return Deadline(None if math.isinf(self.end) else self.left / parts)


class StopAtDeadline(Callback):
    """Stop a fit at a deadline: before the next batch of training, or within a long validation.

    Args:
        deadline: The deadline.
        grace: Seconds that a validation may take past the deadline.

    Raises:
        TimeIsUp: From the fit, if training was not complete.
    """

    def __init__(self, deadline: Deadline, grace: float = 10.0) -> None:
        self.deadline, self.grace = deadline, grace

    @override
    def on_train_batch_start(self, trainer: Trainer, *args: Any) -> None:
        if self.deadline.left == 0:
            raise TimeIsUp

    @override
    def on_validation_batch_end(self, *args: Any, **kwargs: Any) -> None:
        if time.monotonic() >= self.deadline.end + self.grace:
            raise TimeIsUp
