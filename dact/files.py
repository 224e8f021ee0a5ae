"""Atomic writes and checked reads.

What is written goes to a temporary name next to its own, reaches the disk, and is then renamed: a
crash leaves the old file or the new one. What is read is checked as far as the file allows."""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import os
import re
import shutil
import tempfile
import zipfile
from collections.abc import Iterator, Mapping
from operator import methodcaller
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.plugins import TorchCheckpointIO
from lightning.pytorch.utilities.rank_zero import rank_zero_only  # type: ignore[attr-defined]
from safetensors import safe_open
from safetensors.torch import save
from torch import Tensor
from typing_extensions import override

# key in the metadata of a safetensors file: digest of its tensors and its other metadata
DIGEST = "sha256"


@contextlib.contextmanager
def replacing(path: Path, shared: bool = False) -> Iterator[Path]:
    """Yield a temporary file that replaces `path` at the end, or is removed if an exception leaves
    the block.

    Only one process at a time may write to a path, or all processes of a fit on several devices. If
    `path` is `shared`, any processes may, each with a temporary file of its own, and the last one
    to end replaces it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    rank: int = getattr(rank_zero_only, "rank", 0)
    number = f"{rank}." if rank else ""
    partial = path.with_name(f".{path.name}.{number}{f'{os.getpid()}.' if shared else ''}partial")
    try:
        yield partial
        _sync(partial)
        os.replace(partial, path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise
    _sync(path.parent)


@contextlib.contextmanager
def replacing_folder(folder: Path) -> Iterator[Path]:
    """Yield a temporary folder that replaces `folder` at the end; see `replacing`."""
    folder = folder.resolve()  # what a link names is replaced, and not the link
    partial, old = (
        folder.with_name(f".{folder.name}.partial"),
        folder.with_name(f".{folder.name}.old"),
    )
    _put_back(old)
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        yield partial
        for path in [*partial.rglob("*"), partial]:
            _sync(path)
        if folder.exists():
            os.replace(folder, old)
        os.replace(partial, folder)
    except BaseException:
        _put_back(old)
        shutil.rmtree(partial, ignore_errors=True)
        raise
    _sync(folder.parent)
    shutil.rmtree(old, ignore_errors=True)


def _put_back(old: Path) -> None:
    """Give a folder that was moved aside its name again, or remove it if its successor has that
    name."""
    folder = old.with_name(old.name.removeprefix(".").removesuffix(".old"))
    if old.is_dir() and not folder.exists():
        os.replace(old, folder)
    shutil.rmtree(old, ignore_errors=True)


def check_writable_folder(folder: Path, what: str) -> None:
    """Raise a ``PermissionError`` that begins with `what` unless files can be written into a
    folder."""
    try:
        tempfile.TemporaryFile(dir=folder).close()
    except OSError as error:
        raise PermissionError(f"{what}: {folder}: {error.strerror}") from error


def remove_partial(folder: Path) -> None:
    """Remove the temporary files and folders that a killed process left under `folder`, and put old
    folders back."""
    for old in folder.rglob(".*.old"):
        _put_back(old)
    for left_over in folder.rglob(".*.partial"):
        if left_over.is_dir():
            shutil.rmtree(left_over, ignore_errors=True)
        else:
            left_over.unlink(missing_ok=True)


def _sync(path: Path) -> None:
    if os.name == "nt" and path.is_dir():
        return  # folders cannot be opened there
    descriptor = os.open(
        path, os.O_RDWR if os.name == "nt" else os.O_RDONLY
    )  # Windows syncs only what it may write
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_text(path: Path, text: str) -> None:
    """Write a text file atomically."""
    with replacing(path) as partial:
        partial.write_text(text, encoding="utf-8")


def write_json(path: Path, content: Any) -> None:
    """Write plain data as JSON, atomically. NumPy's numbers become Python's."""
    write_text(path, json.dumps(content, indent=1, default=methodcaller("item")) + "\n")


def read_json(path: Path) -> Any:
    """Return what `write_json` wrote.

    Raises:
        ValueError: If the file is corrupted; the message names it.
    """
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
    """Write a safetensors file atomically, with a digest of its content."""
    # (Tensors that share memory are refused by the format, so each is a copy.)
    plain = {name: tensor.detach().cpu().clone().contiguous() for name, tensor in tensors.items()}
    notes = dict(metadata or {})
    with replacing(path) as partial:
        partial.write_bytes(save(plain, {**notes, DIGEST: _digest(plain, notes)}))


def read_tensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Return the tensors and the metadata of a safetensors file.

    Files that other tools wrote or re-saved have no digest, and are read without this check.

    Raises:
        ValueError: If the file is corrupted: it cannot be parsed, or its digest does not match its
            content. The message names the file.
    """
    try:
        with safe_open(path, "pt") as file:
            metadata = dict(file.metadata() or {})
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - no mapping
    except Exception as error:  # the library raises many kinds
        raise ValueError(f"{path} is corrupted or not a safetensors file: {error}") from error
    digest = metadata.pop(DIGEST, None)
    if digest is not None and digest != _digest(tensors, metadata):
        raise ValueError(
            f"{path} is corrupted: its content does not have the digest that was stored with it"
        )
    return tensors, metadata


def _digest(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> str:
    digest = hashlib.sha256(json.dumps(dict(metadata), sort_keys=True).encode())
    for name in sorted(tensors):
        tensor = tensors[name]
        digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}".encode())
        digest.update(tensor.flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def read_checkpoint(path: Path, map_location: Any = "cpu") -> dict[str, Any]:
    """Return a checkpoint of the Trainer, read under torch's weights-only loading: it cannot run
    code.

    Raises:
        ValueError: If it is corrupted or holds more than data; the message names the file.
    """
    try:
        # torch reads the archive without checking its checksums.
        with zipfile.ZipFile(path) as archive:
            broken = archive.testzip()
        if broken is not None:
            raise ValueError(f"the checksum of {broken} is wrong")
        return torch.load(path, map_location=map_location, weights_only=True)
    except (
        Exception
    ) as error:  # a broken archive, a refused pickle and a foreign file raise many kinds
        refused = re.search(r"Unsupported global: GLOBAL (\S+)", str(error))
        reason = (str(error) or type(error).__name__).splitlines()[0]
        if refused is not None:
            reason = (
                f"it holds an object of {refused[1]}, and only plain data can be read without running code. A "
                "hyperparameter of the datamodule is a likely place: save it as a string"
            )
        raise ValueError(f"{path} cannot be read as a checkpoint: {reason}") from error


class DurableCheckpointIO(TorchCheckpointIO):
    """A plugin for the Trainer that writes checkpoints atomically and checks them when they are
    read.

    An address such as ``s3://…`` is left to Lightning.
    """

    @override
    def save_checkpoint(
        self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None
    ) -> None:
        if "://" in str(path):
            super().save_checkpoint(checkpoint, path, storage_options)
            return
        content = (
            io.BytesIO()
        )  # torch's own writer does not distinguish a full disk from other faults
        torch.save(checkpoint, content)
        with replacing(Path(path)) as partial:
            partial.write_bytes(content.getbuffer())

    @override
    def load_checkpoint(
        self, path: Any, map_location: Any = None, weights_only: bool | None = None
    ) -> dict[str, Any]:
        if "://" in str(path):
            return super().load_checkpoint(path, map_location, weights_only)
        if not Path(path).is_file():
            raise FileNotFoundError(f"there is no checkpoint at {path}")
        return read_checkpoint(Path(path), map_location)
