"""Errors of use on one line, with the file, the line and the name that may have been meant."""

from __future__ import annotations

import contextlib
import inspect
import os
import re
import sys
from collections.abc import Iterable, Iterator
from difflib import get_close_matches
from importlib import import_module
from itertools import pairwise
from pathlib import Path
from typing import Any, NoReturn

import yaml
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.cli import LightningArgumentParser

USAGE_ERRORS = (ValueError, TypeError, LookupError, OSError, RuntimeError, ImportError, MisconfigurationException)
PACKAGES = ("dact.data", "dact.encoders")  # whose classes a configuration may name without the package


@contextlib.contextmanager
def one_line_errors() -> Iterator[None]:
    """End the process with status 1 and one line for an error of use; with DACT_TRACEBACK set, let it through."""
    try:
        yield
    except USAGE_ERRORS as error:
        if os.environ.get("DACT_TRACEBACK"):
            raise
        message = error.args[0] if isinstance(error, KeyError) and error.args else error
        print(f"dact: error: {' '.join(str(message).split())}", file=sys.stderr)
        raise SystemExit(1) from None


class OneLineParser(LightningArgumentParser):
    """LightningCLI's parser, whose errors are one line that also says what may have been meant."""

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """End the process with status 2; see `argparse.ArgumentParser.error`."""
        if not self.exit_on_error or os.environ.get("DACT_TRACEBACK"):
            super().error(message, ex)
        words = sys.argv[1:]
        files = config_files(words)
        print(f"dact: error: {_misspelt(words, files, _options(self)) or _located(message, files)}", file=sys.stderr)
        raise SystemExit(2)


def config_files(words: list[str]) -> list[Path]:
    """Return the files that ``--config`` names among the words of a command line."""
    parts = [part for word in words for part in (word.split("=", 1) if word.startswith("--") else [word])]
    return [Path(path) for flag, path in pairwise(parts) if flag in ("--config", "-c")]


def _options(parser: Any) -> set[str]:
    """Return the options of a parser and of its commands, such as ``model.lambda_reg``."""
    commands = getattr(parser._subcommands_action, "_name_parser_map", {}) if parser._subcommands_action else {}
    own = {option[2:] for option in parser._option_string_actions if option.startswith("--")}
    return own.union(*(_options(command) for command in commands.values()))


def _misspelt(words: list[str], files: list[Path], options: set[str]) -> str | None:
    """Return what is said of the first key, option or class that does not exist, or None if all of them do."""
    classes: dict[str, str] = {}  # section -> class_path, of which the last one counts
    for file in files:
        with contextlib.suppress(OSError, yaml.YAMLError):  # which jsonargparse reports itself
            node = yaml.compose(file.read_text(encoding="utf-8"))
            if isinstance(node, yaml.MappingNode) and (found := _misspelt_key(node, "", options, classes)):
                line, text = found
                return f"{file}, line {line}: {text}"
    parts = [part for word in words for part in word.split("=", 1)]
    for word, value in pairwise([*parts, ""]):
        name = word[2:].removesuffix("+")
        if not word.startswith("--") or not name:
            continue
        section = next((key for key in ("model.encoder", "data") if name.startswith(f"{key}.")), None)
        if name in ("model.encoder", "data") or name.endswith(".class_path"):
            classes[name.removesuffix(".class_path")] = value
            if not value.startswith("{") and isinstance(known := class_parameters(value), str):
                return known
        elif section and section in classes:
            known = class_parameters(classes[section])
            argument = name.removeprefix(f"{section}.").removeprefix("init_args.").split(".")[0]
            if isinstance(known, list) and argument not in [*known, "help", "dict_kwargs"]:
                return f"{classes[section]} has no option {argument!r}. {_closest(argument, known)}"
        elif section is None and name not in options and not name.endswith(".help"):
            return f"no option --{name}. {_closest(name, options, '--')}"
    return None


