"""The fits of a run: without checkpoints for trials, with checkpoints after the studies."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
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
from dact.tuning.trainer import MONITOR, History, fit, resumable_fit, seeded

FRESH_SEED = 1000  # added to the seed of the run for fits after the studies
# Epochs on frozen states per epoch of the settings, and their largest number: fewer leave the
# submodels undertrained, and the largest number suffices however long the encoder is trained.
HEAD_EPOCHS, MOST_HEAD_EPOCHS = 3, 12


def _schedule(recipe: Recipe, settings: Settings, on_states: bool) -> tuple[int, Mapping[str, Any]]:
    """Return the number of epochs and the Trainer's arguments, which differ on frozen states."""
    epochs = settings.num_epochs or recipe.epochs
    if not on_states:
        return epochs, recipe.trainer
    # A limit on validation batches does not carry over, since batches of states are larger.
    trainer = {**recipe.trainer, "limit_val_batches": None}
    return min(HEAD_EPOCHS * epochs, MOST_HEAD_EPOCHS), trainer


def fit_settings(
    prepared: Prepared, settings: Settings, seed: int, callbacks: Sequence[Callback], logger: Any
) -> tuple[DACT, History]:
    """Fit a new model without checkpoints, for a trial, and return it after the last epoch, with
    the record of all epochs."""
    epochs, trainer = _schedule(prepared.recipe, settings, prepared.is_frozen)
    with seeded(seed):
        model, data = prepared.build(settings, seed)
        return model, fit(trainer, model, data, *callbacks, epochs=epochs, logger=logger)


@dataclass(frozen=True)
class CheckpointedFit:
    """A fit after the studies, with checkpoints in its own folder; it resumes after a kill.

    The last epoch is kept or, on a frozen encoder, the epoch of the lowest val_loss. A fit of the
    encoder ends at a learning rate of 0. Its loss rises before its answers get worse, since they
    become overconfident.
    """

    prepared: Prepared
    folder: Path
    settings: Settings

    @property
    def keep_frozen(self) -> bool:
        """Whether the encoder of frozen mode stays frozen."""
        return self.prepared.recipe.final_training == "frozen"

    @property
    def arguments(self) -> dict[str, Any]:
        """The arguments of the model that differ from the factory's."""
        more = {} if self.settings.model.get("exit_loss_weight") == 0 else self.prepared.finetuning
        return {**self.prepared.learning, **more, **self.settings.model}

    @property
    def seed(self) -> int:
        """The seed of the fit, which no study has used."""
        return self.prepared.recipe.seed + FRESH_SEED

    @property
    def checkpoint(self) -> Path:
        """The checkpoint of the epoch that was kept."""
        return self.folder / "checkpoints" / "best.ckpt"

    @property
    def history(self) -> list[dict[str, float]]:
        """The logged metrics of every epoch, once the fit is done."""
        return read_json(self.folder / "history.json")

    @property
    def val_loss(self) -> float:
        """The validation loss of the epoch that was kept."""
        losses = [epoch[MONITOR] for epoch in self.history]
        return min(losses) if self.keep_frozen else losses[-1]

    def __call__(self, what: str, progress: Progress) -> None:
        """Fit and keep one epoch, or resume an earlier call; `what` names the progress bar.

        Raises:
            NonFiniteLoss: If the loss is not finite.
        """
        if (self.folder / "history.json").is_file() and self.checkpoint.is_file():
            return
        recipe = self.prepared.recipe
        epochs, trainer = _schedule(recipe, self.settings, self.keep_frozen)
        settings = replace(self.settings, model=self.arguments)
        with seeded(self.seed), progress.fit(what, epochs) as bar:
            history = resumable_fit(
                trainer,
                *self.prepared.build(settings, recipe.seed, unfreeze=not self.keep_frozen),
                self.checkpoint.parent,
                bar,
                epochs=epochs,
                monitor=MONITOR if self.keep_frozen else None,
                average=not self.keep_frozen,
            )
        write_json(self.folder / "history.json", history.epochs)
        (self.checkpoint.parent / "last.ckpt").unlink()

    def model(self) -> DACT:
        """Return the model of the epoch that was kept, on the Trainer's device."""
        # Built by the factory: a checkpoint may be unable to rebuild a subclass or custom encoder.
        model = self.prepared.recipe.make_model(**self.arguments)
        stored = read_checkpoint(self.checkpoint)
        adopt(model, stored)
        model.load_state_dict(stored["state_dict"])
        return model.eval().to(self.prepared.recipe.device)
