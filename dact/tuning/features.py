"""Frozen mode's data: the pooled states of all layers, computed once and read from disk by every trial.

A split is a folder with one ``.npy`` file per array. It also has ``made_of.json``, which is written last and holds a
digest of each file.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lightning.pytorch import LightningDataModule
from rich.progress import track
from torch import Tensor
from torch.utils.data import DataLoader, Sampler

from dact import signals
from dact.encoders import LayeredEncoder
from dact.encoders.base import move
from dact.files import read_json, replacing_folder, write_json

DTYPES = {"states": np.float32, "labels": np.int64, "depth": np.int64, "teacher": np.float32}
MADE_OF = "made_of.json"


@torch.no_grad()
def compute_features(encoder: LayeredEncoder, loader: DataLoader[Any], folder: Path, origin: str) -> None:
    """Write the pooled states of every example, with only one batch at a time in memory.

    The arrays are ``states`` ``[examples, layers, hidden]`` (float32), ``labels`` ``[examples]`` and, where the data
    has them, ``depth`` ``[examples]`` and ``teacher`` ``[examples, classes]``, in the order of the loader. Nothing is
    computed if `folder` holds intact files of this origin.

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
    shapes: dict[str, tuple[int, ...]] = {"states": (examples, encoder.num_layers, encoder.hidden_size)}
    first = next(iter(loader))
    shapes |= {name: (examples, *first[name].shape[1:]) for name in ("labels", "depth", "teacher") if name in first}
    given = 0
    with replacing_folder(folder) as partial:
        with ExitStack() as stack:
            writers = {
                name: stack.enter_context(_RowWriter(partial / f"{name}.npy", shape, DTYPES[name]))
                for name, shape in shapes.items()
            }
            for batch in track(loader, description=f"Layer states of {examples:,} {folder.name} texts", transient=True):
                signals.check()
                states = encoder(move(batch, device)).float().cpu()
                given += len(states)
                if given > examples:
                    break
                for name, writer in writers.items():
                    writer.write(states if name == "states" else batch[name])
        if given != examples:
            raise ValueError(
                f"frozen mode needs every example once, but the {folder.name} loader gives "
                f"{'more' if given > examples else given} of its {examples}: leave out drop_last and samplers that "
                "repeat or skip, or use encoder_training=finetune"
            )
        files = {name: writer.digest.hexdigest() for name, writer in writers.items()}
        write_json(partial / MADE_OF, {"fingerprint": origin, "files": files})


class _RowWriter:
    """A ``.npy`` file that grows by rows. It is not memory-mapped: a full disk would then crash the process."""

    def __init__(self, path: Path, shape: tuple[int, ...], dtype: Any) -> None:
        self.dtype, self.digest = np.dtype(dtype), hashlib.sha256()
        self.file = path.open("wb")
        header = {"descr": np.lib.format.dtype_to_descr(self.dtype), "fortran_order": False, "shape": shape}
        np.lib.format.write_array_header_1_0(self.file, header)

    def write(self, rows: Tensor) -> None:
        content = rows.numpy().astype(self.dtype).tobytes()
        self.file.write(content)
        self.digest.update(content)

    def __enter__(self) -> _RowWriter:
        return self

    def __exit__(self, *_: object) -> None:
        self.file.close()


def check_features(folder: Path, origin: str) -> bool:
    """Return whether `folder` holds features of this origin, unchanged since they were written.

    Raises:
        ValueError: If the files are corrupted; the message names the folder.
    """
    if not folder.is_dir():
        return False
    try:
        made_of = read_json(folder / MADE_OF)
        if made_of["fingerprint"] != origin:
            return False
        for name, expected in made_of["files"].items():
            array = np.load(folder / f"{name}.npy", mmap_mode="r")
            found = hashlib.sha256()
            rows = max(1, (1 << 24) // max(1, array[:1].nbytes))
            for start in range(0, len(array), rows):
                found.update(np.ascontiguousarray(array[start : start + rows]).data)
            if found.hexdigest() != expected:
                raise ValueError(f"{name}.npy is not what was written")
    except Exception as error:  # a broken header raises many kinds
        raise ValueError(f"{folder} is corrupted ({error}): delete it, and it will be computed again") from error
    return True


class Features:
    """The memory-mapped arrays of a split; indexing with row numbers reads a batch.

    Args:
        folder: Folder that `compute_features` wrote.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        # Copy-on-write: torch needs writable memory, and the files must not change.
        self.arrays = {
            name: np.load(folder / f"{name}.npy", mmap_mode="c") for name in read_json(folder / MADE_OF)["files"]
        }

    def __reduce__(self) -> Any:
        return Features, (self.folder,)

    def __len__(self) -> int:
        return len(self.arrays["states"])

    def __getitem__(self, rows: list[int]) -> dict[str, Tensor]:
        return {name: torch.from_numpy(np.asarray(array[rows])) for name, array in self.arrays.items()}


class _Batches(Sampler[list[int]]):
    """Batches of rows, in order or shuffled by seed and epoch, so that a resumed fit sees the order of its epoch."""

    def __init__(self, rows: int, batch_size: int, seed: int | None) -> None:
        self.rows, self.batch_size, self.seed, self.epoch = rows, batch_size, seed, 0

    def set_epoch(self, epoch: int) -> None:
        """Set the number of the epoch; the Trainer calls this at the start of each epoch."""
        self.epoch = epoch

    def __len__(self) -> int:
        return -(-self.rows // self.batch_size)

    def __iter__(self) -> Iterator[list[int]]:
        order = np.arange(self.rows)
        if self.seed is not None:
            np.random.default_rng([self.seed, self.epoch]).shuffle(order)
        for start in range(0, self.rows, self.batch_size):
            yield order[start : start + self.batch_size].tolist()


class LoaderData(LightningDataModule):
    """Two loaders as a datamodule.

    Args:
        train: Loader of the training examples.
        val: Loader of the validation examples.
    """

    def __init__(self, train: DataLoader[Any], val: DataLoader[Any]) -> None:
        super().__init__()
        self.train, self.val = train, val

    def train_dataloader(self) -> DataLoader[Any]:
        return self.train

    def val_dataloader(self) -> DataLoader[Any]:
        return self.val


class FeaturesData(LoaderData):
    """Batches of precomputed states: ``states`` ``[batch, layers, hidden]`` and ``labels`` ``[batch]``.

    Args:
        train: Training examples.
        val: Validation examples.
        batch_size: Number of examples per training batch.
        seed: Seed for the order in training.
    """

    def __init__(self, train: Features, val: Features, *, batch_size: int = 64, seed: int = 0) -> None:
        super().__init__(
            _loader(train, _Batches(len(train), batch_size, seed)), _loader(val, _Batches(len(val), 1024, None))
        )


def _loader(features: Features, batches: _Batches) -> DataLoader[Any]:
    # The sampler hands whole batches of rows to the features, which read them at once.
    return DataLoader(features, sampler=batches, batch_size=None)  # type: ignore[arg-type]
