"""Errors of use on one line, with the file, the line and a suggestion."""

from __future__ import annotations

import contextlib
import errno
import inspect
import os
import re
import select
import sys
from collections.abc import Iterable, Iterator
from difflib import get_close_matches
from importlib import import_module
from itertools import accumulate, pairwise
from pathlib import Path
from typing import Any, NoReturn

import yaml
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.cli import LightningArgumentParser

USAGE_ERRORS = (
    ValueError,
    TypeError,
    LookupError,
    OSError,
    RuntimeError,
    ImportError,
    MisconfigurationException,
)
PACKAGES = (
    "dact.data",
    "dact.encoders",
)  # whose classes a configuration may name without the package
CUTOFF = 0.75  # similarity from which on a known word is suggested
# Lines of jsonargparse about a value that do not help its author.
NOISE = re.compile(
    r"Does not validate|Subtypes:|Errors:|Given value type:|Given value: \{|Expected a (path|<class 'NoneType'>)"
)


@contextlib.contextmanager
def one_line_errors() -> Iterator[None]:
    """End the process with status 1 and one line for an error of use; with DACT_TRACEBACK set, let
    it through.

    A reader of standard output that has had enough, such as ``head``, ends it without a word.
    """
    try:
        yield
    except USAGE_ERRORS as error:
        if isinstance(error, BrokenPipeError) and _has_no_reader():
            raise SystemExit(128 + 13) from None
        if os.environ.get("DACT_TRACEBACK"):
            raise
        message = error.args[0] if isinstance(error, KeyError) and error.args else error
        text = " ".join(str(message).split())
        if isinstance(error, OSError) and error.errno == errno.ENOSPC:
            text += ": free some space, and run the same command again"
        if text == "No supported gpu backend found!":
            text = "no GPU here that torch can use: leave trainer.accelerator gpu out, or install a torch for your GPU"
        # Of an option's several types, the first is the one that was meant.
        text = re.sub(
            r"^Does not validate against any of the Union subtypes .*? Errors: - (.*?) - .*",
            r"\1",
            text,
        )
        print(f"dact: error: {text}", file=sys.stderr)
        raise SystemExit(1) from None


def _has_no_reader() -> bool:
    """Return whether nobody reads standard output any more, to which nothing is then written at the
    exit."""
    try:
        poller = select.poll()
        poller.register(sys.stdout, 0)
    except (AttributeError, OSError, TypeError):  # Windows, or no file
        return False
    if not poller.poll(0):
        return False
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return True


class OneLineParser(LightningArgumentParser):
    """LightningCLI's parser, whose errors are one line with a suggestion. It takes no shortened
    options."""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **{"allow_abbrev": False, **options})

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """End the process with status 2; see `argparse.ArgumentParser.error`."""
        if not self.exit_on_error or os.environ.get("DACT_TRACEBACK"):
            super().error(message, ex)
        print(
            f"dact: error: {_explain(message, config_files(sys.argv[1:]), _options(self))}",
            file=sys.stderr,
        )
        raise SystemExit(2)


def config_files(words: list[str]) -> list[Path]:
    """Return the files that ``--config`` names among the words of a command line."""
    parts = [
        part for word in words for part in (word.split("=", 1) if word.startswith("--") else [word])
    ]
    return [Path(path) for flag, path in pairwise(parts) if flag in ("--config", "-c")]


def class_parameters(class_path: str) -> list[str] | None:
    """Return the options of a class, or None if there is no such class or it takes any option."""
    module, _, name = class_path.rpartition(".")
    for holder in [module] if module else PACKAGES:
        with contextlib.suppress(ImportError, AttributeError, ValueError, TypeError):
            parameters = inspect.signature(getattr(import_module(holder), name)).parameters.values()
            free = any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters)
            return None if free else [parameter.name for parameter in parameters]
    return None


def _options(parser: Any) -> set[str]:
    """Return the options of a parser and of its commands, such as ``model.lambda_reg``."""
    commands = (
        getattr(parser._subcommands_action, "_name_parser_map", {})
        if parser._subcommands_action
        else {}
    )
    own = {option[2:] for option in parser._option_string_actions if option.startswith("--")}
    return own.union(*(_options(command) for command in commands.values()))


