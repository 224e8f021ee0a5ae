"""Usage errors on one line, with the place of an unknown class or option and a suggestion."""

from __future__ import annotations

import contextlib
import os
import sys
import textwrap
from argparse import ArgumentError
from collections.abc import Iterator
from difflib import get_close_matches
from importlib import import_module
from pathlib import Path
from typing import Any

import yaml
from jsonargparse import Namespace
from lightning.fabric.utilities.exceptions import MisconfigurationException

from dact.factories import accepted_by

USAGE_ERRORS: tuple[type[Exception], ...] = (ValueError, TypeError, LookupError, OSError)
USAGE_ERRORS += (RuntimeError, ImportError, ArgumentError, yaml.YAMLError)
USAGE_ERRORS += (MisconfigurationException,)
# Sections that name a class, each with the package whose classes need no module path.
SECTIONS = {"data": "dact.data", "model.encoder": "dact.encoders"}


class UsageError(ValueError):
    """A mistake in a command line or in a configuration file."""


@contextlib.contextmanager
def one_line_errors() -> Iterator[None]:
    """Exit with a one-line message on an error; with DACT_TRACEBACK set, raise the error."""
    try:
        yield
    except BrokenPipeError:
        # Exit silently if the reader of stdout (such as head) has closed the pipe.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise SystemExit(128 + 13) from None
    except USAGE_ERRORS as error:
        if os.environ.get("DACT_TRACEBACK"):
            raise
        message: object = error
        if isinstance(error, FileNotFoundError) and error.filename:
            message = f"there is no file {error.filename}"
        if isinstance(error, KeyError) and error.args:
            message = error.args[0]
        line = textwrap.shorten(str(message), 1000, placeholder=" …")
        print(f"dact: error: {line}", file=sys.stderr)
        raise SystemExit(2 if isinstance(error, UsageError) else 1) from None


def parse(parser: Any, words: list[str]) -> Namespace:
    """Return a parsed command line; a `UsageError` names file, line and what was probably meant."""
    given = list(options(words))
    if not any(name.rpartition(".")[2] in ("help", "print_config") for _, name, _ in given):
        known = parser.get_defaults().keys()
        _check(given, {name.replace(".init_args", "") for name in known})
    try:
        return parser.parse_args(words)
    except ArgumentError as error:
        text = str(error)
        places = [place for place, name, _ in given if f'{name.rpartition(".")[2]}"' in text]
        raise UsageError(f"{places[-1] if places else ''}{text}") from error


def options(words: list[str]) -> Iterator[tuple[str, str, str | None]]:
    """Yield place, name without ``init_args``, and value of each option of a command line and its
    files. The place is empty on the command line; the value is None if it is not a scalar."""
    for word, following in zip(words, [*words[1:], ""], strict=False):
        name, equals, value = word.partition("=")
        value = value if equals else following
        if name in ("-c", "--config") and value:
            yield from _options_of(value)
        elif name.startswith("--"):
            yield "", name[2:].replace(".init_args", "").removesuffix("+"), value


def _options_of(file: str) -> Iterator[tuple[str, str, str | None]]:
    try:
        root = yaml.compose(Path(file).read_text(encoding="utf-8"))
    except yaml.MarkedYAMLError as error:
        line = error.problem_mark.line + 1 if error.problem_mark else 1
        raise UsageError(f"{file}, line {line}: not valid YAML: {error.problem}") from error
    if not isinstance(root, yaml.MappingNode):
        raise UsageError(f"{file} holds no options: files with data go to --data.train_file")

    def walk(node: Any, section: str) -> Iterator[tuple[str, str, str | None]]:
        pairs = node.value if isinstance(node, yaml.MappingNode) else []
        # The class decides which options there are, and so comes first.
        for key, value in sorted(pairs, key=lambda pair: pair[0].value != "class_path"):
            name = section if key.value == "init_args" else f"{section}.{key.value}".strip(".")
            plain = value.value if isinstance(value, yaml.ScalarNode) else None
            if name != section:
                yield f"{file}, line {key.start_mark.line + 1}: ", name, plain
            yield from walk(value, name)

    yield from walk(root, "")


def _check(given: list[tuple[str, str, str | None]], known: set[str]) -> None:
    """Raise an error for the first unknown class or option."""
    for place, name, value in given:
        section = name.removesuffix(".class_path")
        if section in SECTIONS and value and not value.startswith("{"):
            found = find_class(value, SECTIONS[section])
            if found is None:
                names = import_module(SECTIONS[section]).__all__
                classes = [name for name in names if name[0].isupper()]
                meant = _meant(value.rpartition(".")[2], classes)
                raise UsageError(f"{place}there is no class {value}. {meant}")
            known = {each for each in known if not f"{each}.".startswith(f"{section}.")}
            names = accepted_by(found)
            known |= {section} if names is None else {f"{section}.{each}" for each in names}
        elif not any(f"{name}.".startswith(f"{k}.") or k.startswith(f"{name}.") for k in known):
            section, _, wrong = name.rpartition(".")
            while section and not any(each.startswith(f"{section}.") for each in known):
                section, _, wrong = section.rpartition(".")
            prefix = f"{section}." if section else ""
            beside = [each for each in known if each.startswith(prefix)]
            meant = _meant(wrong, [each.removeprefix(prefix).split(".")[0] for each in beside])
            where = f" in {section}" if section else ""
            raise UsageError(f"{place}unknown option {wrong!r}{where}. {meant}")


def _meant(word: str, known: list[str]) -> str:
    """Return a suggestion for a mistyped word."""
    if found := get_close_matches(word, known, n=1, cutoff=0.75):
        return f"Did you mean {found[0]}?"
    return f"Expected one of {', '.join(sorted({*known}))}"


def find_class(path: str, package: str) -> Any:
    """Return the class at a path, or with a name in `package`; None if there is none."""
    module, _, name = path.rpartition(".")
    with contextlib.suppress(ModuleNotFoundError, AttributeError):
        return getattr(import_module(module or package), name)
    return None
