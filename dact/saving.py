"""The files of a model: config.json, model.safetensors, and its entry in a checkpoint. They hold
data, never code."""

from __future__ import annotations

import dataclasses
import inspect
import json
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from lightning.pytorch.utilities.rank_zero import rank_zero_warn  # type: ignore[attr-defined]
from torch import Tensor, nn

from dact import encoders, files
from dact.encoders.base import LayeredEncoder
from dact.files import (
    DurableCheckpointIO,
    read_json,
    read_tensors,
    replacing,
    write_json,
    write_tensors,
)
from dact.submodels import SubmodelConfig, Submodels

CONFIG_NAME = "config.json"
WEIGHTS_NAME = "model.safetensors"
FORMAT = "dact/1"
COMPILED = "_orig_mod."  # in the names of what torch.compile has wrapped
HALTING = (
    "halting",
    "halting_tolerance",
    "halting_margin",
)  # attributes that decide when an example halts
# Where a checkpoint holds `config_of`. LightningCLI reads "hyper_parameters" as its own and refuses
# other formats there.
CHECKPOINT_KEY = "dact"
EARLIER_KEY = "hyper_parameters"  # where version 0.1.0 had it
LEARNED = ("temperatures", "calibration")  # attributes that no constructor takes

Model = TypeVar("Model", bound=nn.Module)


# ------------------------------------------------------------------ a model as plain data


def own_arguments(model: object, base: type) -> dict[str, Any] | None:
    """Return the arguments that a subclass was called with. Only the constructor of `base` may call
    this.

    Lightning's `save_hyperparameters` inspects the calling constructors in the same way.

    Args:
        model: The object under construction.
        base: `DACT`, whose arguments are stored with the model's attributes.

    Returns:
        ``arguments``, the arguments that only the subclass has or that it hands to `base` as
        something else, and ``passed``, the names of the arguments of `base` that it takes. None for
        an object of `base` itself.
    """
    frame, outermost = inspect.currentframe(), None
    frame = frame.f_back if frame else None
    received = dict(frame.f_locals) if frame else {}
    while (
        frame
        and frame.f_code.co_name == "__init__"
        and frame.f_locals.get(frame.f_code.co_varnames[0]) is model
    ):
        frame, outermost = frame.f_back, frame
    if type(model) is base or outermost is None:
        return None
    given, of_base = inspect.getargvalues(outermost), list(inspect.signature(base).parameters)
    flat = {name: given.locals[name] for name in given.args[1:] if name in given.locals}
    positional = given.locals[given.varargs] if given.varargs else ()
    if positional and isinstance(positional[0], LayeredEncoder):  # passed on to `base`
        flat |= dict(zip(of_base, positional, strict=False))
    flat |= given.locals[given.keywords] if given.keywords else {}
    kept = {
        name: value
        for name, value in flat.items()
        if name not in of_base or value is not received[name]
    }
    own = {name: plain_data(value) for name, value in kept.items() if _is_plain(value)}
    return {"arguments": own, "passed": [name for name in flat if name in of_base]}


def config_of(model: Any, base: type) -> dict[str, Any]:
    """Return plain data (strings, numbers, lists, dicts) from which `build` makes this model again.

    An argument of a subclass that is not plain data is left out, and must be passed when the model
    is loaded."""
    config = {
        name: plain_data(getattr(model, name))
        for name in (*inspect.signature(base).parameters, *LEARNED)
    }
    if model.subclass is not None:
        config["subclass"] = {"name": type(model).__qualname__, **model.subclass}
    return config


