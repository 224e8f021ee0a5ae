"""The files of a model: config.json, model.safetensors, and its entry in a checkpoint. They hold
data, never code."""

from __future__ import annotations

import dataclasses
import inspect
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor, nn

from dact import encoders, files
from dact.encoders.base import LayeredEncoder
from dact.files import DurableCheckpointIO, read_json, read_tensors, write_json, write_tensors
from dact.submodels import SubmodelConfig, Submodels

CONFIG_NAME = "config.json"
WEIGHTS_NAME = "model.safetensors"
FORMAT = "dact/2"
FORMATS = ("dact/1", FORMAT)  # that can be read
# Attributes that decide when an example halts, in the order of `Halting`.
HALTING = ("halting", "halting_tolerance", "halting_margin")
# Where a checkpoint holds `config_of`. LightningCLI reads "hyper_parameters" as its own and refuses
# other formats there.
CHECKPOINT_KEY = "dact"
EARLIER_KEY = "hyper_parameters"  # where version 0.1.0 had it
LEARNED = ("temperatures", "calibration")  # attributes that no constructor takes
# Names of weights in earlier files: a submodel, a layer, and a part of the submodel of that layer.
ALONE = re.compile(r"(classifier|confidence)\.(\d+)\.(\d+)\.(\w+)")

Model = TypeVar("Model", bound=nn.Module)


# ------------------------------------------------------------------ a model as plain data


def config_of(model: Any, base: type) -> dict[str, Any]:
    """Return plain data (strings, numbers, lists, dicts) from which `build` makes this model again.

    Hyper-parameters of a subclass that are not plain data are left out, and must be passed when the
    model is loaded."""
    names = (*inspect.signature(base).parameters, *LEARNED)
    config = {name: plain_data(getattr(model, name)) for name in names}
    if type(model) is not base and model.hparams:
        own = {
            name: plain_data(value)
            for name, value in model.hparams.items()
            if not name.startswith("_") and _is_plain(plain_data(value))
        }
        config["subclass"] = {"name": type(model).__qualname__, "arguments": own}
    return config


