"""Encoders: stacks of layers that the DACT unit can stop after any layer."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from dact.encoders.base import Batch, LayeredEncoder
from dact.encoders.huggingface import HuggingFaceEncoder
from dact.encoders.transformer import TransformerEncoder

if TYPE_CHECKING:
    from dact.encoders.onnx import OnnxEncoder

__all__ = [
    "Batch",
    "HuggingFaceEncoder",
    "LayeredEncoder",
    "OnnxEncoder",
    "TransformerEncoder",
    "from_config",
]


def __getattr__(name: str) -> Any:
    if name == "OnnxEncoder":  # ONNX Runtime is an extra
        from dact.encoders.onnx import OnnxEncoder

        return OnnxEncoder
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def from_config(config: dict[str, Any] | None, folder: Path | None = None) -> LayeredEncoder:
    """Build the encoder that `LayeredEncoder.config` described, with fresh weights.

    Args:
        config: Description of the encoder.
        folder: Folder of the model, which holds the graphs of an exported encoder.

    Raises:
        ValueError: If the description is missing or names no built-in encoder.
    """
    rest = dict(config or {})
    kind = rest.pop("type", None)
    if kind == "TransformerEncoder":
        return TransformerEncoder(**rest)
    if kind == "HuggingFaceEncoder":
        return HuggingFaceEncoder.from_config(**rest)
    if kind == "OnnxEncoder" and folder is not None:
        # Version 0.1.0 also stored digests of the graphs.
        rest.pop("digests", None)
        return __getattr__(kind)(folder, **rest)
    raise ValueError(
        "the encoder cannot be rebuilt from the checkpoint, since it is not one of dact's own "
        f"({kind or 'no configuration was stored'}): pass encoder=, built as it was for training"
    )
