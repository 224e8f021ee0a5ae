"""The files of a model: config.json, model.safetensors, and its entry in a checkpoint; all of them
hold data, never code."""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dact import encoders, files
from dact.encoders.base import LayeredEncoder
from dact.files import CONFIG_NAME, DurableCheckpointIO, read_json, read_tensors, write_json
from dact.submodels import SubmodelConfig, Submodels
from dact.tasks import Task

WEIGHTS_NAME = "model.safetensors"
FORMAT = "dact/2"
FORMATS = ("dact/1", FORMAT)  # formats that can be read
# Attributes that decide when an example halts.
HALTING = ("halting", "halting_tolerance", "halting_margin", "thresholds")
# Key of the configuration in a checkpoint: "hyper_parameters" belongs to LightningCLI.
CHECKPOINT_KEY = "dact"
EARLIER_KEY = "hyper_parameters"  # the key of version 0.1.0
LEARNED = ("temperatures", "calibration")  # attributes that are no arguments of the constructor
# Names of weights in earlier files: a submodel, a layer, and a part of that layer's submodel.
ALONE = re.compile(r"(classifier|confidence)\.(\d+)\.(\d+)\.(\w+)")


def plain_data(value: Any) -> Any:
    """Return a value as types that weights-only loading allows in a checkpoint."""
    if isinstance(value, LayeredEncoder):
        return plain_data(value.config())
    value = value.config if isinstance(value, Submodels) else value
    value = value.name if isinstance(value, Task) else value
    if isinstance(value, SubmodelConfig):
        return dataclasses.asdict(value)
    if isinstance(value, Mapping):
        return {str(name): plain_data(entry) for name, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return list(map(plain_data, value))
    if isinstance(value, Tensor):
        return value.tolist()
    return value.item() if isinstance(value, np.generic) else value


# ------------------------------------------------------------------ weights


def stacked(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return weights with one tensor per submodel part for all layers; version 0.1.0 had one per
    layer."""
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
    cls: Any, config: Mapping[str, Any], weights: Mapping[str, Tensor], overrides: Mapping[str, Any]
) -> Any:
    """Build a model of class `cls`, load its weights, cast to its precision, and return it."""
    # Earlier models have a confidence that reads states.
    config, weights = {"confidence_reads": "state", **config}, stacked(weights)
    parts = [config.get(name) for name in ("encoder", "classifier", "confidence")]
    asked = [part.get("num_layers", 0) for part in parts if isinstance(part, Mapping)]
    if max(asked, default=0) > len(weights):  # checked before building layers, which takes minutes
        raise ValueError(f"the configuration has more layers than fit its {len(weights)} weights")
    # The random initial weights must not advance the caller's generator.
    with torch.random.fork_rng(devices=[]):
        model = cls.from_config(config, **overrides)
    check_weights(model, weights)
    model.load_state_dict(weights)
    return model


def check_weights(model: Any, weights: Mapping[str, Tensor]) -> None:
    """Raise a one-line ``ValueError`` if weights differ from the model's in name or shape."""
    own, given = ({n: [*w.shape] for n, w in of.items()} for of in (model.state_dict(), weights))
    names = sorted(own.keys() | given.keys())
    faults = [
        f"{name}: {given.get(name, 'nothing')} instead of {own.get(name, 'nothing')}"
        for name in names
        if own.get(name) != given.get(name)
    ]
    if faults:
        raise ValueError(
            f"the weights do not fit this model ({len(faults)} differences, such as {faults[0]}): "
            "build it with the encoder, submodels and output_dimension of its training"
        )


# ------------------------------------------------------------------ checkpoints


def stored_config(checkpoint: Mapping[str, Any]) -> dict[str, Any]:
    """Return the configuration in a checkpoint, not a copy of it; empty if there is none."""
    return checkpoint.get(CHECKPOINT_KEY) or checkpoint.get(EARLIER_KEY) or {}


def read_checkpoint(
    path: str | Path, map_location: Any
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Return the configuration and weights in a checkpoint of DACT, given as file or address."""
    if Path(path).is_dir() or Path(path).suffix == ".safetensors":
        raise ValueError(f"{path} is not a checkpoint: give the model's folder to from_pretrained")
    checkpoint = DurableCheckpointIO().load_checkpoint(path, map_location, weights_only=True)
    config = stored_config(checkpoint)
    if "output_dimension" not in config or "state_dict" not in checkpoint:
        entries = ", ".join(map(str, checkpoint)) or "no entries"
        raise ValueError(f"{path} is not a checkpoint of DACT: it has {entries}")
    return config, checkpoint["state_dict"]


def store_in_checkpoint(path: Path, model: Any) -> None:
    """Write the halting settings, calibration and temperatures of `model` into its checkpoint."""
    checkpoint = files.read_checkpoint(path)
    stored_config(checkpoint).update(
        {name: plain_data(getattr(model, name)) for name in (*HALTING, *LEARNED)}
    )
    DurableCheckpointIO().save_checkpoint(checkpoint, path)


def adopt(model: Any, checkpoint: dict[str, Any]) -> None:
    """Set a model's class names, temperatures and calibration from a checkpoint that it loads, and
    rename the weights of earlier versions in it; other classes are a ``ValueError``."""
    checkpoint["state_dict"] = stacked(checkpoint["state_dict"])
    check_weights(model, checkpoint["state_dict"])
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


def write_folder(model: Any, directory: Path) -> None:
    """Write config.json and model.safetensors into `directory`, which is created if needed."""
    config = {"format": FORMAT, **model.config()}
    json.dumps(config)  # fails before anything in the folder is replaced
    model.encoder.save_files(directory)
    # A killed process must not leave new weights with an old promise.
    (directory / CONFIG_NAME).unlink(missing_ok=True)
    files.write_tensors(directory / WEIGHTS_NAME, model.state_dict())
    write_json(directory / CONFIG_NAME, config)


def read_folder(directory: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Return the configuration and the weights in a folder that `write_folder` wrote. An encoder
    with its own files is loaded, and replaces its entry in the configuration."""
    for name in (CONFIG_NAME, WEIGHTS_NAME):
        if not (directory / name).is_file():
            raise FileNotFoundError(
                f"there is no {directory / name}: give the folder of a run or its model/; a "
                "checkpoint goes to load_from_checkpoint"
            )
    config = read_json(directory / CONFIG_NAME)
    weights, _ = read_tensors(directory / WEIGHTS_NAME)
    if not isinstance(config, dict) or "output_dimension" not in config:
        raise ValueError(f"{directory / CONFIG_NAME} does not describe a model of dact")
    config.pop("written_by", None)  # written by earlier versions
    kind = config.pop("format", FORMAT)
    if kind not in FORMATS:
        path = directory / CONFIG_NAME
        raise ValueError(f"{path} has the format {kind}, of a later dact: install a later one")
    if (config["encoder"] or {}).get("type") == "OnnxEncoder":
        config["encoder"] = encoders.from_config(config["encoder"], directory)
    return config, weights
