"""The fits of a run: without checkpoints for trials, with them for what is kept."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback

from dact.files import read_checkpoint, read_json, write_json
from dact.model import DACT
from dact.saving import adopt
from dact.tuning.prepared import Prepared
from dact.tuning.progress import Progress
from dact.tuning.settings import Settings
from dact.tuning.trainer import (
    MONITOR,
    History,
    fit,
    for_states,
    head_epochs,
    make_trainer,
    resumable_fit,
    seeded,
)

FRESH_SEED = 1000  # added to the seed of the run for fits after the studies


def fit_settings(
    prepared: Prepared,
    settings: Settings,
    seed: int,
    callbacks: Sequence[Callback] = (),
    logger: Any = False,
) -> tuple[DACT, History]:
    """Fit a new model without checkpoints, as trials do.

    Args:
        prepared: Shared inputs of all fits.
        settings: Settings of the fit.
        seed: Seed of the fit.
        callbacks: Further callbacks.
        logger: Logger of the Trainer.

    Returns:
        The model of the last epoch, and the record of all epochs.

    Raises:
        NonFiniteLoss: If val_loss is NaN or infinite.
    """
    history = History()
    epochs, given = settings.num_epochs or prepared.recipe.epochs, prepared.recipe.trainer
    if prepared.is_frozen:
        epochs, given = head_epochs(epochs), for_states(given)
    with seeded(seed):
        model, data = prepared.build(settings, seed=seed)
        trainer = make_trainer(
            given,
            max_epochs=epochs,
            logger=logger,
            callbacks=[history, *callbacks],
            enable_checkpointing=False,
        )
        fit(trainer, model, data)
    return model, history


@dataclass(frozen=True)
class CheckpointedFit:
    """A fit with checkpoints in a folder of its own, which resumes after a kill.

    Args:
        prepared: Shared inputs of the run's fits.
        folder: Folder of the fit.
        settings: Settings of the fit. None stands for the untuned factories, which do not start
            from the whole encoder, and have no teacher unless the factories give them one.
    """

    prepared: Prepared
    folder: Path
    settings: Settings | None

    @property
    def keep_frozen(self) -> bool:
        """Whether the encoder of frozen mode stays frozen."""
        return self.settings is not None and self.prepared.recipe.final_training == "frozen"

    @property
    def monitor(self) -> str | None:
        """Metric whose lowest value chooses the epoch that is kept; None for the last epoch.

        On a frozen encoder it is that of the trials. A fit of the encoder ends at a learning rate
        of 0, and its loss rises before its answers get worse, since they get too sure."""
        return MONITOR if self.keep_frozen else None

    @property
    def learning(self) -> dict[str, Any]:
        """Arguments of its model that no study chooses."""
        if self.settings is None:
            return {}
        more = {} if self.settings.model.get("exit_loss_weight") == 0 else self.prepared.finetuning
        return {**self.prepared.learning, **more}

    @property
    def seed(self) -> int:
        """The seed of the fit: a fresh one, except for the untuned factories."""
        return self.prepared.recipe.seed + (0 if self.settings is None else FRESH_SEED)

    @property
    def checkpoint(self) -> Path:
        """The checkpoint of the epoch that was kept."""
        return self.folder / "checkpoints" / "best.ckpt"

    @property
    def history(self) -> list[dict[str, float]]:
        """The logged metrics of every epoch, once the fit is done."""
        return read_json(self.folder / "history.json")

    @property
    def kept(self) -> dict[str, float]:
        """The logged metrics of the epoch that was kept."""
        if self.monitor is None:
            return self.history[-1]
        return min(self.history, key=lambda epoch: epoch[MONITOR])

    @property
    def is_done(self) -> bool:
        """Whether an earlier call has finished it."""
        return (self.folder / "history.json").is_file() and self.checkpoint.is_file()

    def __call__(self, what: str, progress: Progress) -> None:
        """Fit and keep one epoch; resume from the last epoch of an earlier call.

        Args:
            what: Name of the fit, for progress.
            progress: Console of the run.

        Raises:
            NonFiniteLoss: If its loss is not finite; the message says what to change.
        """
        if self.is_done:
            return
        recipe, settings = self.prepared.recipe, self.settings
        epochs, trainer = recipe.epochs, recipe.trainer
        if settings is not None and settings.num_epochs is not None:
            epochs = settings.num_epochs
        if self.keep_frozen:
            epochs, trainer = head_epochs(epochs), for_states(trainer)
        with seeded(self.seed), progress.fit(what, epochs) as bar:
            if settings is None:
                model, data = recipe.untuned()
            else:
                own = Settings.of(self.learning).updated(settings)
                model, data = self.prepared.build(own, unfreeze=not self.keep_frozen)
            history = resumable_fit(
                trainer,
                model,
                data,
                self.checkpoint.parent,
                bar,
                epochs=epochs,
                log=self.folder,
                keep="best",
                monitor=self.monitor,
                average=settings is not None and not self.keep_frozen,
            )
        write_json(self.folder / "history.json", history.epochs)
        (self.checkpoint.parent / "last.ckpt").unlink()

    def model(self) -> DACT:
        """Return the model of the epoch that was kept, on the device that it should use."""
        recipe = self.prepared.recipe
        if self.settings is None:
            model, _ = recipe.untuned()
        else:
            # By the factory: a class or a custom encoder may hold what no checkpoint can rebuild.
            model = recipe.make_model(**{**self.learning, **self.settings.model})
        from_file = read_checkpoint(self.checkpoint)
        adopt(model, from_file)
        model.load_state_dict(from_file["state_dict"])
        return model.eval().to(recipe.device)
