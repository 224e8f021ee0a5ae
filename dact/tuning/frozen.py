"""Frozen mode: the encoder is warmed up once, its states are computed once, and every trial trains the submodels."""

from __future__ import annotations

import hashlib
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lightning.pytorch import LightningDataModule
from lightning.pytorch.callbacks import ModelCheckpoint

from dact.files import read_tensors, write_tensors
from dact.model import DACT
from dact.tuning.features import Features, compute_features, fingerprint_encoder, fingerprint_teacher
from dact.tuning.objective import fit, make_trainer, seed_trial

if TYPE_CHECKING:
    from dact.tuning.engine import TuningEngine


@dataclass(frozen=True)
class FrozenEncoder:
    """What all trials of frozen mode share.

    Args:
        base: The model of the factory with the warmed-up encoder, never to be trained again.
        train: The states of its layers for the training examples; opened once, for all trials.
        val: Likewise for the validation examples.
        batch_size: That of the data where no trial chooses one.
    """

    base: DACT
    train: Features
    val: Features
    batch_size: int


def freeze(engine: TuningEngine, folder: Path) -> FrozenEncoder:
    """Warm up the encoder and compute its states into `folder`, or take what is there. One process at a time."""
    seed_trial(engine.seed)
    # Without a price for layers: here only the encoder learns what stays.
    model, data = engine.start(engine.make_model(lambda_reg=0.0)), engine.make_data()
    data.prepare_data()
    data.setup("fit")
    taught_by = fingerprint_teacher(data)
    made_of = [
        fingerprint_encoder(model.encoder),
        engine.data_fingerprint,
        engine.warm_up_epochs,
        engine.seed,
        taught_by,
    ]
    _warm_up(engine, model, data, folder, "/".join(map(str, made_of)))
    model.encoder.eval().requires_grad_(False)
    model.to(engine.device)
    fingerprint = f"{fingerprint_encoder(model.encoder)}/{engine.data_fingerprint}/{taught_by}"
    paths = {split: folder / f"{split}.safetensors" for split in ("train", "val")}
    for split, loader in (("train", data.train_dataloader()), ("val", data.val_dataloader())):
        compute_features(model.encoder, loader, paths[split], fingerprint)
    base = engine.make_model()
    base.encoder = model.encoder
    base.class_names = base.class_names or getattr(data, "class_names", None)
    batch_size = next(iter(data.train_dataloader()))["labels"].shape[0]
    return FrozenEncoder(base, Features(paths["train"]), Features(paths["val"]), batch_size)


def _warm_up(engine: TuningEngine, model: DACT, data: LightningDataModule, folder: Path, origin: str) -> None:
    """Fit the encoder with all exits, or read the weights of an earlier warm-up of the same origin."""
    if not engine.warm_up_epochs:
        return
    path = folder / "encoder.safetensors"
    if path.is_file():
        weights, metadata = read_tensors(path)
        if metadata.get("origin") == origin:
            model.encoder.load_state_dict(weights)
            return
    # A warm-up that was stopped goes on with the epoch that it was in.
    checkpoints = folder / f"warm_up_{hashlib.sha256(origin.encode()).hexdigest()[:16]}"
    last = checkpoints / "last.ckpt"
    with engine.display.fit(f"warm-up of the encoder, {engine.warm_up_epochs} epochs") as progress:
        checkpoint = ModelCheckpoint(checkpoints, "last", enable_version_counter=False)
        trainer = make_trainer(
            engine.trainer,
            max_epochs=engine.warm_up_epochs,
            callbacks=[progress, checkpoint],
            enable_checkpointing=True,
        )
        resumed: dict[str, Any] = {"ckpt_path": str(last)} if last.is_file() else {}
        fit(trainer, model, data, **resumed)
    write_tensors(path, model.encoder.state_dict(), {"origin": origin})
    for left_over in folder.glob("warm_up_*"):
        shutil.rmtree(left_over)