def _explain(message: str, files: list[Path], options: set[str]) -> str:
    """Return an error of jsonargparse as one line, with its place in a file and a suggestion."""
    nodes = []
    for file in files:
        with contextlib.suppress(OSError):  # which jsonargparse reports itself
            try:
                nodes += [
                    (file, *node) for node in _nodes(yaml.compose(file.read_text(encoding="utf-8")))
                ]
            except yaml.YAMLError as error:
                mark = getattr(error, "problem_mark", None)
                problem = getattr(error, "problem", error)
                return f"{file}, line {mark.line + 1 if mark else 1}: not valid YAML: {problem}"

    def place(key: str, value: str | None = None) -> str:
        """Return the last file and line that hold a key, with that value if it is a plain one."""
        for file, line, path, content in reversed(nodes):
            if path.endswith(key) and (value is None or content in (None, value)):
                return f"{file}, line {line}: "
        return ""

    text = " ".join(message.split())
    if "Unexpected config:" in text:
        given = files[-1] if files else "--config"
        return f"{given} holds no options: --config takes YAML, and files with data go to --data.train_file"
    section = ".".join(re.findall(r'Parser key "([^"]+)"', text))  # the outer ones first
    if found := re.search(r"class_path '([^']+)': Option '([^']+)' is not accepted", text):
        name, known = found[1].rpartition(".")[2], class_parameters(found[1]) or []
        return f"{place(f'{section}.{found[2]}')}{name} has no option {found[2]!r}. {_closest(found[2], known)}"
    if found := re.search(
        r"dot import path string: (\S+)|class_path '([^']+)': (?:module '|No module)", text
    ):
        data = next(
            (
                word
                for flag, word in pairwise(sys.argv)
                if flag == "--data" and Path(word).is_file()
            ),
            None,
        )
        if data is not None:
            return f"--data takes a class, and {data} is a file: give it as --data.train_file or --data.predict_file"
        path = found[1] or found[2]
        known = [name for package in PACKAGES for name in import_module(package).__all__]
        meant = get_close_matches(path.rpartition(".")[2], known, n=1, cutoff=CUTOFF)
        hint = (
            f"Did you mean {meant[0]}?" if meant else "Name one that is installed, with its module"
        )
        return f"{place('class_path', path)}there is no class {path}. {hint}"
    sections = {
        "",
        *(part for option in options for part in accumulate(option.split("."), "{}.{}".format)),
    }
    if found := re.search(r"does not accept option '([^']+)'", text):
        parts = accumulate(found[1].split("."), "{}.{}".format)
        wrong = next((part for part in parts if part not in sections), found[1])
        section, _, name = wrong.rpartition(".")
        known = [
            option.rpartition(".")[2]
            for option in sections
            if option and option.rpartition(".")[0] == section
        ]
        return f"{place(wrong)}unknown key {name!r}{section and f' in {section}'}. {_closest(name, known)}"
    if found := re.search(r"unrecognized arguments: --([^\s=]+)", text):
        return f"no option --{found[1]}. {_closest(found[1], options, '--')}"
    if found := re.search(r"arguments are required: (.+)", text):
        return f"{re.sub(r'[a-z]+[.](?=model|data)', '', found[1])} must be given, preferably in a file with --config"
    lines = [line.strip().removeprefix("- ") for line in message.splitlines()]
    keys = [index for index, line in enumerate(lines) if line.startswith("Parser key")]
    if not keys:
        return " ".join(lines)
    key, rest = re.findall(r'"(.*?)":? *(.*)', lines[keys[-1]])[0]  # the innermost one
    said = [line for line in [rest, *lines[keys[-1] + 1 :]] if line and not NOISE.match(line)]
    text = re.sub(r"<class '(?:\w+\.)*(\w+)'>", r"\1", " ".join(said)).replace(
        " Given value: ", ". Got value: "
    )
    value = re.search(r"Got value: (\S+)", text)
    if "Unexpected import path format" in text and f"{key}.help" in options:
        return f"{place(section)}{key} has options of its own, which --{key}.help lists, got {value and value[1]}"
    text, *nested = text.split(". Got value: NestedArg")
    if "Expected a str" in text and re.search(r"Got value: (True|False)", text):
        text += ". YAML reads yes, no, true and false as booleans: put them in quotation marks"
    elif nested and "Expected a str" in text:  # such as the name of a column with a colon
        text += ". Words are read as YAML here: put this option into a file, in quotation marks"
    return f"{place(section, value and value[1])}{key}: {text}"


def _closest(word: str, known: Iterable[str], prefix: str = "") -> str:
    known = sorted(set(known))
    shortened = [name for name in known if name.startswith(word)]
    if (
        meant := shortened
        if len(shortened) == 1
        else get_close_matches(word, known, n=1, cutoff=CUTOFF)
    ):
        return f"Did you mean {prefix}{meant[0]}?"
    return f"Expected one of {', '.join(known)}" if 0 < len(known) <= 30 else "See --help"


def _nodes(node: Any, prefix: str = "") -> Iterator[tuple[int, str, str | None]]:
    """Yield, for each key, its line, its dotted path without ``init_args``, and its value if that
    is a plain one."""
    for key, value in node.value if isinstance(node, yaml.MappingNode) else ():
        path = prefix if key.value == "init_args" else f"{prefix}.{key.value}".removeprefix(".")
        yield (
            key.start_mark.line + 1,
            path,
            value.value if isinstance(value, yaml.ScalarNode) else None,
        )
        yield from _nodes(value, path)
