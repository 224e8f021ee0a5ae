"""The commands over a stored model, which need no configuration file: ``validate``, ``test``,
``predict``, ``calibrate``, ``export`` and ``serve``."""

from __future__ import annotations

import argparse
import os
import sys
from dataclasses import dataclass, field, fields
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import torch
import yaml
from jsonargparse import ArgumentParser
from lightning.pytorch import LightningDataModule

from dact import hub
from dact.agreement import check_agreement, names_of_classes
from dact.calibration import Promise, describe, layer_answers
from dact.calibration import calibrate as find_dial
from dact.calibration.answers import Measured
from dact.cli import NEEDED, STORED
from dact.cli.errors import UsageError, find_class, options, parse
from dact.cli.output import measurements, promise_line, quiet
from dact.cli.predict import check_output, write_predictions
from dact.data import TextClassificationData
from dact.data.files import DATASET
from dact.data.tokenizers import tokenizer_for
from dact.encoders import LayeredEncoder
from dact.factories import accepted_by, build_data
from dact.files import CONFIG_NAME, read_json, write_text
from dact.model import DACT
from dact.saving import HALTING, store_in_checkpoint
from dact.text_classifier import TextClassifier

RUNS = "lightning_logs"  # folder of all runs, in the Trainer's default_root_dir
OWN_FILES = "dact.data.TextClassificationData"
NO_LIMIT = 1_000_000  # tokens


def find_model(path: str | Path) -> Path:
    """Return the checkpoint file or model/ folder that `path` stands for.

    Args:
        path: A ``.ckpt`` file; a folder with config.json; the folder of a run, which stands for its
            ``final/model`` after ``dact tune`` and for its ``model`` after ``dact fit``; or
            ``OWNER/NAME`` or ``OWNER/NAME@REVISION``, which is downloaded from the Hub unless the
            current folder has a folder OWNER.
    """
    name, _, revision = str(path).partition("@")
    is_here = Path(path).exists() or Path(name).parent.is_dir()
    if not is_here and hub.HUB_ID.fullmatch(name):
        return hub.local_folder(name, revision=revision or None)
    path = Path(path)
    if path.is_file():
        return path
    if ((folder := hub.local_folder(path)) / CONFIG_NAME).is_file():
        return folder
    if is_tuned(path):
        raise FileNotFoundError(
            f"{path} is a run of dact tune without its final model: resume it with the command "
            f"that began it, with --run_tag {path.name}, or wait for it if it is still running"
        )
    hint = "expected the folder of a run, a model/ folder, a checkpoint or a Hub id"
    meant = f"did you mean {RUNS / path}?" if (RUNS / path).is_dir() else hint
    raise FileNotFoundError(f"no model at {path}: {meant}")


def is_tuned(folder: Path) -> bool:
    """Return whether a folder holds a run of ``dact tune``."""
    return any((folder / name).exists() for name in ("run.json", "studies.db", "final"))


def pair(source: Path) -> list[Path]:
    """Return the model/ folder and the best checkpoint of a run, which hold the same model, if
    `source` is one of them; else `source` alone."""
    source = source.absolute()
    run = source.parent if source.is_dir() else source.parents[1]
    both = [run / "model", run / "checkpoints" / "best.ckpt"]
    return [path for path in both if path.exists()] if source in both else [source]


def load_model(source: Path, encoder: LayeredEncoder | None = None, **overrides: Any) -> DACT:
    """Return the model of a path that `find_model` returned, in eval mode on the CPU."""
    load: Any = DACT.from_pretrained if source.is_dir() else DACT.load_from_checkpoint
    return load(source, encoder=encoder, **overrides).eval()


def store(model: DACT, source: Path) -> None:
    """Write the halting settings, calibration and temperatures of a model where it is stored."""
    for path in pair(source):
        if path.is_dir():
            model.save_pretrained(path)
        else:
            store_in_checkpoint(path, model)


