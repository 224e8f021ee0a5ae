"""Frozen mode: the pooled states of all layers, computed once and read from disk by every trial."""

from __future__ import annotations

import hashlib
import json
import os
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lightning.pytorch import LightningDataModule
from rich.progress import track
from safetensors import safe_open
from torch import Tensor
from torch.utils.data import BatchSampler, DataLoader, RandomSampler, SequentialSampler

from dact.encoders import LayeredEncoder

DTYPES = {"states": ("F32", np.float32), "labels": ("I64", np.int64), "depth": ("I64", np.int64)}


def fingerprint_data(loader: DataLoader[Any]) -> str:
    """A digest of what an encoder would read and what it should answer: token ids and labels of every example."""
    digest = hashlib.sha256()
    examples: Any = loader.dataset
    for item in examples:
        digest.update(json.dumps([item["input_ids"], item.get("labels")], default=_plain).encode())
    return digest.hexdigest()


def _plain(value: Any) -> Any:
    return value.tolist()


def fingerprint_encoder(encoder: LayeredEncoder) -> str:
    """A digest of an encoder's configuration and weights."""
    digest = hashlib.sha256(json.dumps(encoder.config(), sort_keys=True, default=str).encode())
    for name, tensor in encoder.state_dict().items():
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


@torch.no_grad()
def compute_features(encoder: LayeredEncoder, loader: DataLoader[Any], path: Path, fingerprint: str) -> None:
    """Write the pooled states of every example to a safetensors file, batch by batch: memory holds one batch.

    The file has ``states`` ``[examples, layers, hidden]`` (float32), ``labels`` ``[examples]`` and, where the data knows
    it, ``depth`` ``[examples]``, in the order of the loader. Nothing is done if a file with this fingerprint is there.

    Args:
        encoder: In eval mode, on the device that it should use.
        loader: Goes through the examples once, in order.
        path: Where to; written whole or not at all.
        fingerprint: What the file is made of; see `fingerprint_data` and `fingerprint_encoder`.
    """
    if path.is_file() and _stored_fingerprint(path) == fingerprint:
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    device = next(encoder.parameters()).device
    examples = len(loader.dataset)  # type: ignore[arg-type]
    shapes: dict[str, tuple[int, ...]] = {"states": (examples, encoder.num_layers, encoder.hidden_size)}
    shapes |= {name: (examples,) for name in ("labels", "depth") if name in next(iter(loader))}
    partial = path.with_suffix(f".{os.getpid()}")
    arrays = _create(partial, shapes, fingerprint)
    row = 0
    for batch in track(loader, description=f"Layer states of {examples:,} {path.stem} texts", transient=True):
        states = encoder({name: tensor.to(device) for name, tensor in batch.items()}).float().cpu().numpy()
        arrays["states"][row : row + len(states)] = states
        for name in shapes.keys() - {"states"}:
            arrays[name][row : row + len(states)] = batch[name].numpy()
        row += len(states)
    for array in arrays.values():
        array.flush()
    os.replace(partial, path)


def _create(path: Path, shapes: dict[str, tuple[int, ...]], fingerprint: str) -> dict[str, np.memmap[Any, Any]]:
    """Lay out an empty safetensors file and map its tensors; see the format's specification in the safetensors docs."""
    header: dict[str, Any] = {"__metadata__": {"fingerprint": fingerprint}}
    offset = 0
    for name, shape in shapes.items():
        size = int(np.prod(shape)) * np.dtype(DTYPES[name][1]).itemsize
        header[name] = {"dtype": DTYPES[name][0], "shape": list(shape), "data_offsets": [offset, offset + size]}
        offset += size
    encoded = json.dumps(header).encode()
    encoded += b" " * (-len(encoded) % 8)  # tensors start at a multiple of eight bytes
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(encoded)) + encoded)
        file.truncate(8 + len(encoded) + offset)
    return {
        name: np.memmap(path, DTYPES[name][1], "r+", 8 + len(encoded) + header[name]["data_offsets"][0], shape)
        for name, shape in shapes.items()
    }


def _stored_fingerprint(path: Path) -> str | None:
    try:
        with safe_open(path, "pt") as file:
            return (file.metadata() or {}).get("fingerprint")
    except Exception:  # a file that cannot be read is made again
        return None


class _Features:
    """The tensors of a feature file, mapped and not loaded; batches are read by rows."""

    def __init__(self, path: Path) -> None:
        with path.open("rb") as file:
            length = struct.unpack("<Q", file.read(8))[0]
            header = json.loads(file.read(length))
        header.pop("__metadata__", None)
        # Copy-on-write: torch wants memory that it could write to, and the file stays as it is.
        self.arrays = {
            name: np.memmap(path, DTYPES[name][1], "c", 8 + length + entry["data_offsets"][0], tuple(entry["shape"]))
            for name, entry in header.items()
        }

    def __len__(self) -> int:
        return len(self.arrays["states"])

    def __getitem__(self, rows: list[int]) -> dict[str, Tensor]:
        return {name: torch.from_numpy(np.asarray(array[rows])) for name, array in self.arrays.items()}


class FeaturesData(LightningDataModule):
    """Batches of precomputed states: ``states`` ``[batch, layers, hidden]`` and ``labels`` ``[batch]``.

    Args:
        folder: Holds train.safetensors and val.safetensors.
        batch_size: Examples per batch.
        seed: Of the order in training.
    """

    def __init__(self, folder: Path, *, batch_size: int = 64, seed: int = 0) -> None:
        super().__init__()
        self.folder, self.batch_size, self.seed = folder, batch_size, seed

    def _loader(self, split: str) -> DataLoader[Any]:
        features = _Features(self.folder / f"{split}.safetensors")
        rows: RandomSampler | SequentialSampler
        if split == "train":
            rows = RandomSampler(range(len(features)), generator=torch.Generator().manual_seed(self.seed))
            size = self.batch_size
        else:
            rows, size = SequentialSampler(range(len(features))), 1024
        # The sampler hands whole batches of rows to the features, which read them at once.
        batches: Any = BatchSampler(rows, size, drop_last=False)
        return DataLoader(features, sampler=batches, batch_size=None)  # type: ignore[arg-type]

    def train_dataloader(self) -> Iterator[Any]:
        return self._loader("train")  # type: ignore[return-value]

    def val_dataloader(self) -> Iterator[Any]:
        return self._loader("val")  # type: ignore[return-value]
