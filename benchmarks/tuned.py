"""What `dact tune` makes of a data set, next to the alternatives of a user, at equal promises.

    python benchmarks/tuned.py vader2000 --seeds 0 1 2
    python benchmarks/tuned.py tiny --results OTHER    # to see that it runs
    python benchmarks/tuned.py --table                 # only print the table of the stored results
    python benchmarks/tuned.py --sentences MODEL       # the sentences of tests/data

Data sets: `vader2000` (2,000 texts of VADER, configs/quickstart.yaml with 6 trials), `tweets`,
`film`, `product` and `newspaper` (one corpus each), `reviews` (generated), `imbalanced` (450 texts,
four fifths of them positive) and `vader` (all corpora, configs/vader.yaml with bf16-mixed).

The real command runs first; each seed also divides the data differently. The tuned model and the
whole encoder are compared with these, at the promise of the run and with dials set on the same
examples:

- your file: the configuration without tuning.
- cut encoder: taught, with as many layers as the tuned model uses on validation, rounded up.
- plain exits: taught, on as many layers as the tuned model keeps; texts leave by the lead.

The last two start from the teacher's weights and have its probabilities as half of their targets,
with the rates, epochs, heads and consistency of the tuned model. The last epoch of each model is
measured (weights averaged over the last steps, except for whole encoder and your file), once on the
test split; for vader2000, two thirds of the training texts that its 2,000 leave out are added to it
(speeds are those on the test split). Errors are standard errors of paired differences over the
texts, or between the runs if these are larger. The tuned model is also compared with each other
model at the margin that takes as many layers on validation texts. Each run writes a file to
results/tuned/, so that a stopped call resumes."""

from __future__ import annotations

import argparse
import csv
import json
import math
import re
import statistics
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import yaml
from lightning.pytorch import LightningDataModule
from torch import Tensor

from dact import DACT, TextClassifier, calibrate
from dact.calibration import SETTINGS
from dact.calibration.answers import LayerAnswers, exits_by_setting, layer_answers, mean_and_error
from dact.cli.output import quiet
from dact.encoders.base import Batch
from dact.factories import build_data, build_model
from dact.files import read_checkpoint, read_tensors
from dact.functional import answer_at
from dact.outputs import Loss
from dact.tuning.baseline import ANSWERS, TEACHER
from dact.tuning.evaluation import evaluate
from dact.tuning.recipe import DISTILLATION
from dact.tuning.trainer import make_trainer, resumable_fit, seeded

ROOT = Path(__file__).parent.parent
RESULTS = Path(__file__).parent / "results" / "tuned"
SENTENCES = ROOT / "tests" / "data" / "sentences.tsv"
CORPORA = ("tweets", "film", "product", "newspaper")
TINY = ["--trainer.max_epochs", "1", "--tuner.n_trials", "1", "--tuner.warm_up_epochs", "1"]
QUICKSTART = ["quickstart.yaml", "--tuner.n_trials", "6"]
DATA_SETS = {  # configuration and overrides
    "vader2000": QUICKSTART,
    **{
        name: [*QUICKSTART, "--data.corpora", f"[{name}]", "--data.num_train", "null"]
        for name in CORPORA
    },
    "reviews": ["reviews.yaml"],
    "imbalanced": [*QUICKSTART, "--config", str(ROOT / "benchmarks" / "imbalanced.yaml")],
    "vader": ["vader.yaml", "--trainer.precision", "bf16-mixed"],
    "tiny": [
        "reviews.yaml",
        *["--data.num_train", "400", "--data.num_val", "640", "--data.num_test", "200"],
        *TINY,
    ],
}
# A few thousand texts are too few to detect half a point.
TESTED = {"vader2000": {"class_path": "texts.MoreTests"}}
MEASURED_BATCH = 1024  # texts per call of early exit
ROUNDS = 5  # rounds in which the models take turns to be timed


class MultiExit(DACT):
    """A classifier on every layer, equally weighed. The confidence is 1, so a_n is y_n and texts
    leave by the margin alone."""

    def loss(self, batch: Batch, lambda_reg: float | None = None) -> Loss:
        found = super().loss(batch, lambda_reg)
        return replace(found, loss=found.exit_loss)


