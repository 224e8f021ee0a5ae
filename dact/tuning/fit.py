"""The fits of a run: without checkpoints for trials, with them for what is kept."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback

from dact.files import read_checkpoint, read_json, write_json
from dact.model import DACT
from dact.saving import adopt
from dact.tuning.prepared import Prepared
from dact.tuning.progress import Progress
from dact.tuning.recipe import Recipe
from dact.tuning.settings import Settings
from dact.tuning.trainer import MONITOR, History, fit, make_trainer, resumable_fit, seeded

FRESH_SEED = 1000  # added to the seed of the run for fits after the studies
# Epochs on frozen states per epoch of the final fit: with fewer the submodels have not learned,
# and with the largest number they have, however long the encoder is trained.
HEAD_EPOCHS, MOST_HEAD_EPOCHS = 3, 12


def _schedule(recipe: Recipe, settings: Settings, on_states: bool) -> tuple[int, Mapping[str, Any]]:
    """Return the number of epochs and the arguments of the Trainer, which differ on states."""
    epochs = settings.num_epochs or recipe.epochs
    if not on_states:
        return epochs, recipe.trainer
    # A number of batches means nothing there, since their size is another one.
    trainer = {**recipe.trainer, "limit_val_batches": None}
    return min(HEAD_EPOCHS * epochs, MOST_HEAD_EPOCHS), trainer


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
    epochs, arguments = _schedule(prepared.recipe, settings, prepared.is_frozen)
    with seeded(seed):
        model, data = prepared.build(settings, seed)
        trainer = make_trainer(
            arguments,
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

    The last epoch is kept, or on a frozen encoder that of the lowest val_loss. A fit of the encoder
    ends at a learning rate of 0, and its loss rises before its answers get worse, since they get
    too sure.

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

    def __call__(self, what: str, progress: Progress) -> None:
        """Fit and keep one epoch; resume from the last epoch of an earlier call.

        Args:
            what: Name of the fit, for progress.
            progress: Console of the run.

        Raises:
            NonFiniteLoss: If its loss is not finite; the message says what to change.
        """
        if (self.folder / "history.json").is_file() and self.checkpoint.is_file():
            return
        recipe, settings = self.prepared.recipe, self.settings
        epochs, trainer = _schedule(recipe, settings or Settings(), self.keep_frozen)
        with seeded(self.seed), progress.fit(what, epochs) as bar:
            if settings is None:
                model, data = recipe.untuned()
            else:
                own = Settings.of(self.learning).updated(settings)
                model, data = self.prepared.build(own, recipe.seed, unfreeze=not self.keep_frozen)
            history = resumable_fit(
                trainer,
                model,
                data,
                self.checkpoint.parent,
                bar,
                epochs=epochs,
                monitor=MONITOR if self.keep_frozen else None,
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
        stored = read_checkpoint(self.checkpoint)
        adopt(model, stored)
        model.load_state_dict(stored["state_dict"])
        return model.eval().to(recipe.device)
