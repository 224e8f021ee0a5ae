"""Frozen mode: the pooled states of all layers, computed once and read from disk by every trial."""

from __future__ import annotations

import hashlib
import json
import struct
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lightning.pytorch import LightningDataModule
from rich.progress import track
from torch import Tensor
from torch.utils.data import BatchSampler, DataLoader, RandomSampler, SequentialSampler

from dact.encoders import LayeredEncoder
from dact.encoders.base import move
from dact.encoders.pretrained import resolve_pretrained
from dact.files import replacing
from dact.tuning.stopping import check_stop

DTYPES = {
    "states": ("F32", np.float32),
    "labels": ("I64", np.int64),
    "depth": ("I64", np.int64),
    "teacher": ("F32", np.float32),
}


def fingerprint_data(loader: DataLoader[Any]) -> str:
    """A digest of what an encoder would read and what it should answer: token ids and labels of every example."""
    digest = hashlib.sha256()
    examples: Any = getattr(loader, "dataset", None)
    if not hasattr(examples, "__getitem__") or not hasattr(examples, "__len__"):
        raise TypeError(
            f"tuning needs one DataLoader over a data set with a length for training and one for validation, got "
            f"{type(loader).__name__} over {type(examples).__name__}"
        )
    for row in range(len(examples)):
        item = examples[row]
        if not isinstance(item, Mapping):  # the loader makes batches that are
            item = loader.collate_fn([item])
        if "input_ids" not in item:
            raise KeyError(f"an example needs 'input_ids', got the keys {sorted(item)}")
        digest.update(json.dumps([item["input_ids"], item.get("labels")], default=_plain).encode())
    return digest.hexdigest()