class OneExit(MultiExit):
    """A classifier on the last layer alone."""

    def _submodels(self, batch: Batch) -> tuple[Tensor, Tensor, Tensor]:
        logits, y, h = super()._submodels(batch)
        return logits[:, -1:], y[:, -1:], h[:, -1:]


@dataclass(frozen=True)
class Setting:
    """A run of the command; its peers are fitted like its final fit.

    Args:
        folder: Folder of the run.
        seed: Seed of the run.
        config: Configuration of the run, with all defaults.
        final: Configuration of the final fit, with the tuned settings.
    """

    folder: Path
    seed: int
    config: dict[str, Any]
    final: dict[str, Any]

    @classmethod
    def of(cls, folder: Path, seed: int) -> Setting:
        """Read the setting of a finished run."""
        files = ("whole_config.yaml", "final/config.yaml")
        return cls(folder, seed, *(yaml.safe_load((folder / file).read_text()) for file in files))

    @property
    def aside(self) -> float | None:
        """The share of the validation texts that sets the dials, withheld from the studies; None if
        there is none."""
        share: float | None = self.final["data"]["init_args"]["calibration_fraction"]
        return share

    @property
    def trainer(self) -> dict[str, Any]:
        return {name: value for name, value in self.config["trainer"].items() if value is not None}

    def data(
        self, section: dict[str, Any], teacher: Tensor | None = None, **overrides: Any
    ) -> LightningDataModule:
        data: Any = build_data(section, **overrides)
        data.calibration_fraction, data.teacher_probabilities = self.aside, teacher
        data.prepare_data()
        for stage in ("fit", "test"):
            data.setup(stage)
        return data  # type: ignore[no-any-return]

    def defaults(self) -> DACT:
        """Fit the configuration without tuning, and return the model."""
        with seeded(self.seed):
            return self.fit("defaults", build_model(self.config["model"]), self.config)

    def peer(self, kind: type[DACT], layers: int) -> DACT:
        """Fit a peer with the tuned settings but no confidence; the baseline is its teacher and its
        start."""
        with seeded(self.seed):
            dact = build_model(self.final["model"], num_layers=layers)
            model = kind.from_config(dact.config(), encoder=dact.encoder).at_full_depth()
            model.consistency = dact.consistency
            return self.fit(f"{kind.__name__}-{layers}", model, self.final, self.taught(model))

    def taught(self, model: DACT) -> Tensor:
        """Load the baseline's encoder into `model`, enable distillation, and return the teacher's
        probabilities."""
        weights = read_tensors(self.folder / "whole_encoder" / TEACHER)[0]
        model.encoder.load_state_dict({name: weights[name] for name in model.encoder.state_dict()})
        model.distillation = DISTILLATION
        return read_tensors(self.folder / "whole_encoder" / ANSWERS)[0]["probabilities"]

    def fit(
        self,
        name: str,
        model: DACT,
        config: dict[str, Any],
        teacher: Tensor | None = None,
        epochs: int | None = None,
        **overrides: Any,
    ) -> DACT:
        """Fit a model by `config`, and return the model of the last epoch in eval mode."""
        checkpoints, epochs = (
            self.folder / "peers" / name,
            epochs or config["trainer"]["max_epochs"],
        )
        data = self.data(config["data"], teacher, **overrides)
        taught = teacher is not None  # fitted like the final fit; otherwise as by `dact fit`
        resumable_fit(self.trainer, model, data, checkpoints, epochs=epochs, average=taught)
        model.load_state_dict(read_checkpoint(checkpoints / "last.ckpt")["state_dict"])
        return model.cpu().eval()


def tune(name: str, seed: int, folder: Path, *more: str) -> float | None:
    """Run the command unless it has run, store its complete configuration, and return its seconds;
    None if it was resumed."""
    clock = folder / "seconds.json"
    if not clock.is_file():
        file, *overrides = [*DATA_SETS[name], *more]
        command = [
            sys.executable,
            "-m",
            "dact",
            "tune",
            "--config",
            str(ROOT / "configs" / file),
            *overrides,
        ]
        command += [
            "--seed_everything",
            str(seed),
            "--data.seed",
            str(seed),
            "--run_tag",
            folder.name,
        ]
        # The defaults are fitted here, so that they are timed as well.
        command += ["--tuner.log_dir", str(folder.parent), "--tuner.compare_defaults", "false"]
        config = subprocess.run(
            [*command, "--print_config"], check=True, stdout=subprocess.PIPE, text=True
        ).stdout
        resumed, start = folder.exists(), time.perf_counter()
        subprocess.run(command, check=True)
        (folder / "whole_config.yaml").write_text(config)
        clock.write_text(json.dumps(None if resumed else time.perf_counter() - start))
    seconds: float | None = json.loads(clock.read_text())
    return seconds


