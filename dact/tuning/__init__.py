"""Tuning in three studies: submodels, training parameters, lambda_reg."""

from dact.tuning.engine import TuningEngine

__all__ = ["TuningEngine"]
