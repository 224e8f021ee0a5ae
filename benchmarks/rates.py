"""Whether the best learning rate of a whole encoder after one epoch is the best for all epochs.

    python -m benchmarks.rates --encoder mpnet --data vader-2000 tweets

Each fit has its own learning rate schedule, and adds its numbers to benchmarks/results/rates.json,
so that a stopped run resumes."""

from __future__ import annotations

import argparse
import json
import logging
import warnings
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch

from benchmarks.encoders import ENCODERS
from benchmarks.frontier.data import Setting, make_data
from benchmarks.frontier.methods import Method
from benchmarks.frontier.training import DEVICE, fit, make_model
from dact.encoders.base import move
from dact.functional import soft_targets

RESULTS = Path(__file__).parent / "results" / "rates.json"
FACTORS = (1 / 3, 1.0, 3.0)


@torch.no_grad()
def measured(model: Any, loader: Any) -> dict[str, float]:
    """Return the loss, the Brier score and the accuracy in % of the last layer."""
    model.eval().to(DEVICE)
    found = []
    with torch.autocast(DEVICE.type, torch.bfloat16):
        for batch in loader:
            y = model.full_depth(move(batch, DEVICE)).layer_probabilities[:, -1].float().cpu()
            found.append((y, batch["labels"].cpu()))
    y, target = (torch.cat(part) for part in zip(*found, strict=True))
    distance = (y - soft_targets(target, y.shape[1])).square().sum(dim=1)
    return {
        "loss": round(torch.nn.functional.nll_loss(y.log(), target).item(), 4),
        "brier": round(distance.mean().item(), 4),
        "accuracy": round(100 * (y.argmax(dim=1) == target).double().mean().item(), 2),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--encoder", choices=list(ENCODERS), default="mpnet")
    parser.add_argument("--data", nargs="+", default=["vader-2000", "tweets"])
    parser.add_argument("--splits", nargs="+", type=int, default=[0])
    parser.add_argument("--epochs", nargs="+", type=int, default=[1, 3])
    arguments = parser.parse_args()
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore")

    encoder = ENCODERS[arguments.encoder]
    for name in arguments.data:
        for split in arguments.splits:
            setting = Setting(name, split, encoder_name=arguments.encoder)
            for epochs in arguments.epochs:
                for factor in FACTORS:
                    key = f"{setting} {epochs} {factor * encoder.rate:.2g}"
                    records = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
                    if key in records:
                        continue
                    pl.seed_everything(0, verbose=False)
                    model = make_model(setting, Method("baseline", encoder.num_layers))
                    model.learning_rate = factor * encoder.rate
                    data = make_data(setting)
                    fit(model, data, epochs, "bf16-mixed")
                    loaders = {"val": data.val_dataloader(), "test": data.test_dataloader()}
                    records[key] = {part: measured(model, one) for part, one in loaders.items()}
                    RESULTS.write_text(json.dumps(dict(sorted(records.items())), indent=1) + "\n")
                    print(key, records[key], flush=True)


if __name__ == "__main__":
    main()