def run_one(name: str, seed: int, folder: Path) -> dict[str, Any]:
    """Tune, fit the peers, measure, and return the content of the results file."""
    seconds = tune(name, seed, folder)
    metrics = json.loads((folder / "final" / "metrics.json").read_text())
    took = re.split(r"[,(]", metrics["confirmation"])[0].strip()
    promise = metrics["calibration"]["promise"]
    setting = Setting.of(folder, seed)
    config, final = setting.config, setting.final
    models = {
        "baseline": DACT.from_pretrained(folder / "whole_encoder" / "model"),
        "defaults": setting.defaults(),
        "tuned": DACT.from_pretrained(folder / "final" / "model"),
        "encoder": setting.peer(OneExit, math.ceil(metrics["validation"]["mean_exit_layer"])),
        "multi-exit": setting.peer(MultiExit, metrics["layers"]),
    }
    models[
        "multi-exit"
    ].halting = "exact"  # with a confidence of 1, no text leaves by proof: only the margin acts
    data = setting.data(config["data"], batch_size=MEASURED_BATCH)
    precision = make_trainer(setting.trainer).precision_plugin.forward_context
    with precision():
        for peer in ("defaults", "multi-exit"):
            calibrate(models[peer], data, **promise)
        speeds = texts_per_second(models, list(data.test_dataloader()))
        validation = {n: layer_answers(model, data.val_dataloader()) for n, model in models.items()}
    tested = setting.data({**config["data"], **TESTED.get(name, {})}, batch_size=MEASURED_BATCH)
    test = {
        n: evaluate(m, tested.test_dataloader(), precision=precision) for n, m in models.items()
    }
    right = {n: evaluation.measured.right.double() for n, evaluation in test.items()}
    rows = {}
    for n, evaluation in test.items():
        answers = evaluation.measured.answers
        full = (answers.a[:, -1].argmax(1) == answers.target).double()
        rows[n] = {
            "layers": models[n].num_layers,
            "margin": models[n].halting_margin,
            "texts_per_second": speeds[n],
            **{
                key: evaluation.entry[key]
                for key in (
                    "accuracy",
                    "macro_f1",
                    "majority_share",
                    "mean_exit_layer",
                    "agreement",
                )
            },
            # Paired differences over the texts: mean and standard error.
            "lost_to_full_depth": mean_and_error(full - right[n]),
            "above_baseline": mean_and_error(right[n] - right["baseline"]),
            "tuned_above_this": mean_and_error(right["tuned"] - right[n]),
        }
        if n not in ("baseline", "tuned"):
            exits = validation[n].exit_layers(models[n].exit_rule)
            layers = exits.double().mean().item()
            hits, mean = turned(
                models["tuned"], validation["tuned"], test["tuned"].measured.answers, layers
            )
            apart = mean_and_error(hits - right[n])
            rows[n]["at_as_many_layers"] = {"accuracy": apart, "layers": mean}
    threads = f"{torch.get_num_threads()} threads"
    return {
        "data": name,
        "seed": seed,
        "machine": f"{processor()}, {threads}, {config['trainer']['precision'] or '32-true'}",
        "tuning_seconds": seconds,
        "test_texts": len(right["tuned"]),
        "promise": promise,
        "took": took,
        "confirmation": metrics["confirmation"],
        "settings": {**final["model"], "max_epochs": final["trainer"]["max_epochs"]},
        **({"sentences": sentences(folder / "final" / "model")[0]} if name == "vader2000" else {}),
        "models": rows,
    }


