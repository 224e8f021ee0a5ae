"""The baseline of a run: the whole encoder, fine-tuned once at full depth. Every fit learns from it
and starts from it.

Two epochs of that fit are kept. The last one, where the learning rate has fallen to 0, is what
results are compared with. It is the most accurate one or close to it, and owes nothing to a choice
on the validation examples. The epoch of the lowest Brier score is the teacher and the starting
point: later ones know the training examples by heart, and teach less."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lightning.pytorch import Callback, LightningDataModule, LightningModule, Trainer
from torch import Tensor
from torch.utils.data import DataLoader
from typing_extensions import override

from dact import signals
from dact.calibration.answers import layer_answers
from dact.callbacks import save_with_tokenizer
from dact.encoders.base import move
from dact.files import read_checkpoint, read_tensors, replacing_folder, write_tensors
from dact.functional import soft_targets
from dact.model import DACT
from dact.saving import WEIGHTS_NAME
from dact.tuning import tensorboard
from dact.tuning.fitting import MIN_STEPS, checkpoints_of, enough_epochs, resumable_fit, seeded
from dact.tuning.progress import Progress
from dact.tuning.recipe import Recipe

DEFAULT_BATCH = (
    32  # examples per batch of the teacher's answers, for a loader that makes batches of its own
)
PACE = "seconds per epoch"
BRIER = "val_brier"


class BrierScore(Callback):
    """Log ``val_brier``: the mean squared distance between the answer of full depth and the class,
    in [0, 2].

    It chooses the epoch that teaches (Brier 1950, *Verification of Forecasts Expressed in Terms of
    Probability*). Its probabilities count, and they get too sure in later epochs. The log loss says
    so too, but a few answers that are sure and wrong decide it: its lowest value may be that of an
    epoch that has learned no rare class yet."""

    @override
    def on_validation_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, *args: Any
    ) -> None:
        answer = outputs["layer_probabilities"][:, -1].float()  # [batch, classes]
        distance = (
            (answer - soft_targets(batch["labels"], answer.shape[1])).square().sum(dim=1).mean()
        )
        pl_module.log(BRIER, distance, on_epoch=True, batch_size=len(answer), sync_dist=True)


@dataclass(frozen=True)
class Baseline:
    """The files of a baseline.

    Args:
        folder: Folder ``baseline`` of the run.
    """

    folder: Path

    @property
    def answers(self) -> Path:
        """The file of the teacher's answers to the training examples and the baseline's to the
        validation examples."""
        return self.folder / "answers.safetensors"

    def load(self, model: DACT) -> DACT:
        """Load the baseline's weights into a model of the factory that runs at full depth, and
        return the model."""
        model.load_state_dict(read_tensors(self.folder / "model" / WEIGHTS_NAME)[0])
        return model

    @property
    def teacher(self) -> Path:
        """The file of the weights of the teacher's encoder."""
        return self.folder / "teacher.safetensors"

    def encoder(self) -> dict[str, Tensor]:
        """Return the weights of the teacher's encoder."""
        return read_tensors(self.teacher)[0]

    def probabilities(self) -> Tensor | None:
        """Return the teacher's probabilities of the training examples ``[examples, classes]``; None
        without ``row``."""
        return read_tensors(self.answers)[0].get("probabilities")

    def right(self, target: Tensor) -> Tensor | None:
        """Return which validation examples it classifies correctly, bool ``[examples]``.

        Args:
            target: Classes of the validation examples in their order, int64 ``[examples]``; the
                last ones may be missing.

        Returns:
            The flags, or None if the baseline saw the examples in another order.
        """
        answers = read_tensors(self.answers)[0]
        seen, classes = answers["targets"][: len(target)], answers["classes"][: len(target)]
        return classes == target if torch.equal(seen, target) else None

    def origin(self) -> str | None:
        """Return the digest of the inputs of its fit; None if there is no finished baseline."""
        there = self.answers.is_file() and self.teacher.is_file()
        return read_tensors(self.answers)[1].get("origin") if there else None


def fit_baseline(
    recipe: Recipe,
    folder: Path,
    model: DACT,
    data: LightningDataModule,
    origin: str,
    progress: Progress,
) -> Baseline:
    """Fine-tune the whole encoder at full depth, keep two epochs and their answers, or return those
    of an earlier call.

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
        progress.seconds_per_epoch = float(read_tensors(baseline.answers)[1].get(PACE, 0))
        return baseline
    with seeded(recipe.seed):
        model = recipe.whole(model).at_full_depth()
    epochs = enough_epochs(recipe.trainer, data, recipe.epochs, MIN_STEPS)
    checkpoints = checkpoints_of(folder, f"{origin}/teacher")
    with seeded(recipe.seed), progress.fit("baseline at full depth", epochs) as bar:
        history = resumable_fit(
            recipe.trainer,
            model,
            data,
            checkpoints,
            bar,
            BrierScore(),
            what="the baseline",
            epochs=epochs,
            log=folder,
            keep="teacher",
            monitor=BRIER,
        )
    parameters = {"learning_rate": model.learning_rate, "num_epochs": epochs}
    tensorboard.log_fit(
        folder, parameters, history.epochs[-1], f"{folder.parent.name}/{folder.name}"
    )
    model.class_names = model.class_names or getattr(data, "class_names", None)
    with progress.stage("answers of the baseline"), recipe.precision():
        # Of the model as the fit left it: a callback of the user's may have changed it after the
        # last checkpoint.
        found = layer_answers(model.eval().to(recipe.device), data.val_dataloader())
        answers = {"classes": found.a[:, -1].argmax(1), "targets": found.target}
        with replacing_folder(folder / "model") as partial:
            save_with_tokenizer(model.cpu(), data, partial)
        model.load_state_dict(read_checkpoint(checkpoints / "teacher.ckpt")["state_dict"])
        write_tensors(baseline.teacher, model.encoder.state_dict())
        answers |= _probabilities(model.to(recipe.device), data)
    facts = {"origin": origin, PACE: str(progress.seconds_per_epoch)}
    write_tensors(baseline.answers, answers, facts)  # last, since it marks the baseline as done
    for left_over in folder.glob("fit_*"):
        shutil.rmtree(left_over)
    return baseline


@torch.no_grad()
def _probabilities(model: DACT, data: Any) -> dict[str, Tensor]:
    """Return the ``probabilities`` of the training examples, in their order; nothing for data that
    cannot carry them.

    Such data has no `teacher_probabilities`, or its batches have no ``row`` that numbers the
    examples."""
    if not hasattr(data, "teacher_probabilities"):
        return {}
    train = data.train_dataloader()
    # Each example once, which the loader's own sampler may not give; those of similar length
    # together.
    lengths = getattr(train.dataset, "lengths", None)
    order = (
        range(len(train.dataset))
        if lengths is None
        else np.argsort(lengths, kind="stable").tolist()
    )
    size = train.batch_size or DEFAULT_BATCH
    loader = DataLoader(train.dataset, batch_size=size, sampler=order, collate_fn=train.collate_fn)
    examples = len(train.dataset)
    probabilities = torch.zeros(examples, model.output_dimension, dtype=torch.float32)
    answered = torch.zeros(examples, dtype=torch.bool)
    for batch in loader:
        signals.check()
        row = batch.get("row")
        if row is None or not ((row >= 0) & (row < examples)).all():
            return {}
        probabilities[row] = model(move(batch, model.device)).probabilities.float().cpu()
        answered[row] = True
    return {"probabilities": probabilities} if answered.all() else {}
