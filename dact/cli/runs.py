"""Runs of ``dact fit``: the owner of a folder, checks before a run is resumed, and values from its
training data."""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import yaml
from filelock import FileLock, Timeout
from lightning.pytorch import LightningDataModule
from lightning.pytorch.cli import LightningArgumentParser

from dact.callbacks import LAST
from dact.cli.stored import is_tuned, load_model
from dact.encoders import LayeredEncoder
from dact.files import read_checkpoint
from dact.functional import UNLABELLED
from dact.model import DACT

# Options of data that decide which examples a fit sees.
DIVIDES = (
    "val_file",
    "calibration_fraction",
    "val_fraction",
    "seed",
    "split",
    "corpora",
    "num_train",
    "num_val",
    "max_depth",
)


def check_tag(runs: Path, tag: str, command: str) -> Path:
    """Return the folder of a run, unless its name is a path or it belongs to another command."""
    if tag in ("", ".", "..") or tag != Path(tag).name:
        raise ValueError(f"run_tag must be a name, got {tag!r}")
    if re.fullmatch(r"\d+e\d+", tag, re.IGNORECASE):
        raise ValueError(
            f"run_tag {tag} would be read as a number from a file: give another, such as run-{tag}"
        )
    folder = runs / tag
    tuned = is_tuned(folder)
    fitted = any((folder / name).exists() for name in ("checkpoints", "model"))
    if (tuned and command == "fit") or (fitted and command == "tune"):
        raise ValueError(
            f"{folder} belongs to dact {'tune' if tuned else 'fit'}: give another --run_tag"
        )
    return folder


@contextlib.contextmanager
def sole_writer(folder: Path | None) -> Iterator[None]:
    """Hold the lock of the folder of a fit, if it has one and its file system knows locks.

    Raises:
        ValueError: If another process holds it.
    """
    if folder is None:
        yield
        return
    lock = FileLock(folder / ".lock", timeout=0)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock.acquire()
    except Timeout:
        raise ValueError(
            f"another dact fit writes to {folder} now: wait for its end, or give another --run_tag"
        ) from None
    except (OSError, NotImplementedError):
        pass  # no locks on this file system; where nothing can be written, the fit says so
    try:
        yield
    finally:
        lock.release()


def balanced_weights(data: LightningDataModule, classes: int) -> list[float]:
    """Return n / (classes · n_c) for each class c of the n training examples, of which n_c are of
    that class.

    `data` must be set up for fit.
    """
    labels = getattr(getattr(data, "splits", {}).get("train"), "labels", None)
    if labels is None:
        labels = torch.cat([batch["labels"].cpu() for batch in data.train_dataloader()])
    labels = torch.as_tensor(labels)
    counts = torch.bincount(labels[labels != UNLABELLED], minlength=classes).double()
    if (counts == 0).any():
        raise ValueError(
            f"class_weights: balanced needs training examples of every class, but there are {counts.long().tolist()}"
        )
    return [round(weight, 6) for weight in (counts.sum() / (classes * counts)).tolist()]


def check_same_run(folder: Path, now: dict[str, Any]) -> None:
    """Raise an error that names the first option of model or data, or the monitor, with which a run
    was not started.

    `now` is the configuration of a fit, as its config.yaml would hold it.
    """
    stored = folder / "config.yaml"
    before = _read(stored) if stored.is_file() else now
    for section in ("model", "data", "optimizer", "lr_scheduler", "monitor"):
        if now.get(section) != before.get(section):
            different = _first_difference(before.get(section), now.get(section), section)
            raise ValueError(
                f"run {folder.name} was started with another {different}: use the value in {stored}, or give another "
                "--run_tag"
            )