def turned(
    model: DACT, validation: LayerAnswers, test: LayerAnswers, layers: float
) -> tuple[Tensor, float]:
    """Turn the margin of `model` to the largest with these mean layers or fewer on validation
    texts; return which test examples are right then, and their mean layers."""
    dial = "halting_margin"
    exits = exits_by_setting(validation, model.exit_rule, dial)
    margins = [m for m in SETTINGS[dial] if exits(m).double().mean().item() <= layers]
    margin = max(margins, default=min(SETTINGS[dial]))
    at = exits_by_setting(test, model.exit_rule, dial)(margin)
    return (answer_at(test.a, at).argmax(1) == test.target).double(), at.double().mean().item()


@torch.no_grad()
def texts_per_second(models: dict[str, DACT], batches: Sequence[Batch]) -> dict[str, float]:
    """Return the median speed of each model on all batches, in texts per second.

    The models take turns, after a warm-up round. The time to make the batches is excluded.
    """
    seconds: dict[str, list[float]] = {name: [] for name in models}
    for name in [*models] * (1 + ROUNDS):
        start = time.perf_counter()
        for batch in batches:
            models[name].early_exit(batch)
        seconds[name].append(time.perf_counter() - start)
    texts = sum(len(batch["labels"]) for batch in batches)
    return {name: texts / statistics.median(values[1:]) for name, values in seconds.items()}


def processor() -> str:
    """Return the name of the processor from /proc/cpuinfo."""
    return next(
        line for line in Path("/proc/cpuinfo").read_text().splitlines() if "model name" in line
    ).split(": ")[1]


# ---------------------------------------------------------------------- the table

# The names of the models in results files, and in the table.
NAMES = {
    "baseline": "whole encoder",
    "defaults": "your file",
    "tuned": "tuned",
    "encoder": "cut encoder",
    "multi-exit": "plain exits",
}
# The names of the candidates in earlier runs, and today.
TOOK = {
    "default settings": "your file's settings",
    "first trial": "recommended",
    "runner-up": "second choice of λ",
}


def table(runs: Sequence[dict[str, Any]]) -> str:
    lines = [
        "| data (seeds) | model | layers kept | mean layers | test accuracy, % | macro F1 "
        "| above whole encoder, points | tuned above it at as many layers | times as fast |",
        "|---" * 9 + "|",
    ]
    for data in DATA_SETS:
        own = [run for run in runs if run["data"] == data]
        seeds = ", ".join(str(run["seed"]) for run in own)
        for name, shown in NAMES.items() if own else ():
            rows = [run["models"][name] for run in own]
            above = [row["above_baseline"] for row in rows]
            turned = [
                row["at_as_many_layers"]["accuracy"] for row in rows if "at_as_many_layers" in row
            ]
            speeds = [
                row["texts_per_second"] / run["models"]["baseline"]["texts_per_second"]
                for row, run in zip(rows, own, strict=True)
            ]
            cells = [
                f"{data} ({seeds})" if name == "baseline" else "",
                shown,
                ", ".join(str(row["layers"]) for row in rows),
                f"{statistics.mean(row['mean_exit_layer'] for row in rows):.2f}",
                f"{100 * statistics.mean(row['accuracy'] for row in rows):.2f}",
                f"{statistics.mean(row['macro_f1'] for row in rows):.3f}",
                points(above) if name != "baseline" else "",
                points(turned) if turned else "",
                f"{statistics.mean(speeds):.2f}",
            ]
            lines.append(f"| {' | '.join(cells)} |")
    lines.append("")
    for name in ("defaults", "encoder", "multi-exit"):
        others = [run["models"][name] for run in runs]
        apart = points([row["tuned_above_this"] for row in others])
        tuned = statistics.mean(run["models"]["tuned"]["mean_exit_layer"] for run in runs)
        layers = signed(tuned - statistics.mean(row["mean_exit_layer"] for row in others))
        lines.append(f"- tuned less {NAMES[name]}: {apart} points of accuracy, {layers} layers")
        having = [row["at_as_many_layers"] for row in others if "at_as_many_layers" in row]
        if having:  # earlier runs lack it
            equal = points([row["accuracy"] for row in having])
            lines.append(f"    - at as many layers ({len(having)} runs): {equal}")
    took = Counter(run["took"] for run in runs)
    found = ", ".join(f"{n} × {TOOK.get(name, name)}" for name, n in took.items())
    lines.append(f"- the re-fit under new seeds took: {found}")
    lines.append(f"- {promises(runs)}")
    return "\n".join([*lines, *sorted({f"- {run['machine']}" for run in runs})])


