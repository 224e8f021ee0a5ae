"""Promises about early exit, and the settings of a dial that keep them."""

from dact.calibration.answers import Dial, LayerAnswers, Measured, layer_answers
from dact.calibration.calibrate import (
    SETTINGS,
    Calibration,
    Promise,
    calibrate,
    choose_setting,
    describe,
    examples_for_an_estimate,
)

__all__ = [
    "SETTINGS",
    "Calibration",
    "Dial",
    "LayerAnswers",
    "Measured",
    "Promise",
    "calibrate",
    "choose_setting",
    "describe",
    "examples_for_an_estimate",
    "layer_answers",
]
