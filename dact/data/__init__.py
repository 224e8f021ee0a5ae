"""Datamodules: your own files, generated reviews without a download, and a real data set."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from dact.data.compositional import CompositionalSentiment
    from dact.data.text import TextClassificationData
    from dact.data.vader import VaderSentiment

__all__ = ["CompositionalSentiment", "TextClassificationData", "VaderSentiment"]

_MODULES = {
    "CompositionalSentiment": "dact.data.compositional",
    "TextClassificationData": "dact.data.text",
    "VaderSentiment": "dact.data.vader",
}


def __getattr__(name: str) -> Any:
    if name in _MODULES:  # transformers and datasets are imported by those who use them
        return getattr(import_module(_MODULES[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
