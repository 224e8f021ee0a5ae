"""Frozen mode's data: the pooled states of all layers, computed once and read from disk by every
trial.

A split is a folder with one ``.npy`` file per array. It also has ``made_of.json``, which is written
last and holds a digest of each file."""

from __future__ import annotations

from contextlib import ExitStack
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
from dact.files import file_digest, read_json, replacing_folder, write_json

SINGLE, WHOLE = np.dtype(np.float32), np.dtype(np.int64)
DTYPES: dict[str, np.dtype[Any]] = {
    "states": SINGLE,
    "labels": WHOLE,
    "depth": WHOLE,
    "teacher": SINGLE,
}
MADE_OF = "made_of.json"
VALIDATION_BATCH = 1024


@torch.no_grad()
def compute_features(
    encoder: LayeredEncoder, loader: DataLoader[Any], folder: Path, origin: str
) -> None:
    """Write the pooled states of every example, with only one batch at a time in memory.

    The arrays are ``states`` ``[examples, layers, hidden]`` (float32), ``labels`` ``[examples]``
    and, where the data has them, ``depth`` ``[examples]`` and ``teacher`` ``[examples, classes]``,
    in the order of the loader. Nothing is computed if `folder` holds intact files of this origin.

    Args:
        encoder: Encoder in eval mode, on the device that it should use.
        loader: Loader that gives every example once.
        folder: Destination; written whole or not at all.
        origin: Digest of the encoder and the data.

    Raises:
        ValueError: If the files are corrupted, or the loader does not give every example once.
    """
    if check_features(folder, origin):
        return
    device = next(encoder.parameters()).device
    examples = len(loader.dataset)  # type: ignore[arg-type]
    shapes: dict[str, tuple[int, ...]] = {
        "states": (examples, encoder.num_layers, encoder.hidden_size)
    }
    first = next(iter(loader))
    shapes |= {
        name: (examples, *first[name].shape[1:])
        for name in ("labels", "depth", "teacher")
        if name in first
    }
    given = 0
    with replacing_folder(folder) as partial:
        with ExitStack() as stack:
            # Not memory-mapped: a full disk would then crash the process.
            files = {
                name: stack.enter_context((partial / f"{name}.npy").open("wb")) for name in shapes
            }
            for name, file in files.items():
                descr = np.lib.format.dtype_to_descr(DTYPES[name])
                header = {"descr": descr, "fortran_order": False, "shape": shapes[name]}
                np.lib.format.write_array_header_1_0(file, header)
            for batch in track(
                loader,
                description=f"Layer states of {examples:,} {folder.name} texts",
                transient=True,
            ):
                signals.check()
                states = encoder(move(batch, device)).float().cpu()
                given += len(states)
                if given > examples:
                    break
                for name, file in files.items():
                    rows = states if name == "states" else batch[name]
                    file.write(rows.numpy().astype(DTYPES[name]).tobytes())
        if given != examples:
            raise ValueError(
                f"frozen mode needs every example once, but the {folder.name} loader gives "
                f"{'more' if given > examples else given} of its {examples}: leave out drop_last and samplers that "
                "repeat or skip, or use encoder_training=finetune"
            )
        written = {name: file_digest(partial / f"{name}.npy") for name in files}
        write_json(partial / MADE_OF, {"origin": origin, "files": written})


def check_features(folder: Path, origin: str) -> bool:
    """Return whether `folder` holds features of this origin, unchanged since they were written.

    Raises:
        ValueError: If the files are corrupted; the message names the folder.
    """
    if not folder.is_dir():
        return False
    try:
        made_of = read_json(folder / MADE_OF)
        if made_of.get("origin") != origin:
            return False
        for name, expected in made_of["files"].items():
            if file_digest(folder / f"{name}.npy") != expected:
                raise ValueError(f"{name}.npy is not what was written")
    except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
        raise ValueError(
            f"{folder} is corrupted ({error}): delete it, and it will be computed again"
        ) from error
    return True


class Features(Dataset[dict[str, Tensor]]):
    """The memory-mapped arrays of a split, which a loader reads by batches.

    Args:
        folder: Folder that `compute_features` wrote.
    """

    def __init__(self, folder: Path) -> None:
        # Copy-on-write: torch needs writable memory, and the files must not change.
        self.arrays = {
            name: np.load(folder / f"{name}.npy", mmap_mode="c")
            for name in read_json(folder / MADE_OF)["files"]
        }

    def __len__(self) -> int:
        return len(self.arrays["states"])

    def __getitems__(self, rows: list[int]) -> dict[str, Tensor]:
        """Return the batch of these rows, which torch's loaders ask for as a whole."""
        return {
            name: torch.from_numpy(np.asarray(array[rows])) for name, array in self.arrays.items()
        }


class FeaturesData(LightningDataModule):
    """Batches of precomputed states: ``states`` ``[batch, layers, hidden]`` and ``labels``
    ``[batch]``.

    Args:
        train: Training examples.
        val: Validation examples.
        batch_size: Number of examples per training batch.
        seed: Seed for the order in training.
    """

    def __init__(
        self, train: Features, val: Features, *, batch_size: int = 64, seed: int = 0
    ) -> None:
        super().__init__()
        order = LengthGroupedSampler(
            [0] * len(train), batch_size, seed
        )  # a resumed fit sees the order of its epoch
        self.train, self.val = _loader(train, batch_size, order), _loader(val, VALIDATION_BATCH)

    def train_dataloader(self) -> DataLoader[Any]:
        return self.train

    def val_dataloader(self) -> DataLoader[Any]:
        return self.val


def _loader(
    features: Features, batch_size: int, order: LengthGroupedSampler | None = None
) -> DataLoader[Any]:
    return DataLoader(features, batch_size, sampler=order, collate_fn=lambda batch: batch)
