"""Errors of use on one line: what jsonargparse says of a wrong option or file, without its internals."""

from __future__ import annotations

import inspect
import os
import re
import sys
from collections.abc import Iterable
from difflib import get_close_matches
from importlib import import_module
from itertools import pairwise
from pathlib import Path
from typing import Any, NoReturn

import yaml
from lightning.pytorch.cli import LightningArgumentParser

# Lines of its messages that name its own types, or alternatives that nobody meant.
_NOISE = re.compile(
    r"\s*(- )?(Does not validate against any of the Union subtypes|Subtypes: |Errors:|Given value type: |Given value: "
    r"(NestedArg|Namespace)\(|Expected a <class 'NoneType'>|Expected a path but ).*"
)


class OneLineParser(LightningArgumentParser):
    """LightningCLI's parser, whose errors are one line that also says what may have been meant."""

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """End the process with status 2; see `argparse.ArgumentParser.error`."""
        if not self.exit_on_error or os.environ.get("DACT_TRACEBACK"):
            super().error(message, ex)
        print(f"dact: error: {one_line(message)}{_meant(message, self)}", file=sys.stderr)
        raise SystemExit(2)


def one_line(message: str) -> str:
    """What a person needs of a message.

    Example:
        >>> one_line("Parser key \\"a\\":\\n  Errors:\\n    - Expected a <class 'int'>\\n  Given value: abc")
        'a: Expected a int. Given value: abc'
    """
    lines = [re.sub(r"^\s*(- )?", "", line) for line in message.splitlines() if line.strip() and not _NOISE.match(line)]
    text = ". ".join(lines).replace(":. ", ": ")
    text = re.sub(r"<class '(?:\w+\.)*(\w+)'>", r"\1", text)
    text = re.sub(r"Parser key \"([^\"]+)\"", r"\1", text)
    return text.replace('in "<unicode string>"', _broken_file())


def _broken_file() -> str:
    """Which of the command's files is no YAML."""
    words = [word for argument in sys.argv for word in argument.split("=", 1)]
    for flag, path in pairwise(words):
        if flag in ("--config", "-c") and Path(path).is_file():
            try:
                yaml.safe_load(Path(path).read_text())
            except yaml.YAMLError:
                return f"in {path}"
    return "in the text"


def _meant(message: str, parser: Any) -> str:
    """What a misspelt option, argument or class may have been meant to be."""
    if found := re.search(r"unrecognized arguments: (--[^\s=]+)", message):
        return _closest(found[1], _options(parser))
    if found := re.search(r"class_path '([^']+)':\s+Option '([^']+)' is not accepted", message):
        module, _, name = found[1].rpartition(".")
        return _closest(found[2], inspect.signature(getattr(import_module(module), name)).parameters)
    if found := re.search(r"module '([^']+)' has no attribute '([^']+)'", message):
        return _closest(found[2], getattr(import_module(found[1]), "__all__", ()))
    return ""


def _options(parser: Any) -> set[str]:
    """All options of a parser and of its commands."""
    commands = getattr(parser._subcommands_action, "_name_parser_map", {}) if parser._subcommands_action else {}
    own = set(parser._option_string_actions)
    return own.union(*(_options(command) for command in commands.values()))


def _closest(word: str, known: Iterable[str]) -> str:
    known = sorted(set(known))
    meant = get_close_matches(word, known, n=1, cutoff=0.8)
    if meant:
        return f". Did you mean {meant[0]}?"
    return f". Expected one of {', '.join(known)}" if known and len(known) <= 30 else ""
