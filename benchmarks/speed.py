"""The time that early exit saves, compared with the same encoder without early exit through the
same scheduler.

    python benchmarks/speed.py real --model DIR    # a model folder, on the test texts of VADER
    python benchmarks/speed.py real --model DIR --full_depth DIR2 --halting_margin 0.9
    python benchmarks/speed.py shapes    # MiniLM and BERT-base shapes, exits spread evenly
    python benchmarks/speed.py shapes --precision bf16-mixed --step_tokens 16384 65536

R = N / mean exit layer is the speed-up of an ideal scheduler. Every ratio compares two sides that
take turns in one run."""

from __future__ import annotations

import argparse
import copy
import dataclasses
import itertools
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from dact import DACT, DACTOutput, TextClassifier
from dact.cli.output import quiet
from dact.data import VaderSentiment
from dact.encoders import HuggingFaceEncoder
from dact.encoders.huggingface import AutoModel
from dact.functional import Halting
from dact.submodels import start_at

RESULTS = Path(__file__).parent / "results" / "speed.json"
SHAPES = {
    "tiny": {
        "hidden_size": 32,
        "num_hidden_layers": 3,
        "num_attention_heads": 2,
        "intermediate_size": 64,
    },
    "MiniLM": {
        "hidden_size": 384,
        "num_hidden_layers": 6,
        "num_attention_heads": 12,
        "intermediate_size": 1536,
    },
    "BERT-base": {
        "hidden_size": 768,
        "num_hidden_layers": 12,
        "num_attention_heads": 12,
        "intermediate_size": 3072,
    },
}


def in_turn(sides: dict[str, Callable[[], object]], rounds: int) -> dict[str, float]:
    """Return the median seconds of each side; the sides take turns, after a warm-up round."""
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    for turn in range(rounds + 1):
        for name, work in sides.items():
            synchronize()
            start = time.perf_counter()
            work()
            synchronize()
            if turn:
                seconds[name].append(time.perf_counter() - start)
    return {name: statistics.median(values) for name, values in seconds.items()}


def synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


class Nothing(nn.Module):
    """Submodels that cost nothing: the same answer for every state."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.size = size

    def answer(self, layer: int, state: Tensor) -> Tensor:
        return state.new_zeros(1, self.size).expand(len(state), -1)


def real(arguments: argparse.Namespace) -> dict[str, Any]:
    """Measure a fitted model on real texts: in bulk, one at a time, and against the pipeline of
    transformers."""
    dials = {name: getattr(arguments, name) for name in ("halting_tolerance", "halting_margin")}
    classifier = TextClassifier.from_pretrained(
        arguments.model, **{name: value for name, value in dials.items() if value is not None}
    )
    full_depth = TextClassifier.from_pretrained(
        arguments.full_depth or arguments.model, halting="never"
    )
    model = classifier.model
    data = VaderSentiment(tokenizer=classifier.tokenizer)
    data.setup("test")
    texts, labels = data.splits["test"].texts, data.splits["test"].labels
    assert labels is not None
    tokens = classifier.tokenizer(texts, truncation=True, padding=True, return_tensors="pt")
    batch = dict(tokens)
    layers = model.num_layers

    def run(rule: str) -> Callable[[], Any]:
        return lambda: run_by(model, batch, rule)

    exits = model.early_exit(batch).exit_layer
    ideal = layers / exits.double().mean().item()
    bulk = in_turn({"full depth": run("never"), "early exit": run(model.halting)}, arguments.rounds)

    few = [
        dict(classifier.tokenizer([text], truncation=True, return_tensors="pt"))
        for text in texts[:200]
    ]
    few_exits = torch.cat([model.early_exit(one).exit_layer for one in few])
    one = in_turn(
        {
            "full depth": lambda: [run_by(model, one, "never") for one in few],
            "early exit": lambda: [model.early_exit(one) for one in few],
        },
        arguments.rounds,
    )
    return {
        "layers": layers,
        "mean exit layer": exits.double().mean().item(),
        "R": ideal,
        "bulk": bulk | compare(bulk, ideal),
        "one at a time": one | compare(one, layers / few_exits.double().mean().item()),
        "unit": unit_cost(model, batch, arguments.rounds),
        "pipeline": beside_pipeline(classifier, full_depth, texts, labels, arguments.rounds),
    }


def run_by(model: DACT, batch: dict[str, Tensor], rule: Any) -> DACTOutput:
    """Run a batch under a halting rule in place of the model's own."""
    return model._inference(batch, dataclasses.replace(model.exit_rule, rule=rule))