def promises(runs: Sequence[dict[str, Any]]) -> str:
    """Return a line on how many promises were broken on test texts by over two standard errors."""
    lost = [run["models"]["tuned"]["lost_to_full_depth"] for run in runs]
    excess = [
        mean - run["promise"]["max_accuracy_loss"]
        for (mean, _), run in zip(lost, runs, strict=True)
    ]
    broken = sum(over > 2 * error for over, (_, error) in zip(excess, lost, strict=True))
    mean = signed(100 * statistics.mean(excess))
    return f"promises broken: {broken} of {len(runs)}; loss less promise: {mean} points on average"


def pooled(pairs: Sequence[Sequence[float]]) -> tuple[float, float]:
    """Return the mean over the runs with its standard error, from the texts or from the runs,
    whichever is larger."""
    means = [mean for mean, _ in pairs]
    of_texts = math.hypot(*(error for _, error in pairs)) / len(pairs)
    of_runs = statistics.stdev(means) / len(means) ** 0.5 if len(means) > 1 else 0.0
    return statistics.mean(means), max(of_texts, of_runs)


def points(pairs: Sequence[Sequence[float]]) -> str:
    """Return the mean over the runs with its standard error, in points."""
    mean, error = pooled(pairs)
    return f"{signed(100 * mean)} ± {100 * error:.2f}"


def signed(value: float) -> str:
    """Return a value with two decimals and its sign; 0 has no sign."""
    return f"{value:+.2f}".replace("-", "−") if abs(value) >= 0.005 else "0.00"


# ---------------------------------------------------------------------- custom sentences


def sentences(model: str | Path) -> tuple[int, list[str]]:
    """Return how many of the 30 sentences a model gets right, and a line for each wrong one."""
    with SENTENCES.open(newline="") as file:
        rows = list(csv.DictReader(file, delimiter="\t"))
    answers = TextClassifier.from_pretrained(model)([row["text"] for row in rows])
    wrong = [
        (row, answer)
        for row, answer in zip(rows, answers, strict=True)
        if answer.label != row["label"]
    ]
    lines = [f"{answer.label} instead of {row['label']}: {row['text']}" for row, answer in wrong]
    return len(rows) - len(wrong), lines


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("data", nargs="*", metavar="DATA", help=f"some of {', '.join(DATA_SETS)}")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--log_dir", type=Path, default=ROOT / "lightning_logs")
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of the results")
    parser.add_argument(
        "--table", action="store_true", help="print the table of the stored results"
    )
    parser.add_argument("--sentences", metavar="MODEL", help="folder of a model")
    arguments = parser.parse_args()
    if unknown := set(arguments.data) - DATA_SETS.keys():
        parser.error(
            f"unknown data: {', '.join(sorted(unknown))}; there are {', '.join(DATA_SETS)}"
        )
    quiet()
    if arguments.sentences:
        right, wrong = sentences(arguments.sentences)
        print("\n".join([*wrong, f"{right} of {right + len(wrong)} sentences right"]))
        return
    if arguments.table:
        arguments.data = []
    runs = [*measured(arguments, run_one).values()]
    print(table(runs) if runs else f"no results in {arguments.results}")


def measured(
    arguments: argparse.Namespace, measure: Callable[[str, int, Path], dict[str, Any]]
) -> dict[str, dict[str, Any]]:
    """Measure the runs that have no result yet, store each in its own file, and return all stored
    results by name."""
    for name in arguments.data:
        for seed in arguments.seeds:
            result = arguments.results / f"{name}-{seed}.json"
            if not result.is_file():
                found = measure(name, seed, arguments.log_dir / f"{name}-{seed}")
                arguments.results.mkdir(parents=True, exist_ok=True)
                result.write_text(json.dumps(found, indent=1) + "\n")
    return {
        path.stem: json.loads(path.read_text()) for path in sorted(arguments.results.glob("*.json"))
    }


if __name__ == "__main__":
    main()