def _misspelt_key(
    node: yaml.MappingNode, prefix: str, options: set[str], classes: dict[str, str]
) -> tuple[int, str] | None:
    """Return the line and the fault of the first unknown key under `node`."""
    for key, value in node.value:
        name, path, line = str(key.value), f"{prefix}{key.value}", key.start_mark.line + 1
        below = [option.removeprefix(f"{path}.") for option in options if option.startswith(f"{path}.")]
        if path not in options and not below:
            others = {option.removeprefix(prefix).split(".")[0] for option in options if option.startswith(prefix)}
            return line, f"unknown key {name!r}{f' in {prefix[:-1]}' if prefix else ''}. {_closest(name, others)}"
        if not isinstance(value, yaml.MappingNode):
            continue
        entries = {str(entry.value): content for entry, content in value.value}
        if "class_path" in entries:
            class_path = str(entries["class_path"].value)
            classes[path] = class_path
            known = class_parameters(class_path)
            if isinstance(known, str):
                return entries["class_path"].start_mark.line + 1, known
            arguments = entries.get("init_args")
            for entry, _ in arguments.value if isinstance(arguments, yaml.MappingNode) and known else ():
                if str(entry.value) not in (known or ()):
                    text = f"{class_path} has no option {entry.value!r}. {_closest(str(entry.value), known or ())}"
                    return entry.start_mark.line + 1, text
        elif any(option not in ("help",) for option in below) and (
            found := _misspelt_key(value, f"{path}.", options, classes)
        ):
            return found
    return None


def class_parameters(class_path: str) -> list[str] | str | None:
    """Return the options of a class, a message if its module has no such class, or None if they cannot be told."""
    module, _, name = class_path.rpartition(".")
    holders = [module] if module else PACKAGES
    try:
        found = next((getattr(import_module(holder), name) for holder in holders if _has(holder, name)), None)
        if found is None:
            known = {known for holder in holders for known in getattr(import_module(holder), "__all__", ())}
            return f"there is no class {class_path}. {_closest(name, known)}"
        parameters = inspect.signature(found).parameters.values()
    except (ImportError, ValueError, TypeError):
        return None
    if any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters):
        return None
    return [parameter.name for parameter in parameters]


def _has(module: str, name: str) -> bool:
    return hasattr(import_module(module), name)


def _closest(word: str, known: Iterable[str], prefix: str = "") -> str:
    known = sorted(set(known))
    if meant := get_close_matches(word, known, n=1, cutoff=0.75):
        return f"Did you mean {prefix}{meant[0]}?"
    return f"Expected one of {', '.join(known)}" if 0 < len(known) <= 30 else "See --help"


def _located(message: str, files: list[Path]) -> str:
    """Return jsonargparse's message about a value on one line, with the file and line where the value stands."""
    lines = [line.strip().removeprefix("- ") for line in message.splitlines()]
    noise = (
        "Does not validate",
        "Subtypes:",
        "Errors:",
        "Given value type:",
        "Given value: {",
        "Given value: NestedArg(",
        "Given value: Namespace(",
        "Expected a <class 'NoneType'>",
        "Expected a path",
    )
    text = " ".join(line for line in lines if line and not line.startswith(noise)).replace(
        'in "<unicode string>", ', ""
    )
    text = text.replace(" Given value: ", ". Got value: ")
    text = re.sub(r"<class '(?:\w+\.)*(\w+)'>", r"\1", text)
    key = list(re.finditer(r'Parser key "([^"]+)":?\s*', text))[-1:]  # the innermost one
    if not key and "Problems parsing config" not in text:
        return text
    place = ""
    for file in files:
        try:
            nodes = dict(_nodes(yaml.compose(file.read_text(encoding="utf-8"))))
        except yaml.YAMLError as error:
            line = error.problem_mark.line + 1 if isinstance(error, yaml.MarkedYAMLError) and error.problem_mark else 1
            return f"{file}, line {line}: no valid YAML: {getattr(error, 'problem', error)}"
        except OSError:
            continue
        typed = key and any(f".{word[2:].split('=')[0]}".endswith(f".{key[0][1]}") for word in sys.argv[1:])
        if key and not typed:  # a value on the command line stands in no file
            lines_of_key = [line for path, line in nodes.items() if f".{path}".endswith(f".{key[0][1]}")]
            place = f"{file}, line {lines_of_key[-1]}: " if lines_of_key else place
    return f"{place}{key[0][1]}: {text[key[0].end() :]}" if key else text


def _nodes(node: Any, prefix: str = "") -> Iterator[tuple[str, int]]:
    """Yield the dotted path of each key, without ``init_args``, and its line."""
    for key, value in node.value if isinstance(node, yaml.MappingNode) else ():
        path = prefix if key.value == "init_args" else f"{prefix}.{key.value}".removeprefix(".")
        yield path, key.start_mark.line + 1
        yield from _nodes(value, path)