def compare(seconds: dict[str, float], ideal: float) -> dict[str, float]:
    speedup = seconds["full depth"] / seconds["early exit"]
    return {"speed-up": speedup, "share of R": speedup / ideal}


def unit_cost(model: DACT, batch: dict[str, Tensor], rounds: int) -> dict[str, float]:
    """Measure the cost of both submodels and the halting test if no example leaves, compared with
    the encoder alone."""
    bare, stays = copy.copy(model), copy.deepcopy(model)
    bare._modules = {
        **model._modules,
        "classifier": Nothing(model.output_dimension),
        "confidence": Nothing(1),
    }
    # h = 1 and equal probabilities: no example leaves before the last layer.
    for submodels, bias in ((stays.confidence, 40.0), (stays.classifier, 0.0)):
        start_at(submodels, bias)
    seconds = in_turn(
        {
            "encoder alone": lambda: run_by(bare, batch, "never"),
            "with the unit": lambda: run_by(stays, batch, "exact"),
        },
        rounds,
    )
    return {**seconds, "cost, %": 100 * (seconds["with the unit"] / seconds["encoder alone"] - 1)}


def beside_pipeline(
    classifier: TextClassifier,
    full_depth: TextClassifier,
    texts: list[str],
    labels: list[int],
    rounds: int,
) -> dict[str, float]:
    """Measure raw texts in, labels out, against the pipeline of transformers, with batches of 32 on
    a random model of the same shape as `full_depth`."""
    from transformers import AutoModelForSequenceClassification, pipeline

    encoder = full_depth.model.encoder
    assert isinstance(encoder, HuggingFaceEncoder)
    config = copy.deepcopy(encoder.model.config)
    config.num_labels = full_depth.model.output_dimension
    plain = AutoModelForSequenceClassification.from_config(config).eval()
    pipe = pipeline(
        "text-classification",
        model=plain,
        tokenizer=classifier.tokenizer,
        batch_size=32,
        device="cpu",
    )
    seconds = in_turn(
        {
            "pipeline": lambda: pipe(
                texts, truncation=True, max_length=classifier.tokenizer.model_max_length
            ),
            "TextClassifier": lambda: classifier(texts),
        },
        rounds,
    )
    names = [classifier.class_names[label] for label in labels]

    def accuracy(model: TextClassifier) -> float:
        return statistics.mean(
            said.label == name for said, name in zip(model(texts), names, strict=True)
        )

    return {
        **seconds,
        "speed-up": seconds["pipeline"] / seconds["TextClassifier"],
        "accuracy": accuracy(classifier),
        "accuracy at full depth": accuracy(full_depth),
    }


class EvenExits(Halting):
    """Let examples leave at random, equally many after each layer; the rule is still evaluated, for
    its cost."""

    def halts(
        self, a: Tensor, p: Tensor, y: Tensor, remaining: Any, num_layers: int, *task: Any
    ) -> Tensor:
        super().halts(a, p, y, remaining, num_layers, *task)
        generator = torch.Generator().manual_seed(num_layers * len(a) + int(remaining))
        return (torch.rand(len(a), generator=generator) < 1 / (remaining + 1)).to(a.device)


