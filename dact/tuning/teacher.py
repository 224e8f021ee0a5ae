"""The teacher of a run: the model of the factory, fine-tuned at full depth once."""

from __future__ import annotations

import hashlib
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from lightning.pytorch import LightningDataModule
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor

from dact.encoders.base import move
from dact.files import read_tensors, write_tensors
from dact.model import DACT
from dact.tuning.features import fingerprint_encoder, fingerprint_pretrained
from dact.tuning.objective import fit, make_trainer, seed_trial
from dact.tuning.stopping import check_stop

if TYPE_CHECKING:
    from dact.tuning.engine import TuningEngine


@dataclass(frozen=True)
class Teacher:
    """What the trials of a run learn from.

    Args:
        probabilities: ``[training examples, classes]``, in the order of the training examples.
        encoder: The weights of its encoder, from which the trials start; None for a teacher that the data names.
    """

    probabilities: Tensor
    encoder: dict[str, Tensor] | None


def teach(engine: TuningEngine, folder: Path, named: str | None) -> Teacher:
    """Fine-tune a teacher and ask it, or read what an earlier one left. One process at a time.

    Args:
        engine: The engine of the run.
        folder: Where its answers and its encoder are kept.
        named: A teacher that the data names, to be asked instead.
    """
    seed_trial(engine.seed)
    model, data = engine.make_model().at_full_depth(), engine.plain_data()
    data.prepare_data()
    data.setup("fit")
    epochs = engine.trainer["max_epochs"]
    trained = f"{fingerprint_encoder(model.encoder)}/{epochs}/{engine.seed}"
    origin = f"{engine.data_fingerprint}/{trained if named is None else fingerprint_pretrained(named)}"
    said, kept = folder / "probabilities.safetensors", folder / "encoder.safetensors"
    found = [read_tensors(path) for path in ([said, kept] if named is None else [said]) if path.is_file()]
    # Both, since a crash may have left one of another origin.
    if len(found) == (2 if named is None else 1) and all(metadata.get("origin") == origin for _, metadata in found):
        return Teacher(found[0][0]["probabilities"], found[1][0] if named is None else None)
    encoder = None
    if named is None:
        probabilities = _train_and_ask(engine, model, data, folder, origin)
        encoder = {name: weight.cpu() for name, weight in model.encoder.state_dict().items()}
        write_tensors(kept, encoder, {"origin": origin})
    else:
        probabilities = _ask(engine)
    write_tensors(said, {"probabilities": probabilities}, {"origin": origin})
    for left_over in folder.glob("fit_*"):
        shutil.rmtree(left_over)
    return Teacher(probabilities, encoder)


def _ask(engine: TuningEngine) -> Tensor:
    """What the teacher that the data names says."""
    data: Any = engine.data()
    data.prepare_data()
    data.setup("fit")
    said: Tensor = data.teacher_probabilities
    return said


def _train_and_ask(engine: TuningEngine, model: DACT, data: LightningDataModule, folder: Path, origin: str) -> Tensor:
    epochs = engine.trainer["max_epochs"]
    # A fit that was stopped goes on with the epoch that it was in.
    checkpoints = folder / f"fit_{hashlib.sha256(origin.encode()).hexdigest()[:16]}"
    last = checkpoints / "last.ckpt"
    with engine.display.fit(f"teacher at full depth, {epochs} epochs") as progress:
        checkpoint = ModelCheckpoint(checkpoints, "last", enable_version_counter=False)
        callbacks = [progress, checkpoint]
        trainer = make_trainer(engine.trainer, max_epochs=epochs, callbacks=callbacks, enable_checkpointing=True)
        fit(trainer, model, data, ckpt_path=str(last) if last.is_file() else None)
    model = model.eval().to(engine.device)
    rows, answers = [], []
    with torch.no_grad():
        for batch in data.train_dataloader():
            check_stop()
            rows.append(batch["row"])
            answers.append(model(move(batch, model.device)).probabilities.cpu())
    order = torch.cat(rows).argsort()
    return torch.cat(answers)[order]
