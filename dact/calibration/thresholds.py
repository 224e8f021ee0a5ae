"""Thresholds of labels that maximize their F1 scores."""

from __future__ import annotations

import torch
from torch import Tensor

from dact.calibration.answers import LayerAnswers


def best_thresholds(answers: LayerAnswers) -> list[float]:
    """Return the threshold of each label that maximizes its F1 score without early exit, halfway
    between two answers, or 0.5 for a label that no example has.

    Args:
        answers: Answers to examples that are not used to calibrate a promise.
    """
    columns = zip(answers.a[:, -1].T, answers.target.T, strict=True)
    return [_best_threshold(a.double(), present == 1) for a, present in columns]


def _best_threshold(a: Tensor, present: Tensor) -> float:
    if not present.any():
        return 0.5
    a, order = a.sort(descending=True)
    returned = torch.arange(1, len(a) + 1)
    f1 = 2 * present[order].cumsum(dim=0) / (returned + present.sum())
    following = torch.cat([a[1:], a.new_zeros(1)])
    f1[a == following] = 0.0  # no threshold lies between them
    best = int(f1.argmax())
    return ((a[best] + following[best]) / 2).clamp(1e-6, 1 - 1e-6).item()
