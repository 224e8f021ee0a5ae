"""Frozen mode's data: the pooled states of all layers, computed once and read by every trial."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from lightning.pytorch import LightningDataModule
from rich.progress import track
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from dact import signals
from dact.data.batching import LengthGroupedSampler
from dact.encoders import LayeredEncoder
from dact.encoders.base import move
from dact.files import replacing_folder

DTYPES = {"states": "<f4", "labels": "<i8", "teacher": "<f4"}
VALIDATION_BATCH = 1024


@torch.no_grad()
def compute_features(encoder: LayeredEncoder, loader: DataLoader[Any], folder: Path) -> None:
    """Write the pooled states of every example, with only one batch at a time in memory.

    The arrays are ``states`` ``[examples, layers, hidden]`` (float32), ``labels`` ``[examples]``
    and, where the data has it, ``teacher`` ``[examples, classes]``, in the order of the data set,
    not of the loader. Each array is a ``.npy`` file in `folder`, which is written completely or not
    at all.
    """
    device, examples = next(encoder.parameters()).device, len(loader.dataset)  # type: ignore[arg-type]
    size, collate = loader.batch_size or 32, loader.collate_fn
    in_order = DataLoader(loader.dataset, batch_size=size, collate_fn=collate)
    first, done = next(iter(in_order)), 0
    shapes: dict[str, tuple[int, ...]] = {
        "states": (examples, encoder.num_layers, encoder.hidden_size),
        **{name: (examples, *first[name].shape[1:]) for name in DTYPES if name in first},
    }
    with replacing_folder(folder) as partial:
        arrays = {
            name: np.lib.format.open_memmap(partial / f"{name}.npy", "w+", DTYPES[name], shape)
            for name, shape in shapes.items()
        }
        title = f"Layer states of {examples:,} {folder.name} texts"
        for batch in track(in_order, description=title, transient=True):
            signals.check()
            batch["states"] = encoder(move(batch, device)).float().cpu()
            for name, array in arrays.items():
                array[done : done + len(batch["states"])] = batch[name].numpy()
            done += len(batch["states"])


class Features(Dataset[dict[str, Tensor]]):
    """The memory-mapped arrays of a split that `compute_features` wrote, read in batches."""

    def __init__(self, folder: Path) -> None:
        # Copy-on-write: torch needs writable memory, and the files must not change.
        files = sorted(folder.glob("*.npy"))
        self.arrays = {file.stem: np.load(file, mmap_mode="c") for file in files}

    def __len__(self) -> int:
        return len(self.arrays["states"])

    def __getitems__(self, rows: list[int]) -> dict[str, Tensor]:
        """Return the batch of these rows; a DataLoader calls this once per batch."""
        arrays = self.arrays.items()
        return {name: torch.from_numpy(np.asarray(array[rows])) for name, array in arrays}


class FeaturesData(LightningDataModule):
    """Batches of precomputed states: ``states`` ``[batch, layers, hidden]`` and ``labels``
    ``[batch]``; only the confidence learns from `apart`, and `seed` sets the training order."""

    def __init__(
        self,
        train: Features,
        val: Features,
        apart: Features | None = None,
        *,
        batch_size: int,
        seed: int,
    ) -> None:
        super().__init__()
        # The order depends on the epoch alone, so a resumed fit repeats it.
        order = LengthGroupedSampler([0] * len(train), batch_size, seed)
        self.train = _loader(train, batch_size, order)
        self.val = _loader(val, VALIDATION_BATCH, None)
        self.apart = None if apart is None else _loader(apart, VALIDATION_BATCH, None)

    def train_dataloader(self) -> DataLoader[Any]:
        return self.train

    def val_dataloader(self) -> DataLoader[Any]:
        return self.val

    def confidence_dataloader(self) -> DataLoader[Any] | None:
        return self.apart


def _loader(features: Features, size: int, order: LengthGroupedSampler | None) -> DataLoader[Any]:
    return DataLoader(features, size, sampler=order, collate_fn=lambda batch: batch)
