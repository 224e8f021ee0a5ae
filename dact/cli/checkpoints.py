"""Checkpoints of a fit: the best epoch and the last one, as one file where they are the same."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from typing_extensions import override

from dact.files import DurableCheckpointIO

BEST, LAST = "best.ckpt", "last.ckpt"


class BestAndLast(ModelCheckpoint):
    """Keep ``best.ckpt``, the epoch with the best value of `monitor`, and ``last.ckpt``, the last epoch.

    Lightning's ``save_last=True`` writes last.ckpt only in epochs that are the best so far, and a second file then.
    Here a best epoch that is also the last one is one file under two names, where the file system has hard links.

    Args:
        dirpath: Folder to write to; ``checkpoints`` of the logger's folder if left out.
        monitor: Name of the logged metric.
        mode: ``"min"`` or ``"max"``.
    """

    def __init__(self, dirpath: str | Path | None = None, monitor: str = "val_loss", mode: str = "min") -> None:
        super().__init__(dirpath, "best", monitor=monitor, mode=mode, enable_version_counter=False)

    @override
    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        before = self.best_model_score
        super().on_train_epoch_end(trainer, pl_module)
        self._keep_last(trainer, before)

    def _keep_last(self, trainer: Trainer, best_before: Any) -> None:
        if trainer.fast_dev_run or self.dirpath is None:  # type: ignore[attr-defined]
            return
        last = Path(self.dirpath) / LAST
        # A link needs files that are replaced as a whole when they are written again, never overwritten in place.
        durable = isinstance(trainer.strategy.checkpoint_io, DurableCheckpointIO) and "://" not in str(last)
        if durable and self.best_model_score is not best_before:
            if trainer.is_global_zero:
                _link(Path(self.best_model_path), last)
            trainer.strategy.barrier()
        else:
            trainer.save_checkpoint(last)


def _link(source: Path, target: Path) -> None:
    """Make `target` a second name of `source`, or a copy where there are no hard links."""
    partial = target.with_name(f".{target.name}.partial")
    partial.unlink(missing_ok=True)
    try:
        os.link(source, partial)
    except OSError:
        shutil.copy(source, partial)
    os.replace(partial, target)