@dataclass
class Stored:
    """A stored model, how it runs, and the data of a command.

    Args:
        model: Folder of a run, model/ folder, checkpoint, or OWNER/NAME[@REVISION] on the Hub.
        data: Section ``data`` of the configuration.
        encoder: Section ``model.encoder``, for a model that cannot rebuild its encoder.
        halting: Halting rule; the model's if left out.
        halting_margin: Margin, in [0, 1]; the model's if left out.
        halting_tolerance: Tolerance, in [0, 1); the model's if left out.
        thresholds: Thresholds of the labels; the model's if left out.
        device: Device, such as cpu or cuda; auto takes a GPU if there is one.
        dtype: Precision of the encoder.
    """

    model: str
    data: Any = None
    encoder: Any = None
    halting: Literal["exact", "paper", "never"] | None = None
    halting_margin: float | None = None
    halting_tolerance: float | None = None
    thresholds: list[float] | None = None
    device: str = "auto"
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    had_promise: bool = field(default=False, init=False)  # as it is stored

    @cached_property
    def dact(self) -> DACT:
        """The model on its device; loading it prints its margin to standard error."""
        source, encoder = find_model(self.model), None
        kind = self.encoder and find_class(self.encoder["class_path"], "dact.encoders")
        if self.encoder and not (kind and kind.__module__.startswith("dact.")):
            parser = ArgumentParser(exit_on_error=False)
            parser.add_subclass_arguments(LayeredEncoder, "encoder")
            built = parser.instantiate(parser.parse_object({"encoder": self.encoder}))
            encoder = built.encoder
        model = load_model(source, encoder)
        self.had_promise = model.calibration is not None
        for name in HALTING:
            if getattr(self, name) is not None:
                setattr(model, name, getattr(self, name))
        held = "no promise, as the stored one is for another setting"
        if model.calibration is not None:
            held = "an estimate" if model.calibration.get("estimate") else "a promise"
        elif not self.had_promise:
            held = "no promise"
        rule = f"{model.halting} rule, tolerance {model.halting_tolerance:g}"
        print(f"halting_margin {model.halting_margin:.8g} with {held} ({rule})", file=sys.stderr)
        gpu = torch.accelerator.current_accelerator(check_available=True) or "cpu"
        return model.to(gpu if self.device == "auto" else self.device)

    def precision(self) -> torch.autocast:
        """Return the context in which the model runs in `dtype`."""
        kind, dtype = self.dact.device.type, getattr(torch, self.dtype)
        return torch.autocast(kind, dtype, enabled=self.dtype != "float32")

    def build_data(self) -> LightningDataModule:
        """Return the data, with the model's classes and at most as many tokens as it takes."""
        options = self.data["init_args"]
        if options.get("class_names", ()) is None:
            options["class_names"] = self.dact.class_names
        if "max_length" in options:
            longest = self.dact.encoder.max_length or NO_LIMIT
            options["max_length"] = min(options["max_length"], longest)
        return build_data(self.data)


def validate(stored: Stored) -> None:
    """Measure a model on its validation examples."""
    with stored.precision():
        measure(stored.dact, stored.build_data(), "validate")


def test(stored: Stored) -> None:
    """Measure a model on test examples, and check its promise."""
    with stored.precision():
        measure(stored.dact, stored.build_data(), "test")


def measure(model: DACT, data: LightningDataModule, stage: Literal["validate", "test"]) -> Measured:
    """Print the measurements of a model and, on test examples, whether its promise holds; return
    the measurements."""
    data.prepare_data()
    data.setup(stage)
    check_agreement(model, data, training=False)
    batches = data.test_dataloader() if stage == "test" else data.val_dataloader()
    answers = layer_answers(model, batches)
    measured = Measured(answers, answers.exit_layers(model.exit_rule))
    split = "test" if stage == "test" else "validation"
    print(measurements(measured, names_of_classes(model), split))
    if stage == "test" and model.calibration is not None:
        print(promise_line(model.calibration, measured))
    return measured


def calibrate(stored: Stored, fit_thresholds: bool = False, **promise: Any) -> None:
    """Find the setting of a dial that keeps a promise, and store it with the model."""
    source = find_model(stored.model)
    if not Path(stored.model).exists():
        raise UsageError(
            f"dact calibrate writes to the model: download it first, by `hf download "
            f"{stored.model.partition('@')[0]} --local-dir FOLDER`, and give --model FOLDER"
        )
    wanted, model, data = Promise(**promise), stored.dact, stored.build_data()
    before = getattr(model, wanted.dial)
    data.prepare_data()
    data.setup("validate")
    if short := wanted.shortage(data):
        if wanted.confidence is not None:
            raise UsageError(f"{short}: give more, promise less, or ask for --confidence null")
        print(short)
    with stored.precision():
        found = find_dial(model, data, fit_thresholds=fit_thresholds, **promise)
    store(model, source)
    replaced = ", and its promise is replaced" if stored.had_promise else ""
    places = " and ".join(map(os.path.relpath, pair(source)))
    now = f"{getattr(model, wanted.dial):.8g} in {places}"
    print(describe(vars(found), model.num_layers))
    print(f"{wanted.dial} was {before:.8g}{replaced}: it is {now}")


def predict(
    stored: Stored, *, output: str = "predictions.csv", keep_columns: list[str] | None = None
) -> None:
    """Classify the texts of a file, or of standard input, a batch at a time.

    Args:
        output: File to write: .csv, .jsonl or .parquet; - writes csv to standard output.
        keep_columns: Columns of the input to copy; by default the text columns, and id if there is
            one.
    """
    data = stored.data["init_args"]
    file = data.get("predict_file")
    check_output(output, file)
    if data.get("tokenizer") is None:
        raise UsageError(f"no tokenizer is stored with {stored.model}: give --data.tokenizer")
    tokenizer = tokenizer_for(data["tokenizer"], data["max_length"])
    classifier = TextClassifier(stored.dact, tokenizer, dtype=stored.dtype)
    columns = [data["text_column"], data.get("text_pair_column")]
    texts = [name for name in columns if name is not None]
    write_predictions(classifier, file, texts, keep_columns, output, data.get("delimiter"))


