"""Early exit next to full depth on a tiny encoder in small batches, where overhead is all that counts.

python benchmarks/tiny.py --output tiny.json
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from dataclasses import replace
from pathlib import Path

import torch

from dact import DACT
from dact.encoders import TransformerEncoder


def spread_model(target: float, batch: dict[str, torch.Tensor]) -> DACT:
    """A model of 6 layers whose examples leave after about `target` layers on average, at a margin that is searched."""
    torch.manual_seed(0)
    model = DACT(encoder=TransformerEncoder(100, 6, 32, 2)).eval()
    torch.nn.init.normal_(model.encoder.tokens.weight)
    for submodel in model.classifier:
        torch.nn.init.normal_(submodel[-1].weight, std=0.5)
    margins = [step / 200 for step in range(200)]
    model.halting_margin = min(margins, key=lambda margin: abs(mean_exit(model, margin, batch) - target))
    return model


@torch.no_grad()
def mean_exit(model: DACT, margin: float, batch: dict[str, torch.Tensor]) -> float:
    model.halting_margin = margin
    return model(batch).exit_layer.double().mean().item()


def measure(rounds: int) -> dict[str, float]:
    """Seconds of a batch of 32 by early exit and at full depth, medians of alternating rounds, and their ratio."""
    batch = {"input_ids": torch.randint(3, 100, (32, 12))}
    model = spread_model(4.0, batch)
    rules = {"early exit": model.exit_rule, "full depth": replace(model.exit_rule, rule="never")}
    seconds: dict[str, list[float]] = {name: [] for name in rules}
    for _ in range(rounds):
        for name, rule in rules.items():
            model.exit_rule = rule
            start = time.perf_counter()
            model.early_exit(batch)
            seconds[name].append(time.perf_counter() - start)
    model.exit_rule = rules["early exit"]
    early, full = (statistics.median(values) for values in seconds.values())
    depth = model.early_exit(batch).exit_layer.double().mean().item()
    return {"mean exit layer": depth, "early exit, s": early, "full depth, s": full, "speed-up": full / early}


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=300)
    parser.add_argument("--output", type=Path)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    found = measure(arguments.rounds)
    print(json.dumps(found, indent=1))
    if arguments.output:
        arguments.output.write_text(json.dumps(found, indent=1) + "\n")
