"""The embedded data needs depth: encoders of 1 and 4 layers, equally trained on
CompositionalSentiment.

python benchmarks/composition.py
"""

from __future__ import annotations

import argparse
import json
import statistics
from pathlib import Path

import lightning.pytorch as pl
import torch

from dact import DACT
from dact.cli.quiet import quiet
from dact.data import CompositionalSentiment
from dact.encoders import TransformerEncoder

RESULTS = Path(__file__).parent / "results" / "composition.json"


def accuracy_of(num_layers: int, seed: int, epochs: int, num_train: int) -> dict[str, object]:
    """Train an encoder of `num_layers` layers to full depth and test it, also by the depth of the
    examples."""
    pl.seed_everything(seed)
    data = CompositionalSentiment(num_train=num_train, max_depth=6)
    encoder = TransformerEncoder(data.vocab_size, num_layers, 32, 2, slopes=(1.0, 1.0))
    model = DACT(encoder=encoder, lambda_reg=0.0, halting="never", learning_rate=2e-3)
    trainer = pl.Trainer(
        max_epochs=epochs,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        gradient_clip_val=1.0,
        limit_val_batches=0,
    )
    trainer.fit(model, data)
    data.setup("test")
    model.eval()
    right: dict[int, list[float]] = {}
    with torch.no_grad():
        for batch in data.test_dataloader():
            hits = model(batch).probabilities.argmax(1) == batch["labels"]
            for depth, hit in zip(batch["depth"].tolist(), hits.tolist(), strict=True):
                right.setdefault(depth, []).append(float(hit))
    everything = [hit for hits in right.values() for hit in hits]
    by_depth = {depth: statistics.mean(hits) for depth, hits in sorted(right.items())}
    return {
        "layers": num_layers,
        "seed": seed,
        "accuracy": statistics.mean(everything),
        "by_depth": by_depth,
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--epochs", type=int, default=20)
    parser.add_argument("--num_train", type=int, default=40_000)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--layers", type=int, nargs="+", default=[1, 4])
    parser.add_argument("--results", type=Path, default=RESULTS)
    arguments = parser.parse_args()
    quiet()
    runs = [
        accuracy_of(layers, seed, arguments.epochs, arguments.num_train)
        for layers in arguments.layers
        for seed in range(arguments.seeds)
    ]
    arguments.results.parent.mkdir(exist_ok=True)
    arguments.results.write_text(
        json.dumps({"epochs": arguments.epochs, "runs": runs}, indent=1) + "\n"
    )
    depths = list(runs[0]["by_depth"])
    print(
        "| layers | test accuracy, % | " + " | ".join(f"depth {depth}" for depth in depths) + " |"
    )
    print("|---" * (2 + len(depths)) + "|")
    for layers in arguments.layers:
        own = [run for run in runs if run["layers"] == layers]
        shown = [statistics.mean(run["accuracy"] for run in own)]
        shown += [statistics.mean(run["by_depth"][depth] for run in own) for depth in depths]
        print(f"| {layers} | " + " | ".join(f"{100 * value:.1f}" for value in shown) + " |")


if __name__ == "__main__":
    main()
