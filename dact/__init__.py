"""dact: a transformer encoder turned into a classifier that spends only as many layers as each example needs."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from dact.model import DACT, DACTOutput
from dact.submodels import SubmodelConfig

if TYPE_CHECKING:
    from dact.calibration import calibrate
    from dact.text_classifier import TextClassifier
    from dact.tuning import TuningEngine

__version__ = "0.1.0"
__all__ = ["DACT", "DACTOutput", "SubmodelConfig", "TextClassifier", "TuningEngine", "calibrate"]

# Imported on first use: transformers, datasets and optuna take seconds, and not everyone needs them.
_LATER = {
    "TextClassifier": "dact.text_classifier",
    "TuningEngine": "dact.tuning",
    "calibrate": "dact.calibration",
}


def __getattr__(name: str) -> Any:
    if name in _LATER:
        return getattr(import_module(_LATER[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
