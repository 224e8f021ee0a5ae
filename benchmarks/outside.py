"""Time that `dact tune` spends outside of training: this checkout next to another one, in turn.

    git worktree add ../before fc91062
    python benchmarks/outside.py --before ../before              # six runs, about half an hour
    python benchmarks/outside.py --before ../before --rounds 1 --trials 1

Both run the quickstart of the other checkout, the generated reviews in frozen mode, with the same
number of trials and each with its own search space: the other one's has a learning rate of the
frozen encoder, which is refused today. What counts as training is what happens inside `fit`,
`validate`, `test` and `predict` of Lightning's Trainer; the rest is outside: imports, tokenizing,
states, studies, pictures, calibration, measurements."""

from __future__ import annotations

import argparse
import functools
import json
import os
import runpy
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).parent.parent
RESULTS = Path(__file__).parent / "results" / "outside.json"


def run_here(arguments: list[str]) -> None:
    """Run the command in this process, and print the seconds of all and of training."""
    start = time.perf_counter()
    import lightning.pytorch as pl

    training, depth = 0.0, 0

    def timed(method: Any) -> Any:
        @functools.wraps(method)
        def wrapped(*args: Any, **options: Any) -> Any:
            nonlocal training, depth
            begin, depth = time.perf_counter(), depth + 1
            try:
                return method(*args, **options)
            finally:
                depth -= 1
                if not depth:
                    training += time.perf_counter() - begin

        return wrapped

    for name in ("fit", "validate", "test", "predict"):
        setattr(pl.Trainer, name, timed(getattr(pl.Trainer, name)))
    sys.argv = ["dact", *arguments]
    try:
        runpy.run_module("dact", run_name="__main__", alter_sys=True)
    except SystemExit as error:
        if error.code:
            raise
    print("\n" + json.dumps({"all": time.perf_counter() - start, "training": training}))


def measure(checkout: Path, config: dict[str, Any], trials: int) -> dict[str, float]:
    """Run the command of a checkout in a fresh folder and a fresh process."""
    words = ["tune", "--config", "both.yaml", "--run_tag", "timed", "--tuner.n_trials", str(trials)]
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "both.yaml").write_text(yaml.safe_dump(config))
        done = subprocess.run(
            [
                sys.executable,
                str(Path(__file__).resolve()),
                "--",
                *words,
                "--trainer.accelerator",
                "cpu",
            ],
            cwd=folder,
            env={**os.environ, "PYTHONPATH": str(checkout.resolve())},
            capture_output=True,
            text=True,
            check=False,
        )
    if done.returncode:
        raise SystemExit(f"{checkout}: {done.stdout[-2000:]}{done.stderr[-2000:]}")
    found = json.loads(done.stdout.splitlines()[-1])
    return {**found, "outside": found["all"] - found["training"]}


def main() -> None:
    if sys.argv[1:2] == ["--"]:
        run_here(sys.argv[2:])
        return
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--before", type=Path, required=True, help="the other checkout")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--trials", type=int, default=6, help="trials of each study")
    parser.add_argument("--results", type=Path, default=RESULTS)
    arguments = parser.parse_args()
    config = yaml.safe_load((arguments.before / "configs" / "quickstart.yaml").read_text())
    config["tuner"].pop("search_space", None)
    runs: dict[str, list[dict[str, float]]] = {"before": [], "now": []}
    for _ in range(arguments.rounds):
        for name, checkout in (("before", arguments.before), ("now", ROOT)):
            runs[name].append(measure(checkout, config, arguments.trials))
            print(name, {key: round(value, 1) for key, value in runs[name][-1].items()}, flush=True)
    medians = {
        name: {key: statistics.median(run[key] for run in found) for key in found[0]}
        for name, found in runs.items()
    }
    print("\n| | all, s | training, s | outside, s |\n|---|---|---|---|")
    for name, found in medians.items():
        print(f"| {name} | {found['all']:.1f} | {found['training']:.1f} | {found['outside']:.1f} |")
    ratios = [
        now["outside"] / before["outside"]
        for before, now in zip(runs["before"], runs["now"], strict=True)
    ]
    print(
        f"\noutside of training, now / before, median of the pairs: {statistics.median(ratios):.2f}"
    )
    arguments.results.write_text(
        json.dumps({"runs": runs, "medians": medians, "ratios": ratios}, indent=1) + "\n"
    )


if __name__ == "__main__":
    main()
