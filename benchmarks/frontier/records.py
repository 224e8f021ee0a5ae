"""The small JSON of each training: its operating points, and which test texts were right at
them."""

from __future__ import annotations

import base64
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dact import functional
from dact.files import read_json, write_json

from .data import Setting
from .methods import Method
from .rules import BUDGETS, FITS, PAIRED, Fit, Policy, oracle
from .training import Workshop

RESULTS = Path(__file__).parents[1] / "results" / "frontier"
ALL = "all layers"  # the rule under which nothing leaves early


def record(shop: Workshop, method: Method, seed: int) -> dict[str, Any]:
    """Measure a training at all budgets under all rules for its kind, and write that down."""
    said = shop.answers(method, seed)
    y, h, target = (
        {split: said[f"{split}_{what}"] for split in ("val", "test")}
        for what in ("y", "h", "target")
    )
    last = {split: _last(method, y[split], h[split]) for split in y}
    points = {
        ALL: {
            "val": _measured(
                last["val"], torch.full_like(target["val"], method.layers), target["val"]
            ),
            "test": _measured(
                last["test"], torch.full_like(target["test"], method.layers), target["test"]
            ),
            "correct": pack(last["test"].argmax(dim=1) == target["test"]),
        }
    }
    found: dict[str, Any] = {
        "setting": str(shop.setting),
        "epochs": shop.setting.epochs,
        "batch_size": shop.setting.batch_size,
        "method": str(method),
        "seed": seed,
        "texts": {split: len(target[split]) for split in target},
        "rules": {ALL: {f"{method.layers}": points[ALL]}},
    }
    for name, fit in FITS.get(method.kind, {}).items():
        found["rules"][name] = _points(fit, y, h, target, name in PAIRED)
    if method.kind in FITS:
        answers = (
            functional.accumulate(y["test"], h["test"])[0] if method.kind == "dact" else y["test"]
        )
        found["oracle"] = oracle(answers, target["test"])
        found["by layer"] = [
            (answers[:, n].argmax(dim=1) == target["test"]).double().mean().item()
            for n in range(method.layers)
        ]
    path = path_of(shop.setting, method, seed)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_json(path, found)
    return found


def _points(
    fit: Fit, y: dict[str, Tensor], h: dict[str, Tensor], target: dict[str, Tensor], paired: bool
) -> dict[str, Any]:
    """The points of one rule. On validation texts they are cross-fitted: of each half by what the
    other half chose."""
    rule = fit(y["val"], h["val"], target["val"])
    val, test = rule(y["val"], h["val"]), rule(y["test"], h["test"])
    halves = [torch.arange(len(target["val"])) % 2 == half for half in (0, 1)]
    crossed: list[tuple[Policy, Policy, Tensor]] = []
    for chosen in halves:
        other = fit(y["val"][chosen], h["val"][chosen], target["val"][chosen])
        crossed.append(
            (
                *(other(y["val"][part], h["val"][part]) for part in (chosen, ~chosen)),
                target["val"][~chosen],
            )
        )  # type: ignore[arg-type]
    points: dict[str, Any] = {}
    for budget in BUDGETS:
        margin = val.margin_for(budget)
        exits = test.exits(margin)
        answer = functional.answer_at(test.answers, exits)
        parts = []
        for fitted, measured, labels in crossed:
            leaves = measured.exits(fitted.margin_for(budget))
            parts.append(_measured(functional.answer_at(measured.answers, leaves), leaves, labels))
        points[str(budget)] = {
            "margin": margin,
            "val": {key: sum(part[key] for part in parts) / 2 for key in parts[0]},
            "test": _measured(answer, exits, target["test"]),
            **({"correct": pack(answer.argmax(dim=1) == target["test"])} if paired else {}),
        }
    return points


def _last(method: Method, y: Tensor, h: Tensor) -> Tensor:
    """The answer of all layers."""
    return functional.accumulate(y, h)[0][:, -1] if method.kind == "dact" else y[:, -1]


def _measured(answer: Tensor, exits: Tensor, target: Tensor) -> dict[str, float]:
    return {
        "layers": round(exits.double().mean().item(), 4),
        "accuracy": round(100 * (answer.argmax(dim=1) == target).double().mean().item(), 3),
    }


def path_of(setting: Setting, method: Method, seed: int) -> Path:
    return RESULTS / str(setting) / f"{method}.{seed}.json"


def read_all() -> Iterator[dict[str, Any]]:
    """All records, with `correct` as arrays of booleans."""
    for path in sorted(RESULTS.glob("*/*.json")):
        found = read_json(path)
        for points in found["rules"].values():
            for point in points.values():
                if "correct" in point:
                    point["correct"] = unpack(point["correct"], found["texts"]["test"])
        yield found


def pack(correct: Tensor) -> str:
    return base64.b64encode(np.packbits(correct.numpy()).tobytes()).decode()


def unpack(packed: str, texts: int) -> np.ndarray[Any, Any]:
    return np.unpackbits(np.frombuffer(base64.b64decode(packed), dtype=np.uint8))[:texts].astype(
        bool
    )
