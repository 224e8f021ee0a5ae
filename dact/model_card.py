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
Metrics = Mapping[str, Any] | None  # content of metrics.json


def metrics_of(folder: Path) -> Metrics:
    """Return the measurements of the run that a ``model/`` folder belongs to, or None."""
    path = folder.absolute().parent / "metrics.json"
    return read_json(path) if folder.name == "model" and path.is_file() else None


def write_card(
    folder: Path, model: Any, metrics: Metrics = None, repo_id: str | None = None
) -> None:
    """Write README.md into the folder of a `DACT`, unless the folder has a hand-written one.

    Args:
        folder: Folder of the model.
        model: The model.
        metrics: Content of metrics.json; by default read from the run that `folder` belongs to.
        repo_id: Hub id under which the model is published.
    """
    path = folder / CARD_NAME
    if not path.exists() or is_written_by_dact(path):
        write_text(path, card(model, metrics or metrics_of(folder), repo_id))


def is_written_by_dact(path: Path) -> bool:
    """Return whether a model card may be replaced: it still has the line that dact wrote."""
    return MARK in path.read_text(encoding="utf-8", errors="replace")


def card(model: Any, metrics: Metrics = None, repo_id: str | None = None) -> str:
    """Return the text of a model card: Markdown after the Hub's metadata."""
    tags = ["dact", "early-exit", "adaptive-computation-time"]
    metadata = ModelCardData(
        library_name="dact", pipeline_tag="text-classification", tags=tags
    ).to_yaml()
    title = "Text classifier with early exit" if repo_id is None else repo_id.split("/")[-1]
    layers, names = model.num_layers, names_of_classes(model)
    return f"""---
{metadata}
---

# {title}

A text classifier that runs only as many layers of its encoder as each text needs (DACT, arXiv
2004.12770 and 2109.11745). It was trained with the Python package `dact`.

- Encoder: `{type(model.encoder).__name__}`, {layers} layers of hidden size \
{model.encoder.hidden_size}
- {model.task.nouns.capitalize()} ({len(names)}): {", ".join(f"`{name}`" for name in names)}

## Use

```python
from dact import TextClassifier
classifier = TextClassifier.from_pretrained("{repo_id or "path/to/this/folder"}")
print(classifier(["a text", "another text"]))
```

{model.task.answered}

## When a text leaves

Halting rule `{model.halting}`, tolerance {model.halting_tolerance:g}, margin \
{model.halting_margin:.8g}. {model.task.leaves} The rule `never` runs all layers.

{"" if model.calibration is None else describe(model.calibration, layers)}

{_measurements(metrics, layers)}

{MARK}
"""


def what_is_promised(promise: Mapping[str, Any], against: str, layers: int) -> str:
    """Return the content of a promise, given by its fields, as text. `against` names the reference,
    and `layers` is the number of layers of the model."""
    if promise.get("max_accuracy_loss") is not None:
        points = 100 * promise["max_accuracy_loss"]
        return f"at most {points:g} point{'s' * (points != 1)} of accuracy below {against}"
    if promise.get("min_agreement") is not None:
        return f"at least {100 * promise['min_agreement']:g} % agreement with {against}"
    return f"at most {promise['max_layers']:g} of {layers} layers on average"


def describe(found: Mapping[str, Any], layers: int) -> str:
    """Return a `dact.calibration.Calibration`, given by its fields, as a few lines of text, for a
    model with this number of layers."""
    promise, against = found["promise"], f"all {layers} layers"
    compared = f"{against} {100 * found['full_depth_accuracy']:.2f} %"
    if found.get("baseline_accuracy") is not None:
        against = "the whole encoder"
        compared += f", whole encoder {100 * found['baseline_accuracy']:.2f} %"
    names = ("max_accuracy_loss", "min_agreement", "max_layers")
    name = next(one for one in names if promise.get(one) is not None)
    kept = what_is_promised(promise, against, layers)
    says = f"keeps {name}={promise[name]:g} with confidence {promise['confidence']}: {kept}"
    all_layers = (found["halting_tolerance"], found["halting_margin"]) == (0, 1)
    if all_layers and found.get("baseline_accuracy") is None:
        says = f"means that each example gets the answer of {against}, by proof"
    elif found.get("estimate"):
        says = f"is an estimate for {name}={promise[name]:g}, without a guarantee: {kept}"
    # Eight digits, since a margin of 0.99999994 has an effect.
    lines = [
        f"{promise['dial']} {found[promise['dial']]:.8g} {says}",
        f"on the {found['examples']} examples that set it: accuracy "
        f"{100 * found['accuracy']:.2f} % ({compared}), agreement "
        f"{100 * found['agreement']:.2f} %, mean exit layer "
        f"{found['mean_exit_layer']:.2f} of {layers}",
    ]
    if found.get("chose_checkpoint"):
        lines.append(
            "these examples chose epoch or settings, so this is optimistic: set others aside by "
            "calibration_fraction before the next fit, or give a calibration_file"
        )
    return "\n".join(lines)


def _measurements(metrics: Metrics, layers: int) -> str:
    if metrics is None or "test" not in metrics:
        return ""
    test, whole = metrics["test"], metrics.get("baseline")
    entries = [
        ("early exit", test["mean_exit_layer"], test),
        (f"all {layers} layers of the same model", layers, test["full_depth"]),
    ]
    if whole:
        entries.append(("whole encoder, fine-tuned", whole["layers"], whole["test"]))
    rows = [
        f"| {name} | {depth:.2f} | {100 * entry['accuracy']:.2f} % | {entry['macro_f1']:.3f} "
        f"| {entry['texts_per_second']:.0f} |"
        for name, depth, entry in entries
    ]
    at = (
        f"Measured after training, in PyTorch, at margin {metrics['halting_margin']:.8g} and "
        f"tolerance {metrics['halting_tolerance']:g}."
    )
    head = "| | layers | accuracy | macro F1 | texts per second |\n|---|---|---|---|---|"
    return "\n".join([f"## Test\n\n{at}\n", head, *rows])
