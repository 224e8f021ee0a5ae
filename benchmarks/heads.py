"""Frozen mode: on which states should the submodels learn, so that a trial tells how the final fit
would leave?

    python benchmarks/tuned.py vader2000 --seeds 0 1 2    # leaves the runs, unless they are there
    python benchmarks/heads.py --seeds 0 1 2

The default settings are fitted on frozen states, three times each, as trials of the third study
are. The encoder of the states learns for few or more epochs, from all texts or from three fifths of
them; then the submodels learn from the others, or else from all, with few steps (as on two fifths
of the texts) or with 2.3 times as many. All leave where the promise would set the margin on the
studies' validation examples. Next to them stands the final fit of the same settings, which trains
everything."""

from __future__ import annotations

import argparse
import contextlib
import json
import shutil
import statistics
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any
from unittest.mock import patch

import numpy as np
import yaml
from torch.utils.data import DataLoader, Subset

from dact import TuningEngine
from dact.calibration import Promise
from dact.calibration.answers import LayerAnswers
from dact.cli.quiet import quiet
from dact.data.batching import LengthGroupedSampler
from dact.factories import DataFactory, ModelFactory
from dact.files import read_tensors
from dact.tuning import fitting, prepared
from dact.tuning.outcome import Outcome, mean_outcome, outcome_of
from dact.tuning.trial import fit_settings

ROOT = Path(__file__).parent.parent
RESULTS = Path(__file__).parent / "results" / "heads.json"
REPEATS = 3
# share of the texts that the encoder learns from, where the submodels learn from the others
SEEN = 0.6


@dataclass(frozen=True)
class Variant:
    """One way to make the states.

    Args:
        epochs: Epochs of the encoder.
        head_epochs: Epochs of the submodels per epoch of the final fit.
        parted: Whether encoder and submodels learn from different texts.
    """

    epochs: int
    head_epochs: int = fitting.HEAD_EPOCHS
    parted: bool = False


VARIANTS = {
    "other texts than the encoder's, 3 epochs": Variant(3, 7, parted=True),
    "all texts, 3 epochs, more steps": Variant(3, 7),
    "all texts, 3 epochs": Variant(3),
    "all texts, 2 epochs, more steps": Variant(2, 7),
    "all texts, 2 epochs": Variant(2),
}


@contextlib.contextmanager
def parted(seed: int) -> Iterator[None]:
    """Let the encoder learn from one part of the texts, and the submodels from the other."""
    warm_up, compute = prepared._warm_up, prepared.compute_features

    def part(loader: DataLoader[Any], seen: bool) -> DataLoader[Any]:
        order = np.random.default_rng(seed).permutation(len(loader.dataset))
        count = round(SEEN * len(order))
        rows = sorted((order[:count] if seen else order[count:]).tolist())
        lengths = [int(loader.dataset.lengths[row]) for row in rows]
        batch = next(iter(loader))["labels"].shape[0]
        sampler = LengthGroupedSampler(lengths, batch, seed) if seen else None
        return DataLoader(
            Subset(loader.dataset, rows), batch, sampler=sampler, collate_fn=loader.collate_fn
        )

    def warm_up_of_part(folder: Path, recipe: Any, model: Any, data: Any, *others: Any) -> None:
        whole = data.train_dataloader()
        with patch.object(data, "train_dataloader", lambda: part(whole, True)):
            warm_up(folder, recipe, model, data, *others)

    def compute_part(encoder: Any, loader: DataLoader[Any], folder: Path, origin: str) -> None:
        compute(encoder, part(loader, False) if folder.name == "train" else loader, folder, origin)

    with (
        patch.object(prepared, "_warm_up", warm_up_of_part),
        patch.object(prepared, "compute_features", compute_part),
    ):
        yield


def measure(run: Path, folder: Path) -> dict[str, dict[str, float]]:
    """Return what early exit of the default settings gives, by how the states were made."""
    config = yaml.safe_load((run / "whole_config.yaml").read_text())
    found: dict[str, dict[str, float]] = {}
    for name, variant in VARIANTS.items():
        engine = make_engine(config, folder, variant.epochs)
        again = engine._begin(run.name)
        if not again.folder.joinpath("baseline").is_dir():
            shutil.copytree(run / "baseline", again.folder / "baseline")
        shutil.rmtree(again.folder / "features", ignore_errors=True)
        surveyed = engine._survey()
        settings, _ = surveyed.untuned
        with parted(surveyed.recipe.seed) if variant.parted else contextlib.nullcontext():
            ready = engine._prepare(again, surveyed)
        most = variant.head_epochs * ready.recipe.epochs
        with patch.multiple(fitting, HEAD_EPOCHS=variant.head_epochs, MOST_HEAD_EPOCHS=most):
            fits = [
                fit_settings(ready, settings, ready.recipe.seed + repeat)
                for repeat in range(REPEATS)
            ]
        found[name] = described(mean_outcome([fit.outcome(ready) for fit in fits]))
    stored = read_tensors(run / "confirmation" / "default_settings" / "answers.safetensors")[0]
    answers = LayerAnswers(**stored)
    right = ready.baseline.right(answers.target)
    found["the final fit"] = described(
        outcome_of(answers, ready.recipe.make_model(), ready.recipe.promise, right)
    )
    return found


def make_engine(config: dict[str, Any], folder: Path, epochs: int) -> TuningEngine:
    tuner = {**config["tuner"], "log_dir": str(folder), "warm_up_epochs": epochs}
    tuner["promise"] = tuner["promise"] and Promise(**tuner["promise"])
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
        cells = [
            f"{statistics.mean(found):.3f} ({', '.join(f'{value:.2f}' for value in found)})"
            for found in values
        ]
        lines.append(f"| {variant} | {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument(
        "--log_dir", type=Path, default=ROOT / "lightning_logs", help="where tuned.py left its runs"
    )
    arguments = parser.parse_args()
    quiet()
    runs = []
    for seed in arguments.seeds:
        with TemporaryDirectory() as folder:
            runs.append(measure(arguments.log_dir / f"vader2000-{seed}", Path(folder)))
        RESULTS.write_text(
            json.dumps({"seeds": arguments.seeds[: len(runs)], "runs": runs}, indent=1) + "\n"
        )
    print(table(runs))


if __name__ == "__main__":
    main()
