"""What `dact tune` makes of a data set, next to what a user would take instead, at equal promises.

    python benchmarks/tuned.py vader2000 --seeds 0 1 2    # 2,000 texts of the VADER corpora, configs/quickstart.yaml
    python benchmarks/tuned.py tweets film                # a whole corpus each; also product and newspaper
    python benchmarks/tuned.py reviews                    # generated reviews, configs/reviews.yaml
    python benchmarks/tuned.py vader                      # all VADER corpora, configs/vader.yaml with bf16-mixed
    python benchmarks/tuned.py --table                    # only print the table of the stored results
    python benchmarks/tuned.py --sentences MODEL          # how many of the 30 sentences of tests/data a model has right

The real command runs first; each seed also divides the data anew. Next to the tuned model and the baseline stand, all at
the promise that the run made, its dial set on the same calibration examples:
    defaults    what the configuration makes without tuning
    encoder     a taught encoder of as many layers as the tuned model uses on validation, rounded up; all of them run
    multi-exit  a taught multi-exit of as many layers as the tuned model keeps; it leaves by the lead of y_n
The two peers start from the baseline's weights, have its probabilities as half of their targets, and the rates, epochs
and heads of the tuned model. The best epoch is chosen on validation data, and the test split is evaluated once. Errors are
standard errors of paired differences over the texts. Each run leaves a file in results/tuned/: a stopped call goes on.
"""

from __future__ import annotations

import argparse
import csv
import json
import math
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import yaml
from lightning.pytorch import LightningDataModule
from torch import Tensor

from dact import DACT, TextClassifier, calibrate
from dact.answers import mean_and_error
from dact.encoders.base import Batch
from dact.factories import DataFactory, ModelFactory
from dact.files import read_checkpoint, read_tensors
from dact.outputs import Loss
from dact.persistence import WEIGHTS_NAME
from dact.quiet import quiet
from dact.tuning.evaluation import evaluate
from dact.tuning.recipe import CALIBRATION_SHARE, DISTILLATION
from dact.tuning.training import make_trainer, resumable_fit, seeded, without_collapse_warning

ROOT = Path(__file__).parent.parent
RESULTS = Path(__file__).parent / "results" / "tuned"
SENTENCES = ROOT / "tests" / "data" / "sentences.tsv"
CORPORA = ("tweets", "film", "product", "newspaper")
DATA_SETS = {  # configuration and overrides
    "vader2000": ["quickstart.yaml"],
    **{name: ["quickstart.yaml", "--data.corpora", f"[{name}]", "--data.num_train", "null"] for name in CORPORA},
    "reviews": ["reviews.yaml"],
    "vader": ["vader.yaml", "--trainer.precision", "bf16-mixed"],
}
MEASURED_BATCH = 1024  # texts that early exit gets at a time
ROUNDS = 3  # in which the models take turns on the clock


class MultiExit(DACT):
    """A classifier on every layer, equally weighed; a confidence of 1, so that a_n is y_n and only the margin lets leave."""

    def loss(self, batch: Batch, lambda_reg: float | None = None) -> Loss:
        found = super().loss(batch, lambda_reg)
        return replace(found, loss=found.exit_loss)


@dataclass(frozen=True)
class Setting:
    """What all fits next to a run share.

    Args:
        config: The run's configuration, all defaults filled in.
        final: That of its final fit, with what tuning chose.
        folder: Folder of the run.
        seed: Seed of the run.
        promise: The promise that it made, as plain data.
    """

    config: Mapping[str, Any]
    final: Mapping[str, Any]
    folder: Path
    seed: int
    promise: dict[str, Any]

    @property
    def trainer(self) -> dict[str, Any]:
        return {name: value for name, value in self.config["trainer"].items() if value is not None}

    def data(self, section: Mapping[str, Any], teacher: Tensor | None = None, **overrides: Any) -> LightningDataModule:
        data: Any = DataFactory(dict(section))(**overrides)
        data.calibration_fraction = CALIBRATION_SHARE
        data.teacher_probabilities = teacher
        for stage in ("fit", "test"):
            data.prepare_data()
            data.setup(stage)
        return data  # type: ignore[no-any-return]

    def baseline(self) -> DACT:
        return DACT.from_pretrained(self.folder / "baseline" / "model")

    def fit(self, name: str, make: Callable[[], DACT], config: Mapping[str, Any], teacher: Tensor | None) -> DACT:
        """Fit as the run's final fit does, and return the model of the best epoch, in eval mode."""
        checkpoints = self.folder / "peers" / name
        with seeded(self.seed), without_collapse_warning():
            model, data = make(), self.data(config["data"], teacher)
            resumable_fit(
                self.trainer, model, data, checkpoints, epochs=config["trainer"]["max_epochs"], keep_best=True
            )
        model.load_state_dict(read_checkpoint(checkpoints / "best.ckpt")["state_dict"])
        return model.cpu().eval()

    def peer(self, kind: type[DACT], layers: int) -> DACT:
        """Return an unfitted peer: no confidence, a teacher, and the baseline's encoder."""
        model = ModelFactory(dict(self.final["model"]))(num_layers=layers)
        if kind is not DACT:
            model = kind.from_config(model.config(), encoder=model.encoder)
        weights, _ = read_tensors(self.folder / "baseline" / "model" / WEIGHTS_NAME)
        model.encoder.load_state_dict({name: weights[f"encoder.{name}"] for name in model.encoder.state_dict()})
        model.at_full_depth().distillation = DISTILLATION
        return model


