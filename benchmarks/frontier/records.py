"""The small JSON of each training: accuracy at each budget, and which test texts were right."""

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
from .rules import RULES
from .training import Workshop

RESULTS = Path(__file__).parents[1] / "results" / "frontier"
ALL = "all layers"  # the rule under which nothing leaves early


def record(shop: Workshop, method: Method, seed: int) -> None:
    """Measure a training at all budgets under all rules for its kind, and write that down."""
    said = shop.answers(method, seed)
    y, h, target = (
        {split: said[f"{split}_{what}"] for split in ("val", "test")}
        for what in ("y", "h", "target")
    )
    everything: dict[str, Any] = {}
    facts_of_g: dict[str, dict[str, float]] = {}
    for split in y:
        answers = y[split]
        if method.kind == "dact":
            answers = functional.accumulate(y[split], h[split])[0]
            facts_of_g[split] = judged(y[split], h[split], target[split])
        exits = torch.full_like(target[split], method.layers)
        everything[split] = measured(answers[:, -1], exits, target[split])
        everything["correct"] = pack(answers[:, -1].argmax(dim=1) == target[split])  # of test

    rules: dict[str, Any] = {ALL: {f"{method.layers}": everything}}
    for name, rule in RULES.get(method.kind, {}).items():
        policies = {split: rule(y[split], h[split]) for split in y}
        rules[name] = {}
        for budget in shop.setting.encoder.budgets:
            margin = policies["val"].margin_for(budget)
            point: dict[str, Any] = {"margin": margin}
            for split, policy in policies.items():
                exits = policy.exits(margin)
                answer = functional.answer_at(policy.answers, exits)
                point[split] = measured(answer, exits, target[split])
                point["correct"] = pack(answer.argmax(dim=1) == target[split])
            rules[name][str(budget)] = point

    path = path_of(shop.setting, method, seed)
    path.parent.mkdir(parents=True, exist_ok=True)
    setting = shop.setting
    facts: dict[str, Any] = {
        "setting": str(setting),
        "epochs": setting.epochs,
        "batch_size": setting.batch_size,
    }
    texts = {split: len(target[split]) for split in target}
    of_g = {"confidence": facts_of_g} if facts_of_g else {}
    facts |= {"method": str(method), "seed": seed, "texts": texts, **of_g}
    write_json(path, {**facts, "rules": rules})


def judged(y: Tensor, h: Tensor, target: Tensor) -> dict[str, float]:
    """Return what the confidence is worth: the negative log-likelihood of a_N and of y_N, the share
    that leaves before the last layer by proof alone, its mean exit layer, and the mean of p_1."""
    a, p = functional.accumulate(y, h)
    exits = functional.Halting().exit_layers(a, p, y)
    found = {
        "nll_a": torch.nn.functional.nll_loss(a[:, -1].clamp_min(1e-30).log(), target),
        "nll_y": torch.nn.functional.nll_loss(y[:, -1].clamp_min(1e-30).log(), target),
        "proof": (exits < y.shape[1]).double().mean(),
        "proof_layers": exits.double().mean(),
        "p_1": p[:, 0].mean(),
    }
    return {name: round(value.item(), 4) for name, value in found.items()}


def measured(answer: Tensor, exits: Tensor, target: Tensor) -> dict[str, float]:
    return {
        "layers": round(exits.double().mean().item(), 4),
        "accuracy": round(100 * (answer.argmax(dim=1) == target).double().mean().item(), 3),
    }


def path_of(setting: Setting, method: Method, seed: int) -> Path:
    return RESULTS / str(setting) / f"{method}.{seed}.json"


def read_all() -> Iterator[dict[str, Any]]:
    """Return all records, with `correct` as arrays of booleans."""
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
    bits = np.unpackbits(np.frombuffer(base64.b64decode(packed), dtype=np.uint8))
    return bits[:texts].astype(bool)
