"""Fits that survive an interruption: checkpoints of every epoch, and the log of such a fit."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, LightningDataModule
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import TensorBoardLogger

from dact.model import DACT
from dact.tuning import tensorboard
from dact.tuning.fitting import MONITOR, History, NonFiniteLoss, check_validated, fit, make_trainer
from dact.tuning.progress import Progress
from dact.tuning.recipe import Recipe
from dact.tuning.run import Run


def resumable_fit(
    arguments: Mapping[str, Any],
    model: DACT,
    data: LightningDataModule,
    checkpoints: Path,
    *,
    epochs: int,
    callbacks: Sequence[Callback] = (),
    logger: Any = False,
    keep_best: bool = False,
) -> History:
    """Fit with a checkpoint after every epoch, and resume from it if an earlier call was stopped.

    Args:
        arguments: Arguments of the Trainer.
        model: Model of this fit alone.
        data: Datamodule of this fit alone.
        checkpoints: Folder of ``last.ckpt`` and, with `keep_best`, ``best.ckpt``.
        epochs: Number of epochs.
        callbacks: Further callbacks.
        logger: Logger of the Trainer.
        keep_best: Whether to keep the weights of the epoch with the lowest val_loss as well.

    Raises:
        NonFiniteLoss: If val_loss is NaN or infinite.
        ValueError: If no validation ran.
    """
    # Two callbacks, since ``save_last`` writes last.ckpt only in epochs in which the best is written. The best needs
    # no optimizer: a fit resumes from the last epoch.
    kept = [ModelCheckpoint(checkpoints, "last", enable_version_counter=False)]
    if keep_best:
        best = ModelCheckpoint(
            checkpoints, "best", monitor=MONITOR, save_weights_only=True, enable_version_counter=False
        )
        kept.insert(0, best)
    history, last = History(), checkpoints / "last.ckpt"
    callbacks = [history, *callbacks, *kept]
    trainer = make_trainer(arguments, max_epochs=epochs, logger=logger, callbacks=callbacks, enable_checkpointing=True)
    fit(trainer, model, data, ckpt_path=str(last) if last.is_file() else None)
    check_validated(history, epochs)
    return history


def logged_fit(
    run: Run,
    recipe: Recipe,
    model: DACT,
    data: LightningDataModule,
    checkpoints: Path,
    progress: Progress,
    *,
    name: str,
    title: str,
    epochs: int,
    parameters: Mapping[str, Any],
    remedy: str,
) -> History:
    """Fit with a progress bar and a TensorBoard log, keep the best epoch, and resume; see `resumable_fit`.

    Args:
        run: The run.
        recipe: What fits of the run are made of.
        model: Model of this fit alone.
        data: Datamodule of this fit alone.
        checkpoints: Folder of the checkpoints.
        progress: What the console shows.
        name: Folder of the log below that of the run.
        title: What is fitted, for the progress bar and errors.
        epochs: Number of epochs.
        parameters: What TensorBoard's HParams tab shows.
        remedy: What to do if the loss is not finite.

    Raises:
        RuntimeError: If the loss is not finite.
        ValueError: If no validation ran.
    """
    logger = TensorBoardLogger(run.folder, name="", version=name, default_hp_metric=False)
    tensorboard.log_parameters(logger.experiment, parameters, name)
    with progress.fit(f"{title}, {epochs} epochs") as bar:
        try:
            history = resumable_fit(
                recipe.trainer, model, data, checkpoints, epochs=epochs, callbacks=[bar], logger=logger, keep_best=True
            )
        except NonFiniteLoss as error:
            raise RuntimeError(
                f"the {title} of {run.tag!r} broke: {error}. {remedy}, or take precision 32-true, under another run_tag"
            ) from error
    tensorboard.log_outcome(logger.experiment, history.best, succeeded=True)
    logger.finalize("success")
    return history


def checkpoints_of(folder: Path, origin: str) -> Path:
    """Return the folder of the checkpoints of an unfinished fit; a fit of other origin does not resume from them."""
    return folder / f"fit_{hashlib.sha256(origin.encode()).hexdigest()[:16]}"
