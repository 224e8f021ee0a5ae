"""Early exit next to full depth on a tiny encoder in small batches, where overhead is all that
counts.

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
    """A model of 6 layers whose examples leave after about `target` layers on average, at a margin
    that is searched."""
    torch.manual_seed(0)
    model = DACT(encoder=TransformerEncoder(100, 6, 32, 2)).eval()
    torch.nn.init.normal_(model.encoder.tokens.weight)
    for submodel in model.classifier:
        torch.nn.init.normal_(submodel[-1].weight, std=0.5)
    margins = [step / 200 for step in range(200)]
    model.halting_margin = min(
        margins, key=lambda margin: abs(mean_exit(model, margin, batch) - target)
    )
    return model


@torch.no_grad()
def mean_exit(model: DACT, margin: float, batch: dict[str, torch.Tensor]) -> float:
    model.halting_margin = margin
    return model(batch).exit_layer.double().mean().item()


def measure(rounds: int) -> dict[str, float | list[float]]:
    """Return the cost of a batch of 32 by early exit and at full depth, and how many times cheaper
    early exit is.

    Each round runs both, in turn one or the other first, and gives one ratio. Processor time is
    what the batch costs; wall time also holds what other programs of the machine take."""
    batch = {"input_ids": torch.randint(3, 100, (32, 12))}
    model = spread_model(4.0, batch)
    rules = {"early exit": model.exit_rule, "full depth": replace(model.exit_rule, rule="never")}
    clocks = {"processor": time.process_time, "wall": time.perf_counter}
    seconds: dict[str, dict[str, list[float]]] = {
        clock: {name: [] for name in rules} for clock in clocks
    }
    for turn in range(rounds + 20):  # the first are for warming up
        for name in sorted(rules, reverse=turn % 2 == 1):
            model.exit_rule = rules[name]
            start = {clock: read() for clock, read in clocks.items()}
            model.early_exit(batch)
            for clock, read in clocks.items():
                seconds[clock][name].append(read() - start[clock])
    model.exit_rule = rules["early exit"]
    found: dict[str, float | list[float]] = {
        "mean exit layer": model.early_exit(batch).exit_layer.double().mean().item()
    }
    for clock, of in seconds.items():
        early, full = of["early exit"][20:], of["full depth"][20:]
        ratios = [one / other for one, other in zip(full, early, strict=True)]
        found[f"early exit, {clock} s"], found[f"full depth, {clock} s"] = map(
            statistics.median, (early, full)
        )
        found[f"speed-up, {clock}: quartiles"] = [
            round(ratio, 3) for ratio in statistics.quantiles(ratios, n=4)
        ]
    return found


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
