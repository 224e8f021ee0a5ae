"""Rare classes: the answer of a DACT next to those of its own exits and of the whole encoder.

    python benchmarks/rare.py --seeds 0 1 2

`imbalanced` (450 training texts in unequal classes; see texts.py) with the recommended settings and
no study. The exit y_n is the one of largest macro F1 on the validation texts. Test texts are
evaluated once. Errors are those of the paired difference over the test texts (bootstrap)."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import torch
from torch import Tensor
from torchmetrics.functional import f1_score
from tuned import Setting, tune

from dact import DACT
from dact.calibration.answers import layer_answers

RESULTS = Path(__file__).parent / "results" / "rare.json"
DRAWS = 1000


def macro_f1(answers: Tensor, target: Tensor, rows: Tensor | slice = slice(None)) -> float:
    return float(
        f1_score(answers[rows], target[rows], "multiclass", num_classes=3, average="macro")
    )


def run_one(seed: int, folder: Path) -> dict[str, float]:
    """Run the command, and return what the layers of its model answer."""
    tune("imbalanced", seed, folder, "--tuner.n_trials", "0")
    setting = Setting.of(folder, seed)
    data = setting.data(setting.config["data"])
    said = {}
    for name in ("final", "whole_encoder"):
        model = DACT.from_pretrained(folder / name / "model").eval()
        loaders = {"val": data.val_dataloader(), "test": data.test_dataloader()}
        said[name] = {split: layer_answers(model, loader) for split, loader in loaders.items()}
    val, test = said["final"]["val"], said["final"]["test"]
    scores = [macro_f1(y.argmax(1), val.target) for y in val.y.unbind(1)]
    best = scores.index(max(scores))
    a, y = test.a[:, -1].argmax(1), test.y[:, best].argmax(1)
    generator = torch.Generator().manual_seed(0)
    size = len(test.target)
    draws = [torch.randint(size, (size,), generator=generator) for _ in range(DRAWS)]
    less = [macro_f1(a, test.target, rows) - macro_f1(y, test.target, rows) for rows in draws]
    found = {
        "test_texts": size,
        "mean_p_1": test.p[:, 0].mean().item(),
        "a_N": macro_f1(a, test.target),
        "exit": best + 1,
        "best_y_n": macro_f1(y, test.target),
        "y_N": macro_f1(test.y[:, -1].argmax(1), test.target),
        "less_best": macro_f1(a, test.target) - macro_f1(y, test.target),
        "error": torch.tensor(less).std().item(),
        "whole_encoder": macro_f1(said["whole_encoder"]["test"].a[:, -1].argmax(1), test.target),
    }
    return {name: round(value, 4) for name, value in found.items()}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--folder", type=Path, default=Path("lightning_logs") / "rare")
    arguments = parser.parse_args()
    records = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    for seed in arguments.seeds:
        if str(seed) not in records:
            records[str(seed)] = run_one(seed, arguments.folder / f"imbalanced-{seed}")
            RESULTS.write_text(json.dumps(records, indent=1) + "\n")
        print(seed, *(f"{name} {value:g}" for name, value in records[str(seed)].items()))


if __name__ == "__main__":
    main()
