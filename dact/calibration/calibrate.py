"""Calibration: find the setting of a dial that keeps a promise with a stated confidence."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from lightning.pytorch import LightningDataModule
from torch import Tensor

from dact.agreement import check_agreement
from dact.calibration.answers import (
    Dial,
    LayerAnswers,
    Measured,
    exits_by_setting,
    layer_answers,
    share,
)
from dact.calibration.bounds import examples_for_rate
from dact.calibration.promise import SETTINGS, Promise, calibration_batches
from dact.calibration.temperature import fit_temperatures
from dact.calibration.thresholds import best_thresholds
from dact.encoders.base import Batch
from dact.functional import Halting, HaltingRule
from dact.model import DACT
from dact.model_card import describe

# largest share of changed classes that is worth a guarantee
MOST_CHANGED = 0.1


@dataclass(frozen=True)
class Calibration:
    """A halting rule that keeps a promise, and its measurements on the examples.

    Args:
        halting, halting_tolerance, halting_margin: The halting rule.
        thresholds: Thresholds of the labels, if the model has any.
        promise: Promise that these settings keep, as plain data.
        bound: Bound on the loss of accuracy, the agreement or the mean exit layer at this setting,
            taken alone. For an estimate, the measured value with one standard error added, or
            subtracted from an agreement.
        examples: Number of examples.
        accuracy, full_depth_accuracy: Accuracy of early exit, and of all layers.
        agreement: Share of the examples that got the class of all layers.
        mean_exit_layer: Mean exit layer.
        baseline_accuracy: Accuracy of the baseline; None if the promise is against all layers.
        estimate: Whether this is an estimate, without a guarantee.
        chose_checkpoint: Whether the examples chose the checkpoint, which makes this optimistic.
    """

    halting: HaltingRule
    halting_tolerance: float
    halting_margin: float
    promise: dict[str, Any]
    bound: float
    examples: int
    accuracy: float
    full_depth_accuracy: float
    agreement: float
    mean_exit_layer: float
    baseline_accuracy: float | None = None
    estimate: bool = False
    chose_checkpoint: bool = False
    thresholds: list[float] | None = None

    @property
    def exit_rule(self) -> Halting:
        """The halting rule as one object."""
        return Halting(self.halting, self.halting_tolerance, self.halting_margin)


def calibrate(
    model: DACT,
    data: LightningDataModule | Iterable[Batch],
    *,
    max_accuracy_loss: float | None = None,
    min_agreement: float | None = None,
    max_layers: float | None = None,
    confidence: float | None = 0.95,
    dial: Dial = "halting_margin",
    baseline: Tensor | None = None,
    fit_thresholds: bool = False,
) -> Calibration:
    r"""Set the `halting_margin` of `model`, or its `halting_tolerance`, so that it keeps a promise.

    For the first two promises, margins are tried downwards from 1, or tolerances upwards from 0
    (both keep the class of all layers by proof), and the last one before the first failure is
    used. This is a fixed sequence of tests, each at the full level: the probability that any
    passes falsely is at most 1 - confidence (Maurer, Hothorn & Lehmacher 1995). For `max_layers`
    settings are tried from the other end. The tests are in `dact.calibration.bounds`. An estimate
    adds one standard error instead; with few examples it counts only the lost ones.

    Args:
        model: Model to set. Its `calibration` becomes the returned record, as a dict, and its
            temperatures, if it has any, are fitted again.
        data: Labelled examples that were used neither for training nor for any choice: batches, or
            a datamodule with a ``calibration_dataloader()``. Without one, the validation examples
            are used, which chose the checkpoint.
        max_accuracy_loss, min_agreement, max_layers, confidence: As for `Promise`.
        dial: As for `Promise`. The other dial must have no effect for the first two promises.
        baseline: Classes of a reference on the same examples in the same order, int64
            ``[examples]``. `max_accuracy_loss` is then the loss against the reference, which takes
            many more examples.
        fit_thresholds: Whether to first set the `thresholds` of the labels to maximize F1 scores on
            the validation examples. The datamodule must have other examples for calibration.

    Raises:
        ValueError: If data and model do not agree, the promise cannot be kept, the examples are too
            few for it, or the halting rule prevents it.

    Example:
        >>> from dact.encoders import TransformerEncoder
        >>> encoder = TransformerEncoder(vocab_size=50, num_layers=2, hidden_size=8, num_heads=2)
        >>> model = DACT(encoder=encoder)
        >>> ids, labels = torch.randint(3, 50, (200, 5)), torch.randint(0, 3, (200,))
        >>> found = calibrate(model, [{"input_ids": ids, "labels": labels}], min_agreement=0.9)
        >>> found.bound >= 0.9 and model.halting_margin == found.halting_margin
        True
    """
    promise = Promise(max_accuracy_loss, min_agreement, max_layers, confidence, dial)
    # before any layer runs
    promise.check(model.exit_rule)
    batches, chose_checkpoint = _examples(model, data)
    if fit_thresholds:
        _fit_thresholds(model, data, chose_checkpoint)
    answers = layer_answers(model, batches)
    found = choose_setting(answers, promise, model.exit_rule, baseline)
    found = replace(found, chose_checkpoint=chose_checkpoint)
    _adopt(model, found, answers)
    return found


def choose_setting(
    answers: LayerAnswers,
    promise: Promise,
    halting: Halting = Halting(),
    baseline: Tensor | None = None,
) -> Calibration:
    """Return the setting that keeps a promise, as `calibrate` does, from the answers of all layers
    to labelled examples; `halting` gives the value of the other dial."""
    layers, needed = answers.num_layers, promise.examples_needed()
    promise.check(halting)
    if baseline is not None:
        baseline = torch.as_tensor(baseline).cpu()
        if baseline.shape != answers.target.shape or promise.max_accuracy_loss is None:
            raise ValueError(
                "a baseline goes with max_accuracy_loss, and holds one class per example, "
                f"{len(answers.target)} in all, got {list(baseline.shape)}"
            )
    elif len(answers.target) < needed:
        raise ValueError(
            f"{promise.text} takes {needed} examples or more, even if early exit makes no fault on "
            f"them, got {len(answers.target)}: give more, promise less, or ask for an estimate "
            f"(confidence null, in Python None), which takes {promise.examples_for_an_estimate()}"
        )
    exits = exits_by_setting(answers, halting, promise.dial)

    def values(setting: float) -> Tensor:
        return promise.values(Measured(answers, exits(setting)), baseline)

    # The first setting of a dial keeps a promise other than `max_layers` by proof.
    by_proof = promise.max_layers is None
    settings = SETTINGS[promise.dial] if by_proof else SETTINGS[promise.dial][::-1]
    proved = settings[0] if by_proof and baseline is None else None
    chosen = proved
    for setting in settings:
        if setting != proved and not promise.keeps(values(setting), layers):
            break
        chosen = setting
    if chosen is None:
        first = values(settings[0])
        # rounded up, so that it can be promised
        bound = math.ceil(1e4 * promise.bound(first, layers)) / 1e4
        raise ValueError(
            f"{promise.text} cannot be promised: at {promise.dial} {settings[0]:g} it is "
            f"{first.double().mean():.4f} on these {len(first)} examples, and {bound:.4f} can be "
            "promised. Promise that, give more examples, or train again"
        )
    thresholds = None if answers.task.thresholds is None else list(answers.task.thresholds)
    bound = 0.0 if chosen == proved else promise.bound(values(chosen), layers)
    rule, measured = halting.with_dial(promise.dial, chosen), Measured(answers, exits(chosen))
    return Calibration(
        rule.rule,
        rule.tolerance,
        rule.margin,
        promise=asdict(promise),
        bound=bound if promise.min_agreement is None else 1 - bound,
        examples=len(measured.exits),
        accuracy=measured.accuracy,
        full_depth_accuracy=measured.full_depth.accuracy,
        agreement=measured.agreement,
        mean_exit_layer=measured.mean_exit_layer,
        baseline_accuracy=None
        if baseline is None
        else share(answers.task.same(baseline, answers.target)),
        estimate=promise.confidence is None,
        thresholds=thresholds,
    )


def settle(model: DACT, data: LightningDataModule | Iterable[Batch]) -> str:
    r"""Set the margin of a fitted model on the examples that are set aside.

    The margin keeps the default promise. If n examples are too few for that, it is the last setting
    of the fixed sequence at which every example keeps the class of all layers. This guarantees a
    `min_agreement` of :math:`(1 - \text{confidence})^{1/n}`.

    The model is unchanged if it has no dial, or if the examples are too few to guarantee that at
    most 10 % of the classes change.

    Returns:
        Text that says what is guaranteed, or what is missing.
    """
    promise, text = Promise(), ""
    assert promise.confidence is not None
    least = examples_for_rate(MOST_CHANGED, promise.confidence)
    try:
        promise.check(model.exit_rule)
        batches, none_aside = _examples(model, data)
        if none_aside:
            raise ValueError(
                "no examples are set aside: set the data's calibration_fraction, or give your data "
                f"a calibration_dataloader; it takes {least}, or better {promise.examples_needed()}"
            )
        answers = layer_answers(model, batches)
        examples = len(answers.target)
        if examples < least:
            raise ValueError(f"{examples} examples are set aside, and a guarantee takes {least}")
        if examples < promise.examples_needed():
            # rounded down, so that it is kept
            agreement = math.floor(1e4 * (1 - promise.confidence) ** (1 / examples)) / 1e4
            text = (
                f"{promise.text} takes {promise.examples_needed()} examples. As none of {examples} "
                f"gets another class, with {promise.confidence:.0%} confidence at most "
                f"{100 * (1 - agreement):.2g} % of new ones do:\n"
            )
            promise = Promise(min_agreement=agreement, confidence=promise.confidence)
        found = choose_setting(answers, promise, model.exit_rule)
    except ValueError as error:
        return f"{promise.dial} stays {getattr(model, promise.dial):.8g}: {error}"
    _adopt(model, found, answers)
    return text + describe(vars(found), model.num_layers)


def _examples(
    model: DACT, data: LightningDataModule | Iterable[Batch]
) -> tuple[Iterable[Batch], bool]:
    """Return batches to calibrate on, and whether they chose the checkpoint."""
    if not isinstance(data, LightningDataModule):
        return data, False
    data.prepare_data()
    data.setup("validate")
    check_agreement(model, data, training=False)
    return calibration_batches(data)


def _fit_thresholds(model: DACT, data: Any, chose_checkpoint: bool) -> None:
    if not isinstance(data, LightningDataModule) or chose_checkpoint:
        raise ValueError("fit_thresholds needs validation examples that are not for calibration")
    if model.task.nouns != "labels":
        raise ValueError("fit_thresholds goes with task='multilabel'")
    model.thresholds = best_thresholds(layer_answers(model, data.val_dataloader()))


def _adopt(model: DACT, found: Calibration, answers: LayerAnswers) -> None:
    model.exit_rule, model.calibration = found.exit_rule, asdict(found)
    if model.temperatures is not None:
        model.temperatures = fit_temperatures(answers, answers.exit_layers(found.exit_rule))
