"""The request that a command line makes, read and completed before LightningCLI parses it."""

from __future__ import annotations

import contextlib
import os
import re
import shlex
import socket
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit
from urllib.request import getproxies

import yaml
from huggingface_hub import constants

from dact.checks import check_count
from dact.cli import LIGHTNING
from dact.cli.errors import class_parameters
from dact.cli.predictions import BATCH, OUTPUT, PredictionData, check_writable
from dact.cli.runs import fit_data
from dact.cli.stored import counterpart, find_model, hub_id
from dact.data.files import (
    DATASET,
)  # with its package, whose classes a configuration names without it
from dact.data.tokenizers import load_tokenizer
from dact.encoders.pretrained import resolve_pretrained
from dact.files import read_json

EVALUATING = ("validate", "test", "predict", "calibrate")
OWN_FILES = "TextClassificationData"
COLUMNS = ("text_column", "text_pair_column", "label_column")
DIVISION = ("val_file", "seed", "val_fraction", "calibration_fraction")
MOST_TOKENS = 1_000_000  # tokens; nothing is cut


@dataclass
class Request:
    """A command line, completed with the options that follow from the others.

    Args:
        command: Name of the command.
        words: Words for LightningCLI's parser.
        model: Stored model that ``--model`` names, as `find_model` found it, for a command that
            evaluates one.
        sections: Content of the configuration files; later files override earlier ones.
        given: Words as they were typed.
    """

    command: str
    words: list[str]
    model: Path | None = None
    sections: dict[str, Any] = field(default_factory=dict)
    given: list[str] = field(default_factory=list)

    @classmethod
    def read(cls, words: list[str]) -> Request:
        """Return the request of a command line."""
        command = next(word for word in words if word in LIGHTNING)
        request = cls(command, list(words), given=list(words))
        for section in _sections(words):
            _merge(request.sections, section)
        if not any(word in ("-h", "--help") for word in words):
            if command == "predict" and isinstance(
                output := request.value("output") or OUTPUT, str
            ):
                check_writable(output)  # before anything that takes time
                file = request.value("data.predict_file")
                if (
                    isinstance(file, str)
                    and os.path.exists(output)
                    and os.path.exists(file)
                    and os.path.samefile(output, file)
                ):
                    raise ValueError(
                        f"--output {output} is the file with the texts, and would replace it: name another"
                    )
            request._take_model()
            request._complete_words()
        return request

    def gives(self, option: str) -> bool:
        """Return whether the command line or a file gives an option, such as
        ``model.output_dimension``."""
        return (
            any(name == option for _, name, _ in _options(self.words))
            or self.value(option) is not None
        )

    def value(self, option: str) -> Any:
        """Return the value of an option as it was given, or None."""
        given = [
            v
            for place, name, v in _options(self.words)
            if name == option and place.stop <= len(self.words)
        ]
        if given:
            return given[-1]
        node: Any = self.sections
        for name in option.split("."):
            node = (
                node.get("init_args", node) if isinstance(node, dict) and name not in node else node
            )
            node = node.get(name) if isinstance(node, dict) else None
        return node

    def model_words(self) -> list[str]:
        """Return the words that give options of the model."""
        places = [
            place
            for place, name, _ in _options(self.words)
            if re.match(r"model\.(?!encoder)", name)
        ]
        return [word for place in places for word in self.words[place]]

    def again(self, name: str, value: str) -> str:
        """Return the command line, with an option set to `value`."""
        words = list(self.given)
        for place in [place for place, option, _ in _options(words) if option == name][::-1]:
            del words[place]
        return shlex.join(["dact", *words, f"--{name}", value])

    def _take_model(self) -> None:
        """Remove ``--model`` from the words, unless it names a file of options, and find that
        model."""
        if self.command not in EVALUATING:
            return
        if self.command == "calibrate":
            _refuse_hub(self.value("ckpt_path"), "ckpt_path")
        for place, name, value in _options(self.words):
            if name != "model" or value.endswith((".yaml", ".yml", ".json")):
                continue
            if not value:
                raise ValueError(
                    "--model needs a value: a model/ folder, the folder of a run, or a Hub id"
                )
            if self.command == "calibrate":
                _refuse_hub(value, "model")
            self.model = find_model(value)
            del self.words[place]
            return

    def _complete_words(self) -> None:
        """Add the data class for the user's own files, and its tokenizer, if they were not
        given."""
        hub_names = ("model.encoder.pretrained", "data.tokenizer", "data.teacher")
        go_offline_without_hub([self.value(name) for name in hub_names])
        data = self.value("data.class_path") or self.value("data")
        own = [place.start for place, name, _ in _options(self.words) if name.startswith("data.")]
        files = [
            place
            for place, word in enumerate(self.words)
            if word.partition("=")[0] in ("--config", "-c")
        ]
        if own and (data is None or (isinstance(data, str) and files and own[0] < files[0])):
            data = data or OWN_FILES
            self.words.insert(
                self.words.index(self.command) + 1, f"--data={data}"
            )  # its options need to be known
        known = class_parameters(data) if isinstance(data, str) else None
        if isinstance(known, list) and "tokenizer" in known and not self.gives("data.tokenizer"):
            source = self._tokenizer()
            if source is not None:
                self.words.append(f"--data.tokenizer={source}")

    def _tokenizer(self) -> str | None:
        """Return the place of the tokenizer of the stored model, or of the encoder to train."""
        if self.command in EVALUATING:
            given = self.value("ckpt_path")
            path = self.model or (find_model(given) if given else None)
            folder = path if path is None or path.is_dir() else counterpart(path)
            return (
                str(folder)
                if folder is not None and (folder / "tokenizer_config.json").is_file()
                else None
            )
        pretrained = self.value("model.encoder.pretrained")
        return pretrained if isinstance(pretrained, str) else None

    def own_data(self, config: Any, model: Any) -> PredictionData | None:
        """Return data for a file to classify, read a batch at a time, in place of the data of a
        configuration.

        For another command or other data the result is None, and data from the user's own files get
        the classes and the length of the stored model."""
        data = config.get("data")
        if data is None or data["class_path"].rpartition(".")[2] != OWN_FILES:
            return None
        arguments = data["init_args"]
        if self.command == "predict" and arguments.get("predict_file") is None:
            raise ValueError(
                "dact predict needs --data.predict_file, the file with the texts, or - for standard input"
            )
        files = ("calibration_file", "val_file", "train_file")
        if self.command == "calibrate" and not any(arguments.get(file) for file in files):
            raise ValueError(
                "dact calibrate needs --data.calibration_file, labelled examples that were used neither to train the "
                "model nor to choose it"
            )
        check_count("data.batch_size", arguments["batch_size"])
        self._take_columns(arguments)
        if self.command != "predict" or str(arguments["predict_file"]).startswith(DATASET):
            if arguments.get("class_names") is None and model.class_names is not None:
                arguments["class_names"] = list(model.class_names)
            arguments["max_length"] = self._max_length(arguments, model)
            return None
        if arguments["tokenizer"] is None:
            source = self.model or self.value("ckpt_path")
            raise ValueError(
                f"no tokenizer is stored with {source}: give --data.tokenizer, that of the encoder"
            )
        columns = {name: arguments[name] for name in ("text_column", "text_pair_column")}
        tokenizer, size = (
            load_tokenizer(str(arguments["tokenizer"])),
            max(arguments["batch_size"], BATCH),
        )
        length = self._max_length(arguments, model)
        config.data = None
        return PredictionData(
            arguments["predict_file"], tokenizer, max_length=length, batch_size=size, **columns
        )

    def _take_columns(self, arguments: Any) -> None:
        """Take columns from the fit unless they were given, and its division to validate on its own
        files."""
        source = self.model or find_model(self.value("ckpt_path"))
        section = fit_data(source)
        if section.get("class_path", "").rpartition(".")[2] != OWN_FILES:
            return
        fitted = section["init_args"]
        names = list(COLUMNS)
        for file in ("val_file", "train_file") if self.command == "validate" else ():
            if arguments.get(file):
                same = fitted.get(file) and os.path.realpath(arguments[file]) == os.path.realpath(
                    fitted[file]
                )
                names += DIVISION if same else ()
                break
        for name in names:
            beside = name == "calibration_fraction" and arguments.get("calibration_file")
            if name in fitted and not beside and not self.gives(f"data.{name}"):
                arguments[name] = fitted[name]

    def _max_length(self, arguments: Any, model: Any) -> int:
        """Return how many tokens are kept: as given, or, as by `TextClassifier`, what tokenizer and
        encoder take."""
        if self.gives("data.max_length"):
            return int(arguments["max_length"])
        file = Path(resolve_pretrained(str(arguments["tokenizer"])), "tokenizer_config.json")
        stored = (
            read_json(file).get("model_max_length") if file.is_file() else None
        )  # 1e30 means no limit
        return int(min(stored or MOST_TOKENS, model.encoder.max_length or MOST_TOKENS, MOST_TOKENS))


