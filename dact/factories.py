"""Factories that build the model and the data of a configuration file again, with some arguments
replaced.

They hold only plain data, so that they can be sent to worker processes.
"""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from jsonargparse import ArgumentError, ArgumentParser
from lightning.pytorch import LightningDataModule

from dact.data import CompositionalSentiment
from dact.encoders import TransformerEncoder
from dact.model import DACT
from dact.submodels import SubmodelConfig


class ModelFactory:
    """A factory of models: ``factory(**overrides)`` returns a new `DACT`.

    Args:
        section: The ``model:`` section, as plain data.
    """

    def __init__(self, section: dict[str, Any]) -> None:
        self.section = section

    def __call__(self, **overrides: Any) -> DACT:
        plain = {
            name: asdict(v) if isinstance(v, SubmodelConfig) else v for name, v in overrides.items()
        }
        parser = ArgumentParser(exit_on_error=False)
        parser.add_class_arguments(DACT, "model")
        return parser.instantiate_classes(
            parser.parse_object({"model": {**self.section, **plain}})
        ).model


class DataFactory:
    """A factory of data: ``factory(**overrides)`` returns a new datamodule.

    Args:
        section: The ``data:`` section, as plain data: ``class_path`` and ``init_args``.
    """

    def __init__(self, section: dict[str, Any]) -> None:
        self.section = section

    def __call__(self, **overrides: Any) -> LightningDataModule:
        arguments = {**(self.section.get("init_args") or {}), **overrides}
        parser = ArgumentParser(exit_on_error=False)
        parser.add_subclass_arguments(LightningDataModule, "data", fail_untyped=False)
        path = self.section["class_path"]
        try:
            config = parser.parse_object({"data": {"class_path": path, "init_args": arguments}})
        except ArgumentError as error:
            if not overrides:
                raise
            raise ValueError(
                f"{path} must take {', '.join(overrides)}, which dact tune sets: add that argument"
            ) from error
        return parser.instantiate_classes(config).data


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