def plain_data(value: Any) -> Any:
    """Return a value as the types that a checkpoint may hold: NumPy's numbers and strings would
    need code to read."""
    value = getattr(value, "_orig_mod", value)  # what torch.compile has wrapped
    if isinstance(value, LayeredEncoder):
        return plain_data(value.config())
    if isinstance(value, Submodels):
        return plain_data(dataclasses.asdict(value.config))
    if isinstance(value, Mapping):
        return {str(name): plain_data(entry) for name, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return list(map(plain_data, value))
    if isinstance(value, Tensor):
        return value.tolist()
    return value.item() if isinstance(value, np.generic) else value


def _is_plain(value: Any) -> bool:
    if isinstance(value, Mapping):
        return all(isinstance(name, str) and _is_plain(entry) for name, entry in value.items())
    if isinstance(value, (list, tuple)):
        return all(map(_is_plain, value))
    return value is None or type(value) in (str, int, float, bool) or isinstance(value, np.generic)


def build(
    cls: type[Model], base: type, config: Mapping[str, Any], overrides: Mapping[str, Any]
) -> Model:
    """Build a model with fresh weights as `config_of` described it.

    Args:
        cls: Class of the model: `base` or a subclass of it, which gets its own arguments back.
        base: `DACT`.
        config: Result of `config_of`.
        overrides: Constructor arguments that replace entries of `config`.

    Raises:
        TypeError: If the constructor has no argument of the name of an override.
        ValueError: If the encoder cannot be rebuilt, an argument is missing, or one is outside its
            range.
    """
    known = inspect.signature(cls).parameters
    is_open = any(parameter.kind is parameter.VAR_KEYWORD for parameter in known.values())
    for name in overrides.keys() - known.keys():
        if not is_open:
            raise TypeError(
                f"{cls.__name__} has no argument {name!r}: expected one of {', '.join(known)}"
            )
    config = dict(config)
    learned, layers = {name: config.pop(name, None) for name in LEARNED}, config.get("num_layers")
    subclass = config.pop("subclass", None) or {"arguments": {}, "passed": list(config)}
    arguments = config
    if cls is not base:
        wanted = {*known, *subclass["passed"]} if is_open else {*known}
        arguments = {name: value for name, value in config.items() if name in wanted} | {
            name: value for name, value in subclass["arguments"].items() if is_open or name in known
        }
    arguments |= overrides
    missing = [
        name
        for name, parameter in known.items()
        if parameter.default is parameter.empty
        and parameter.kind not in (parameter.VAR_KEYWORD, parameter.VAR_POSITIONAL)
        and name not in arguments
    ]
    if missing:
        raise ValueError(
            f"{cls.__name__} needs {', '.join(missing)}, which the file does not hold: pass it as {missing[0]}=…"
        )
    for name in {"classifier", "confidence"} & arguments.keys():
        if isinstance(arguments[name], Mapping):
            arguments[name] = SubmodelConfig(**arguments[name])
    if "encoder" in arguments and not isinstance(arguments["encoder"], LayeredEncoder):
        arguments["encoder"] = encoders.from_config(arguments["encoder"])
    model: Any = cls(**arguments)
    for name in (
        *HALTING,
        "class_names",
    ):  # may have changed after the constructor of a subclass set them
        if name in config and name not in overrides:
            setattr(model, name, config[name])
    if cls is not base:
        _check_rebuilt(model, config, subclass, overrides)
    if layers in (None, model.num_layers):  # they do not hold for another full depth
        for name in LEARNED:
            setattr(model, name, learned[name])
    return model


def _check_rebuilt(
    model: Any, config: Mapping[str, Any], subclass: Mapping[str, Any], overrides: Mapping[str, Any]
) -> None:
    """Warn if a subclass has made something else of the arguments that it was given before."""
    then = {name: config[name] for name in subclass["passed"] if name in config} | subclass[
        "arguments"
    ]
    now = {
        name: plain_data(getattr(model, name, None)) for name in subclass["passed"]
    } | model.subclass["arguments"]
    for name, value in then.items():
        if (
            name not in overrides
            and type(value) in (int, float, str)
            and now.get(name, value) != value
        ):
            rank_zero_warn(
                f"{type(model).__name__} has made {name} {now[name]} of {value}, since its __init__ changes this "
                f"argument, which is stored as changed: give the changed value another name than {name}"
            )


# ------------------------------------------------------------------ checkpoints


def stored_config(checkpoint: Mapping[str, Any]) -> dict[str, Any]:
    """Return the description of the model in a checkpoint of DACT, as a reference: changes to it
    change the checkpoint.

    Empty if there is none. Checkpoints of version 0.1.0 have it under ``hyper_parameters``.
    """
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
        raise ValueError(
            f"{path} is not a checkpoint of DACT: it has {', '.join(map(str, checkpoint)) or 'no entries'}"
        )
    return config, checkpoint["state_dict"]


def store_in_checkpoint(path: Path, model: Any) -> None:
    """Write the halting settings of `model` and what was learned after its fit into a checkpoint of
    it."""
    checkpoint = files.read_checkpoint(path)
    stored_config(checkpoint).update(
        {name: plain_data(getattr(model, name)) for name in (*HALTING, *LEARNED)}
    )
    DurableCheckpointIO().save_checkpoint(checkpoint, path)


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
    if cls is base and "encoder" not in overrides:
        # First without memory, since a description from elsewhere may ask for more than there is.
        try:
            with torch.device("meta"):
                skeleton = build(cls, base, config, overrides)
        except RuntimeError as error:  # the product of the sizes overflows
            raise ValueError(
                f"{where} describes a model that cannot be built: {str(error).splitlines()[0]}"
            ) from error
        check_weights(skeleton, weights, where)
    with torch.random.fork_rng(
        devices=[]
    ):  # random weights are made first, which must not move the caller's generator
        model = build(cls, base, config, overrides)
    check_weights(model, weights, where)
    model.load_state_dict(weights)
    return model


def check_weights(model: Any, weights: Mapping[str, Tensor], what: str) -> None:
    """Raise a one-line ``ValueError`` if names or shapes of `weights` are not those of the
    model."""
    own, weights = (
        model.state_dict(),
        {name.replace(COMPILED, ""): weight for name, weight in weights.items()},
    )
    different = [
        f"{name}: {list(weights[name].shape)} instead of {list(own[name].shape)}"
        for name in own
        if name in weights and weights[name].shape != own[name].shape
    ]
    absent, unknown = sorted(own.keys() - weights.keys()), sorted(weights.keys() - own.keys())
    faults = (
        different
        + [f"{name} is missing" for name in absent]
        + [f"{name} is unknown" for name in unknown]
    )
    if not faults:
        return
    layers = len({name.split(".")[1] for name in weights if name.startswith("confidence.")})
    if layers not in (0, model.num_layers) and not model.share_submodels:
        faults = [f"{layers} layers instead of {model.num_layers}", *faults]
    raise ValueError(
        f"{what} does not fit this model ({len(faults)} differences, such as {faults[0]}). Build the model with the "
        f"encoder, submodels and output_dimension ({model.output_dimension} here) that it was trained with, or use "
        "DACT.load_from_checkpoint, which reads them from the checkpoint (on the command line, give the config.yaml "
        "of the fit)"
    )


def adopt(model: Any, checkpoint: Mapping[str, Any]) -> None:
    """Give a model the class names, temperatures and calibration of a checkpoint that it loads.

    Raises:
        ValueError: If weights or class names of the checkpoint are not those of the model.
    """
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


# ------------------------------------------------------------------ weights


def name_plainly(model: nn.Module) -> None:
    """Keep the prefix that torch.compile gives to a part of the model out of the names of its
    weights."""
    model.register_state_dict_post_hook(_without_prefix)
    model.register_load_state_dict_pre_hook(_with_prefix)


def _without_prefix(module: nn.Module, state: dict[str, Any], prefix: str, metadata: Any) -> None:
    for name in [
        name for name in state if name.startswith(prefix) and COMPILED in name[len(prefix) :]
    ]:
        state[prefix + name[len(prefix) :].replace(COMPILED, "")] = state.pop(name)


def _with_prefix(module: nn.Module, state: dict[str, Any], prefix: str, *others: Any) -> None:
    _without_prefix(module, state, prefix, None)  # of a file that has it
    named = (module.named_parameters, module.named_buffers)
    for name in [name for all_of in named for name, _ in all_of(remove_duplicate=False)]:
        if COMPILED in name and (plain := prefix + name.replace(COMPILED, "")) in state:
            state[prefix + name] = state.pop(plain)


# ------------------------------------------------------------------ a folder


def _this_version() -> str:
    try:
        return f"dact {version('dact')}"
    except PackageNotFoundError:  # run from its sources
        return "dact"


def write_folder(model: Any, base: type, directory: Path) -> None:
    """Write config.json and model.safetensors into `directory`, which is created if needed."""
    config = {"format": FORMAT, "written_by": _this_version(), **config_of(model, base)}
    json.dumps(config)  # before anything in the folder is replaced
    model.encoder.save_files(directory)
    with replacing(directory / WEIGHTS_NAME) as partial:
        write_tensors(partial, model.state_dict())
        # Until the new one is there, so that a kill leaves no new weights under an old promise.
        (directory / CONFIG_NAME).unlink(missing_ok=True)
    write_json(directory / CONFIG_NAME, config)


def read_folder(directory: Path, base: type) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Return the configuration and the weights in a folder that `write_folder` wrote, or another
    tool re-saved.

    Raises:
        FileNotFoundError: If the folder or one of the two files is missing.
        ValueError: If a file cannot be read, or is of a version of dact that writes more.
    """
    if not directory.is_dir():
        raise FileNotFoundError(
            f"there is no folder {directory}: expected one that save_pretrained wrote"
        )
    for name in (CONFIG_NAME, WEIGHTS_NAME):
        if not (directory / name).is_file():
            inside = [
                path
                for path in (directory / "model", directory / "final" / "model")
                if path.is_dir()
            ]
            hint = f", such as {inside[0]}" if inside else ""
            raise FileNotFoundError(
                f"{directory} has no {name}: expected a folder that save_pretrained wrote{hint}"
            )
    config = read_json(directory / CONFIG_NAME)
    weights, _ = read_tensors(directory / WEIGHTS_NAME)
    if not isinstance(config, dict) or not str(kind := config.pop("format", None)).startswith(
        "dact/"
    ):
        raise ValueError(f"{directory / CONFIG_NAME} does not describe a model of dact")
    written_by = config.pop("written_by", "dact")
    unknown = sorted(config.keys() - {*inspect.signature(base).parameters, *LEARNED, "subclass"})
    if kind != FORMAT or (unknown and written_by != _this_version()):
        what = f"has {', '.join(unknown)}" if kind == FORMAT else f"is in the format {kind}"
        raise ValueError(
            f"{directory / CONFIG_NAME} was written by {written_by} and {what}, which this version of dact does not "
            "know: install that version"
        )
    return config, weights


def encoder_with_files(config: Mapping[str, Any], directory: Path) -> LayeredEncoder | None:
    """Return the encoder of a folder if it consists of files instead of weights, None otherwise."""
    described = config.get("encoder") or {}
    return (
        encoders.from_config(described, directory)
        if described.get("type") == "OnnxEncoder"
        else None
    )
