"""Atomic writes, so that a crash leaves the old file or the new one, and reads that run no code."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import shutil
from collections.abc import Iterator, Mapping
from operator import methodcaller
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.plugins import TorchCheckpointIO
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor
from typing_extensions import override

CONFIG_NAME = "config.json"  # in the folder of a model


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yield a temporary file, one per process, that replaces `path` at the end of the block, or is
    removed if the block raises."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        yield partial
        with partial.open("rb") as file:
            os.fsync(file.fileno())
        os.replace(partial, path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise


@contextlib.contextmanager
def replacing_folder(folder: Path) -> Iterator[Path]:
    """Yield a temporary folder that replaces `folder` at the end of the block; see `replacing`."""
    partial, old = (folder.with_name(f".{folder.name}.{kind}") for kind in ("partial", "old"))
    for left_over in (partial, old):
        shutil.rmtree(left_over, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        yield partial
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    if folder.exists():
        os.replace(folder, old)
    os.replace(partial, folder)
    shutil.rmtree(old, ignore_errors=True)


def write_text(path: Path, text: str) -> None:
    """Write a text file atomically."""
    with replacing(path) as partial:
        partial.write_text(text, encoding="utf-8")


def write_json(path: Path, content: Any) -> None:
    """Write plain data as JSON, atomically. NumPy's numbers become Python's."""
    write_text(path, json.dumps(content, indent=1, default=methodcaller("item")) + "\n")


def read_json(path: Path) -> Any:
    """Return what `write_json` wrote."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is corrupted: {error}") from error


def file_digest(path: Path) -> str:
    """Return the SHA-256 of a file, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_tensors(
    path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None
) -> None:
    """Write a safetensors file atomically."""
    # The format does not allow tensors that share memory, so each is copied.
    plain = {name: tensor.detach().cpu().clone().contiguous() for name, tensor in tensors.items()}
    with replacing(path) as partial:
        save_file(plain, partial, dict(metadata or {}))


def read_tensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Return the tensors and the metadata of a safetensors file, or raise a ``ValueError``."""
    try:
        with safe_open(path, "pt") as file:
            metadata = dict(file.metadata() or {})
            return {name: file.get_tensor(name) for name in file.keys()}, metadata  # noqa: SIM118 - no mapping
    except Exception as error:  # the library raises many kinds
        raise ValueError(f"{path} is corrupted or not a safetensors file: {error}") from error


def read_checkpoint(path: str | Path, map_location: Any = "cpu") -> dict[str, Any]:
    """Return a Trainer checkpoint from a file or an address; reading it cannot run code.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If it is corrupted or holds more than data.
    """
    try:
        return TorchCheckpointIO().load_checkpoint(path, map_location, weights_only=True)
    except FileNotFoundError:
        raise
    except Exception as error:  # a corrupted archive, a rejected pickle, or no checkpoint
        refused = re.search(r"Unsupported global: GLOBAL (\S+)", str(error))
        reason = (str(error) or type(error).__name__).splitlines()[0]
        if refused is not None:
            reason = (
                f"it holds an object of {refused[1]}, and only plain data can be read without "
                "running code. A hyperparameter of the datamodule is a likely place: save a string"
            )
        raise ValueError(f"{path} cannot be read as a checkpoint: {reason}") from error


class DurableCheckpointIO(TorchCheckpointIO):
    """A plugin for the Trainer that writes checkpoints atomically and reads them as data."""

    @override
    def save_checkpoint(
        self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None
    ) -> None:
        if "://" in str(path):
            super().save_checkpoint(checkpoint, path, storage_options)
        else:
            with replacing(Path(path)) as partial:
                torch.save(checkpoint, partial)

    @override
    def load_checkpoint(
        self, path: Any, map_location: Any = "cpu", weights_only: bool | None = None
    ) -> dict[str, Any]:
        return read_checkpoint(path, map_location)
