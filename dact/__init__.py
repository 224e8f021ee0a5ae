"""dact: a transformer encoder turned into a classifier that runs only as many layers as each
example needs."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from dact import calibration as calibration
    from dact import data as data
    from dact import encoders as encoders
    from dact import functional as functional
    from dact.calibration.calibrate import calibrate
    from dact.exporting import export as export
    from dact.model import DACT, DACTOutput
    from dact.submodels import SubmodelConfig
    from dact.text_classifier import TextClassifier
    from dact.tuning import TuningEngine

__version__ = "0.2.0"
# `export` is left out: without its extra, `from dact import *` would fail.
__all__ = ["DACT", "DACTOutput", "SubmodelConfig", "TextClassifier", "TuningEngine", "calibrate"]

# Imported on first use: torch, Lightning, transformers and optuna take seconds to import.
_NAMES = {
    "DACT": "dact.model",
    "DACTOutput": "dact.model",
    "SubmodelConfig": "dact.submodels",
    "TextClassifier": "dact.text_classifier",
    "TuningEngine": "dact.tuning",
    "calibrate": "dact.calibration",
    "export": "dact.exporting",
}
_MODULES = ("calibration", "data", "encoders", "functional")


def __getattr__(name: str) -> Any:
    if name in _NAMES:
        return getattr(import_module(_NAMES[name]), name)
    if name in _MODULES:
        return import_module(f"dact.{name}")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
