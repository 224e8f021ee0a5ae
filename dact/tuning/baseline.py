"""The baseline of a run: the whole encoder, fine-tuned once with one head.

Two epochs of that fit are kept. Results are compared with the last one, where the learning rate has
fallen to 0: it is the most accurate or close to it, and was not chosen on validation examples. The
epoch of the lowest Brier score is the teacher and the starting point of later fits: epochs after it
have memorised the training examples, and teach less.
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lightning.pytorch import Callback, LightningDataModule, LightningModule, Trainer
from torch import Tensor
from torch.utils.data import DataLoader
from typing_extensions import override

from dact import signals
from dact.calibration import layer_answers
from dact.callbacks import save_with_tokenizer
from dact.encoders.base import move
from dact.files import read_checkpoint, replacing_folder, write_tensors
from dact.model import DACT
from dact.tuning import report
from dact.tuning.progress import Progress
from dact.tuning.recipe import Recipe, as_written
from dact.tuning.trainer import MIN_STEPS, enough_epochs, resumable_fit, seeded

BRIER = "val_brier"
TEACHER = "teacher.safetensors"  # weights of its encoder
# Training examples: the teacher's probabilities. Validation: where the last epoch is right.
ANSWERS = "answers.safetensors"


class BrierScore(Callback):
    """Log ``val_brier``: the mean squared distance between the last layer's answer and the labels.

    It is in [0, 2], or in [0, 2] per label with several labels, and chooses the teacher's epoch
    (Brier 1950, *Verification of Forecasts Expressed in Terms of Probability*). The log loss is
    less suitable, since a few confident errors dominate it: its lowest value may come from an epoch
    that has not learned the rare classes yet.
    """

    @override
    def on_validation_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, *args: Any
    ) -> None:
        task: Any = pl_module.task
        answer = outputs["layer_probabilities"][:, -1].float()  # [batch, classes]
        target = task.targets(batch["labels"], answer.shape[1])
        distance = (task.outcomes(answer) - target).square().sum(dim=1).mean()
        pl_module.log(BRIER, distance, on_epoch=True, batch_size=len(answer), sync_dist=True)


def fit_baseline(
    recipe: Recipe, folder: Path, data: LightningDataModule, progress: Progress
) -> dict[str, Any]:
    """Fine-tune the whole encoder, keep two epochs in `folder`, and return the last metrics."""
    checkpoints = folder / "fit"
    with seeded(recipe.seed):
        model = recipe.whole_model().at_full_depth()
    epochs = enough_epochs(recipe.trainer, data, recipe.epochs, MIN_STEPS)
    with seeded(recipe.seed), progress.fit("whole encoder", epochs, recipe.epochs) as bar:
        callbacks = [bar, BrierScore()]
        history = resumable_fit(
            recipe.trainer, model, data, checkpoints, *callbacks, epochs=epochs, monitor=BRIER
        )
    written = as_written(model, getattr(data, "batch_size", None), epochs)
    parameters = report.parameters_of(model, written)
    report.log_fit(folder, parameters, history.epochs[-1], f"{folder.parent.name}/{folder.name}")
    model.class_names = model.class_names or getattr(data, "class_names", None)

    with progress.stage("answers of the whole encoder"), recipe.precision():
        found = layer_answers(model.eval().to(recipe.device), data.val_dataloader())
        right = found.task.same(found.classes[:, -1], found.target)
        answers = {"right": right, "targets": found.target}
        with replacing_folder(folder / "model") as partial:
            save_with_tokenizer(model.cpu(), data, partial)
        model.load_state_dict(read_checkpoint(checkpoints / "best.ckpt")["state_dict"])
        write_tensors(folder / TEACHER, model.encoder.state_dict())
        answers |= _probabilities(model.to(recipe.device), data)
    write_tensors(folder / ANSWERS, answers)
    shutil.rmtree(checkpoints)
    return {"num_epochs": epochs, **history.epochs[-1]}


@torch.no_grad()
def _probabilities(model: DACT, data: Any) -> dict[str, Tensor]:
    """Return ``probabilities`` of the training examples in row order; empty without ``row``."""
    train = data.train_dataloader()
    if not hasattr(data, "teacher_probabilities") or "row" not in next(iter(train)):
        return {}
    # Each example exactly once, unlike the loader's sampler, and sorted by length.
    lengths = getattr(train.dataset, "lengths", None)
    order = range(len(train.dataset)) if lengths is None else np.argsort(lengths, kind="stable")
    loader = DataLoader(
        train.dataset,
        batch_size=train.batch_size or 32,
        sampler=[int(row) for row in order],
        collate_fn=train.collate_fn,
    )
    probabilities = torch.zeros(len(train.dataset), model.output_dimension)
    for batch in loader:
        signals.check()
        answers = model(move(batch, model.device)).probabilities
        probabilities[batch["row"]] = answers.float().cpu()
    return {"probabilities": probabilities}
