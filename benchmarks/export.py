"""What ONNX Runtime and int8 add to early exit: raw text in, label out, on a CPU and the test texts
of VADER.

    python -m benchmarks.export --prepare    # trains the models that are missing
    python -m benchmarks.export              # measures them, in about six minutes
    python -m benchmarks.export --full DIR --model DIR --truncated DIR    # models fitted before
    python -m benchmarks.export --encoder mpnet --num_train 2000 --epochs 3 --rounds 1 --single 100
    python -m benchmarks.export --num_train 300 --epochs 1 --texts 60 --rounds 1 --single 5

Sides: the pipeline of transformers (float32, batches of 32) on the fine-tuned whole encoder; the
whole encoder through `TextClassifier`, in PyTorch (float32, bfloat16) and ONNX Runtime (float32,
int8); DACT with two thirds of the layers, taught by it, in PyTorch and ONNX Runtime, each at the
margin that loses at most a point of accuracy; taught encoders of fewer layers with int8. All sides
take turns in one run. The machine should be idle: two cores, and nothing else running."""

from __future__ import annotations

import argparse
import copy
import json
import math
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks.encoders import ENCODERS
from benchmarks.frontier.data import Setting, make_data
from benchmarks.frontier.methods import Method
from benchmarks.frontier.training import Workshop
from dact import DACT, TextClassifier, calibrate
from dact.cli.output import quiet
from dact.data.base import TextDataModule
from dact.encoders import HuggingFaceEncoder, OnnxEncoder
from dact.exporting import export

RESULTS = Path(__file__).parent / "results" / "export.json"
MODELS = Path(__file__).parent.parent / "lightning_logs" / "benchmark_export"
PIPELINE = (
    "from transformers import pipeline; "
    "pipeline('text-classification', model={!r}, device='cpu')(['a fine screen'])"
)
CLASSIFIER = (
    "from dact import TextClassifier; TextClassifier.from_pretrained({!r})(['a fine screen'])"
)
# Not getrusage: its peak includes that of the parent process.
MEMORY = (
    "; print([line.split()[1] for line in open('/proc/self/status') "
    "if line.startswith('VmHWM')][0])"
)


def processor() -> str:
    """Return the name of the processor and the number of threads that PyTorch uses."""
    lines = (
        Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").is_file() else []
    )
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return f"{names[0] if names else platform.processor()}, {torch.get_num_threads()} threads"


# ---------------------------------------------------------------------- the models


def setting(arguments: argparse.Namespace) -> Setting:
    name = "vader" if arguments.num_train is None else f"vader-{arguments.num_train}"
    small = arguments.encoder == "minilm"
    return Setting(name, 0, arguments.epochs, 64 if small else 32, arguments.encoder)


def trained(name: str, arguments: argparse.Namespace) -> Path:
    """Return the folder of the model with this name in the frontier benchmark; train it if it is
    missing."""
    shop = Workshop(arguments.models, setting(arguments), arguments.precision, keep_models=True)
    method = Method.parse(name)
    for one in dict.fromkeys((shop.whole, method)):
        if not shop.is_done(one, arguments.seed):
            print(f"training {one}", flush=True)
            shop.train(one, arguments.seed)
    return shop.home(method, arguments.seed) / "model"


def exported(folder: Path, quantize: Any, promise: TextDataModule | None = None) -> Path:
    """Export a model next to its folder, set its margin with the examples of `promise` unless that
    is None, and return the folder."""
    output = folder.with_name(f"{folder.name}-{quantize or 'float32'}")
    print(export(folder, output, quantize), flush=True)
    if promise is not None:
        keep_promise(output, promise)
    return output


def keep_promise(folder: Path, data: TextDataModule) -> None:
    """Set the margin of a stored model so that at most a point of accuracy is lost, with 95 %
    confidence."""
    model = DACT.from_pretrained(folder)
    calibrate(model, data, max_accuracy_loss=0.01, dial="halting_margin")
    model.save_pretrained(folder)


def plain_copy(folder: Path) -> Path:
    """Save the encoder of a fitted model with transformers, and return the folder; the head is
    random, since only the time matters."""
    from transformers import AutoModelForSequenceClassification

    classifier = TextClassifier.from_pretrained(folder)
    encoder = classifier.model.encoder
    assert isinstance(encoder, HuggingFaceEncoder)
    config = copy.deepcopy(encoder.model.config)
    config.num_labels = classifier.model.output_dimension
    plain = AutoModelForSequenceClassification.from_config(config)
    plain.base_model.load_state_dict(encoder.model.state_dict(), strict=False)
    output = folder.with_name(f"{folder.name}-transformers")
    plain.save_pretrained(output)
    classifier.tokenizer.save_pretrained(output)
    return output


# ---------------------------------------------------------------------- measuring


