"""Promises about early exit, and the settings of a dial that keep them."""

from dact.calibration.answers import Dial, LayerAnswers, Measured, layer_answers
from dact.calibration.calibrate import Calibration, calibrate, choose_setting, settle
from dact.calibration.promise import SETTINGS, Promise
from dact.model_card import describe

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
    "layer_answers",
    "settle",
]
