"""``python -m dact`` and the console script ``dact``: the list of commands needs no Lightning."""

from __future__ import annotations

import gc
import sys
from difflib import get_close_matches

from dact import __version__
from dact.cli import STORED, TRAINING

HELP = """\
usage: dact COMMAND [--OPTION ...]

Classifiers that run only as many layers as each example needs.

commands:
{commands}

  dact fit | tune --config FILE [--run_tag TAG]
  dact test | predict | ... --model MODEL

  dact COMMAND --help                               options of a command
  dact fit --data.help TextClassificationData       options of a data class
  dact fit --model.encoder.help HuggingFaceEncoder  options of an encoder class
  dact --version

MODEL is the folder of a run, a model/ folder, a checkpoint or a Hub id,
OWNER/NAME or OWNER/NAME@REVISION. Options override files, and later files
override earlier ones. A configuration, including a run's, can name any class
of any installed module, and so run any code: use only files you trust.
"""


def main() -> None:
    """Run the command line of this process."""
    words = sys.argv[1:]
    commands = {**TRAINING, **STORED}
    if not words or words[0] in ("-h", "--help"):
        lines = "\n".join(f"  {name:<11}{text}" for name, text in commands.items())
        print(HELP.format(commands=lines), end="")
    elif words[0] == "--version":
        print(f"dact {__version__}")
    elif words[0] in commands:
        _run(*words)
    else:
        meant = get_close_matches(words[0], commands, n=1)
        hint = f"did you mean {meant[0]}?" if meant else f"expected one of {', '.join(commands)}"
        print(f"dact: error: no command {words[0]!r}: {hint}", file=sys.stderr)
        raise SystemExit(2)


def _run(command: str, *words: str) -> None:
    try:
        from dact.cli.errors import one_line_errors

        with one_line_errors():
            if command in TRAINING:
                from dact.cli.main import run
            else:
                from dact.cli.stored import run
            # Garbage collection and the exit need not visit the objects of imported modules.
            gc.freeze()
            run(command, list(words))
    except KeyboardInterrupt:
        print("\ndact: stopped", file=sys.stderr)
        raise SystemExit(130) from None


if __name__ == "__main__":
    main()