def in_turn(
    sides: dict[str, Callable[[list[str]], Any]], texts: list[str], rounds: int
) -> tuple[dict[str, float], dict[str, Any]]:
    """Return the median seconds and the answers of each side; the sides take turns, after some
    warm-up texts."""
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    answers: dict[str, Any] = {}
    for work in sides.values():
        work(texts[:100])
    for _ in range(rounds):
        for name, work in sides.items():
            start = time.perf_counter()
            answers[name] = work(texts)
            seconds[name].append(time.perf_counter() - start)
    return {name: statistics.median(values) for name, values in seconds.items()}, answers


def one_at_a_time(
    sides: dict[str, Callable[[list[str]], object]], texts: Sequence[str]
) -> dict[str, dict[str, float]]:
    """Return the median and the 95th percentile of the milliseconds for one text; the sides take
    turns at each text."""
    milliseconds: dict[str, list[float]] = {name: [] for name in sides}
    for text in [texts[0], *texts]:
        for name, work in sides.items():
            start = time.perf_counter()
            work([text])
            milliseconds[name].append(1000 * (time.perf_counter() - start))
    found = {}
    for name, values in milliseconds.items():
        ordered = sorted(values[1:])
        found[name] = {
            "median": statistics.median(ordered),
            "p95": ordered[math.ceil(0.95 * len(ordered)) - 1],
        }
    return found


def first_answer(code: str, folder: Path) -> dict[str, float]:
    """Return the seconds from the start of a process to its end after one answer, and its peak
    memory in MiB."""
    start = time.perf_counter()
    command = [sys.executable, "-c", code.format(str(folder)) + MEMORY]
    result = subprocess.run(command, capture_output=True, text=True, check=True)
    return {"seconds": time.perf_counter() - start, "MiB": int(result.stdout.split()[-1]) / 1024}


def paired(first: Sequence[bool], second: Sequence[bool]) -> dict[str, float]:
    """Return first less second in points, with its standard error; both say which examples are
    right."""
    differences = [100.0 * (one - other) for one, other in zip(first, second, strict=True)]
    return {
        "points": statistics.mean(differences),
        "standard error": statistics.stdev(differences) / math.sqrt(len(differences)),
    }


def models(arguments: argparse.Namespace) -> tuple[Path, Path, list[Path]]:
    """Return the folders of the whole encoder, of DACT and of the cut encoders; train the
    missing ones."""
    encoder = ENCODERS[arguments.encoder]
    full = arguments.full or trained(f"baseline-{encoder.num_layers}", arguments)
    dact = arguments.model or trained(f"dact-{encoder.kept}-detached", arguments)
    cuts = arguments.truncated or [
        trained(f"encoder-{layers}", arguments) for layers in arguments.truncated_layers
    ]
    return full, dact, cuts


def measure(arguments: argparse.Namespace) -> dict[str, Any]:
    from transformers import pipeline

    full, dact, truncated = models(arguments)
    data = make_data(setting(arguments))
    data.setup("validate")
    data.setup("test")
    held_out = data.splits["test"].take(range(min(arguments.texts, len(data.splits["test"]))))
    texts, labels = held_out.texts, held_out.labels
    assert labels is not None
    keep_promise(dact, data)
    folders = {
        "PyTorch, full depth": full,
        "float32, full depth": exported(full, None),
        "int8, full depth": exported(full, "int8"),
        "PyTorch, early exit": dact,
        "float32, early exit": exported(dact, None, data),
        "int8, early exit": exported(dact, "int8", data),
    }
    for cut in truncated:
        layers = DACT.from_pretrained(cut).num_layers
        folders[f"int8, cut to {layers} layers"] = exported(cut, "int8")
    classifiers = {name: TextClassifier.from_pretrained(folder) for name, folder in folders.items()}
    for name, folder in (("full depth", full), ("early exit", dact)):
        classifiers[f"bfloat16, {name}"] = TextClassifier.from_pretrained(folder, dtype="bfloat16")
    plain = plain_copy(full)
    pipe = pipeline("text-classification", model=str(plain), batch_size=32, device="cpu")
    length = classifiers["int8, early exit"].tokenizer.model_max_length

    def answer_by_pipeline(some: list[str]) -> Any:
        return pipe(some, truncation=True, max_length=length)

    sides: dict[str, Callable[[list[str]], Any]] = {"pipeline": answer_by_pipeline, **classifiers}
    bulk, answers = in_turn(sides, texts, arguments.rounds)
    names = data.class_names
    assert names is not None
    del answers["pipeline"]  # its head is random
    right = {
        name: [one.label == names[label] for one, label in zip(said, labels, strict=True)]
        for name, said in answers.items()
    }
    # DACT without early exit, float32 and int8: what quantization changes.
    depths = {
        name: [
            one.label
            for one in TextClassifier.from_pretrained(
                folders[f"{name}, early exit"], halting="never"
            )(texts)
        ]
        for name in ("float32", "int8")
    }
    depths_right = {
        name: [one == names[label] for one, label in zip(said, labels, strict=True)]
        for name, said in depths.items()
    }
    single = one_at_a_time(sides, texts[: arguments.single])
    reference = right["PyTorch, full depth"]
    assert isinstance(classifiers["int8, early exit"].model.encoder, OnnxEncoder)
    return {
        "processor": processor(),
        "texts": len(texts),
        "seconds in bulk": bulk,
        "accuracy": {name: statistics.mean(values) for name, values in right.items()},
        "mean exit layer": {
            name: statistics.mean(one.exit_layer for one in said) for name, said in answers.items()
        },
        "margin": {name: one.model.halting_margin for name, one in classifiers.items()},
        "less than the fine-tuned model": {
            name: paired(values, reference) for name, values in right.items()
        },
        "classes that int8 changes": {
            "whole encoder": share_changed(
                answers["float32, full depth"], answers["int8, full depth"]
            ),
            "DACT at full depth": statistics.mean(
                a != b for a, b in zip(*depths.values(), strict=True)
            ),
        },
        "points that int8 loses": {
            "whole encoder": paired(right["int8, full depth"], right["float32, full depth"]),
            "DACT at full depth": paired(depths_right["int8"], depths_right["float32"]),
        },
        "milliseconds for one text": single,
        "first answer": {
            "pipeline": first_answer(PIPELINE, plain),
            "PyTorch, early exit": first_answer(CLASSIFIER, dact),
            "int8, early exit": first_answer(CLASSIFIER, folders["int8, early exit"]),
        },
    }


