"""Several labels per text: DACT next to plain exits and an encoder cut to half, taught alike.

    python -m benchmarks.labels --data joined depths --splits 0 1
    python -m benchmarks.labels --encoder mpnet --data joined --splits 0 1 --unlabelled 2000

`joined`: one to three texts of different corpora of VADER, joined by blanks in random order, 2,000
for training, 600 for validation and 2,000 for the test, each drawn only from texts of its split.
The seven labels are the corpora and the sentiments that occur. MiniLM of 6 layers, or MPNet-base of
12. `--unlabelled` adds so many training texts without labels, whose target is the whole encoder's
answer, to all models but the whole encoder.

`depths`: 20,000 generated reviews, composed in up to three steps. Two labels are words, which one
layer can see, and two are the sentiment, which takes several. A small encoder of 6 layers.

DACT and the plain exits keep two thirds of the layers, `dact of half` half of them. All models
train for 3 epochs; all but the whole encoder start from its weights and have its answers as half of
their targets. The margin of a budget is the largest that keeps the validation texts within it (by
proof alone: margin 1); test texts are evaluated once.
Errors are those of the paired difference to the whole encoder over the test texts (bootstrap)."""

from __future__ import annotations

import argparse
import json
import logging
import random
import warnings
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor

from benchmarks.encoders import ENCODERS, Encoder
from benchmarks.frontier.training import DEVICE, HEAD, HEAD_RATE, TEACHER_SHARE, fit
from dact import DACT
from dact.calibration import SETTINGS
from dact.calibration.answers import Measured, exits_by_setting, layer_answers
from dact.data import CompositionalSentiment, VaderSentiment
from dact.data.base import TextDataModule
from dact.data.examples import Examples
from dact.data.vader import CLASS_NAMES, CORPORA
from dact.encoders import HuggingFaceEncoder, TransformerEncoder
from dact.encoders.base import move
from dact.tasks import UNLABELLED

RESULTS = Path(__file__).parent / "results" / "labels.json"
BUDGETS = (1 / 4, 1 / 3, 5 / 12, 1 / 2)  # of the layers
KINDS = ("cut", "dact of half", "exits", "dact")
SIZES = {"train": 2000, "val": 600, "test": 2000}
WORDS = ("battery", "screen")
DRAWS = 500


class Joined(VaderSentiment):
    """One to three texts of different corpora, with the corpora and sentiments as labels."""

    task = "multilabel"
    num_unlabelled = 0

    def examples(self, split: str) -> Examples:
        self.class_names = [*CORPORA, *CLASS_NAMES]
        parts = [VaderSentiment(corpora=[name], split=self.split) for name in CORPORA]
        given = [part.examples(split) for part in parts]
        draw, texts, labels = random.Random(f"{self.split}/{split}"), [], []
        more = self.num_unlabelled if split == "train" else 0
        for _ in range(SIZES[split] + more):
            chosen = draw.sample(range(len(given)), draw.randint(1, 3))
            rows = [(corpus, draw.randrange(len(given[corpus]))) for corpus in chosen]
            texts.append(" ".join(given[corpus].texts[row] for corpus, row in rows))
            found = {*chosen, *(len(CORPORA) + given[corpus].labels[row] for corpus, row in rows)}
            labels.append(tuple(int(n in found) for n in range(len(self.class_names))))
        labels[SIZES[split] :] = [(UNLABELLED,) * len(self.class_names)] * more
        return Examples(texts, labels=labels)


class Depths(CompositionalSentiment):
    """Generated reviews whose labels are two words and two sentiments."""

    task = "multilabel"

    def examples(self, split: str) -> Examples:
        self.class_names = [*WORDS, "negative", "positive"]
        given = super().examples(split)
        pairs = zip(given.texts, given.labels, strict=True)
        labels = [
            (*(int(word in text) for word in WORDS), int(label == 0), int(label == 2))
            for text, label in pairs
        ]
        return Examples(given.texts, labels=labels)


@cache
def make_data(
    used: Encoder, name: str, split: int, share: float, num_unlabelled: int
) -> TextDataModule:
    """Return the data, tokenized once; `share` of its training texts is for the confidence."""
    data: TextDataModule
    if name == "joined":
        data = Joined(
            tokenizer=used.pretrained, split=split, batch_size=32, confidence_fraction=share
        )
        data.num_unlabelled = num_unlabelled
    else:
        data = Depths(20_000, max_depth=3, seed=split, batch_size=32, confidence_fraction=share)
    data.setup("fit")
    data.setup("test")
    return data


@dataclass(frozen=True)
class Trained:
    """A model, and the answers of its layers to the validation and test texts."""

    model: DACT
    answers: dict[str, Any]

    def at(self, budget: float | None, part: str = "test") -> Measured:
        """Measure early exit within a budget, or all layers without one."""
        halting, exits = self.model.exit_rule, {}
        for split, answers in self.answers.items():
            exits[split] = exits_by_setting(answers, halting, "halting_margin")
        if budget is None:
            last = torch.full_like(exits[part](1.0), self.model.num_layers)
            return Measured(self.answers[part], last)
        settings = sorted(SETTINGS["halting_margin"], reverse=True)
        within = (m for m in settings if exits["val"](m).double().mean() <= budget)
        return Measured(self.answers[part], exits[part](next(within, settings[-1])))


