"""How often promises are kept: a simulation of every choice that a run makes before its promise.

    python benchmarks/coverage.py

A population of generated answers stands for all texts, so the truth is known. Each of 1,000 draws
has choosing examples and as many other examples. On the choosing examples, the best of 12
checkpoints is selected for each of four λ, by the loss without early exit, and the rule "promise"
selects λ. Then the margin for "at most one point below all layers" is set with 95 % confidence, and
by an estimate, on the other examples and on the choosing ones. A setting breaks the promise if it
loses more than a point on the population. Further rounds have too few examples for the confidence.
numpy generates the answers; dact makes the choices."""

from __future__ import annotations

import argparse
import json
from dataclasses import replace
from functools import cache
from itertools import product
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch

from dact.calibration import Promise, choose_setting
from dact.calibration.answers import LayerAnswers, Measured
from dact.functional import Halting, accumulate
from dact.tuning.outcome import outcome_of
from dact.tuning.selection import Point, select_lambda

RESULTS = Path(__file__).parent / "results" / "coverage.json"
LAMBDAS, CHECKPOINTS, LAYERS, CLASSES = (0.005, 0.02, 0.05, 0.1), 12, 6, 3
PROMISE = Promise(max_accuracy_loss=0.01)
ESTIMATE = replace(PROMISE, confidence=None)
MODEL: Any = SimpleNamespace(
    exit_rule=Halting(), class_weights=None
)  # what `outcome_of` reads from a model
KINDS = {"promise": PROMISE, "estimate": ESTIMATE}


def generated(texts: int) -> list[LayerAnswers]:
    """Return the answers of all checkpoints of all λ, and last of a baseline, to the same texts;
    hard texts are hard for all."""
    generator = np.random.default_rng(0)
    target = generator.integers(CLASSES, size=texts)
    label = np.eye(CLASSES)[target][:, None]  # [texts, 1, classes]
    hard = 3 * generator.random((texts, 1, 1))
    alike = generator.standard_normal((texts, LAYERS, CLASSES))
    found = []
    for lambda_reg in [*np.repeat(LAMBDAS, CHECKPOINTS), 0.0]:
        noise = 0.9 * alike + 0.4 * generator.standard_normal(alike.shape)
        rise = np.linspace(1, 4 + 0.1 * generator.standard_normal(), LAYERS)[:, None]
        y = torch.from_numpy(hard * noise + rise * label).float().softmax(-1)
        h = (1.2 - 2 * lambda_reg - y.amax(-1)).clamp(0, 1)  # a price for layers lowers it
        found.append(LayerAnswers(*accumulate(y, h), y, torch.from_numpy(target)))
    return found


def choose(
    models: list[LayerAnswers], losses: np.ndarray, baseline: torch.Tensor, rows: torch.Tensor
) -> int:
    """Return the index of the model that a run would choose on the texts of `rows`."""
    best = losses[:, rows].mean(1).reshape(len(LAMBDAS), CHECKPOINTS).argmin(
        1
    ) + CHECKPOINTS * np.arange(len(LAMBDAS))
    points = []
    for lambda_reg, number in zip(LAMBDAS, best, strict=True):
        found = outcome_of(models[number].take(rows), MODEL, PROMISE, baseline[rows])
        points.append(Point(lambda_reg, found.loss, found.layers, found))
    return int(
        best[points.index(select_lambda(points, "promise", allowed=PROMISE.max_accuracy_loss))]
    )


def simulate(
    models: list[LayerAnswers], reference: LayerAnswers, examples: int, draws: int
) -> list[dict[str, Any]]:
    """Return, for each way to set the margin, the share of promises kept, and the mean loss and
    layers on the population."""
    target = reference.target
    baseline = reference.a[:, -1].argmax(1) == target
    losses = np.stack(
        [-one.a[:, -1].gather(1, target[:, None])[:, 0].log().numpy() for one in models]
    )
    generator = torch.Generator().manual_seed(0)
    seen: dict[tuple[str, str], list[tuple[float, float]]] = {}
    for _ in range(draws):
        parts = dict(
            zip(
                ("other", "choosing"),
                torch.randint(len(target), (2, examples), generator=generator),
                strict=True,
            )
        )
        model = models[choose(models, losses, baseline, parts["choosing"])]
        for (kind, promise), (part, rows) in product(KINDS.items(), parts.items()):
            if examples >= (promise.examples_needed() or 0):
                margin = choose_setting(model.take(rows), promise).halting_margin
                seen.setdefault((kind, part), []).append(truth(model, margin))
    rows = []
    for (kind, part), points in seen.items():
        losses, layers = np.array(points).T
        rows.append(
            {
                "set by": kind,
                "on": f"{examples} {part}",
                "kept": float((losses <= PROMISE.most).mean()),
                "accuracy_loss": float(losses.mean()),
                "mean_exit_layer": float(layers.mean()),
            }
        )
    return rows


@cache
def truth(model: LayerAnswers, margin: float) -> tuple[float, float]:
    """Return the loss of accuracy below all layers and the mean exit layer on the population."""
    measured = Measured(model, model.exit_layers(Halting(margin=margin)))
    return -measured.difference(measured.full_depth.right)[0], measured.mean_exit_layer


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--texts", type=int, default=10_000, help="size of the population")
    parser.add_argument(
        "--examples",
        type=int,
        nargs="+",
        default=[1500, 1000, 260, 200, 100],
        help="numbers of choosing, and of other, examples",
    )
    parser.add_argument("--draws", type=int, default=1000)
    parser.add_argument("--results", type=Path, default=RESULTS)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    *models, reference = generated(arguments.texts)
    rows = [
        row
        for examples in arguments.examples
        for row in simulate(models, reference, examples, arguments.draws)
    ]
    print(
        "| margin set by | on examples | kept, % | mean loss, points | mean layers |",
        "|---" * 5 + "|",
        sep="\n",
    )
    for row in rows:
        kept, lost = 100 * row["kept"], 100 * row["accuracy_loss"]
        numbers = f"{kept:.1f} | {lost:.2f} | {row['mean_exit_layer']:.2f}"
        print(f"| {row['set by']} | {row['on']} | {numbers} |")
    arguments.results.write_text(
        json.dumps({"texts": arguments.texts, "draws": arguments.draws, "rows": rows}, indent=1)
    )


if __name__ == "__main__":
    main()