def run_one(name: str, seed: int, log_dir: Path) -> dict[str, Any]:
    """Tune, fit the peers, measure, and return what the results file holds."""
    folder = log_dir / f"{name}-{seed}"
    config, seconds = tune(name, seed, folder)
    metrics = json.loads((folder / "final" / "metrics.json").read_text())
    final = yaml.safe_load((folder / "final" / "config.yaml").read_text())
    setting = Setting(config, final, folder, seed, metrics["calibration"]["promise"])
    teacher = read_tensors(folder / "baseline" / "answers.safetensors")[0]["probabilities"]
    used = math.ceil(metrics["validation"]["mean_exit_layer"])
    models = {
        "baseline": setting.baseline(),
        "defaults": setting.fit("defaults", ModelFactory(config["model"]), config, None),
        "tuned": DACT.from_pretrained(folder / "final" / "model"),
        "encoder": setting.fit(f"encoder-{used}", lambda: setting.peer(DACT, used), final, teacher),
        "multi-exit": setting.fit("multi-exit", lambda: setting.peer(MultiExit, metrics["layers"]), final, teacher),
    }
    models["multi-exit"].halting = "exact"  # by which a confidence of 1 lets none leave: the margin alone does
    data = setting.data(config["data"], batch_size=MEASURED_BATCH)
    precision = make_trainer(setting.trainer, enable_checkpointing=False).precision_plugin.forward_context
    with precision():
        for peer in ("defaults", "multi-exit"):
            calibrate(models[peer], data, **setting.promise)
    found = {
        split: {name: evaluate(model, loader, precision=precision, timed=False) for name, model in models.items()}
        for split, loader in (("validation", data.val_dataloader()), ("test", data.test_dataloader()))
    }
    with precision():
        speeds = texts_per_second(models, list(data.test_dataloader()))
    test, rows = found["test"], {}
    right = {name: evaluation.right.double() for name, evaluation in test.items()}
    for name_, model in models.items():
        answers = test[name_].answers
        full = (answers.a[:, -1].argmax(1) == answers.target).double()
        rows[name_] = {
            "layers": model.num_layers,
            "margin": model.halting_margin,
            **{split: _kept(evaluations[name_].entry) for split, evaluations in found.items()},
            "lost_to_full_depth": mean_and_error(full - right[name_]),
            "tuned_less_this": {
                "accuracy": mean_and_error(right["tuned"] - right[name_]),
                "layers": mean_and_error((test["tuned"].exit_layers - test[name_].exit_layers).double()),
            },
            "above_baseline": mean_and_error(right[name_] - right["baseline"]),
            "texts_per_second": speeds[name_],
        }
    return {
        "data": name,
        "seed": seed,
        "processor": processor(),
        "threads": torch.get_num_threads(),
        "precision": config["trainer"]["precision"] or "32-true",
        "tuning_seconds": seconds,
        "test_texts": len(right["tuned"]),
        "promise": setting.promise,
        "confirmation": metrics["confirmation"],
        "lambda_reg": metrics["lambda_reg"],
        "epochs": final["trainer"]["max_epochs"],
        "models": rows,
    }


def tune(name: str, seed: int, folder: Path) -> tuple[dict[str, Any], float]:
    """Run the command unless it has run, and return its whole configuration and how many seconds it took."""
    file, *overrides = DATA_SETS[name]
    command = [sys.executable, "-m", "dact", "tune", "--config", str(ROOT / "configs" / file), *overrides]
    command += ["--seed_everything", str(seed), "--data.seed", str(seed), "--run_tag", folder.name]
    command += [
        "--tuner.log_dir",
        str(folder.parent),
        "--tuner.compare_defaults",
        "false",
    ]  # they have no promise there
    printed = subprocess.run([*command, "--print_config"], check=True, capture_output=True, text=True).stdout
    clock = folder / "seconds.json"
    if not clock.is_file():
        start = time.perf_counter()
        subprocess.run(command, check=True)
        clock.write_text(json.dumps(time.perf_counter() - start))
    return yaml.safe_load(printed), json.loads(clock.read_text())


@torch.no_grad()
def texts_per_second(models: Mapping[str, DACT], batches: Sequence[Batch]) -> dict[str, float]:
    """Return the median speed of each model on all batches; they take turns. Making the batches is not timed."""
    seconds: dict[str, list[float]] = {name: [] for name in models}
    for _ in range(ROUNDS):
        for name, model in models.items():
            start = time.perf_counter()
            for batch in batches:
                model.early_exit(batch)
            seconds[name].append(time.perf_counter() - start)
    texts = sum(len(batch["labels"]) for batch in batches)
    return {name: texts / statistics.median(values) for name, values in seconds.items()}


