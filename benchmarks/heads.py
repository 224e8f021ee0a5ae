"""Frozen mode: on which states should the submodels learn, so that a trial tells how the final fit would leave?

    python benchmarks/tuned.py vader2000 --seeds 0 1 2    # leaves the runs, unless they are there
    python benchmarks/heads.py --seeds 0 1 2

The default settings are fitted on frozen states, three times each, as trials of the third study are. The encoder of the
states learns from three fifths of the texts and the submodels from the others (what `dact tune` does), or both from all
texts, or both from all texts with one epoch for the encoder, also with so few epochs for the submodels that they take as
many steps as on two fifths of the texts. All leave where the promise would set the margin on the studies' validation
examples. Next to them stands the final fit of the same settings, which trains everything.
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
from collections.abc import Callable, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any
from unittest.mock import patch

import yaml

from dact import TuningEngine
from dact.answers import LayerAnswers
from dact.calibration import Promise
from dact.cli.quiet import quiet
from dact.factories import DataFactory, ModelFactory
from dact.files import read_tensors
from dact.tuning import fitting, prepared
from dact.tuning.outcome import Outcome, mean_outcome, outcome_of
from dact.tuning.trial import fit_settings

ROOT = Path(__file__).parent.parent
RESULTS = Path(__file__).parent / "results" / "heads.json"
REPEATS = 3
Divide = Callable[[int, int | None], tuple[list[int], list[int]]]


def all_for_both(examples: int, seed: int | None) -> tuple[list[int], list[int]]:
    return list(range(examples)), list(range(examples))


VARIANTS: dict[str, tuple[Divide, int | None, int]] = {  # how texts are divided, epochs of the encoder, HEAD_EPOCHS
    "other texts than the encoder's": (prepared._divide, None, fitting.HEAD_EPOCHS),
    "the encoder's texts": (all_for_both, None, fitting.HEAD_EPOCHS),
    "the encoder's texts, one epoch": (all_for_both, 1, fitting.HEAD_EPOCHS),
    "the encoder's texts, one epoch, few steps": (all_for_both, 1, 3),
}


def measure(run: Path, folder: Path) -> dict[str, dict[str, float]]:
    """Return what early exit of the default settings gives, by where the submodels learned."""
    config = yaml.safe_load((run / "whole_config.yaml").read_text())
    found: dict[str, dict[str, float]] = {}
    for name, (divide, epochs, head_epochs) in VARIANTS.items():
        engine = make_engine(config, folder, epochs)
        again = engine._begin(run.name)
        if not again.folder.joinpath("baseline").is_dir():
            shutil.copytree(run / "baseline", again.folder / "baseline")
        shutil.rmtree(again.folder / "features", ignore_errors=True)
        surveyed = engine._survey()
        settings, _ = surveyed.untuned
        with patch.object(prepared, "_divide", divide):
            ready = engine._prepare(again, surveyed)
        with patch.object(fitting, "HEAD_EPOCHS", head_epochs):
            fits = [fit_settings(ready, settings, ready.recipe.seed + repeat) for repeat in range(REPEATS)]
        found[name] = described(mean_outcome([fit.outcome(ready) for fit in fits]))
    stored = read_tensors(run / "confirmation" / "default_settings" / "answers.safetensors")[0]
    answers = LayerAnswers(**stored)
    right = ready.baseline.right(answers.target)
    found["the final fit"] = described(outcome_of(answers, ready.recipe.make_model(), ready.recipe.promise, right))
    return found


def make_engine(config: dict[str, Any], folder: Path, epochs: int | None) -> TuningEngine:
    tuner = {**config["tuner"], "log_dir": str(folder)}
    tuner["promise"] = tuner["promise"] and Promise(**tuner["promise"])
    if epochs is not None:
        tuner["warm_up_epochs"] = epochs
    engine = TuningEngine(
        config["model"]["output_dimension"],
        model=ModelFactory(config["model"]),
        data=DataFactory(config["data"]),
        trainer={name: value for name, value in config["trainer"].items() if value is not None},
        seed=config["seed_everything"],
        **tuner,
    )
    engine.progress.console.quiet = True
    return engine


def described(outcome: Outcome) -> dict[str, float]:
    return {
        "task loss": outcome.loss,
        "layers": outcome.layers,
        "points above the baseline": -100 * outcome.lost.double().mean().item(),
    }


def table(runs: Sequence[dict[str, dict[str, float]]]) -> str:
    names = list(runs[0]["the final fit"])
    lines = [f"| submodels learn on | {' | '.join(names)} |", "|---" * (len(names) + 1) + "|"]
    for variant in runs[0]:
        values = [[run[variant][name] for run in runs] for name in names]
        cells = [f"{statistics.mean(found):.2f} ({', '.join(f'{value:.2f}' for value in found)})" for found in values]
        lines.append(f"| {variant} | {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--log_dir", type=Path, default=ROOT / "lightning_logs", help="where tuned.py left its runs")
    arguments = parser.parse_args()
    quiet()
    runs = []
    for seed in arguments.seeds:
        with TemporaryDirectory() as folder:
            runs.append(measure(arguments.log_dir / f"vader2000-{seed}", Path(folder)))
        RESULTS.write_text(json.dumps({"seeds": arguments.seeds[: len(runs)], "runs": runs}, indent=1) + "\n")
    print(table(runs))


if __name__ == "__main__":
    main()
