"""The teacher of a run: the model of the factory, fine-tuned at full depth once."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import torch
from lightning.pytorch.callbacks import ModelCheckpoint

from dact.files import read_tensors, write_tensors
from dact.tuning.features import fingerprint_encoder
from dact.tuning.objective import fit, make_trainer, seed_trial

if TYPE_CHECKING:
    from dact.tuning.engine import TuningEngine


def teach(engine: TuningEngine, folder: Path) -> torch.Tensor:
    """Fine-tune a teacher and ask it, or read what an earlier one said. One process at a time.

    Returns:
        Its class probabilities, ``[training examples, classes]``, in the order of the training examples.
    """
    seed_trial(engine.seed)
    model, data = engine.make_model().at_full_depth(), engine.plain_data()
    data.prepare_data()
    data.setup("fit")
    epochs = engine.trainer["max_epochs"]
    origin = f"{fingerprint_encoder(model.encoder)}/{engine.data_fingerprint}/{epochs}/{engine.seed}"
    path = folder / "probabilities.safetensors"
    if path.is_file():
        tensors, metadata = read_tensors(path)
        if metadata.get("origin") == origin:
            return tensors["probabilities"]
    last = folder / "last.ckpt"  # of a fit that was stopped
    with engine.display.fit(f"teacher at full depth, {epochs} epochs") as progress:
        checkpoint = ModelCheckpoint(folder, "last", enable_version_counter=False)
        trainer = make_trainer(engine.trainer, max_epochs=epochs, callbacks=[progress, checkpoint])
        fit(trainer, model, data, ckpt_path=str(last) if last.is_file() else None)
    model = model.eval().to("cuda" if engine.uses_cuda else "cpu")
    rows, answers = [], []
    with torch.no_grad():
        for batch in data.train_dataloader():
            on_device = {name: tensor.to(model.device) for name, tensor in batch.items()}
            rows.append(batch["row"])
            answers.append(model(on_device).probabilities.cpu())
    order = torch.cat(rows).argsort()
    probabilities = torch.cat(answers)[order]
    write_tensors(path, {"probabilities": probabilities}, {"origin": origin})
    last.unlink()
    return probabilities