def shapes(arguments: argparse.Namespace) -> dict[str, Any]:
    """Measure random weights of known shapes, by length, number of examples and tokens per step."""
    from transformers import BertConfig

    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = {"32-true": None, "bf16-mixed": torch.bfloat16, "16-mixed": torch.float16}[
        arguments.precision
    ]
    results = {}
    for name in arguments.shapes:
        encoder = HuggingFaceEncoder.from_model(
            AutoModel.from_config(BertConfig(vocab_size=30522, **SHAPES[name]))
        )
        model = DACT(encoder=encoder).eval().to(device)
        for lengths, count in itertools.product(("128", "mixed"), arguments.examples):
            batch = random_batch(count, lengths == "mixed", device)

            def early(model: DACT = model, batch: dict[str, Tensor] = batch) -> Any:
                return model._inference(batch, EvenExits())

            def full(model: DACT = model, batch: dict[str, Tensor] = batch) -> Any:
                return run_by(model, batch, "never")

            for tokens in arguments.step_tokens or [None]:
                model.step_tokens = tokens
                with torch.autocast(device, dtype, enabled=dtype is not None):
                    ideal = encoder.num_layers / early().exit_layer.double().mean().item()
                    seconds = in_turn({"full depth": full, "early exit": early}, arguments.rounds)
                key = f"{name}, length {lengths}, {count} examples" + (
                    f", {tokens} tokens a step" if tokens else ""
                )
                results[key] = {"R": ideal, **seconds, **compare(seconds, ideal)}
                print(f"{key}: R {ideal:.2f}, {results[key]['share of R']:.2f} R", flush=True)
    return results


def random_batch(count: int, mixed: bool, device: str) -> dict[str, Tensor]:
    """Return token ids of length 128, or of mixed lengths from 8 to 128."""
    generator = torch.Generator().manual_seed(0)
    sizes = (
        torch.randint(8, 129, (count,), generator=generator) if mixed else torch.full((count,), 128)
    )
    mask = (torch.arange(128) < sizes[:, None]).long()
    ids = torch.randint(1000, 30000, (count, 128), generator=generator) * mask
    return {"input_ids": ids.to(device), "attention_mask": mask.to(device)}


def show(content: dict[str, Any], indent: str = "  ") -> None:
    for name, value in content.items():
        if isinstance(value, dict):
            print(f"{indent}{name}")
            show(value, indent + "  ")
        else:
            print(f"{indent}{name}: {value if isinstance(value, (str, int)) else f'{value:.3f}'}")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("part", choices=["real", "shapes"])
    parser.add_argument(
        "--model", type=Path, help="for real: a model/ folder of dact fit or dact tune"
    )
    parser.add_argument(
        "--full_depth", type=Path, help="likewise, for the pipeline; defaults to --model"
    )
    parser.add_argument("--halting_tolerance", type=float)
    parser.add_argument("--halting_margin", type=float)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument(
        "--precision", default="32-true", choices=["32-true", "bf16-mixed", "16-mixed"]
    )
    parser.add_argument("--examples", type=int, nargs="+", default=[64, 256, 1024])
    parser.add_argument(
        "--shapes", nargs="+", choices=list(SHAPES), default=["MiniLM", "BERT-base"]
    )
    parser.add_argument(
        "--step_tokens",
        type=int,
        nargs="+",
        help="for shapes: values to compare; defaults to the model's own",
    )
    parser.add_argument("--results", type=Path, default=RESULTS)
    arguments = parser.parse_args()
    if arguments.part == "real" and arguments.model is None:
        parser.error("real needs --model")
    quiet()
    device = (
        torch.cuda.get_device_name()
        if torch.cuda.is_available()
        else f"CPU, {torch.get_num_threads()} threads"
    )
    results = json.loads(arguments.results.read_text()) if arguments.results.is_file() else {}
    found = {"real": real, "shapes": shapes}[arguments.part](arguments)
    layers = f", {found['layers']} layers" if "layers" in found else ""
    key = f"{arguments.part}{layers}, {device}, {arguments.precision}"
    results[key] = found
    arguments.results.parent.mkdir(exist_ok=True)
    arguments.results.write_text(json.dumps(results, indent=1) + "\n")
    print(f"\n{key}")
    show(found)


if __name__ == "__main__":
    main()