def _options(words: list[str]) -> Iterator[tuple[slice, str, str]]:
    """Yield the place of each option, its name without the ``init_args`` that may be left out, and
    its value."""
    for start, word in enumerate(words):
        if word.startswith("--"):
            name, equals, value = word[2:].partition("=")
            place = slice(start, start + (1 if equals else 2))
            yield (
                place,
                name.replace(".init_args.", "."),
                value if equals else "".join(words[place][1:]),
            )


def _sections(words: list[str]) -> Iterator[dict[str, Any]]:
    """Yield, in their order, what ``--config``, ``--data``, ``--data.init_args`` and so on give as
    file or as JSON."""
    for _, name, value in _options(["--config" if word == "-c" else word for word in words]):
        if not re.fullmatch(r"config|(model|data)(\.encoder)?(\.init_args)?", name):
            continue
        content = None
        if name == "config" or value.endswith((".yaml", ".yml", ".json")):
            try:
                content = yaml.safe_load(Path(value).read_text(encoding="utf-8"))
            except UnicodeDecodeError as error:
                raise ValueError(f"{value} is not a text file in UTF-8: save it as one") from error
            except (OSError, yaml.YAMLError):
                continue  # the parser reports it
        elif value.startswith("{"):
            with contextlib.suppress(yaml.YAMLError):
                content = yaml.safe_load(value)
        if isinstance(content, dict):
            for part in [] if name == "config" else reversed(name.split(".")):
                content = {part: content}
            yield content


