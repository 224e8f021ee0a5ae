"""``python -m dact`` and the console script ``dact``, which print help without importing
Lightning."""

from __future__ import annotations

import argparse
import gc
import sys
from difflib import get_close_matches
from typing import NoReturn

from dact import __version__
from dact.cli import LIGHT, LIGHTNING

HELP = """\
usage: dact COMMAND [--config FILE ...] [--OPTION ...]

Classifiers that spend only as many layers as each example needs.

commands:
{commands}

  dact COMMAND --help                               the options of a command
  dact fit --data.help TextClassificationData       those of a class of data
  dact fit --model.encoder.help HuggingFaceEncoder  those of a class of encoder
  dact --version

--model takes the folder of a run, its model/ folder, or a Hub id, OWNER/NAME or
OWNER/NAME@REVISION. An option replaces that of the files before it, and a later
file an earlier one. A configuration can name any class of any installed module,
and so run any code: use only files that you trust.
"""


def main() -> None:
    """Run the command line of this process."""
    try:
        _run(sys.argv[1:])
    except KeyboardInterrupt:  # before a command has begun, or from one that has nothing to resume
        print("\ndact: stopped", file=sys.stderr)
        raise SystemExit(130) from None


def _run(words: list[str]) -> None:
    if not words or words[0] in ("-h", "--help"):
        commands = "\n".join(f"  {name:<11}{text}" for name, text in {**LIGHTNING, **LIGHT}.items())
        print(HELP.format(commands=commands), end="")
    elif words[0] == "--version":
        print(f"dact {__version__}")
    elif words[0] in LIGHT:
        _run_light(words)
    elif LIGHTNING.keys() & set(words):
        from dact.cli.commands import main as run_lightning

        # what is imported lives as long as the process: collections and the exit need not visit it
        gc.freeze()
        run_lightning()
    else:
        meant = get_close_matches(words[0], [*LIGHTNING, *LIGHT], n=1)
        hint = (
            f"did you mean {meant[0]}?"
            if meant
            else f"expected one of {', '.join([*LIGHTNING, *LIGHT])}"
        )
        print(f"dact: error: no command {words[0]!r}: {hint}", file=sys.stderr)
        raise SystemExit(2)


def _run_light(words: list[str]) -> None:
    """Run ``dact export`` or ``dact serve``."""
    parser = _Parser(prog=f"dact {words[0]}", description=LIGHT[words[0]])
    parser.add_argument("--model", required=True, help="model/ folder, folder of a run, or Hub id")
    if words[0] == "export":
        parser.add_argument("--output", required=True, help="folder to write to")
        parser.add_argument(
            "--quantize",
            choices=["int8"],
            help="quantize the weights of the layers; default: float32",
        )
    else:
        parser.add_argument(
            "--host", default="127.0.0.1", help="address to listen on (default: %(default)s)"
        )
        parser.add_argument(
            "--port", type=int, default=8000, help="port to listen on (default: %(default)s)"
        )
        parser.add_argument(
            "--max_batch",
            type=int,
            default=64,
            help="most requests in a batch (default: %(default)s)",
        )
        parser.add_argument(
            "--max_wait",
            type=float,
            default=0.002,
            help="seconds to wait for a fuller batch (default: %(default)s)",
        )
    options = vars(parser.parse_args(words[1:]))
    from dact.cli.errors import one_line_errors

    with one_line_errors():
        from dact.cli.stored import find_model

        model = find_model(options.pop("model"))
        if words[0] == "export":
            from dact.exporting import export

            print(export(model, **options))
        else:
            from dact.server import serve

            serve(model, **options)


class _Parser(argparse.ArgumentParser):
    """A parser whose errors are one line."""

    def error(self, message: str) -> NoReturn:
        print(f"dact: error: {message}; see {self.prog} --help", file=sys.stderr)
        raise SystemExit(2)


if __name__ == "__main__":
    main()
