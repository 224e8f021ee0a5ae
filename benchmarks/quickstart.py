"""What `dact tune` makes of the embedded data: configs/quickstart.yaml beside an encoder truncated to its mean depth.

    python benchmarks/quickstart.py              # 3 seeds
    python benchmarks/quickstart.py --table      # only print the table of the stored results

The truncated encoder has as many layers as early exit used on average on validation data, rounded up, and one head; it
is trained for as many epochs as the encoder and the submodels of the tuned model together, with the warm-up's settings.
"""

from __future__ import annotations

import argparse
import json
import math
import shutil
import statistics
import subprocess
import sys
import time
from pathlib import Path

import lightning.pytorch as pl
import optuna
import torch
import yaml

from dact import DACT
from dact.cli.quiet import quiet
from dact.factories import DataFactory, ModelFactory

ROOT = Path(__file__).parent.parent
CONFIG = ROOT / "configs" / "quickstart.yaml"
RESULTS = Path(__file__).parent / "results" / "quickstart.json"
PICTURE = RESULTS.with_name("quickstart_depth.png")


def tune(seed: int, folder: Path) -> dict[str, object]:
    """Run the command and read what it left."""
    tag = f"quickstart-{seed}"
    command = [sys.executable, "-m", "dact", "tune", "--config", CONFIG, "--seed_everything", seed, "--run_tag", tag]
    start = time.perf_counter()
    subprocess.run([*map(str, command), "--tuner.log_dir", str(folder)], check=True)
    seconds = time.perf_counter() - start
    final = folder / tag / "final"
    metrics = json.loads((final / "metrics.json").read_text())
    defaults = json.loads((final / "defaults" / "metrics.json").read_text())
    studies = optuna.get_all_study_names(f"sqlite:///{folder / tag / 'studies.db'}")
    trials = [
        trial
        for name in studies
        for trial in optuna.load_study(study_name=name, storage=f"sqlite:///{folder / tag / 'studies.db'}").trials
    ]
    return {
        "seed": seed,
        "seconds": seconds,
        "trials": len(trials),
        "pruned": sum(trial.state == optuna.trial.TrialState.PRUNED for trial in trials),
        "validation": metrics["validation"],
        "test": metrics["test"],
        "defaults": defaults["test"],
        "lambda_reg": metrics["lambda_reg"],
        "exit_by_depth": exit_by_depth(final / "model"),
        "num_epochs": yaml.safe_load((folder / tag / "external_config.yaml").read_text())["num_epochs"],
        "picture": str(final / "depth_against_exit_layer.png"),
    }


@torch.no_grad()
def exit_by_depth(model: Path) -> dict[int, float]:
    """The mean exit layer of the test examples of each depth."""
    data = DataFactory(yaml.safe_load(CONFIG.read_text())["data"])()
    data.setup("test")
    exits: dict[int, list[int]] = {}
    classifier = DACT.from_pretrained(model)
    for batch in data.test_dataloader():
        for depth, layer in zip(batch["depth"].tolist(), classifier(batch).exit_layer.tolist(), strict=True):
            exits.setdefault(depth, []).append(layer)
    return {depth: statistics.mean(layers) for depth, layers in sorted(exits.items())}


def truncated(run: dict[str, object]) -> dict[str, object]:
    """Train an encoder of the run's own mean depth, rounded up, to its last layer, and test it."""
    config = yaml.safe_load(CONFIG.read_text())
    layers = math.ceil(run["validation"]["mean_exit_layer"])  # type: ignore[index]
    config["model"]["encoder"]["init_args"]["num_layers"] = layers
    pl.seed_everything(run["seed"], verbose=False)  # type: ignore[arg-type]
    model = ModelFactory(config["model"])(lambda_reg=0.0, exit_loss_weight=0.0, halting="never")
    data = DataFactory(config["data"])()
    epochs = config["tuner"]["warm_up_epochs"] + run["num_epochs"]
    trainer = pl.Trainer(
        max_epochs=epochs,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        gradient_clip_val=config["trainer"]["gradient_clip_val"],
        limit_val_batches=0,
    )
    trainer.fit(model, data)
    return {
        "layers": layers,
        "epochs": epochs,
        "accuracy": trainer.test(model, data, verbose=False)[0]["test_accuracy"],
    }


def table(runs: list[dict]) -> str:
    lines = [
        "| seed | minutes | pruned | early exit, % | mean layers | by depth of the example | full depth, % | agreement, % "
        "| truncated, % | defaults, % |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for run in runs:
        test, cut, defaults = run["test"], run["truncated"], run["defaults"]
        by_depth = " / ".join(f"{layer:.2f}" for layer in run["exit_by_depth"].values())
        lines.append(
            f"| {run['seed']} | {run['seconds'] / 60:.1f} | {run['pruned']} of {run['trials']} "
            f"| {100 * test['accuracy']:.2f} | {test['mean_exit_layer']:.2f} | {by_depth} "
            f"| {100 * test['full_depth']['accuracy']:.2f} | {100 * test['agreement']:.1f} "
            f"| {100 * cut['accuracy']:.2f} ({cut['layers']} layers) "
            f"| {100 * defaults['accuracy']:.2f} ({defaults['mean_exit_layer']:.2f} layers) |"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--log_dir", type=Path, default=Path("lightning_logs"))
    parser.add_argument("--table", action="store_true", help="print the table of the stored results")
    arguments = parser.parse_args()
    quiet()
    runs = []
    for seed in [] if arguments.table else range(arguments.seeds):
        run = tune(seed, arguments.log_dir)
        picture = run.pop("picture")
        if seed == 0:
            RESULTS.parent.mkdir(exist_ok=True)
            shutil.copy(str(picture), PICTURE)
        runs.append({**run, "truncated": truncated(run)})
        RESULTS.write_text(json.dumps(runs, indent=1) + "\n")
    print(f"\n{table(json.loads(RESULTS.read_text()))}")


if __name__ == "__main__":
    main()
