"""The model card: the README.md of a model folder, which the Hub shows as the page of the model."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from dact.agreement import names_of_classes
from dact.files import write_text

CARD_NAME = "README.md"
MARK = "<!-- Written by dact. Delete this line, and your own text is kept when the model is saved again. -->"
MODEL_FOLDERS = ("model", ".model.partial")  # of a run, whose other files are next to them
SHOWN_CLASSES = 20
Metrics = Mapping[str, Any] | None  # content of metrics.json


@dataclass(frozen=True)
class Provenance:
    """Facts about a model, from the folder of its run.

    Args:
        metrics: Content of its metrics.json, or None.
        data: Name of the data, or None.
    """

    metrics: Metrics = None
    data: str | None = None


def read_provenance(folder: Path) -> Provenance:
    """Return the facts in the files next to the ``model/`` folder of a run; none for any other
    folder."""
    if folder.name not in MODEL_FOLDERS:
        return Provenance()
    metrics = data = None
    with contextlib.suppress(OSError, ValueError):  # not there, or not ours
        metrics = json.loads((folder.parent / "metrics.json").read_text(encoding="utf-8"))
    with contextlib.suppress(OSError, ValueError, AttributeError, yaml.YAMLError):
        data = _name_of_data(
            yaml.safe_load((folder.parent / "config.yaml").read_text(encoding="utf-8"))
        )
    return Provenance(metrics if isinstance(metrics, dict) else None, data)


def _name_of_data(config: Any) -> str | None:
    """Return the class of the data with the name of its training file, without the folder, which
    may be private."""
    section = config.get("data") if isinstance(config, dict) else None
    if not isinstance(section, dict) or not isinstance(section.get("class_path"), str):
        return None
    name = section["class_path"].rsplit(".", 1)[-1]
    file = (section.get("init_args") or {}).get("train_file")
    return f"{name}, {Path(file).name}" if isinstance(file, str) else name


def write_card(
    folder: Path, model: Any, metrics: Metrics = None, repo_id: str | None = None
) -> None:
    """Write README.md into the folder of a model, unless one is there that was written by hand.

    Args:
        folder: Folder of the model.
        model: The model, a `DACT`.
        metrics: Content of metrics.json; that of the run around the folder if None.
        repo_id: Hub id under which it is published; None for a local folder.
    """
    path = folder / CARD_NAME
    if not path.exists() or is_written_by_dact(path):
        found = read_provenance(folder)
        write_text(path, card(model, Provenance(metrics or found.metrics, found.data), repo_id))


def is_written_by_dact(path: Path) -> bool:
    """Return whether a model card may be replaced: dact wrote it, and no user has claimed it."""
    return MARK in path.read_text(encoding="utf-8", errors="replace")


def card(model: Any, provenance: Provenance = Provenance(), repo_id: str | None = None) -> str:
    """Return the text of a model card, in Markdown with the metadata of the Hub in front."""
    metadata = {
        "library_name": "dact",
        "pipeline_tag": "text-classification",
        "tags": ["dact", "early-exit", "adaptive-computation-time"],
    }
    title = "Text classifier with early exit" if repo_id is None else repo_id.split("/")[-1]
    metrics = provenance.metrics
    if metrics is not None and metrics.get("layers") != model.num_layers:  # those of another model
        metrics = None
    parts = [
        f"---\n{yaml.safe_dump(metadata, sort_keys=False)}---",
        f"# {title}",
        "A text classifier that runs only as many layers of its encoder as each text needs (DACT, arXiv 2004.12770 and "
        "2109.11745). It was trained with the Python package `dact`.",
        _facts(model, provenance.data),
        f"## Use\n\n{_use(model, repo_id)}",
        f"## When a text leaves\n\n{_halting(model)}",
        *(_measurements(metrics, _kind(model)) if metrics else []),
        MARK,
    ]
    return "\n\n".join(parts) + "\n"


def _facts(model: Any, data: str | None) -> str:
    described = model.encoder.config() or {}
    family = (described.get("model") or {}).get("model_type")
    pooling = f", {described['pooling']} pooling" if "pooling" in described else ""
    encoder = f"`{_kind(model)}`" + (f" ({family})" if family else "")
    names = names_of_classes(model)
    more = f" and {len(names) - SHOWN_CLASSES} more" if len(names) > SHOWN_CLASSES else ""
    lines = [
        f"- Encoder: {encoder}, {model.num_layers} layers of hidden size {model.encoder.hidden_size}{pooling}",
        f"- Classes ({len(names)}): {', '.join(map(_code, names[:SHOWN_CLASSES]))}{more}",
    ]
    return "\n".join([*lines, f"- Training data: {_code(data)}"] if data else lines)


def _kind(model: Any) -> str:
    return type(model.encoder).__name__


def _code(text: str) -> str:
    """Return text as inline code on one line."""
    return f"`{' '.join(text.replace('`', chr(39)).split())}`"


def _use(model: Any, repo_id: str | None) -> str:
    name = "path/to/this/folder" if repo_id is None else repo_id
    if model.encoder.config() is None:  # nothing but its own code can build it
        call = f'DACT.from_pretrained("{name}", encoder={_kind(model)}(...))'
        return f"```python\nfrom dact import DACT\nmodel = {call}\n```"
    return (
        "```python\n"
        "from dact import TextClassifier\n"
        f'classifier = TextClassifier.from_pretrained("{name}")\n'
        'print(classifier(["a text", "another text"]))  # label, score and exit layer of each\n'
        "```\n\n"
        "Many texts in one call are classified faster than one at a time. `DACT.from_pretrained` returns the model "
        "itself, which takes token ids."
    )


def _halting(model: Any) -> str:
    setting = f"Halting rule `{model.halting}`, tolerance {model.halting_tolerance:g}, margin {model.halting_margin:.8g}."
    if model.halting == "never":
        return f"{setting} Every text runs all {model.num_layers} layers."
    if model.calibration is not None:
        return f"{setting} {_promise(model.calibration, model.num_layers)}"
    if model.halting_tolerance == 0 and model.halting_margin == 1:
        return f"{setting} By proof, the class is the one that all {model.num_layers} layers would give; the score is not."
    return f"{setting} There is no promise about the texts whose class differs from that of all layers."


def what_is_promised(promise: Mapping[str, Any], against: str, layers: int) -> str:
    """Return the content of a promise as text.

    Args:
        promise: Fields of `dact.calibration.Promise`.
        against: Name of the reference of accuracy and agreement.
        layers: Number of layers of the model.
    """
    if promise.get("max_accuracy_loss") is not None:
        points = 100 * promise["max_accuracy_loss"]
        return f"at most {points:g} point{'s' * (points != 1)} of accuracy below {against}"
    if promise.get("min_agreement") is not None:
        return f"at least {100 * promise['min_agreement']:g} % agreement with {against}"
    return f"at most {promise['max_layers']:g} of {layers} layers on average"


def _promise(calibration: Mapping[str, Any], layers: int) -> str:
    """Return the record of `dact.calibrate` as text."""
    promise = calibration["promise"]
    against = (
        "the model's own full depth"
        if calibration.get("baseline_accuracy") is None
        else "the baseline"
    )
    what = what_is_promised(promise, against, layers)
    if calibration.get("estimate"):
        first = f"**Estimate, without a confidence:** {what}."
    else:
        first = f"**Promise, with {100 * promise['confidence']:g} % confidence on new texts of the same kind:** {what}."
    seen = (
        f" Set on {calibration['examples']} examples: accuracy {100 * calibration['accuracy']:.2f} % (full depth "
        f"{100 * calibration['full_depth_accuracy']:.2f} %), {calibration['mean_exit_layer']:.2f} of {layers} layers."
    )
    reused = " These examples also chose the checkpoint, so this is optimistic."
    return first + seen + (reused if calibration.get("chose_checkpoint") else "")


def _measurements(metrics: Mapping[str, Any], kind: str) -> list[str]:
    """Return the tables of the measurements that `metrics` has, for a model with this kind of
    encoder."""
    parts = []
    before = " before the export to ONNX Runtime" if kind == "OnnxEncoder" else ""
    with contextlib.suppress(
        KeyError, TypeError, AttributeError
    ):  # a table of another shape is left out
        test, layers = metrics["test"], metrics["layers"]
        rows = [
            ("early exit", test["mean_exit_layer"], test),
            ("the same model at full depth", layers, test["full_depth"]),
        ]
        if "baseline" in metrics:
            rows.append(
                (
                    "whole encoder, fine-tuned",
                    metrics["baseline"]["layers"],
                    metrics["baseline"]["test"],
                )
            )
        table = [
            f"| {name} | {depth:.2f} | {100 * entry['accuracy']:.2f} % | {entry['macro_f1']:.3f} "
            f"| {_speed(entry.get('texts_per_second'))} |"
            for name, depth, entry in rows
        ]
        head = "| | layers | accuracy | macro F1 | texts per second |\n|---|---|---|---|---|"
        at = f"margin {metrics.get('halting_margin', 1):.8g} and tolerance {metrics.get('halting_tolerance', 0):g}"
        parts.append(f"## Test\n\nMeasured{before} at {at}.\n\n" + "\n".join([head, *table]))
    with contextlib.suppress(KeyError, TypeError, AttributeError):
        table = [
            f"| {point['margin']:g} | {point['mean_exit_layer']:.2f} | {100 * point['accuracy']:.2f} % "
            f"| {100 * point['agreement']:.2f} % |"
            for point in metrics["margin_curve"]
        ]
        head = "| margin | layers | accuracy | agreement with full depth |\n|---|---|---|---|"
        text = f"Measured{before} on validation examples: estimates. `from_pretrained(..., halting_margin=...)` sets one."
        parts.append(f"## Operating points\n\n{text}\n\n" + "\n".join([head, *table]))
    return parts


def _speed(texts_per_second: float | None) -> str:
    return "" if texts_per_second is None else f"{texts_per_second:.0f}"
