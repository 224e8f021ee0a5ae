"""The model card: the README.md of a model folder, which the Hub shows as the page of the model."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCardData

from dact.agreement import names_of_classes
from dact.files import read_json, write_text

CARD_NAME = "README.md"
MARK = (
    "<!-- Written by dact. Delete this line, and your own text is kept when the model is saved "
    "again. -->"
)
SHOWN_CLASSES = 20
Metrics = Mapping[str, Any] | None  # content of metrics.json


def metrics_of(folder: Path) -> Metrics:
    """Return the measurements of the run that a ``model/`` folder is part of; None for any other
    folder."""
    path = folder.absolute().parent / "metrics.json"
    return read_json(path) if folder.name == "model" and path.is_file() else None


def write_card(
    folder: Path, model: Any, metrics: Metrics = None, repo_id: str | None = None
) -> None:
    """Write README.md into the folder of a model, unless one is there that was written by hand.

    Args:
        folder: Folder of the model.
        model: The model, a `DACT`.
        metrics: Content of metrics.json, whose measurements the card shows; that of the run whose
            ``model/`` folder this is if None.
        repo_id: Hub id under which it is published; None for a local folder.
    """
    path = folder / CARD_NAME
    if not path.exists() or is_written_by_dact(path):
        write_text(path, card(model, metrics or metrics_of(folder), repo_id))


def is_written_by_dact(path: Path) -> bool:
    """Return whether a model card may be replaced: dact wrote it, and no user has claimed it."""
    return MARK in path.read_text(encoding="utf-8", errors="replace")


def card(model: Any, metrics: Metrics = None, repo_id: str | None = None) -> str:
    """Return the text of a model card, in Markdown with the metadata of the Hub in front."""
    metadata = ModelCardData(
        library_name="dact",
        pipeline_tag="text-classification",
        tags=["dact", "early-exit", "adaptive-computation-time"],
    )
    title = "Text classifier with early exit" if repo_id is None else repo_id.split("/")[-1]
    parts = [
        f"---\n{metadata.to_yaml()}\n---",
        f"# {title}",
        "A text classifier that runs only as many layers of its encoder as each text needs (DACT, "
        "arXiv 2004.12770 and 2109.11745). It was trained with the Python package `dact`.",
        _facts(model),
        f"## Use\n\n{_use(model, repo_id)}",
        f"## When a text leaves\n\n{_halting(model)}",
        *_measurements(metrics, model.num_layers),
        MARK,
    ]
    return "\n\n".join(parts) + "\n"


def _facts(model: Any) -> str:
    names = names_of_classes(model)
    shown = ", ".join(f"`{name}`" for name in names[:SHOWN_CLASSES])
    more = f" and {len(names) - SHOWN_CLASSES} more" if len(names) > SHOWN_CLASSES else ""
    return (
        f"- Encoder: `{type(model.encoder).__name__}`, {model.num_layers} layers of hidden size "
        f"{model.encoder.hidden_size}\n- Classes ({len(names)}): {shown}{more}"
    )


def _use(model: Any, repo_id: str | None) -> str:
    name = "path/to/this/folder" if repo_id is None else repo_id
    # Only its own code can build an encoder without a description.
    own = f", encoder={type(model.encoder).__name__}(...)" if model.encoder.config() is None else ""
    return f"""```python
from dact import TextClassifier
classifier = TextClassifier.from_pretrained("{name}"{own})
print(classifier(["a text", "another text"]))
```

Each prediction has the label, its score and the exit layer. `TextClassifier.stream` takes texts one
at a time. `DACT.from_pretrained` returns the model itself, which takes token ids."""


def _halting(model: Any) -> str:
    if model.halting == "never":
        return f"Halting rule `never`: every text runs all {model.num_layers} layers."
    text = (
        f"Halting rule `{model.halting}`, tolerance {model.halting_tolerance:g}, margin "
        f"{model.halting_margin:.8g}. A text leaves when its class is proven to end at most the "
        f"tolerance behind the winner of all {model.num_layers} layers, or when a layer's own "
        "first class leads by more than the margin (1 for never)."
    )
    if model.calibration is None:
        return text
    return f"{text}\n\n{_promise(model.calibration, model.num_layers)}"


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
    promise, against = calibration["promise"], f"the same model with all {layers} layers"
    if calibration.get("baseline_accuracy") is not None:
        against = "the whole encoder"
    what = what_is_promised(promise, against, layers)
    if calibration.get("estimate"):
        kind = "Estimate, without a confidence"
    else:
        level = 100 * promise["confidence"]
        kind = f"Promise, with {level:g} % confidence on new texts of the same kind"
    text = (
        f"**{kind}:** {what}. Set on {calibration['examples']} examples: accuracy "
        f"{100 * calibration['accuracy']:.2f} % (all {layers} layers "
        f"{100 * calibration['full_depth_accuracy']:.2f} %), "
        f"{calibration['mean_exit_layer']:.2f} of {layers} layers."
    )
    if calibration.get("chose_checkpoint"):
        text += " These examples also chose the checkpoint, so this is optimistic."
    return text


def _measurements(metrics: Metrics, layers: int) -> list[str]:
    """Return the table of the measurements that metrics.json has."""
    if metrics is None or "test" not in metrics:
        return []
    test = metrics["test"]
    entries = [
        ("early exit", test["mean_exit_layer"], test),
        (f"all {layers} layers of the same model", layers, test["full_depth"]),
    ]
    if "baseline" in metrics:
        whole = metrics["baseline"]
        entries.append(("whole encoder, fine-tuned", whole["layers"], whole["test"]))
    rows = [
        f"| {name} | {depth:.2f} | {100 * entry['accuracy']:.2f} % | {entry['macro_f1']:.3f} "
        f"| {entry['texts_per_second']:.0f} |"
        for name, depth, entry in entries
    ]
    head = "| | layers | accuracy | macro F1 | texts per second |\n|---|---|---|---|---|"
    at = (
        f"Measured after training, in PyTorch, at margin {metrics['halting_margin']:.8g} and "
        f"tolerance {metrics['halting_tolerance']:g}."
    )
    return ["\n".join([f"## Test\n\n{at}\n", head, *rows])]
