"""Which epoch should a final fit keep: its last, or the one with the lowest val_loss?

    python benchmarks/epochs.py vader2000 imbalanced --seeds 10 11 12 13

`dact tune` runs with one trial, whose settings are those that tuning begins with. They are fitted
again from the baseline, which is their teacher, and both epochs are kept. Each model leaves under
the promise of the run, and besides by the margin that takes as many layers as the other epoch's
model on validation texts. The test texts are asked once."""

from __future__ import annotations

import argparse
import json
import statistics
from pathlib import Path
from typing import Any

from tuned import DATA_SETS, MEASURED_BATCH, ROOT, Setting, measured, points, tune, turned_down

from dact import DACT, calibrate
from dact.calibration.answers import layer_answers, mean_and_error
from dact.cli.quiet import quiet
from dact.factories import ModelFactory
from dact.files import read_checkpoint
from dact.tuning.evaluation import evaluate
from dact.tuning.fitting import MONITOR, make_trainer, resumable_fit, seeded

RESULTS = Path(__file__).parent / "results" / "epochs"


def run_one(name: str, seed: int, folder: Path) -> dict[str, Any]:
    tune(name, seed, folder, "--tuner.n_trials", "1")
    setting = Setting.of(folder, seed)
    config, final = setting.config, setting.final
    metrics = json.loads((folder / "final" / "metrics.json").read_text())
    checkpoints, epochs = folder / "both", final["trainer"]["max_epochs"]
    with seeded(final["seed_everything"]):
        model = ModelFactory(final["model"])()
        learnt = setting.data(final["data"], setting.taught(model))
        resumable_fit(
            setting.trainer,
            model,
            learnt,
            checkpoints,
            epochs=epochs,
            keep="lowest",
            monitor=MONITOR,
        )
    data = setting.data(config["data"], batch_size=MEASURED_BATCH)
    precision = make_trainer(
        setting.trainer, enable_checkpointing=False
    ).precision_plugin.forward_context
    models, validation, test = {}, {}, {}
    for which in ("lowest", "last"):
        models[which] = DACT.load_from_checkpoint(checkpoints / f"{which}.ckpt").cpu().eval()
        with precision():
            calibrate(models[which], data, **metrics["calibration"]["promise"])
            validation[which] = layer_answers(models[which], data.val_dataloader())
        test[which] = evaluate(models[which], data.test_dataloader(), precision=precision)
    layers = validation["lowest"].exit_layers(models["lowest"].exit_rule).double().mean().item()
    turned, mean = turned_down(
        models["last"], validation["last"], test["last"].answers, layers=layers
    )
    kept = ("accuracy", "macro_f1", "majority_share", "mean_exit_layer")
    right = {which: evaluation.right.double() for which, evaluation in test.items()}
    return {
        "epochs": {
            which: read_checkpoint(checkpoints / f"{which}.ckpt")["epoch"] for which in models
        },
        **{
            which: {key: evaluation.entry[key] for key in kept}
            for which, evaluation in test.items()
        },
        "last_above_lowest": mean_and_error(right["last"] - right["lowest"]),
        "at_as_many_layers": {"accuracy": mean_and_error(turned - right["lowest"]), "layers": mean},
    }


def table(runs: dict[str, dict[str, Any]]) -> str:
    lines = [
        "| data, seed | epochs | mean layers | test accuracy, % | majority's answers, % |",
        "|---" * 5 + "|",
    ]
    for name, run in runs.items():
        pairs = [
            " / ".join(form.format(scale * run[which][key]) for which in ("lowest", "last"))
            for key, form, scale in (
                ("mean_exit_layer", "{:.2f}", 1),
                ("accuracy", "{:.2f}", 100),
                ("majority_share", "{:.0f}", 100),
            )
        ]
        lines.append(
            f"| {name} | {run['epochs']['lowest'] + 1} / {run['epochs']['last'] + 1} | {' | '.join(pairs)} |"
        )
    fewer = statistics.mean(
        run["last"]["mean_exit_layer"] - run["lowest"]["mean_exit_layer"] for run in runs.values()
    )
    under = points([run["last_above_lowest"] for run in runs.values()])
    equal = points([run["at_as_many_layers"]["accuracy"] for run in runs.values()])
    return "\n".join(
        [
            *lines,
            "",
            f"last less lowest: {under} points, {fewer:+.2f} layers; at as many layers {equal} points",
        ]
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("data", nargs="*", metavar="DATA", help=f"some of {', '.join(DATA_SETS)}")
    parser.add_argument("--seeds", type=int, nargs="+", default=[10])
    parser.add_argument("--log_dir", type=Path, default=ROOT / "lightning_logs" / "epochs")
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of the results")
    arguments = parser.parse_args()
    quiet()
    if unknown := set(arguments.data) - DATA_SETS.keys():
        parser.error(
            f"unknown data: {', '.join(sorted(unknown))}; there are {', '.join(DATA_SETS)}"
        )
    runs = measured(arguments, run_one)
    print(table(runs) if runs else f"no results in {arguments.results}")


if __name__ == "__main__":
    main()
