"""The settings of a fit, and the winners of the studies, from which they follow."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Settings:
    """What a fit is made with.

    Args:
        model: Arguments of `DACT` that replace those of the factory, as plain values.
        batch_size: Number of examples per training batch; that of the data if None.
        num_epochs: Number of epochs; that of the Trainer if None.
    """

    model: Mapping[str, Any] = field(default_factory=dict)
    batch_size: int | None = None
    num_epochs: int | None = None

    @classmethod
    def of(cls, arguments: Mapping[str, Any]) -> Settings:
        """Return the settings in arguments by name, ``batch_size`` and ``num_epochs`` among
        them."""
        model = {n: v for n, v in arguments.items() if n not in ("batch_size", "num_epochs")}
        return cls(model, arguments.get("batch_size"), arguments.get("num_epochs"))

    def arguments(self) -> dict[str, Any]:
        """Return all settings by name, as `of` takes them."""
        others = {"batch_size": self.batch_size, "num_epochs": self.num_epochs}
        return {**self.model, **{name: one for name, one in others.items() if one is not None}}

    def updated(self, other: Settings) -> Settings:
        """Return these settings, with those that `other` has in their place."""
        return Settings.of({**self.arguments(), **other.arguments()})

    def flat(self) -> dict[str, Any]:
        """Return the settings under the names of the studies' parameters, such as
        ``classifier_dropout``."""
        found: dict[str, Any] = {}
        for name, value in self.arguments().items():
            nested = isinstance(value, Mapping)
            found |= {f"{name}_{n}": v for n, v in value.items()} if nested else {name: value}
        return found


@dataclass(frozen=True)
class Winners:
    """The winners of a run's studies, as `TuningEngine` describes them; None where a study has no
    winner yet."""

    classifier_config: dict[str, Any] | None = None
    confidence_config: dict[str, Any] | None = None
    external_config: dict[str, Any] | None = None
    lambda_reg: float | None = None

    def settings(self) -> Settings:
        """Return the settings that the winners stand for."""
        others = {
            "classifier": self.classifier_config,
            "confidence": self.confidence_config,
            "lambda_reg": self.lambda_reg,
        }
        chosen = {name: value for name, value in others.items() if value is not None}
        return Settings.of({**(self.external_config or {}), **chosen})

    def missing(self) -> list[str]:
        """Return the names of the winners that are missing."""
        return [name for name, value in vars(self).items() if value is None]
