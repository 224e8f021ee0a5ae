"""The baseline of a run: the encoder, fine-tuned once at full depth. Every fit learns from it and starts from it."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import LightningDataModule
from torch import Tensor

from dact import signals
from dact.callbacks import save_with_tokenizer
from dact.encoders.base import move
from dact.files import read_checkpoint, read_tensors, replacing_folder, write_tensors
from dact.model import DACT
from dact.persistence import WEIGHTS_NAME
from dact.tuning import tensorboard
from dact.tuning.fitting import checkpoints_of, resumable_fit, seeded
from dact.tuning.progress import Progress
from dact.tuning.recipe import Recipe

MIN_STEPS = 300  # optimizer steps below which a pretrained encoder has not learned its task


@dataclass(frozen=True)
class Baseline:
    """The files of a baseline.

    Args:
        folder: Folder ``baseline`` of the run.
    """

    folder: Path

    @property
    def answers(self) -> Path:
        """The file of its answers to the training and validation examples."""
        return self.folder / "answers.safetensors"

    def load(self, model: DACT) -> DACT:
        """Load the baseline's weights into a model of the factory that runs at full depth, and return the model."""
        model.load_state_dict(read_tensors(self.folder / "model" / WEIGHTS_NAME)[0])
        return model

    def encoder(self) -> dict[str, Tensor]:
        """Return the weights of its encoder."""
        weights = read_tensors(self.folder / "model" / WEIGHTS_NAME)[0]
        return {name.removeprefix("encoder."): value for name, value in weights.items() if name.startswith("encoder.")}

    def probabilities(self) -> Tensor | None:
        """Return its probabilities of the training examples ``[examples, classes]``; None if they have no ``row``."""
        return read_tensors(self.answers)[0].get("probabilities")

    def right(self, target: Tensor) -> Tensor | None:
        """Return which validation examples it classifies correctly, bool ``[examples]``.

        Args:
            target: Classes of the validation examples in their order, int64 ``[examples]``; the last ones may be
                missing.

        Returns:
            The flags, or None if the baseline saw the examples in another order.
        """
        answers = read_tensors(self.answers)[0]
        seen, classes = answers["targets"][: len(target)], answers["classes"][: len(target)]
        return classes == target if torch.equal(seen, target) else None

    def origin(self) -> str | None:
        """Return the digest of the inputs of its fit; None if there is no finished baseline."""
        return read_tensors(self.answers)[1].get("origin") if self.answers.is_file() else None


def fit_baseline(
    recipe: Recipe, folder: Path, model: DACT, data: LightningDataModule, origin: str, progress: Progress
) -> Baseline:
    """Fine-tune a model at full depth and keep its best epoch and its answers, or return what an earlier call made.

    Args:
        recipe: Recipe of the run.
        folder: Folder ``baseline`` of the run.
        model: Model of the factory, which must not be used afterwards.
        data: Datamodule that is set up for a fit.
        origin: Digest of model, data and settings.
        progress: Console of the run.

    Raises:
        NonFiniteLoss: If the loss is not finite.
    """
    baseline = Baseline(folder)
    if baseline.origin() == origin:
        return baseline
    model, epochs, checkpoints = model.at_full_depth(), _epochs(recipe, data), checkpoints_of(folder, origin)
    with seeded(recipe.seed), progress.fit(f"baseline at full depth, {epochs} epochs") as bar:
        history = resumable_fit(
            recipe.trainer,
            model,
            data,
            checkpoints,
            what="the baseline",
            epochs=epochs,
            callbacks=[bar],
            log=folder,
            # A rate that falls to 0 makes the later epochs the more accurate ones, though they become too sure of
            # themselves: by val_loss, an epoch with 1 to 2 points less would be kept.
            keep_best="val_accuracy",
        )
    parameters = {"learning_rate": model.learning_rate, "num_epochs": epochs}
    best = max(history.epochs, key=lambda epoch: epoch["val_accuracy"])
    tensorboard.log_fit(folder, parameters, best, folder.name)
    model.load_state_dict(read_checkpoint(checkpoints / "best.ckpt")["state_dict"])
    model.class_names = model.class_names or getattr(data, "class_names", None)
    with replacing_folder(folder / "model") as partial:
        save_with_tokenizer(model.cpu(), data, partial)
    with progress.stage("answers of the baseline"), recipe.precision():
        answers = _ask(model.eval().to(recipe.device), data)
    write_tensors(baseline.answers, answers, {"origin": origin})  # last, since it marks the baseline as done
    for left_over in folder.glob("fit_*"):
        shutil.rmtree(left_over)
    return baseline


def _epochs(recipe: Recipe, data: Any) -> int:
    """Return the number of epochs of the baseline: on little data up to twice the usual, of which the best is kept."""
    steps = max(1, len(data.train_dataloader()))
    return min(max(recipe.epochs, -(-MIN_STEPS // steps)), 2 * recipe.epochs)


@torch.no_grad()
def _ask(model: DACT, data: Any) -> dict[str, Tensor]:
    """Return a model's probabilities of the training examples, in their order, and its validation classes."""
    rows, probabilities, found = [], [], {}
    for batch in data.train_dataloader():
        signals.check()
        if "row" not in batch:
            break
        rows.append(batch["row"])
        probabilities.append(model(move(batch, model.device)).probabilities.float().cpu())
    if rows:
        found["probabilities"] = torch.cat(probabilities)[torch.cat(rows).argsort()]
    classes, targets = [], []
    for batch in data.val_dataloader():
        classes.append(model(move(batch, model.device)).probabilities.argmax(1).cpu())
        targets.append(batch["labels"].cpu())
    return {**found, "classes": torch.cat(classes), "targets": torch.cat(targets)}
