"""Errors of use on one line; that of an unknown class or option has its place and a suggestion."""

from __future__ import annotations

import contextlib
import inspect
import os
import sys
from argparse import ArgumentError
from collections.abc import Iterator
from difflib import get_close_matches
from importlib import import_module
from pathlib import Path
from typing import Any

import yaml
from jsonargparse import Namespace

USAGE_ERRORS = (ArgumentError, yaml.YAMLError)  # of the command line or of a configuration file
OTHER_ERRORS = (ValueError, TypeError, LookupError, OSError, RuntimeError, ImportError)
PACKAGES = ("dact.data", "dact.encoders")  # whose classes are known by their bare names
SECTIONS = ("data", "model.encoder")  # which name a class of these packages, or another


def usage_error(text: str) -> ArgumentError:
    """Return an error of use."""
    return ArgumentError(None, text)


@contextlib.contextmanager
def one_line_errors() -> Iterator[None]:
    """End the process with one line for an error; with DACT_TRACEBACK set, let it through."""
    try:
        yield
    except BrokenPipeError:
        # Exit silently if the reader of stdout (such as head) has closed the pipe.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise SystemExit(128 + 13) from None
    except (*USAGE_ERRORS, *OTHER_ERRORS) as error:
        if os.environ.get("DACT_TRACEBACK"):
            raise
        message = error.args[0] if isinstance(error, KeyError) and error.args else error
        print(f"dact: error: {' '.join(str(message).split())}", file=sys.stderr)
        raise SystemExit(2 if isinstance(error, USAGE_ERRORS) else 1) from None


def parse(parser: Any, words: list[str]) -> Namespace:
    """Return what a parser of jsonargparse makes of the words of a command line.

    Raises:
        ArgumentError: If a class, option or value is wrong. The message names file, line, and what
            was probably meant.
    """
    given = list(options(words))
    if not any(name.rpartition(".")[2] in ("help", "print_config") for _, name, _ in given):
        defaults = parser.get_defaults().keys()
        _check(given, {name.replace(".init_args", "") for name in defaults})
    try:
        return parser.parse_args(words)
    except ArgumentError as error:
        text = str(error)
        places = [place for place, name, _ in given if f'{name.rpartition(".")[2]}"' in text]
        raise usage_error(f"{places[-1] if places else ''}{text}") from error


def options(words: list[str]) -> Iterator[tuple[str, str, str | None]]:
    """Yield place, name without ``init_args``, and value of each option of a command line and of
    its files. The place is empty on the command line, the value None if it is no plain one."""
    for word, following in zip(words, [*words[1:], ""], strict=False):
        name, equals, value = word.partition("=")
        value = value if equals else following
        if name in ("-c", "--config"):
            with Path(value).open(encoding="utf-8") as file:
                root = yaml.compose(file)
            if not isinstance(root, yaml.MappingNode):
                raise usage_error(f"{value} holds no options: data goes to --data.train_file")
            yield from _options_of(value, root, "")
        elif name.startswith("--"):
            yield "", name[2:].replace(".init_args", "").removesuffix("+"), value


def _options_of(file: str, node: yaml.Node, section: str) -> Iterator[tuple[str, str, str | None]]:
    pairs = node.value if isinstance(node, yaml.MappingNode) else []
    # The class decides which options there are, and so comes first.
    for key, value in sorted(pairs, key=lambda pair: pair[0].value != "class_path"):
        name = section if key.value == "init_args" else f"{section}.{key.value}".strip(".")
        if name != section:
            plain = value.value if isinstance(value, yaml.ScalarNode) else None
            yield f"{file}, line {key.start_mark.line + 1}: ", name, plain
        yield from _options_of(file, value, name)


def _check(given: list[tuple[str, str, str | None]], known: set[str]) -> None:
    """Raise an error for the first unknown class or option."""
    for place, name, value in given:
        section = name.removesuffix(".class_path")
        if section in SECTIONS and value and not value.startswith("{"):
            accepted = class_options(value)
            if accepted is None:
                names = [each for package in PACKAGES for each in import_module(package).__all__]
                meant = _meant(value.rpartition(".")[2], names)
                raise usage_error(f"{place}there is no class {value}. {meant}")
            known = {each for each in known if not each.startswith(f"{section}.")}
            known |= {f"{section}.{each}" for each in accepted} or {section}
        elif not any(f"{name}.".startswith(f"{k}.") or k.startswith(f"{name}.") for k in known):
            section, _, wrong = name.rpartition(".")
            while section and not any(each.startswith(f"{section}.") for each in known):
                section, _, wrong = section.rpartition(".")
            prefix, where = (f"{section}.", f" in {section}") if section else ("", "")
            beside = [k.removeprefix(prefix).split(".")[0] for k in known if k.startswith(prefix)]
            raise usage_error(f"{place}unknown option {wrong!r}{where}. {_meant(wrong, beside)}")


def _meant(word: str, known: list[str]) -> str:
    """Return a suggestion of what a mistyped word may stand for."""
    found = get_close_matches(word, known, n=1, cutoff=0.75)
    return f"Did you mean {found[0]}?" if found else f"Known are {', '.join(sorted({*known}))}"


def class_options(path: str) -> list[str] | None:
    """Return the names of the options of the class that a configuration names: empty if it takes
    any, None if there is no such class."""
    module, _, name = path.rpartition(".")
    for holder in [module] if module else PACKAGES:
        with contextlib.suppress(ModuleNotFoundError, AttributeError):
            found = inspect.signature(getattr(import_module(holder), name)).parameters.values()
            takes_any = any(parameter.kind is parameter.VAR_KEYWORD for parameter in found)
            return [] if takes_any else [parameter.name for parameter in found]
    return None