def train(
    kind: str, used: Encoder, name: str, split: int, whole: DACT | None, num_unlabelled: int = 0
) -> Trained:
    """Train one model: ``whole`` or one of `KINDS`."""
    pl.seed_everything(0, verbose=False)
    is_dact, half = kind.startswith("dact"), used.num_layers // 2
    data = make_data(used, name, split, 0.05 if is_dact else 0.0, num_unlabelled)
    layers = {"whole": used.num_layers, "cut": half, "dact of half": half}.get(kind, used.kept)
    encoder: Any
    if name == "joined":
        encoder = HuggingFaceEncoder(used.pretrained, num_layers=layers)
    else:
        encoder = TransformerEncoder(42, layers, 32, 2, slopes=(2.0, 2.0))
    rate = used.rate if name == "joined" else 2e-3
    model = DACT(
        encoder,
        len(data.class_names or []),
        HEAD,
        HEAD,
        task="multilabel",
        learning_rate=rate,
        submodel_learning_rate=max(rate, HEAD_RATE),
        detach_exits=True,
        exit_loss_weight=1.0,
    )
    if not is_dact:
        model.at_full_depth()
    if kind == "exits":
        model.detach_exits, model.exit_loss_weight, model.halting = True, 1.0, "exact"
    if whole is not None:
        model.distillation = TEACHER_SHARE
        own = {n: w for n, w in whole.state_dict().items() if n.startswith("encoder.")}
        model.load_state_dict(
            {n: w for n, w in own.items() if n in model.state_dict()}, strict=False
        )
        with _precision(name):
            data.teacher_probabilities = _answers(whole, data.train_dataloader())
    fit(model, data, 3, "bf16-mixed" if name == "joined" else "32-true")
    data.teacher_probabilities = None
    model.eval().to(DEVICE)
    loaders = {"val": data.val_dataloader(), "test": data.test_dataloader()}
    with _precision(name):
        answers = {part: layer_answers(model, one) for part, one in loaders.items()}
    return Trained(model, answers)


def _precision(name: str) -> torch.autocast:
    """Return the context in which models are evaluated: in the precision of their training."""
    return torch.autocast(DEVICE.type, torch.bfloat16, enabled=name == "joined")


@torch.no_grad()
def _answers(model: DACT, loader: Any) -> Tensor:
    """Return the answers of the last layer to the training texts, by row."""
    found: list[tuple[Tensor, Tensor]] = []
    for batch in loader:
        y = model.full_depth(move(batch, DEVICE)).layer_probabilities
        assert y is not None
        found.append((y[:, -1].float().cpu(), batch["row"]))
    y, row = (torch.cat(part) for part in zip(*found, strict=True))
    return y[row.argsort()]


def micro_f1(one: Measured, rows: Tensor | None = None) -> float:
    got, given = one.classes, one.answers.target == 1
    if rows is not None:
        got, given = got[rows], given[rows]
    return 100 * (2 * (got & given).sum() / (got.sum() + given.sum())).item()


def compared(trained: Trained, reference: Trained, budget: float | None) -> dict[str, float]:
    one, whole = trained.at(budget), reference.at(None)
    on_val = micro_f1(trained.at(budget, "val")) - micro_f1(reference.at(None, "val"))
    generator, size = torch.Generator().manual_seed(0), len(one.exits)
    draws = [torch.randint(size, (size,), generator=generator) for _ in range(DRAWS)]
    differences = [micro_f1(one, rows) - micro_f1(whole, rows) for rows in draws]
    return {
        "layers": round(one.mean_exit_layer, 3),
        "micro_f1": round(micro_f1(one), 2),
        "less_whole": round(micro_f1(one) - micro_f1(whole), 2),
        "error": round(torch.tensor(differences).std().item(), 2),
        "val_less_whole": round(on_val, 2),
        "same_sets": round(100 * one.accuracy, 2),
    }


def stored() -> dict[str, Any]:
    return json.loads(RESULTS.read_text()) if RESULTS.exists() else {}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--encoder", choices=[*ENCODERS], default="minilm")
    parser.add_argument("--data", nargs="+", default=["joined", "depths"])
    parser.add_argument("--splits", nargs="+", type=int, default=[0, 1])
    parser.add_argument("--unlabelled", type=int, default=0, help="joined texts without labels")
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=KINDS)
    arguments = parser.parse_args()
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore")
    for name in arguments.data:
        for split in arguments.splits:
            used, key = ENCODERS[arguments.encoder], f"{name}.{split}"
            if arguments.encoder != "minilm":
                key = f"{arguments.encoder}.{key}"
            if arguments.unlabelled and name == "joined":
                key += f"+{arguments.unlabelled}"
            known = stored().get(key, {})
            missing = [kind for kind in arguments.kinds if f"{kind} at all" not in known]
            if missing:
                whole = train("whole", used, name, split, None)
                for kind in missing:
                    found = {"whole encoder": compared(whole, whole, None)}
                    one = train(kind, used, name, split, whole.model, arguments.unlabelled)
                    found[f"{kind} at all"] = compared(one, whole, None)
                    for share in () if kind == "cut" else BUDGETS:
                        budget = share * used.num_layers
                        found[f"{kind} at {budget}"] = compared(one, whole, budget)
                    if kind.startswith("dact"):
                        found[f"{kind} by proof"] = compared(one, whole, used.num_layers)
                    print(kind, {n: v["less_whole"] for n, v in found.items()}, flush=True)
                    records = stored()
                    records[key] = {**records.get(key, {}), **found}
                    RESULTS.write_text(json.dumps(records, indent=1) + "\n")
            for label, values in stored()[key].items():
                print(f"{key:<10} {label:<14}", *(f"{n} {v}" for n, v in values.items()))


if __name__ == "__main__":
    main()
