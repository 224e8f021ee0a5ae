"""Calibration: find the halting margin, or tolerance, that keeps a promise with a stated
confidence."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Any, get_args

from lightning.pytorch import LightningDataModule
from torch import Tensor

from dact import functional
from dact.agreement import check_agreement
from dact.calibration import bounds
from dact.calibration.answers import Dial as Dial
from dact.calibration.answers import LayerAnswers as LayerAnswers
from dact.calibration.answers import (
    Measured,
    careful_mean_and_error,
    check_baseline,
    exits_by_setting,
    mean_and_error,
    share,
)
from dact.calibration.answers import layer_answers as layer_answers
from dact.calibration.temperature import fit_temperatures
from dact.checks import check_choice, check_range, check_type
from dact.encoders.base import Batch
from dact.functional import Halting
from dact.model import DACT

# The settings that are tried, from the most layers to the fewest; at the first one a dial has no
# effect.
SETTINGS: dict[str, tuple[float, ...]] = {
    "halting_tolerance": tuple(step / 100 for step in range(100)),
    # Geometric towards 1, where a confident classifier has most examples, up to the last number
    # below 1 in float32.
    "halting_margin": (
        1.0,
        1 - 2**-24,
        *(1 - digit * 10**-power for power in range(7, 2, -1) for digit in (1, 2, 5)),
        *(step / 100 for step in range(99, -1, -1)),
    ),
}

# Multiple of the examples that an estimate needs from which on gained examples offset lost ones in
# it. Among fewer, luck with a few gains would hide what is lost.
MANY = 4


@dataclass(frozen=True)
class Promise:
    """A bound that early exit must keep: exactly one of the first three arguments.

    Args:
        max_accuracy_loss: Largest loss of accuracy below this model's own full depth, or below a
            baseline, as a share: 0.005 is half a point; in [0, 1).
        min_agreement: Smallest share of examples that get the class of this model's own full depth,
            in (0, 1].
        max_layers: Largest mean exit layer.
        confidence: Probability with which the promise holds for new examples of the same kind, in
            (0, 1). None (null) asks for an estimate: the measured value keeps the promise with one
            standard error to spare.
        dial: Name of the setting that is moved to keep the promise.

    Raises:
        ValueError: If not exactly one is given, or a value is outside its range.
        TypeError: If a value is not a number.
    """

    max_accuracy_loss: float | None = None
    min_agreement: float | None = None
    max_layers: float | None = None
    confidence: float | None = 0.95
    dial: Dial = "halting_margin"

    def __post_init__(self) -> None:
        check_choice("dial", self.dial, Dial)
        given = [
            n
            for n in ("max_accuracy_loss", "min_agreement", "max_layers")
            if getattr(self, n) is not None
        ]
        if len(given) != 1:
            raise ValueError(
                "a promise is one of max_accuracy_loss, min_agreement and max_layers, got "
                + (
                    f"{' and '.join(given)}: give null (in Python None) for the others"
                    if given
                    else "none of them"
                )
            )
        if self.max_accuracy_loss is not None:
            check_range(
                "max_accuracy_loss",
                self.max_accuracy_loss,
                "[0, 1)",
                "it is a share, 0.01 is one point",
            )
        if self.min_agreement is not None:
            check_range(
                "min_agreement", self.min_agreement, "(0, 1]", "it is a share, 0.95 is 95 %"
            )
        if self.max_layers is not None:
            check_range("max_layers", self.max_layers, "[1, inf]")
        if self.confidence is not None:
            check_range(
                "confidence",
                self.confidence,
                "(0, 1)",
                "it is a probability, or None for an estimate",
            )

    @property
    def allowed(self) -> float:
        """The largest allowed value of the bounded quantity: lost accuracy, disagreement, or the
        mean exit layer."""
        most = 1 - self.min_agreement if self.min_agreement is not None else self.max_accuracy_loss
        return self.max_layers if most is None else most  # type: ignore[return-value]

    def examples_needed(self, layers: int | None = None) -> int | None:
        """Return the fewest examples that can support this promise, if early exit makes no fault on
        them.

        It is 2 for an estimate, even where so few only leave full depth, and None for an allowance
        of 0, which takes the proof. For a number of layers it depends on `layers`, of the model,
        and is 2 without these."""
        if self.confidence is None or (self.max_layers is not None and layers is None):
            return 2
        if self.max_layers is not None and layers is not None:
            return bounds.examples_for_mean(self.max_layers, layers, self.confidence)
        spent = bounds.NUISANCE_SHARE if self.min_agreement is None else 0.0
        return bounds.examples_for_rate(self.allowed, 1 - (1 - self.confidence) * (1 - spent))

    def check(self, halting: Halting, layers: int) -> None:
        """Raise an error if a model of this rule and number of layers cannot be calibrated or keeps
        the promise anyway.

        The rule must have a dial to move, and its other dial must not let examples leave early
        already."""
        if halting.rule == "never":
            raise ValueError("a model with halting='never' has no dial: give it halting='exact'")
        values = {"halting_tolerance": halting.tolerance, "halting_margin": halting.margin}
        for name in set(get_args(Dial)) - {self.dial}:
            if self.max_layers is None and values[name] != SETTINGS[name][0]:
                raise ValueError(
                    f"{self.dial} is calibrated from full depth on, but the model has {name}={values[name]:g}: set "
                    f"it to {SETTINGS[name][0]:g}, or calibrate it instead (dial: {name})"
                )
        if self.max_layers is not None and self.max_layers >= layers:
            raise ValueError(
                f"max_layers={self.max_layers:g} promises nothing: the model has {layers} layers. Promise fewer"
            )


@dataclass(frozen=True)
class Calibration:
    """A halting rule that keeps a promise, and its measurements.

    Args:
        halting: Halting rule.
        halting_tolerance: Tolerance, in [0, 1).
        halting_margin: Margin, in [0, 1].
        promise: Promise that they keep, as plain data.
        bound: Bound at that confidence for the chosen setting taken alone: on the loss of accuracy,
            the agreement or the mean exit layer. The search for the setting guarantees only the
            promise. For an estimate, the measured value with one standard error added, or
            subtracted from an agreement.
        examples: Number of examples that were measured.
        accuracy: Accuracy of early exit on them.
        full_depth_accuracy: Accuracy of this model's own full depth on them.
        agreement: Share of them that got the class of full depth.
        mean_exit_layer: Mean exit layer on them.
        baseline_accuracy: Accuracy of the baseline on them; None if the promise is against the
            model's own full depth.
        estimate: Whether this is an estimate, without a confidence.
        chose_checkpoint: Whether the same examples chose the checkpoint, which makes the promise
            optimistic.
    """

    halting: functional.HaltingRule
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

    @property
    def exit_rule(self) -> Halting:
        """The rule as one object, as `LayerAnswers.exit_layers` takes it."""
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
) -> Calibration:
    r"""Set the `halting_margin` of `model`, or its `halting_tolerance`, so that it keeps a promise.

    For the first two promises, margins are tried downwards from 1, or tolerances upwards from 0
    (both keep the class of full depth by proof), and the last one before the first that fails is
    taken. This is a fixed sequence of tests, each at the full level: the probability that any
    passes falsely is at most 1 - confidence (Maurer, Hothorn & Lehmacher 1995). For a loss of
    accuracy, below full depth or a baseline, it is that of a paired difference,
    `dact.calibration.bounds.difference_p_value`. For agreement the one-sided Clopper–Pearson bound
    (1934) on the rate of examples whose class differs must be small enough. For `max_layers`
    settings are tried from the other end, and the bound is the empirical Bernstein bound on the
    mean exit layer (Maurer & Pontil 2009, theorem 4). An estimate takes the same values with one
    standard error added; with few examples it counts the lost ones alone.

    Args:
        model: Model that gets the setting and, as `calibration`, the returned record. The dial of an
            earlier promise starts anew; temperatures, if the model has any, are fitted again.
        data: Labelled examples that were used neither for training nor for any choice: batches, or
            a datamodule, of which ``calibration_dataloader()`` is used or, if there is none, the
            validation examples. These chose the checkpoint, and the record then says so.
        max_accuracy_loss: Largest loss of accuracy below this model's own full depth, as a share in
            [0, 1): 0.005 is half a point.
        min_agreement: Smallest share of examples that get the class of this model's own full depth,
            in (0, 1].
        max_layers: Largest mean exit layer.
        confidence: Probability with which the promise holds for new examples of the same kind, in
            (0, 1). None asks for an estimate instead: the measured value keeps the promise with one
            standard error to spare.
        dial: Name of the dial that is moved. The margin mostly takes fewer layers for the same
            promise. The other dial stays, and must have no effect for the first two promises: only
            then does the sequence begin at full depth.
        baseline: Classes of a reference on the same examples, int64 ``[examples]``, in their order:
            `max_accuracy_loss` is then the loss of accuracy below the reference. That takes many
            more examples than full depth of the same model, with which early exit mostly agrees.

    Returns:
        The setting with its bound, and the measurements on the examples.

    Raises:
        TypeError: If the model is no `DACT`, or a batch no dict.
        ValueError: If data and model do not agree, not exactly one promise is given, it cannot be
            kept (the message says which can), the examples are too few for it (the message says how
            many it takes), or the other dial or ``halting="never"`` prevents it.

    Example:
        >>> import torch
        >>> from dact.encoders import TransformerEncoder
        >>> model = DACT(encoder=TransformerEncoder(vocab_size=50, num_layers=2, hidden_size=8, num_heads=2))
        >>> batch = {"input_ids": torch.randint(3, 50, (200, 5)), "labels": torch.randint(0, 3, (200,))}
        >>> found = calibrate(model, [batch], min_agreement=0.9)
        >>> found.bound >= 0.9 and model.halting_margin == found.halting_margin
        True
    """
    promise = Promise(max_accuracy_loss, min_agreement, max_layers, confidence, dial)
    check_type("calibrate: model", model, DACT, "DACT.from_pretrained(…)")
    halting = model.exit_rule
    if model.calibration is not None:  # the dial of an earlier promise starts anew
        earlier = model.calibration["promise"]["dial"]
        halting = halting.with_dial(earlier, SETTINGS[earlier][0])
    promise.check(halting, model.num_layers)  # before any layer runs
    batches, chose_checkpoint = _examples(data)
    if isinstance(data, LightningDataModule):
        check_agreement(model, data, training=False)
    answers = layer_answers(model, batches)
    found = choose_setting(
        answers, promise, halting, baseline=baseline, chose_checkpoint=chose_checkpoint
    )
    model.exit_rule, model.calibration = found.exit_rule, asdict(found)
    if model.temperatures is not None:
        model.temperatures = fit_temperatures(answers, answers.exit_layers(found.exit_rule))
    return found


def choose_setting(
    answers: LayerAnswers,
    promise: Promise,
    halting: Halting = Halting(),
    *,
    baseline: Tensor | None = None,
    chose_checkpoint: bool = False,
) -> Calibration:
    """Choose the setting that keeps a promise, as `calibrate` does, from the answers of all layers,
    without a model.

    Args:
        answers: Answers of all layers to labelled examples. Their exit layers at the setting are
            ``answers.exit_layers(found.exit_rule)``.
        promise: Promise to keep.
        halting: Halting rule, whose ``promise.dial`` is replaced.
        baseline: As for `calibrate`.
        chose_checkpoint: Whether the same examples chose the checkpoint; it is recorded and does
            not change the choice.

    Raises:
        ValueError: As for `calibrate`.
    """
    promise.check(halting, answers.num_layers)
    if baseline is not None:
        if promise.max_accuracy_loss is None:
            raise ValueError(
                "a baseline goes with max_accuracy_loss: leave it out for other promises"
            )
        baseline = check_baseline(baseline, answers)
    elif (needed := promise.examples_needed()) is not None and len(answers.target) < needed:
        name, value = _promised(promise)
        raise ValueError(
            f"{name}={value:g} with confidence {promise.confidence:g} takes {needed} examples or more, even if early "
            f"exit makes no fault on them, got {len(answers.target)}: give more, promise less, or ask for an estimate "
            f"(confidence null, in Python None), which takes {examples_for_an_estimate(promise)}"
        )
    exits = exits_by_setting(answers, halting, promise.dial)
    evidence = _Evidence(promise, answers, baseline)
    settings = (
        SETTINGS[promise.dial] if promise.max_layers is None else SETTINGS[promise.dial][::-1]
    )
    by_proof = promise.max_layers is None and baseline is None
    chosen = settings[0] if by_proof else None
    for setting in settings[1:] if by_proof else settings:
        if not evidence.keeps(exits(setting)):
            break
        chosen = setting
    if chosen is None:
        raise ValueError(evidence.refusal(exits(settings[0]), settings[0]))
    at = exits(chosen)
    bound = 0.0 if by_proof and chosen == settings[0] else evidence.bound(at)
    measured = Measured(answers, at)
    rule = halting.with_dial(promise.dial, chosen)
    return Calibration(
        rule.rule,
        rule.tolerance,
        rule.margin,
        promise=asdict(promise),
        bound=bound if promise.min_agreement is None else 1 - bound,
        examples=len(at),
        accuracy=measured.accuracy,
        full_depth_accuracy=measured.full_depth.accuracy,
        agreement=measured.agreement,
        mean_exit_layer=measured.mean_exit_layer,
        baseline_accuracy=None if baseline is None else share(baseline == answers.target),
        estimate=promise.confidence is None,
        chose_checkpoint=chose_checkpoint,
    )


class _Evidence:
    """Tests of a promise on labelled examples that leave at given layers, int64 ``[examples]``."""

    def __init__(self, promise: Promise, answers: LayerAnswers, baseline: Tensor | None) -> None:
        self.promise = promise
        self.layers = answers.num_layers
        self.target = answers.target
        self.classes = answers.a.argmax(dim=2)  # [examples, layers]
        self.reference = self.classes[:, -1] if baseline is None else baseline
        few = promise.confidence is None and len(self.target) < MANY * examples_for_an_estimate(
            promise
        )
        self.counts_gains = baseline is not None or not few

    def keeps(self, exits: Tensor) -> bool:
        """Return whether the promise holds with its confidence."""
        if (
            self.promise.max_accuracy_loss is not None and self.promise.confidence is not None
        ):  # faster than the bound
            error = 1 - self.promise.confidence
            return (
                bounds.difference_p_value(
                    *self._discordant(exits), len(exits), self.promise.allowed, error
                )
                <= error
            )
        return self.bound(exits) <= self.promise.allowed

    def bound(self, exits: Tensor) -> float:
        """Return an upper bound on the quantity that the promise limits."""
        confidence, examples = self.promise.confidence, len(exits)
        if confidence is None:
            values = self._values(exits).double()
            if self.promise.max_layers is not None:
                return sum(mean_and_error(values))
            if self.promise.min_agreement is not None:
                return sum(careful_mean_and_error(values, low=0.0))
            return sum(careful_mean_and_error(values if self.counts_gains else values.clip(min=0)))
        if self.promise.max_layers is not None:
            return bounds.mean_upper_bound(exits, self.layers, confidence)
        if self.promise.min_agreement is not None:
            return bounds.binomial_upper_bound(int(self._values(exits).sum()), examples, confidence)
        return bounds.difference_upper_bound(*self._discordant(exits), examples, confidence)

    def refusal(self, exits: Tensor, setting: float) -> str:
        """Return a message that says why even the first setting does not keep the promise, and what
        can be done."""
        promise, bound = (
            self.promise,
            math.ceil(1e4 * self.bound(exits)) / 1e4,
        )  # what is named can be promised
        name, value = _promised(promise)
        how = (
            "as an estimate"
            if promise.confidence is None
            else f"with confidence {promise.confidence:g}"
        )
        if promise.max_layers is not None:
            train = (
                ", train with a larger lambda_reg" if promise.dial == "halting_tolerance" else ""
            )
            most, remedy = (
                f"the fewest layers that can be promised are {bound:.4f}",
                f"Promise that{train}, or give",
            )
            if bound >= self.layers:
                most = f"{len(exits)} examples support no promise below {self.layers}"
                remedy = f"It takes {promise.examples_needed(self.layers)} or more{train}: give"
            return (
                f"{name}={value:g} cannot be promised {how}: {most} of {self.layers}, at {promise.dial} {setting:g}. "
                f"{remedy} more examples"
            )
        lost, remedy = (
            mean_and_error(self._values(exits))[0],
            "promise that, or train a better model",
        )
        if lost < value:  # the bound tightens with the square root of the number of examples
            enough = len(exits) * ((bound - lost) / (value - lost)) ** 2
            remedy = f"promise that, or give about {float(f'{enough:.2g}'):.0f} examples"
        return (
            f"{name}={value:g} below the baseline cannot be promised {how}: at {promise.dial} {setting:g} the model is "
            f"{100 * lost:.2f} points below it on these {len(exits)} examples, and up to {100 * bound:.2f} points can "
            f"be promised; {remedy}"
        )

    def _values(self, exits: Tensor) -> Tensor:
        """Return, per example, the value whose mean is bounded: exit layer, disagreement, or loss
        (1, 0 or -1)."""
        if self.promise.max_layers is not None:
            return exits
        early = functional.answer_at(self.classes, exits)
        if self.promise.min_agreement is not None:
            return early != self.reference
        return (self.reference == self.target).int() - (early == self.target).int()

    def _discordant(self, exits: Tensor) -> tuple[int, int]:
        """Return how many examples only the reference has right, and how many only early exit has
        right."""
        loss = self._values(exits)
        return int((loss > 0).sum()), int((loss < 0).sum())


def _examples(data: LightningDataModule | Iterable[Batch]) -> tuple[Iterable[Batch], bool]:
    """Return the batches to calibrate on, and whether they chose the checkpoint; given batches are
    trusted."""
    if not isinstance(data, LightningDataModule):
        return data, False
    data.prepare_data()
    data.setup("validate")
    set_aside = getattr(data, "calibration_dataloader", lambda: None)()
    return (data.val_dataloader(), True) if set_aside is None else (set_aside, False)


def describe(found: Calibration, layers: int) -> str:
    """Return a calibration as a few lines of text.

    Args:
        found: Calibration.
        layers: Number of layers of the model.
    """
    promise = Promise(**found.promise)
    name, value = _promised(promise)
    # 0.99999994 is a margin that has an effect
    setting = f"{promise.dial} {getattr(found, promise.dial):.8g}"
    against = "this model's own full depth" if found.baseline_accuracy is None else "the baseline"
    bound = {
        "max_accuracy_loss": f"at most {100 * found.bound:.2f} points below {against}",
        "min_agreement": f"agreement with {against} at least {100 * found.bound:.2f} %",
        "max_layers": f"at most {found.bound:.2f} of {layers} layers on average",
    }[name]
    by_proof = (
        found.baseline_accuracy is None
        and getattr(found, promise.dial) == SETTINGS[promise.dial][0]
    )
    if by_proof and name != "max_layers":
        first = f"{setting} keeps {name}={value:g}: the class is that of {against} by proof, and no other setting passed"
        if found.estimate and found.examples < examples_for_an_estimate(promise) < math.inf:
            first += f", which takes {examples_for_an_estimate(promise)} examples or more"
    elif found.estimate:
        first = f"{setting} is an estimate for {name}={value:g}, without a confidence: {bound}, one standard error included"
    else:
        first = f"{setting} keeps {name}={value:g} with confidence {promise.confidence:g}: taken alone, {bound}"
    compared = f"this model's own full depth {100 * found.full_depth_accuracy:.2f} %"
    if found.baseline_accuracy is not None:
        compared += f", baseline {100 * found.baseline_accuracy:.2f} %"
    lines = [
        first,
        f"seen on {found.examples} examples: accuracy {100 * found.accuracy:.2f} % ({compared}), agreement "
        f"{100 * found.agreement:.2f} %, mean exit layer {found.mean_exit_layer:.2f} of {layers}",
    ]
    if found.chose_checkpoint:
        lines.append(
            "these examples chose the checkpoint, so this is optimistic: set others aside with the data's "
            "calibration_fraction before the next fit, or give a calibration_file or calibration_dataloader"
        )
    return "\n".join(lines)


def examples_for_an_estimate(promise: Promise) -> float:
    """Return the fewest examples that an estimate takes; of accuracy and agreement, if there is no
    fault among them."""
    if promise.max_layers is not None:
        return 2
    error = (
        1 if promise.min_agreement is not None else math.sqrt(2)
    )  # of no fault, times the number of examples
    return math.ceil(error / promise.allowed - 1.5) if promise.allowed else math.inf


def _promised(promise: Promise) -> tuple[str, float]:
    names = ("max_accuracy_loss", "min_agreement", "max_layers")
    return next((name, value) for name in names if (value := getattr(promise, name)) is not None)