def processor() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").is_file() else []
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "unknown")


def _kept(entry: Mapping[str, Any]) -> dict[str, float]:
    return {name: entry[name] for name in ("accuracy", "macro_f1", "mean_exit_layer", "agreement")}


# ---------------------------------------------------------------------- the table


def pooled(pairs: Sequence[Sequence[float]]) -> tuple[float, float]:
    """Return the mean of independent means and its standard error."""
    return statistics.mean(mean for mean, _ in pairs), math.sqrt(sum(error**2 for _, error in pairs)) / len(pairs)


def table(runs: Sequence[Mapping[str, Any]]) -> str:
    lines = [
        "| data | | layers kept | mean layers | accuracy, % | above the baseline | lost to own full depth | times as fast |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for data in DATA_SETS:
        own = [run for run in runs if run["data"] == data]
        for name in own[0]["models"] if own else ():
            rows = [run["models"][name] for run in own]
            speed = [
                row["texts_per_second"] / run["models"]["baseline"]["texts_per_second"]
                for row, run in zip(rows, own, strict=True)
            ]
            cells = [
                "/".join(str(row["layers"]) for row in rows),
                f"{statistics.mean(row['test']['mean_exit_layer'] for row in rows):.2f}",
                f"{100 * statistics.mean(row['test']['accuracy'] for row in rows):.2f}",
                points([row["above_baseline"] for row in rows]),
                points([row["lost_to_full_depth"] for row in rows]),
                f"{statistics.mean(speed):.2f}",
            ]
            lines.append(f"| {data if name == 'baseline' else ''} | {name} | " + " | ".join(cells) + " |")
    lines += ["", *summary(runs), ""]
    lines += sorted({f"{run['processor']}, {run['threads']} threads, {run['precision']}" for run in runs})
    return "\n".join(lines)


def points(pairs: Sequence[Sequence[float]]) -> str:
    mean, error = pooled(pairs)
    return f"{100 * mean:+.2f} ± {100 * error:.2f}"


def summary(runs: Sequence[Mapping[str, Any]]) -> list[str]:
    lines = []
    for name in ("defaults", "encoder", "multi-exit"):
        less = [run["models"][name]["tuned_less_this"] for run in runs]
        layers = statistics.mean(difference["layers"][0] for difference in less)
        lines.append(
            f"- tuned less {name}, {len(runs)} runs: {points([difference['accuracy'] for difference in less])} points of "
            f"accuracy, {layers:+.2f} layers"
        )
    won = [run for run in runs if "tuned beats" in run["confirmation"]]
    lines.append(f"- the confirmation took what was tuned in {len(won)} of {len(runs)} runs")
    promised = [run for run in runs if run["promise"]["max_accuracy_loss"] is not None]
    excess = [run["models"]["tuned"]["lost_to_full_depth"][0] - run["promise"]["max_accuracy_loss"] for run in promised]
    errors = [run["models"]["tuned"]["lost_to_full_depth"][1] for run in promised]
    broken = sum(over > 2 * error for over, error in zip(excess, errors, strict=True))
    lines.append(
        f"- promises: {broken} of {len(promised)} broken by more than two standard errors; loss less promise "
        f"{100 * statistics.mean(excess):+.2f} points on average"
    )
    return lines


# ---------------------------------------------------------------------- sentences of one's own


def sentences(model: str) -> str:
    """Return how many of the 30 sentences a model has right, and which it has wrong."""
    with SENTENCES.open(newline="") as file:
        rows = list(csv.DictReader(file, delimiter="\t"))
    answers = TextClassifier.from_pretrained(model)([row["text"] for row in rows])
    wrong = [(row, answer) for row, answer in zip(rows, answers, strict=True) if answer.label != row["label"]]
    lines = [f"{answer.label} instead of {row['label']}: {row['text']}" for row, answer in wrong]
    return "\n".join([*lines, f"{len(rows) - len(wrong)} of {len(rows)} sentences right"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", nargs="*", metavar="DATA", help=f"some of {', '.join(DATA_SETS)}")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--log_dir", type=Path, default=ROOT / "lightning_logs")
    parser.add_argument("--table", action="store_true", help="print the table of the stored results")
    parser.add_argument("--sentences", metavar="MODEL", help="folder of a model")
    arguments = parser.parse_args()
    if unknown := set(arguments.data) - DATA_SETS.keys():
        parser.error(f"unknown data: {', '.join(sorted(unknown))}; there are {', '.join(DATA_SETS)}")
    quiet()
    if arguments.sentences:
        print(sentences(arguments.sentences))
        return
    for name in [] if arguments.table else arguments.data:
        for seed in arguments.seeds:
            result = RESULTS / f"{name}-{seed}.json"
            if not result.is_file():
                found = run_one(name, seed, arguments.log_dir)
                RESULTS.mkdir(parents=True, exist_ok=True)
                result.write_text(json.dumps(found, indent=1) + "\n")
    print(table([json.loads(path.read_text()) for path in sorted(RESULTS.glob("*.json"))]))


if __name__ == "__main__":
    main()
