"""The settings of a fit, and the winners of the studies, from which they follow."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

# The winners of the studies (see `TuningEngine`), and the argument of `DACT` that each one becomes.
WINNERS = {
    "classifier_config": "classifier",
    "confidence_config": "confidence",
    "external_config": None,  # holds arguments itself
    "lambda_reg": "lambda_reg",
}


@dataclass(frozen=True)
class Settings:
    """The settings of a fit.

    Args:
        model: Arguments of `DACT` that replace the factory's, as plain values.
        batch_size: Number of examples per training batch; the data's if None.
        num_epochs: Number of epochs; the Trainer's if None.
    """

    model: Mapping[str, Any] = field(default_factory=dict)
    batch_size: int | None = None
    num_epochs: int | None = None

    @classmethod
    def of(cls, arguments: Mapping[str, Any]) -> Settings:
        """Return settings from arguments by name, including ``batch_size`` and ``num_epochs``."""
        model = {n: v for n, v in arguments.items() if n not in ("batch_size", "num_epochs")}
        return cls(model, arguments.get("batch_size"), arguments.get("num_epochs"))

    @classmethod
    def of_winners(cls, winners: Mapping[str, Any]) -> Settings:
        """Return the settings of winners by name; None stands for a study without a winner yet."""
        found = dict(winners.get("external_config") or {})
        for name, argument in WINNERS.items():
            if argument is not None and winners.get(name) is not None:
                found[argument] = winners[name]
        return cls.of(found)

    def arguments(self) -> dict[str, Any]:
        """Return all settings by name, as `of` takes them."""
        others = {"batch_size": self.batch_size, "num_epochs": self.num_epochs}
        return {**self.model, **{name: one for name, one in others.items() if one is not None}}

    def updated(self, other: Settings) -> Settings:
        """Return these settings, replaced by those of `other` where it has any."""
        return Settings.of({**self.arguments(), **other.arguments()})

    def flat(self) -> dict[str, Any]:
        """Return the settings by the studies' parameter names, such as ``classifier_dropout``."""
        found: dict[str, Any] = {}
        for name, value in self.arguments().items():
            nested = isinstance(value, Mapping)
            found |= {f"{name}_{n}": v for n, v in value.items()} if nested else {name: value}
        return found
