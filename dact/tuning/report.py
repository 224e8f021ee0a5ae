"""What a tuned model is worth: metrics.json, pictures and the summary."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader
from torchmetrics.functional.classification import multiclass_f1_score

from dact import functional, plots
from dact.model import DACT
from dact.tuning.selection import Point, pareto_front

TOLERANCES = (0.0, 0.05, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)


@torch.no_grad()
def evaluate(model: DACT, loader: DataLoader[Any]) -> tuple[dict[str, Any], list[dict[str, float]]]:
    """Measure early exit beside full depth, through the same code.

    Args:
        model: In eval mode, on the device that it should use.
        loader: Labelled batches.

    Returns:
        The entry of metrics.json for one split, and the curve over the tolerance.
    """
    device = model.device
    collected: list[tuple[Tensor, Tensor, Tensor]] = []
    for batch in loader:
        output = model({name: tensor.to(device) for name, tensor in batch.items()})
        assert output.layer_probabilities is not None
        assert output.h is not None
        a, p = functional.accumulate(output.layer_probabilities, output.h)
        collected.append((a.cpu(), p.cpu(), batch["labels"]))
    a, p, target = (torch.cat(parts) for parts in zip(*collected, strict=True))
    full = torch.full_like(target, p.shape[1])
    exits = functional.exit_layers(a, p, model.halting, model.halting_tolerance)
    entry = _quality(a, exits, target)
    entry["texts_per_second"] = _texts_per_second(model, loader, model.halting)
    entry["full_depth"] = {**_quality(a, full, target), "texts_per_second": _texts_per_second(model, loader, "never")}
    entry["agreement"] = _agreement(a, exits)
    curve = []
    for tolerance in TOLERANCES:
        at = functional.exit_layers(a, p, model.halting, tolerance)
        quality = _quality(a, at, target)
        shown = {name: quality[name] for name in ("accuracy", "mean_exit_layer")}
        curve.append({"tolerance": tolerance, **shown, "agreement": _agreement(a, at)})
    return entry, curve


def _quality(a: Tensor, exits: Tensor, target: Tensor) -> dict[str, Any]:
    answer = functional.answer_at(a, exits)
    layers = a.shape[1]
    return {
        "accuracy": (answer.argmax(1) == target).double().mean().item(),
        "macro_f1": multiclass_f1_score(answer, target, num_classes=a.shape[2], average="macro").item(),
        "task_loss": functional.task_loss(answer, target).item(),
        "mean_exit_layer": exits.double().mean().item(),
        "exit_histogram": torch.bincount(exits - 1, minlength=layers).tolist(),
    }


def _agreement(a: Tensor, exits: Tensor) -> float:
    return (functional.answer_at(a, exits).argmax(1) == a[:, -1].argmax(1)).double().mean().item()


def _texts_per_second(model: DACT, loader: DataLoader[Any], halting: functional.HaltingRule) -> float:
    """Early exit over all batches with a halting rule; making the batches is not timed."""
    own, texts, seconds = model.halting, 0, 0.0
    model.halting = halting
    try:
        for batch in loader:
            batch = {name: tensor.to(model.device) for name, tensor in batch.items()}
            start = time.perf_counter()
            model.early_exit(batch).exit_layer.tolist()  # waits for a GPU, too
            seconds += time.perf_counter() - start
            texts += len(batch["input_ids"])
    finally:
        model.halting = own
    return texts / seconds


def write_json(path: Path, content: Any) -> None:
    """Write whole or not at all."""
    write_text(path, json.dumps(content, indent=1) + "\n")


def write_text(path: Path, text: str) -> None:
    """Write whole or not at all, also over a crash."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    with partial.open("w") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(partial, path)


def pareto_picture(points: list[Point], chosen: Point) -> Any:
    """Task loss against layers of all trials, with the front and the chosen one."""
    figure, axes = plots.new_figure()
    front = pareto_front(points)
    colours = axes.scatter(
        [point.layers for point in points],
        [point.loss for point in points],
        c=[point.lambda_reg for point in points],
        norm="log",
        label="trials",
    )
    axes.plot([point.layers for point in front], [point.loss for point in front], "-", alpha=0.5, label="Pareto front")
    axes.plot(chosen.layers, chosen.loss, "o", ms=14, mfc="none", mec="tab:red", mew=2, label="chosen")
    axes.set(xlabel="mean exit layer", ylabel="task loss")
    axes.legend()
    figure.colorbar(colours, label="lambda_reg")
    return figure


def tolerance_picture(curve: list[dict[str, float]], layers: int) -> Any:
    """Accuracy and agreement against the mean exit layer, over the tolerance."""
    figure, axes = plots.new_figure()
    depth = [point["mean_exit_layer"] for point in curve]
    axes.plot(depth, [100 * point["accuracy"] for point in curve], "o-", label="accuracy")
    axes.plot(depth, [100 * point["agreement"] for point in curve], "s--", alpha=0.6, label="agreement with full depth")
    for point in curve:
        axes.annotate(f"{point['tolerance']:g}", (point["mean_exit_layer"], 100 * point["accuracy"]), fontsize=7)
    axes.set(xlabel=f"mean exit layer of {layers}", ylabel="validation, %", title="halting tolerance beside each point")
    axes.legend()
    return figure


def exit_picture(entry: Mapping[str, Any]) -> Any:
    """How many examples leave after each layer."""
    figure, axes = plots.new_figure()
    counts = entry["exit_histogram"]
    axes.bar(range(1, len(counts) + 1), counts)
    axes.set(xlabel="exit layer", ylabel="examples", title=f"mean exit layer {entry['mean_exit_layer']:.2f}")
    return figure