def _refuse_hub(model: Any, option: str) -> None:
    if isinstance(model, str) and hub_id(model):
        raise ValueError(
            f"--{option} {model} is no folder here, and dact calibrate writes to the model: download one from the Hub "
            f"first, by `hf download {model.partition('@')[0]} --local-dir FOLDER`, and give --{option} FOLDER"
        )


def go_offline_without_hub(names: list[Any]) -> None:
    """Set Hugging Face's libraries offline if the Hub cannot be reached, which saves a minute of
    retries."""
    local = [
        name
        for name in names
        if isinstance(name, str) and (name.startswith("package:") or Path(name).exists())
    ]
    if (
        "HF_HUB_OFFLINE" in os.environ
        or getproxies()
        or not [n for n in names if n is not None and n not in local]
    ):
        return
    address = urlsplit(constants.ENDPOINT)
    try:
        socket.create_connection((address.hostname or "", address.port or 443), timeout=5).close()
    except OSError:
        os.environ["HF_HUB_OFFLINE"] = "1"  # for processes that this one starts
        constants.HF_HUB_OFFLINE = True


def _merge(base: dict[str, Any], over: dict[str, Any]) -> None:
    """Replace entries of `base` by those of `over`, section by section; another class replaces its
    whole section."""
    for name, value in over.items():
        old = base.get(name)
        if isinstance(value, dict) and isinstance(old, dict):
            before, now = (
                str(one.get("class_path", "")).rpartition(".")[2] for one in (old, value)
            )
            if before and now and before != now:
                old.clear()
            _merge(old, value)
        else:
            base[name] = value