def checkpoint_to_resume(folder: Path, now: dict[str, Any]) -> str | None:
    """Return the checkpoint from which a run resumes, and say so; None, said as well, if only its
    model is left.

    Args:
        folder: Folder of the run.
        now: As for `check_same_run`.

    Raises:
        ValueError: If the run was started with other options, or has finished.
    """
    check_same_run(folder, now)
    last = folder / "checkpoints" / LAST
    if not last.is_file():
        print(f"{folder} has no {LAST} to resume from: it begins again")
        return None
    done = read_checkpoint(last)["epoch"] + 1
    if 0 < (now["trainer"]["max_epochs"] or 1000) <= done:
        raise ValueError(
            f"run {folder.name} has finished epoch {done}, its last: raise --trainer.max_epochs, or give another "
            "--run_tag"
        )
    print(f"resuming {folder} after epoch {done}")
    return str(last)


def _read(path: Path) -> dict[str, Any]:
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(
            f"{path} is corrupted ({' '.join(str(error).split())[:100]}): delete it, and resume again"
        ) from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} is corrupted: delete it, and resume again")
    return content


def fit_data(source: Path) -> dict[str, Any]:
    """Return the ``data:`` section of the fit of a model, empty where nothing is known of a fit.

    Args:
        source: Checkpoint or model/ folder of a run.
    """
    stored = (source.parent if source.is_dir() else source.parent.parent) / "config.yaml"
    try:
        section = yaml.safe_load(stored.read_text(encoding="utf-8"))["data"]
        return {**section, "init_args": dict(section.get("init_args") or {})}
    except (OSError, yaml.YAMLError, ValueError, LookupError, TypeError, AttributeError):
        return {}


def check_set_aside(source: Path, now: dict[str, Any]) -> None:
    """Raise an error if data would promise on other examples than those that the fit of a model has
    set aside.

    Args:
        source: Checkpoint or model/ folder of a run; elsewhere nothing is known of a fit.
        now: The ``data:`` section, complete.
    """
    before = fit_data(source)
    then, given = before.get("init_args", {}), dict(now.get("init_args") or {})
    files = {
        name: os.path.realpath(then[name]) for name in ("val_file", "train_file") if then.get(name)
    }
    file = os.path.realpath(given["val_file"]) if given.get("val_file") else None
    is_new = file is not None and file not in files.values()
    aside = os.path.realpath(given["calibration_file"]) if given.get("calibration_file") else None
    used = next((name for name, of_fit in files.items() if of_fit == aside), None)
    if used is not None:
        raise ValueError(
            "a promise needs examples that the fit has not seen, but "
            f"data.calibration_file={given['calibration_file']} is the {used} of the fit: give another file"
        )
    if before.get("class_path") != now.get("class_path") or given.get("calibration_file") or is_new:
        return
    for name in DIVIDES:
        if (
            name in ("val_file", "val_fraction")
            and file is not None
            and file == files.get("val_file")
        ):
            continue
        if name in then and name in given and then[name] != given[name]:
            if name == "calibration_fraction" and not given[name]:
                # the validation examples, of which the result says that they chose the checkpoint
                continue
            other = ", or give a data.calibration_file, with data.calibration_fraction 0"
            other = other if "calibration_file" in given else ""
            raise ValueError(
                f"a promise needs examples that the fit has set aside, but data.{name} was {then[name]!r} there and is "
                f"{given[name]!r} here: use the value in the config.yaml of the fit{other}"
            )


def _first_difference(before: Any, now: Any, path: str) -> str:
    """Return the dotted name of the first entry that differs."""
    if isinstance(before, dict) and isinstance(now, dict):
        for name in [*before, *now]:
            if before.get(name) != now.get(name):
                return _first_difference(before.get(name), now.get(name), f"{path}.{name}")
    return f"{path} ({before!r} instead of {now!r})"


def stored_model(source: Path, encoder: Any, **overrides: Any) -> DACT:
    """Return a stored model; if it cannot rebuild its own encoder, with that of a configuration's
    ``model.encoder``."""
    try:
        return load_model(source, **overrides)
    except ValueError:
        if encoder is None:
            raise
        builder = LightningArgumentParser(exit_on_error=False)
        builder.add_subclass_arguments(LayeredEncoder, "encoder")
        own: LayeredEncoder = builder.instantiate_classes(
            builder.parse_object({"encoder": encoder})
        ).encoder
        if own.config() is not None:
            raise
    return load_model(source, own, **overrides)