def share_changed(first: Sequence[Any], second: Sequence[Any]) -> float:
    return statistics.mean(
        one.label != other.label for one, other in zip(first, second, strict=True)
    )


# ---------------------------------------------------------------------- the table


def table(found: dict[str, Any]) -> str:
    """Return the table of the sides in Markdown."""
    bulk, single = found["seconds in bulk"], found["milliseconds for one text"]
    lines = [
        f"{found['processor']}, {found['texts']} texts",
        "",
        "| side | texts/s | × pipeline | accuracy, % | mean layers | one text, median / p95, ms |",
        "|---|---|---|---|---|---|",
    ]
    for name, seconds in bulk.items():
        accuracy = found["accuracy"].get(name, math.nan)
        layers = found["mean exit layer"].get(name, math.nan)
        lines.append(
            f"| {name} | {found['texts'] / seconds:.0f} | {bulk['pipeline'] / seconds:.2f} "
            f"| {_number(100 * accuracy)} | {_number(layers)} "
            f"| {single[name]['median']:.2f} / {single[name]['p95']:.2f} |"
        )
    lines += ["", "| process | first answer, s | memory, MiB |", "|---|---|---|"]
    lines += [
        f"| {name} | {one['seconds']:.1f} | {one['MiB']:.0f} |"
        for name, one in found["first answer"].items()
    ]
    early, full = bulk["int8, early exit"], bulk["int8, full depth"]
    one, whole = (single[f"int8, {name}"]["median"] for name in ("early exit", "full depth"))
    less = found["less than the fine-tuned model"]
    below = {name: paired_text(difference) for name, difference in less.items()}
    changed = 100 * max(found["classes that int8 changes"].values())
    lines += [
        "",
        f"int8 with early exit, beside int8 at full depth: {full / early:.2f} times as fast in "
        f"bulk, {whole / one:.2f} times for one text; {below['int8, early exit']} points from the "
        f"fine-tuned model, {bulk['pipeline'] / early:.1f} times as fast as the pipeline. int8 "
        f"changes at most {changed:.2f} % of the classes.",
    ]
    return "\n".join(lines)


def _number(value: float) -> str:
    return "" if math.isnan(value) else f"{value:.2f}"


def paired_text(difference: dict[str, float]) -> str:
    return f"{difference['points']:+.2f} ± {difference['standard error']:.2f}"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--prepare",
        action="store_true",
        help="train the missing models, and measure nothing",
    )
    parser.add_argument("--full", type=Path, help="model folder: the whole encoder, fine-tuned")
    parser.add_argument("--model", type=Path, help="model folder: DACT; its margin is overwritten")
    parser.add_argument(
        "--truncated", type=Path, nargs="+", help="model folders: taught encoders of fewer layers"
    )
    parser.add_argument(
        "--truncated_layers", type=int, nargs="*", default=[3], help="layers of those to train"
    )
    parser.add_argument("--encoder", choices=[*ENCODERS], default="minilm")
    parser.add_argument(
        "--models", type=Path, default=MODELS, help="folder for what is trained here"
    )
    parser.add_argument("--num_train", type=int, help="number of training texts; defaults to all")
    parser.add_argument("--epochs", type=int, default=2)
    parser.add_argument("--precision", default="bf16-mixed")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--texts", type=int, default=10**9, help="number of test texts; defaults to all"
    )
    parser.add_argument(
        "--single", type=int, default=300, help="number of texts classified one at a time"
    )
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--results", type=Path, default=RESULTS)
    arguments = parser.parse_args()
    quiet()
    if arguments.prepare:
        models(arguments)
        return
    found = measure(arguments)
    arguments.results.parent.mkdir(parents=True, exist_ok=True)
    arguments.results.write_text(json.dumps(found, indent=1) + "\n")
    print(f"\n{table(found)}")


if __name__ == "__main__":
    main()