def export(model: Path, output: str, quantize: Literal["int8"] | None = None) -> None:
    """Write the layers of a model as ONNX Runtime graphs, and renew its promise on the data of its
    run.

    Args:
        model: Folder of a run, model/ folder, or OWNER/NAME[@REVISION] on the Hub.
        output: Folder to write to.
        quantize: int8 quantizes the weights of the layers; float32 if left out.
    """
    from dact.exporting import export as write

    print(write(model, output, quantize))
    record, run = load_model(model).calibration, _run_config(model)
    if "data" in run:
        write_text(Path(output, "config.yaml"), yaml.safe_dump({"data": run["data"]}))
    if record is None or "data" not in run or record.get("baseline_accuracy") is not None:
        return
    print("The promise is renewed on the calibration examples of the run:")
    try:
        data = _data_section(output, [run], [])
        calibrate(Stored(output, data), **record["promise"])
    except (ValueError, OSError) as error:
        print(f"It was not renewed, which `dact calibrate --model {output}` does: {error}")


def run(command: str, words: list[str]) -> None:
    """Run a command over a stored model."""
    quiet()
    sys.path.append(str(Path().absolute()))
    function: Any = globals().get(command)
    if command == "serve":
        from dact.server import serve as function
    parser = ArgumentParser(
        prog=f"dact {command}",
        usage=f"dact {command} --model MODEL {NEEDED[command]} [--OPTION ...]",
        description=STORED[command],
        exit_on_error=False,
        allow_abbrev=False,
    )
    if command in ("export", "serve"):
        parser.add_function_arguments(function)
        arguments = parse(parser, words).as_dict()
        function(**{**arguments, "model": find_model(arguments["model"])})
        return
    before = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    before.add_argument("--model")
    before.add_argument("-c", "--config", action="append", default=[])
    given, words = before.parse_known_args(words)
    sections = [] if given.model is None else [_run_config(find_model(given.model))]
    sections += [_read(Path(name)) for name in given.config]
    parser.add_class_arguments(Stored, skip={"data", "encoder"}, instantiate=False)
    parser.add_argument("--config", help="file whose section data, or model.encoder, is used")
    if command == "calibrate":
        parser.add_class_arguments(Promise, instantiate=False)
        help = "first set the thresholds of labels to maximize F1 scores on validation examples"
        parser.add_argument("--fit_thresholds", type=bool, default=False, help=help)
    else:
        parser.add_function_arguments(function, skip={"stored"})
    parser.add_subclass_arguments(LightningDataModule, "data", instantiate=False, required=False)
    parser.set_defaults({"data": _data_section(given.model, sections, words)})
    words += [] if given.model is None else ["--model", given.model]
    config = parse(parser, words).as_dict()
    config.pop("config")
    encoders = [one["model"]["encoder"] for one in sections if one.get("model", {}).get("encoder")]
    own = {one.name: config.pop(one.name) for one in fields(Stored) if one.name in config}
    function(Stored(**own, encoder=encoders[-1] if encoders else None), **config)


def _run_config(source: Path) -> dict[str, Any]:
    """Return the configuration of the run that a model belongs to, or that an export keeps; empty
    if it has none."""
    folder = source.absolute().parent if source.is_dir() else source.absolute().parents[1]
    files = (one / "config.yaml" for one in (source, folder))
    return next((_read(file) for file in files if file.is_file()), {})


def _read(path: Path) -> dict[str, Any]:
    with path.open(encoding="utf-8") as file:
        return yaml.safe_load(file) or {}


def _data_section(
    model: str | None, sections: list[dict[str, Any]], words: list[str]
) -> dict[str, Any]:
    """Return the section ``data`` of the last configuration that names a class, or one for your own
    files if that class does not take the options of the command line."""
    section: dict[str, Any] = {"class_path": OWN_FILES}
    for one in sections:
        new = one.get("data") or {}
        arguments = {**section.get("init_args", {}), **new.get("init_args", {})}
        section = new if "class_path" in new else {**section, "init_args": arguments}
    names = {name.split(".")[1] for _, name, _ in options(words) if name.startswith("data.")}
    found = find_class(section["class_path"], "dact.data")
    accepted = None if found is None else accepted_by(found)
    if found is None:
        print(f"no class {section['class_path']}: the data is {OWN_FILES}", file=sys.stderr)
    if found is None or (accepted is not None and not names <= {*accepted}):
        section, accepted = {"class_path": OWN_FILES}, accepted_by(TextClassificationData)
    # Drop the files of the fit that are not on this machine.
    arguments = {
        name: value
        for name, value in (section.get("init_args") or {}).items()
        if not (name.endswith("_file") and value and name not in names)
        or value.startswith(DATASET)
        or Path(value).exists()
    }
    source = Path() if model is None else find_model(model)
    folder = source if source.is_dir() else source.absolute().parents[1] / "model"
    file = folder / "tokenizer_config.json"
    if "tokenizer" in (accepted or ()) and file.is_file():
        arguments["tokenizer"] = str(folder)
        longest = read_json(file).get("model_max_length") or NO_LIMIT
        arguments.setdefault("max_length", min(longest, NO_LIMIT))
    if names & {"val_file", "calibration_file"}:
        # All examples of a file that is given here are used.
        arguments["calibration_fraction"] = 0.0
    return {**section, "init_args": arguments}
