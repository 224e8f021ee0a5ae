"""Digests of the inputs of a run: data, encoders and teachers.

An *identity* is plain data that must be equal for trials or fits to be comparable. An *origin* is
the digest of all inputs of a result, which is stored with it: a result of another origin is made
again."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from operator import methodcaller
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader

from dact.encoders import LayeredEncoder
from dact.encoders.pretrained import resolve_pretrained
from dact.files import file_digest
from dact.saving import plain_data


def digest(content: Any) -> str:
    """Return a digest of plain data."""
    return hashlib.sha256(
        json.dumps(plain_data(content), sort_keys=True, default=str).encode()
    ).hexdigest()


def data_digest(loader: DataLoader[Any]) -> str:
    """Return a digest of the token ids and labels of all examples.

    Raises:
        TypeError: If `loader` is not one DataLoader over a data set with a length.
        KeyError: If an example has no ``input_ids``.
    """
    found = hashlib.sha256()
    examples: Any = getattr(loader, "dataset", None)
    if not hasattr(examples, "__getitem__") or not hasattr(examples, "__len__"):
        raise TypeError(
            f"tuning needs one DataLoader over a data set with a length for training and one for validation, got "
            f"{type(loader).__name__} over {type(examples).__name__}"
        )
    for row in range(len(examples)):
        example = examples[row]
        item = (
            example if isinstance(example, Mapping) else loader.collate_fn([example])
        )  # batches are mappings
        if "input_ids" not in item:
            raise KeyError(f"an example needs 'input_ids', got the keys {sorted(item)}")
        label = item["labels"] if "labels" in item else _entry(loader, example, "labels")
        found.update(
            json.dumps([item["input_ids"], label], default=methodcaller("tolist")).encode()
        )
    return found.hexdigest()


def teacher_digest(loader: DataLoader[Any]) -> str:
    """Return a digest of the teacher's probabilities that the batches of a loader carry."""
    found, examples = hashlib.sha256(), loader.dataset
    for row in range(len(examples)):  # type: ignore[arg-type]
        teacher = torch.as_tensor(_entry(loader, examples[row], "teacher"))
        found.update(tensor_digest(teacher.detach().float()).encode())
    return found.hexdigest()


def _entry(loader: DataLoader[Any], item: Any, name: str) -> Any:
    """Return an entry of an example, which may get it only as part of a batch; None if it has
    none."""
    if isinstance(item, Mapping) and name in item:
        return item[name]
    # Without a batch_sampler, the data set makes the batches.
    batch = loader.collate_fn(item if loader.batch_sampler is None else [item])
    return batch.get(name) if isinstance(batch, Mapping) else None


def pretrained_digest(pretrained: str) -> str:
    """Return a digest of the files of a local model folder, or of the name of a model on the
    Hub."""
    folder = Path(resolve_pretrained(pretrained))
    found = hashlib.sha256(pretrained.encode())
    for path in sorted(folder.glob("*")) if folder.is_dir() else []:
        if path.suffix in (".safetensors", ".bin", ".json"):
            found.update(bytes.fromhex(file_digest(path)))
    return found.hexdigest()


def tensor_digest(tensor: Tensor | None) -> str:
    """Return a digest of a tensor's values, or an empty string for None."""
    return (
        ""
        if tensor is None
        else hashlib.sha256(tensor.cpu().contiguous().numpy().tobytes()).hexdigest()
    )


def encoder_digest(encoder: LayeredEncoder) -> str:
    """Return a digest of an encoder's configuration and weights."""
    found = hashlib.sha256(json.dumps(encoder.config(), sort_keys=True, default=str).encode())
    for name, tensor in encoder.state_dict().items():
        found.update(name.encode())
        found.update(
            tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes()
        )
    return found.hexdigest()