def fingerprint_pretrained(pretrained: str) -> str:
    """A digest of the weights in a local folder; a Hub id stands for itself."""
    folder = Path(resolve_pretrained(pretrained))
    digest = hashlib.sha256(pretrained.encode())
    for path in sorted(folder.glob("*")) if folder.is_dir() else []:
        if path.suffix in (".safetensors", ".bin", ".json"):
            with path.open("rb") as file:
                digest.update(hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()


def _plain(value: Any) -> Any:
    return value.tolist()


def fingerprint_teacher(data: LightningDataModule) -> str:
    """A digest of what a teacher says of the training examples; empty where there is none."""
    said: Tensor | None = getattr(data, "teacher_probabilities", None)
    return "" if said is None else hashlib.sha256(said.contiguous().numpy().tobytes()).hexdigest()


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

    The file has ``states`` ``[examples, layers, hidden]`` (float32), ``labels`` ``[examples]`` and, where the data has
    them, ``depth`` ``[examples]`` and ``teacher`` ``[examples, classes]``, in the order of the loader. Nothing is done if
    a sound file with this fingerprint is there.

    Args:
        encoder: In eval mode, on the device that it should use.
        loader: Goes through the examples once, in order.
        path: Where to; written whole or not at all.
        fingerprint: What the file is made of; see `fingerprint_data` and `fingerprint_encoder`.

    Raises:
        ValueError: If there is a damaged file, or the loader does not give every example once.
    """
    if path.is_file() and check_features(path, fingerprint):
        return
    device = next(encoder.parameters()).device
    examples = len(loader.dataset)  # type: ignore[arg-type]
    shapes: dict[str, tuple[int, ...]] = {"states": (examples, encoder.num_layers, encoder.hidden_size)}
    first = next(iter(loader))
    shapes |= {name: (examples, *first[name].shape[1:]) for name in ("labels", "depth", "teacher") if name in first}
    given = 0
    with replacing(path) as partial, _FeatureWriter(partial, shapes, fingerprint) as writer:
        for batch in track(loader, description=f"Layer states of {examples:,} {path.stem} texts", transient=True):
            check_stop()
            states = encoder(move(batch, device)).float().cpu()
            given += len(states)
            if given > examples:
                break
            writer.write({"states": states, **{name: batch[name] for name in shapes.keys() - {"states"}}})
        if given != examples:
            raise ValueError(
                f"frozen mode needs every example once, but the {path.stem} loader gives {'more' if given > examples else given}"
                f" of its {examples}: leave out drop_last and samplers that repeat or skip, or take encoder_training=finetune"
            )


class _FeatureWriter:
    """A safetensors file that grows by rows; see the format's specification in the safetensors documentation.

    Written and not mapped: a full disk is an error here, where a mapping would end the process. The header ends with a
    digest of each tensor, known only at the end.
    """

    def __init__(self, path: Path, shapes: dict[str, tuple[int, ...]], fingerprint: str) -> None:
        self.fingerprint = fingerprint
        self.digests = {name: hashlib.sha256() for name in shapes}
        self.entries: dict[str, Any] = {}
        self.ends: dict[str, int] = {}
        size = 0
        for name, shape in shapes.items():
            self.ends[name] = size
            size += int(np.prod(shape)) * np.dtype(DTYPES[name][1]).itemsize
            self.entries[name] = {
                "dtype": DTYPES[name][0],
                "shape": list(shape),
                "data_offsets": [self.ends[name], size],
            }
        self.start = len(self._header())
        self.file = path.open("wb")
        self.file.truncate(self.start + size)

    def _header(self) -> bytes:
        digests = {name: digest.hexdigest() for name, digest in self.digests.items()}
        metadata = {"fingerprint": self.fingerprint, "header": _digest(self.entries), **digests}
        encoded = json.dumps({"__metadata__": metadata, **self.entries}).encode()
        encoded += b" " * (-len(encoded) % 8)  # tensors start at a multiple of eight bytes
        return struct.pack("<Q", len(encoded)) + encoded

    def write(self, rows: dict[str, Tensor]) -> None:
        """The next rows of every tensor."""
        for name, tensor in rows.items():
            content = tensor.numpy().astype(DTYPES[name][1]).tobytes()
            self.file.seek(self.start + self.ends[name])
            self.file.write(content)
            self.digests[name].update(content)
            self.ends[name] += len(content)

    def __enter__(self) -> _FeatureWriter:
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        if kind is None:
            self.file.seek(0)
            self.file.write(self._header())
        self.file.close()


def _digest(entries: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(entries).encode()).hexdigest()


def check_features(path: Path, fingerprint: str) -> bool:
    """Whether a file is of this fingerprint, and then, byte for byte, what `compute_features` wrote.

    Raises:
        ValueError: If it is damaged.
    """
    try:
        with path.open("rb") as file:
            header = json.loads(file.read(struct.unpack("<Q", file.read(8))[0]))
            start, metadata = file.tell(), header.pop("__metadata__")
            if metadata["fingerprint"] != fingerprint:
                return False
            if metadata["header"] != _digest(header):
                raise ValueError("its header is not what was written")
            for name, entry in header.items():
                first, last = entry["data_offsets"]
                file.seek(start + first)
                digest, left = hashlib.sha256(), last - first
                while left and (content := file.read(min(left, 1 << 24))):
                    digest.update(content)
                    left -= len(content)
                if digest.hexdigest() != metadata[name]:
                    raise ValueError(f"its {name} are not what was written")
            return True
    except Exception as error:  # a broken header raises many kinds
        raise ValueError(f"{path} is damaged ({error}): delete it, and it will be computed again") from error


class Features:
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
        train: The training examples.
        val: The validation examples.
        batch_size: Examples per batch.
        seed: Of the order in training.
    """

    def __init__(self, train: Features, val: Features, *, batch_size: int = 64, seed: int = 0) -> None:
        super().__init__()
        self.splits = {"train": train, "val": val}
        self.batch_size, self.seed = batch_size, seed

    def _loader(self, split: str) -> DataLoader[Any]:
        features = self.splits[split]
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