def plain_data(value: Any) -> Any:
    """Return a value as the types that a checkpoint may hold: NumPy's numbers and strings would
    need code to read."""
    if isinstance(value, LayeredEncoder):
        return plain_data(value.config())
    value = value.config if isinstance(value, Submodels) else value
    if isinstance(value, SubmodelConfig):
        return dataclasses.asdict(value)
    if isinstance(value, Mapping):
        return {str(name): plain_data(entry) for name, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return list(map(plain_data, value))
    if isinstance(value, Tensor):
        return value.tolist()
    return value.item() if isinstance(value, np.generic) else value


def _is_plain(value: Any) -> bool:
    if isinstance(value, (dict, list)):
        return all(map(_is_plain, value.values() if isinstance(value, dict) else value))
    return value is None or type(value) in (str, int, float, bool)


def build(
    cls: type[Model], base: type, config: Mapping[str, Any], overrides: Mapping[str, Any]
) -> Model:
    """Build a model with fresh weights as `config_of` described it.

    Args:
        cls: Class of the model: `base`, or a subclass of it, which gets the hyper-parameters back
            that it has saved. One that has saved none gets the arguments of `base`.
        base: `DACT`.
        config: Result of `config_of`.
        overrides: Constructor arguments that replace entries of `config`.

    Raises:
        TypeError: If the constructor lacks an argument, or gets one that it does not have.
        ValueError: If the encoder cannot be rebuilt, or an argument is outside its range.
    """
    config = dict(config)
    learned = {name: config.pop(name, None) for name in LEARNED}
    subclass = config.pop("subclass", None)
    arguments = config
    if cls is not base:
        known = inspect.signature(cls).parameters
        is_open = any(one.kind is one.VAR_KEYWORD for one in known.values())
        arguments = {name: value for name, value in config.items() if name in known or is_open}
        if subclass is not None:
            passed = {"encoder"} & known.keys()
            arguments = {name: config[name] for name in passed} | subclass["arguments"]
    arguments = {**arguments, **overrides}
    for name in {"classifier", "confidence"} & arguments.keys():
        if isinstance(arguments[name], Mapping):
            arguments[name] = SubmodelConfig(**arguments[name])
    if "encoder" in arguments and not isinstance(arguments["encoder"], LayeredEncoder):
        arguments["encoder"] = encoders.from_config(arguments["encoder"])
    model: Any = cls(**arguments)
    # They may have changed after the constructor of a subclass set them.
    for name in {*HALTING, "class_names"} & (config.keys() - overrides.keys()):
        setattr(model, name, config[name])
    if config.get("num_layers") in (None, model.num_layers):  # else full depth is another one
        for name in LEARNED:
            setattr(model, name, learned[name])
    return model


# ------------------------------------------------------------------ weights


def stacked(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return weights with those of the submodels of all layers in one tensor.

    Files of version 0.1.0 and of development versions before 0.2.0 have one tensor per layer.
    """
    found: dict[str, Tensor] = {}
    alone: dict[str, dict[int, Tensor]] = {}
    for name, weight in weights.items():
        match = ALONE.fullmatch(name)
        if match is None:
            found[name] = weight
        elif match[4] != "num_batches_tracked":
            of_part = alone.setdefault(f"{match[1]}.{match[3]}.{match[4]}", {})
            of_part[int(match[2])] = weight
    return found | {
        name: torch.stack([of_part[n] for n in sorted(of_part)]) for name, of_part in alone.items()
    }


def load(
    cls: type[Model],
    base: type,
    config: Mapping[str, Any],
    weights: Mapping[str, Tensor],
    where: str,
    overrides: Mapping[str, Any],
) -> Model:
    """Build a model and load its weights, which are cast to the model's precision.

    Raises:
        ValueError: If names or shapes of the weights do not fit, or as for `build`.
    """
    weights = stacked(weights)
    if cls is base and "encoder" not in overrides:
        _check_size(config, weights, where)
    # Random weights are made first, which must not move the caller's generator.
    with torch.random.fork_rng(devices=[]):
        model = build(cls, base, config, overrides)
    check_weights(model, weights, where)
    model.load_state_dict(weights)
    return model


def _check_size(config: Mapping[str, Any], weights: Mapping[str, Tensor], where: str) -> None:
    """Raise a ``ValueError`` if a model has more weights than its file, before they take memory."""
    given = sum(weight.numel() for weight in weights.values())
    asked = (config.get("encoder") or {}).get("num_layers") or 0
    if asked > given:
        raise ValueError(
            f"{where} does not fit this model (it has {given:,} weights instead of "
            f"those of {asked:,} layers)"
        )
    with torch.device("meta"):
        encoder = encoders.from_config(config["encoder"])
        parts: list[nn.Module] = [encoder]
        for name in ("classifier", "confidence"):
            parts.append(SubmodelConfig(**config[name]).build(encoder.hidden_size, 1))
    asked = sum(parameter.numel() for part in parts for parameter in part.parameters())
    if asked > given:
        raise ValueError(
            f"{where} does not fit this model (it has {given:,} weights instead of {asked:,})"
        )


def check_weights(model: Any, weights: Mapping[str, Tensor], what: str) -> None:
    """Raise a one-line ``ValueError`` if names or shapes of `weights` are not those of the
    model."""
    own = {name: list(weight.shape) for name, weight in model.state_dict().items()}
    given = {name: list(weight.shape) for name, weight in weights.items()}
    faults = [
        f"{name}: {given.get(name, 'nothing')} instead of {own.get(name, 'nothing')}"
        for name in sorted(own.keys() | given.keys())
        if own.get(name) != given.get(name)
    ]
    if faults:
        raise ValueError(
            f"{what} does not fit this model ({len(faults)} differences, such as {faults[0]}). "
            "Build it with the encoder, submodels and output_dimension of its training, or use "
            "DACT.load_from_checkpoint, which reads them from the checkpoint"
        )


# ------------------------------------------------------------------ checkpoints


def stored_config(checkpoint: Mapping[str, Any]) -> dict[str, Any]:
    """Return the description of the model in a checkpoint of DACT, as a reference; empty if there
    is none."""
    return checkpoint.get(CHECKPOINT_KEY) or checkpoint.get(EARLIER_KEY) or {}


def read_checkpoint(
    path: str | Path, map_location: Any
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Return the description and the weights in a checkpoint of DACT, a file or an address.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If the file cannot be read or is not a checkpoint of DACT.
    """
    checkpoint = DurableCheckpointIO().load_checkpoint(path, map_location, weights_only=True)
    config = stored_config(checkpoint)
    if "output_dimension" not in config or "state_dict" not in checkpoint:
        entries = ", ".join(map(str, checkpoint)) or "no entries"
        raise ValueError(f"{path} is not a checkpoint of DACT: it has {entries}")
    return config, checkpoint["state_dict"]


def store_in_checkpoint(path: Path, model: Any) -> None:
    """Write the halting settings of `model` and what was learned after its fit into a checkpoint of
    it."""
    checkpoint = files.read_checkpoint(path)
    stored_config(checkpoint).update(
        {name: plain_data(getattr(model, name)) for name in (*HALTING, *LEARNED)}
    )
    DurableCheckpointIO().save_checkpoint(checkpoint, path)


def adopt(model: Any, checkpoint: dict[str, Any]) -> None:
    """Give a model the class names, temperatures and calibration of a checkpoint that it loads, and
    the weights in it their present names.

    Raises:
        ValueError: If weights or class names of the checkpoint are not those of the model.
    """
    checkpoint["state_dict"] = stacked(checkpoint["state_dict"])
    check_weights(model, checkpoint["state_dict"], "the checkpoint")
    config = stored_config(checkpoint)
    stored, own = config.get("class_names"), model.class_names
    if stored is not None and own is not None and list(stored) != list(own):
        raise ValueError(
            f"the checkpoint has the classes {', '.join(stored)}, in this order, but here they are "
            f"{', '.join(own)}: give the data class_names={list(stored)}, or train again"
        )
    model.class_names = own or stored
    model.calibration, model.temperatures = config.get("calibration"), config.get("temperatures")


# ------------------------------------------------------------------ a folder


def write_folder(model: Any, base: type, directory: Path) -> None:
    """Write config.json and model.safetensors into `directory`, which is created if needed."""
    config = {"format": FORMAT, **config_of(model, base)}
    json.dumps(config)  # before anything in the folder is replaced
    model.encoder.save_files(directory)
    # So that a kill leaves no new weights under an old promise.
    (directory / CONFIG_NAME).unlink(missing_ok=True)
    write_tensors(directory / WEIGHTS_NAME, model.state_dict())
    write_json(directory / CONFIG_NAME, config)


def read_folder(directory: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Return the configuration and the weights in a folder that `write_folder` wrote, or another
    tool re-saved.

    Raises:
        FileNotFoundError: If the folder or one of the two files is missing.
        ValueError: If a file cannot be read, or is of a later version of dact.
    """
    for name in (CONFIG_NAME, WEIGHTS_NAME):
        if not (directory / name).is_file():
            raise FileNotFoundError(
                f"{directory} has no {name}: expected a folder that save_pretrained wrote, such as "
                "model/ of a fit or final/model/ of a tuning run"
            )
    config = read_json(directory / CONFIG_NAME)
    weights, _ = read_tensors(directory / WEIGHTS_NAME)
    if not isinstance(config, dict) or "output_dimension" not in config:
        raise ValueError(f"{directory / CONFIG_NAME} does not describe a model of dact")
    config.pop("written_by", None)  # of earlier versions
    kind = config.pop("format", FORMAT)
    if kind not in FORMATS:
        raise ValueError(
            f"{directory / CONFIG_NAME} has the format {kind}, and this version of dact reads "
            f"{' and '.join(FORMATS)}: install a later one"
        )
    return config, weights


def encoder_with_files(config: Mapping[str, Any], directory: Path) -> LayeredEncoder | None:
    """Return the encoder of a folder if it consists of files instead of weights, None otherwise."""
    described = config.get("encoder") or {}
    if described.get("type") == "OnnxEncoder":
        return encoders.from_config(described, directory)
    return None
