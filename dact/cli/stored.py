"""Places of fitted models: a checkpoint, a model/ folder, the folder of a run that holds one, or
the Hub."""

from __future__ import annotations

import math
import sys
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.utils import disable_progress_bars  # type: ignore[attr-defined]

from dact.calibration import Calibration, Promise, examples_for_an_estimate
from dact.encoders import LayeredEncoder
from dact.files import check_writable_folder
from dact.hub import HUB_ID, local_folder
from dact.model import DACT
from dact.saving import CONFIG_NAME, store_in_checkpoint

RUNS = "lightning_logs"  # folder of all runs, in that of the Trainer


def hub_id(path: str | Path) -> tuple[str, str | None] | None:
    """Return the Hub id and the revision of ``OWNER/NAME`` or ``OWNER/NAME@REVISION``, None for a
    path.

    If a folder OWNER exists, the string is a path: a mistyped run name is not looked up on the Hub.
    """
    name, _, revision = str(path).partition("@")
    if (
        isinstance(path, Path)
        or Path(path).exists()
        or Path(name).parent.is_dir()
        or not HUB_ID.fullmatch(name)
    ):
        return None
    return name, revision or None


def find_model(path: str | Path) -> Path:
    """Return the checkpoint file or model/ folder that `path` stands for.

    Args:
        path: A ``.ckpt`` file, a folder with config.json, or the folder of a run, which stands for
            its ``final/model`` after ``dact tune`` and for its ``model`` after ``dact fit``. A
            string that `hub_id` accepts stands for the downloaded folder.
    """
    if isinstance(path, str) and (found := hub_id(path)):
        name, revision = found
        if not sys.stderr.isatty():
            disable_progress_bars()
        return local_folder(name, revision=revision)
    path = Path(path)
    if path.is_file():
        return path
    for folder in (path, path / "final" / "model", path / "model"):
        if (folder / CONFIG_NAME).is_file():
            return folder
    if is_tuned(path):
        raise FileNotFoundError(
            f"{path} is a run of dact tune without its final model: resume it with the command that began it, with "
            f"--run_tag {path.name}, or wait for it if it is still running"
        )
    inside = sorted(entry.name for entry in path.iterdir())[:5] if path.is_dir() else None
    state = (
        "does not exist" if inside is None else f"has {', '.join(inside)}" if inside else "is empty"
    )
    meant = RUNS / path
    expected = (
        f"a checkpoint, a model/ folder, the folder of a run, such as {RUNS}/version_0, or a Hub id"
    )
    hint = f"did you mean {meant}?" if inside is None and meant.is_dir() else f"expected {expected}"
    raise FileNotFoundError(f"no model at {path}, which {state}: {hint}")


def is_tuned(folder: Path) -> bool:
    """Return whether a folder is that of a run of ``dact tune``."""
    return any(
        (folder / name).exists()
        for name in ("studies.db", "submodels", "classifier_config.yaml", "final")
    )


def load_model(path: Path, encoder: LayeredEncoder | None = None, **overrides: Any) -> DACT:
    """Return the model of a path that `find_model` returned, in eval mode on the CPU."""
    if path.is_dir():
        return DACT.from_pretrained(path, encoder=encoder, **overrides)
    return DACT.load_from_checkpoint(path, encoder=encoder, **overrides).eval()


def counterpart(path: Path) -> Path | None:
    """Return the model/ folder next to a checkpoint of a run, or the best checkpoint next to its
    model/ folder."""
    if path.is_dir():
        checkpoint = path.parent / "checkpoints" / "best.ckpt"
        return checkpoint if checkpoint.is_file() else None
    folder = path.parent.parent / "model"
    return folder if (folder / CONFIG_NAME).is_file() else None


def check_storable(source: Path) -> None:
    """Raise an error unless `store_dial` can write where the model lies."""
    other = counterpart(source)
    for path in [source] if other is None else [source, other]:
        check_writable_folder(
            path if path.is_dir() else path.parent,
            "the model cannot be written: calibrate a copy of it in a folder that can",
        )


def check_estimate(found: Calibration, promise: Promise) -> None:
    """Raise a ``ValueError`` if an estimate had too few examples, so that only the proof is left,
    as without any."""
    needed = examples_for_an_estimate(promise)
    if found.estimate and found.examples < needed < math.inf:
        raise ValueError(
            f"this estimate takes {needed} examples or more, got {found.examples}: give more, or promise less. The "
            "model is left as it was"
        )


def store_dial(source: Path, model: DACT, dial: str) -> list[str]:
    """Store the halting settings of a model in its source, and in the checkpoint or folder next to
    it if that has the same weights. Return a line for the console for each."""
    lines = []
    other = counterpart(source)
    for path in [source] if other is None else [source, other]:
        if path == other:
            stored = load_model(
                path, model.encoder if model.encoder.config() is None else None
            ).state_dict()
            own = model.state_dict()
            if own.keys() != stored.keys() or not all(
                torch.equal(own[name], stored[name]) for name in own
            ):
                lines.append(f"{path} holds other weights, and keeps its {dial}")
                continue
        if path.is_dir():
            model.save_pretrained(path)
        else:
            store_in_checkpoint(path, model)
        lines.append(f"wrote {dial} {getattr(model, dial):.8g} to {path}")
    return lines
