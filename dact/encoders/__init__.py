"""Encoders: stacks of layers that the DACT unit can stop after any of them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from dact.encoders.base import Batch, LayeredEncoder
from dact.encoders.transformer import TransformerEncoder

if TYPE_CHECKING:
    from dact.encoders.huggingface import HuggingFaceEncoder

__all__ = ["Batch", "HuggingFaceEncoder", "LayeredEncoder", "TransformerEncoder", "from_config"]


def __getattr__(name: str) -> Any:
    if name == "HuggingFaceEncoder":  # transformers is imported by those who use it
        from dact.encoders.huggingface import HuggingFaceEncoder

        return HuggingFaceEncoder
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def from_config(config: dict[str, Any] | None) -> LayeredEncoder:
    """The encoder that `LayeredEncoder.config` described, with fresh weights.

    Raises:
        ValueError: If the description is missing or names no built-in encoder.
    """
    kind, rest = (config or {}).get("type"), {key: value for key, value in (config or {}).items() if key != "type"}
    if kind == "TransformerEncoder":
        return TransformerEncoder(**rest)
    if kind == "HuggingFaceEncoder":
        encoder: LayeredEncoder = __getattr__(kind).from_config(**rest)
        return encoder
    raise ValueError(
        "the encoder cannot be rebuilt from the checkpoint, since it is not one of dact's own "
        f"({kind or 'no configuration was stored'}): pass encoder=, built as it was for training"
    )
