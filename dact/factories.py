"""Functions that build the model and the data of a configuration file, with some arguments
replaced. Wrapped in `functools.partial`, they are factories that worker processes can unpickle."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import asdict
from functools import partial
from inspect import Parameter, signature
from typing import Any

from jsonargparse import ArgumentError, ArgumentParser
from lightning.pytorch import LightningDataModule

from dact.data import CompositionalSentiment
from dact.data.base import TextDataModule
from dact.data.examples import Examples
from dact.encoders import TransformerEncoder
from dact.model import DACT
from dact.submodels import SubmodelConfig


def build_model(section: dict[str, Any], **overrides: Any) -> DACT:
    """Return the model that a ``model:`` section, as plain data, describes."""
    plain = {
        name: asdict(value) if isinstance(value, SubmodelConfig) else value
        for name, value in overrides.items()
    }
    parser = ArgumentParser(exit_on_error=False)
    parser.add_class_arguments(DACT, "model")
    config = parser.parse_object({"model": {**section, **plain}})
    return parser.instantiate_classes(config).model


def build_data(section: dict[str, Any], **overrides: Any) -> LightningDataModule:
    """Return the datamodule that a ``data:`` section, as plain data, describes."""
    arguments = {**(section.get("init_args") or {}), **overrides}
    parser = ArgumentParser(exit_on_error=False)
    parser.add_subclass_arguments(LightningDataModule, "data", fail_untyped=False)
    path = section["class_path"]
    try:
        config = parser.parse_object({"data": {"class_path": path, "init_args": arguments}})
    except ArgumentError as error:
        if not overrides:
            raise
        raise ValueError(
            f"{path} must take {', '.join(overrides)}, which dact tune sets: add that argument"
        ) from error
    return parser.instantiate_classes(config).data


def build_few_data(section: dict[str, Any], **overrides: Any) -> LightningDataModule:
    """Return that datamodule with 16 texts per split, spread evenly, for a smoke test."""
    data = build_data(section, **overrides)
    if isinstance(data, TextDataModule):
        data.examples = partial(_few, data.examples)  # type: ignore[method-assign]
    return data


def _few(examples: Callable[[str], Examples], split: str) -> Examples:
    whole = examples(split)
    return whole.take(range(0, len(whole), math.ceil(len(whole) / 16)))


def default_model(output_dimension: int, **overrides: Any) -> DACT:
    """Return a model with the small built-in encoder for the embedded data, as in
    configs/reviews.yaml."""
    encoder = TransformerEncoder(
        vocab_size=42, num_layers=6, hidden_size=32, num_heads=2, slopes=(2.0, 2.0)
    )
    return DACT(
        encoder=encoder, output_dimension=output_dimension, **{"learning_rate": 2e-3, **overrides}
    )


def default_data(**overrides: Any) -> LightningDataModule:
    """Return the embedded data, as in configs/reviews.yaml."""
    return CompositionalSentiment(**{"max_depth": 3, **overrides})


def accepted_by(found: type) -> list[str] | None:
    """Return the names of the arguments of a class, with the keywords that it passes on to its base
    classes; None if it takes any keyword."""
    names: list[str] = []
    kinds = {Parameter.POSITIONAL_OR_KEYWORD, Parameter.KEYWORD_ONLY}
    for kind in found.__mro__:
        if "__init__" in vars(kind):
            parameters = [*signature(vars(kind)["__init__"]).parameters.values()][1:]
            names += [one.name for one in parameters if one.kind in kinds]
            if not any(one.kind is one.VAR_KEYWORD for one in parameters):
                return names
            kinds = {Parameter.KEYWORD_ONLY}  # a base's other arguments are passed by position
    return None
