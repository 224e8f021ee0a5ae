"""Calibrated scores: the expected calibration error, and one temperature per exit layer."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

from torch import Tensor
from torchmetrics.functional.classification import binary_calibration_error

from dact import functional
from dact.calibration.answers import LayerAnswers, check_finite
from dact.confidence import best_temperature
from dact.tasks import MULTICLASS, Task


def expected_calibration_error(scores: Tensor, correct: Tensor, bins: int = 15) -> float:
    """Return the expected calibration error, Σ (share of a bin) · |its accuracy - its mean score|,
    with bins of equal width (Guo et al., ICML 2017, arXiv 1706.04599).

    Args:
        scores: Probability of the returned class, ``[examples]``.
        correct: Whether that class is correct, bool ``[examples]``.
        bins: Number of bins.
    """
    return binary_calibration_error(scores.float(), correct.int(), n_bins=bins, norm="l1").item()


def temper(
    probabilities: Tensor,
    exit_layers: Tensor,
    temperatures: Sequence[float] | None,
    task: Task = MULTICLASS,
) -> Tensor:
    """Return probabilities q proportional to p^(1/T), where T is the temperature of the exit layer.

    Rounding may change the order of the classes: take the class from the input.

    Args:
        probabilities: p, ``[batch, classes]``, each row a probability vector.
        exit_layers: Exit layers, int64 ``[batch]``, 1-based.
        temperatures: T, one per layer, above 0; None returns `probabilities` unchanged.
        task: Task of the probabilities.
    """
    check_finite(probabilities)
    if temperatures is None:
        return probabilities
    given = functional.at_least_float32(probabilities)
    return task.temper(given, given.new_tensor(temperatures)[exit_layers - 1])


def fit_temperatures(answers: LayerAnswers, exits: Tensor) -> list[float]:
    """Return one temperature per exit layer, in [1/8, 8], fitted by the negative log-likelihood of
    early exit (Guo et al. 2017, arXiv 1706.04599).

    Args:
        answers: Answers to labelled examples that were not used for training.
        exits: Exit layers of the examples, int64 ``[examples]``, 1-based.
    """
    task, given = answers.task, functional.answer_at(answers.a, exits).double()
    target = task.targets(answers.target, given.shape[1])
    layers = (exits == layer for layer in range(1, answers.num_layers + 1))
    return [best_temperature(partial(_losses, given[m], target[m], task)) for m in layers]


def _losses(a: Tensor, target: Tensor, task: Task, temperature: float) -> Tensor:
    tempered = task.outcomes(task.temper(a, a.new_full((len(a),), temperature)))
    return -(target * tempered.clamp_min(functional.SMALLEST_PROBABILITY).log()).sum(dim=1)
