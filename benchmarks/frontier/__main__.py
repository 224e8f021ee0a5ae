"""Accuracy against layers: DACT next to taught encoders and multi-exits, all trained alike.

    python -m benchmarks.frontier --data vader-2000 tweets newspaper --splits 0 1 --methods dact-4
    multi-4 encoder-3 python -m benchmarks.frontier --report                            # only print
    the tables of the stored records

Run it from the root of the repository. A method is a kind, a number of layers and options, such as
``dact-4-exits``:

{kinds}

Options: {options}.

Every training leaves a small record in benchmarks/results/frontier/, so that a stopped run resumes;
its models and the answers of its layers stay in `--cache`, which belongs in no commit. What a
method starts from is trained first. Margins, and whatever is fitted after training, are chosen on
validation texts alone."""

from __future__ import annotations

import argparse
import warnings
from pathlib import Path

from dact.cli.quiet import quiet

from . import report
from .data import CLOSED, Setting
from .methods import FULL, KINDS, OPTIONS, Method
from .records import RESULTS, path_of, record
from .training import NUM_TEACHERS, Workshop


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
    parser.add_argument(
        "--data", nargs="+", default=["vader-2000", "tweets", "newspaper"], help="see data.Setting"
    )
    parser.add_argument(
        "--splits", nargs="+", type=int, default=[0, 1], help="divisions of each data set"
    )
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    parser.add_argument(
        "--methods", nargs="+", type=Method.parse, default=[], help="such as dact-4-exits"
    )
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--batch_size", type=int, default=32)
    parser.add_argument("--precision", default="bf16-mixed")
    parser.add_argument(
        "--cache", type=Path, default=Path("lightning_logs") / "frontier", help="for models"
    )
    parser.add_argument("--keep_models", action="store_true", help="for benchmarks/speed.py")
    parser.add_argument(
        "--opened",
        action="store_true",
        help=f"the comparison is decided: allow {', '.join(CLOSED)}",
    )
    parser.add_argument("--report", action="store_true", help="train nothing")
    arguments = parser.parse_args()
    if not arguments.opened and set(CLOSED) & {name.split("-")[0] for name in arguments.data}:
        parser.error(
            f"{', '.join(CLOSED)} are for the end alone, when everything is decided: --opened"
        )
    quiet()
    warnings.filterwarnings("ignore")
    for name in arguments.data if not arguments.report else ():
        for split in arguments.splits:
            setting = Setting(name, split, arguments.epochs, arguments.batch_size)
            shop = Workshop(arguments.cache, setting, arguments.precision, arguments.keep_models)
            for seed in arguments.seeds:
                for method in arguments.methods:
                    if not path_of(setting, method, seed).is_file():
                        run(shop, method, seed)
    show()


def run(shop: Workshop, method: Method, seed: int) -> None:
    """Train and measure what is not there yet."""
    for other in method.needs:
        run(shop, other, seed)
    if "averaged" in method.options:
        for other_seed in range(NUM_TEACHERS):
            run(shop, Method("baseline", FULL), other_seed)
    if "stronger" in method.options:
        run(shop.of_all_texts, Method("baseline", FULL), seed)
    if not shop.is_done(method, seed):
        print(f"{shop.setting}: {method}, seed {seed}", flush=True)
        shop.train(method, seed)
    if not path_of(shop.setting, method, seed).is_file():
        record(shop, method, seed)


def show() -> None:
    """Print the tables of all records, write them to a file, and draw the picture."""
    records = report.load()
    text = report.tables(records)
    print(text)
    (RESULTS / "tables.md").write_text(text)
    report.draw(records, RESULTS / "frontier.png")


main()
