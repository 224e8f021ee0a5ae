"""Accuracy against layers: DACT next to taught encoders and multi-exits, all trained alike.

    python -m benchmarks.frontier --encoder mpnet --data vader-2000 tweets newspaper --splits 0 1
    python -m benchmarks.frontier --methods dact-4-detached multi-4 encoder-3
    python -m benchmarks.frontier --report            # print the tables of the stored records

Run it from the root of the repository. A method is a kind, a number of layers and options, such as
``dact-4-detached``:

{kinds}

Options: {options}.

Every training leaves a small record in benchmarks/results/frontier/, so that a stopped run resumes.
Its models and the answers of its layers stay in `--cache`, which belongs in no commit. What a
method starts from is trained first. Margins are chosen on validation texts alone.
"""

from __future__ import annotations

import argparse
import logging
import warnings
from pathlib import Path

from benchmarks.encoders import ENCODERS

from . import report
from .data import CLOSED, Setting
from .methods import KINDS, OPTIONS, Method
from .records import RESULTS, path_of, record
from .training import Workshop


def main() -> None:
    text = (__doc__ or "").format(
        kinds="\n".join(f"    {name:<10}{what}" for name, what in KINDS.items()),
        options="; ".join(f"{name} ({what})" for name, what in OPTIONS.items()),
    )
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.frontier",
        description=text,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--encoder", choices=list(ENCODERS), default="minilm")
    add("--data", nargs="+", default=["vader-2000", "tweets", "newspaper"], help="see data.Setting")
    add("--splits", nargs="+", type=int, default=[0, 1], help="divisions of each data set")
    add("--seeds", nargs="+", type=int, default=[0])
    add("--methods", nargs="+", type=Method.parse, help="by default those of the tables")
    add("--epochs", type=int, default=3)
    add("--batch_size", type=int, default=32)
    add("--precision", default="bf16-mixed")
    add("--cache", type=Path, default=Path("lightning_logs") / "frontier", help="for models")
    add("--keep_models", action="store_true", help="for benchmarks/speed.py")
    add("--opened", action="store_true", help=f"the comparison is decided: allow {CLOSED}")
    add("--report", action="store_true", help="train nothing")
    arguments = parser.parse_args()
    if not arguments.opened and set(CLOSED) & {name.split("-")[0] for name in arguments.data}:
        parser.error(f"{', '.join(CLOSED)} are for the end, when everything is decided: --opened")

    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore")
    methods = arguments.methods or report.methods_of(ENCODERS[arguments.encoder])
    for name in arguments.data if not arguments.report else ():
        for split in arguments.splits:
            setting = Setting(
                name, split, arguments.epochs, arguments.batch_size, arguments.encoder
            )
            shop = Workshop(arguments.cache, setting, arguments.precision, arguments.keep_models)
            for seed in arguments.seeds:
                for method in methods:
                    run(shop, method, seed)
    show()


def run(shop: Workshop, method: Method, seed: int) -> None:
    """Train and measure what is not there yet."""
    if path_of(shop.setting, method, seed).is_file() and shop.is_done(method, seed):
        return
    if method.kind != "baseline":
        run(shop, shop.teacher_of(method), seed)
    if not shop.is_done(method, seed):
        print(f"{shop.setting}: {method}, seed {seed}", flush=True)
        shop.train(method, seed)
    record(shop, method, seed)


def show() -> None:
    """Print the tables of all records, write them to a file, and draw the picture."""
    records = report.load()
    text = report.tables(records)
    print(text)
    (RESULTS / "tables.md").write_text(text)
    report.draw(records, RESULTS / "frontier.png")


main()
