"""The dials: a halting tolerance, or margin, that keeps a promise with a stated confidence."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from lightning.pytorch import LightningDataModule
from torch import Tensor

from dact import functional
from dact.encoders.base import Batch, move
from dact.files import DurableCheckpointIO, read_checkpoint
from dact.model import DACT, HALTING
from dact.persistence import stored_config

Dial = Literal["halting_tolerance", "halting_margin"]
# The settings that are tried, from the most layers to the fewest; at the first of them a dial does nothing.
SETTINGS: dict[str, tuple[float, ...]] = {
    "halting_tolerance": tuple(step / 100 for step in range(100)),
    # Finer near 1, where a sure classifier has most of its examples.
    "halting_margin": (1.0, 0.9999, 0.9998, 0.9995, 0.999, 0.998, 0.995, *(step / 100 for step in range(99, -1, -1))),
}


@dataclass(frozen=True)
class Promise:
    """What early exit must keep, exactly one of the three.

    Args:
        max_accuracy_loss: Points of accuracy below full depth at the most, as a share: 0.005 is half a point.
        min_agreement: The least share of examples that get the class of full depth.
        max_layers: The most layers on average.
        confidence: The probability with which the promise holds for new examples of the same kind, in (0, 1).
        dial: Which setting of the model is moved to keep it.

    Raises:
        ValueError: If not exactly one is given, or a value is outside its range.
    """

    max_accuracy_loss: float | None = None
    min_agreement: float | None = None
    max_layers: float | None = None
    confidence: float = 0.95
    dial: Dial = "halting_tolerance"

    def __post_init__(self) -> None:
        functional.check_choice("dial", self.dial, Dial)
        given = [n for n in ("max_accuracy_loss", "min_agreement", "max_layers") if getattr(self, n) is not None]
        if len(given) != 1:
            raise ValueError(
                "a promise is one of max_accuracy_loss, min_agreement and max_layers, got "
                + (" and ".join(given) or "none of them")
            )
        for name in ("max_accuracy_loss", "min_agreement"):
            value = getattr(self, name)
            if value is not None and not 0 <= value <= 1:
                meant = "0.005 is half a point" if name == "max_accuracy_loss" else "0.95 is 95 %"
                raise ValueError(f"{name} is a share, in [0, 1], got {value}: {meant}")
        if self.max_layers is not None and not self.max_layers >= 1:
            raise ValueError(f"max_layers must be 1 or more, got {self.max_layers}")
        if not 0 < self.confidence < 1:
            raise ValueError(f"confidence is a probability, in (0, 1), got {self.confidence}")

    def check_layers(self, layers: int) -> None:
        """Raise an error if every model of so many layers keeps this promise."""
        if self.max_layers is not None and self.max_layers >= layers:
            raise ValueError(
                f"max_layers={self.max_layers:g} promises nothing: the model has {layers} layers. Promise fewer"
            )

    def check_model(self, model: DACT) -> None:
        """Raise an error if nothing can be calibrated on `model`, or nothing need be, before any layer runs."""
        if model.halting == "never":
            raise ValueError("a model with halting='never' has no dial: give it halting='exact'")
        self.check_layers(model.encoder.num_layers)
        for name in set(get_args(Dial)) - {self.dial}:
            if self.max_layers is None and getattr(model, name) != SETTINGS[name][0]:
                raise ValueError(
                    f"{self.dial} is calibrated from full depth on, but the model has {name}={getattr(model, name):g}: set "
                    f"it to {SETTINGS[name][0]:g}, or calibrate it instead (dial: {name})"
                )


@dataclass(frozen=True)
class Calibration:
    """How to halt so that a promise is kept, and what was seen of it.

    Args:
        halting: The rule.
        halting_tolerance: The tolerance, in [0, 1).
        halting_margin: The margin, in [0, 1].
        promise: The promise that they keep, as plain data.
        bound: What the chosen setting alone would be credited with at that confidence: the most accuracy that is lost,
            the least agreement, or the most layers on average. (What the search for it guarantees is the promise.)
        examples: How many examples were asked.
        accuracy: Of early exit on them.
        full_depth_accuracy: Of full depth on them.
        agreement: The share that got the class of full depth.
        mean_exit_layer: The layers that they used on average.
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


def calibrate(
    model: DACT,
    data: LightningDataModule | Iterable[Batch],
    *,
    max_accuracy_loss: float | None = None,
    min_agreement: float | None = None,
    max_layers: float | None = None,
    confidence: float = 0.95,
    dial: Dial = "halting_tolerance",
) -> Calibration:
    r"""Set the `halting_tolerance` of `model`, or its `halting_margin`, so that it keeps a promise.

    For the first two promises, tolerances are tried upwards from 0 (which keeps both by proof), or margins downwards from
    1, and the last one before the first that fails is taken: a fixed sequence of tests, each at the full level, of which
    the probability of any false one is at most 1 - confidence (Maurer, Hothorn & Lehmacher 1995). A setting passes if the
    one-sided Clopper–Pearson bound (1934) on the rate of examples that full depth has right and early exit has wrong (no
    accuracy can be lost otherwise), or of examples whose class differs, is small enough. For `max_layers` they are tried
    from the other end, and the bound is the empirical Bernstein bound on the mean exit layer (Maurer & Pontil 2009,
    theorem 4).

    Args:
        model: Is put into eval mode, and gets the setting and, as `calibration`, the record that this returns. An
            earlier promise ends first.
        data: Labelled examples that no training and no choice has seen: batches, or a datamodule, whose
            ``calibration_dataloader`` is taken if it has one, and else its validation examples.
        max_accuracy_loss: Points of accuracy below full depth at the most, as a share: 0.005 is half a point.
        min_agreement: The least share of examples that get the class of full depth, in [0, 1].
        max_layers: The most layers on average.
        confidence: The probability with which the promise holds for new examples of the same kind, in (0, 1).
        dial: Which of the two is moved. The margin mostly takes fewer layers for the same promise. The other one stays,
            and must be without effect for the first two promises: only then the sequence begins at full depth.

    Returns:
        The settings with their bound, and what was seen on the examples.

    Raises:
        ValueError: If not exactly one promise is given, or it cannot be kept (the message says which can), or the other
            dial or ``halting="never"`` stands in the way.

    Example:
        >>> from dact.encoders import TransformerEncoder
        >>> model = DACT(encoder=TransformerEncoder(vocab_size=50, num_layers=2, hidden_size=8, num_heads=2))
        >>> batch = {"input_ids": torch.randint(3, 50, (200, 5)), "labels": torch.randint(0, 3, (200,))}
        >>> found = calibrate(model, [batch], min_agreement=0.9)
        >>> found.bound >= 0.9 and model.halting_tolerance == found.halting_tolerance
        True
    """
    promise = Promise(max_accuracy_loss, min_agreement, max_layers, confidence, dial)
    model.end_calibration()
    promise.check_model(model)
    answers = layer_answers(model.eval(), calibration_batches(data))
    found = choose_setting(answers, promise, **{name: getattr(model, name) for name in HALTING})
    model.calibration = {**asdict(found), "instead_of": getattr(model, dial)}
    setattr(model, dial, getattr(found, dial))
    return found


def store_in_checkpoint(path: Path, model: DACT) -> None:
    """Let a checkpoint of `model` know how it halts, and its calibration."""
    checkpoint = read_checkpoint(path)
    known = (*HALTING, "calibration")
    stored_config(checkpoint).update({name: getattr(model, name) for name in known})
    DurableCheckpointIO().save_checkpoint(checkpoint, path)


def describe(found: Calibration, layers: int) -> str:
    """What a calibration found, in a few lines for a person."""
    promise = {name: value for name, value in found.promise.items() if value is not None}
    confidence, dial = promise.pop("confidence"), promise.pop("dial")
    ((name, value),) = promise.items()
    bounds = {
        "max_accuracy_loss": f"taken alone, accuracy at most {100 * found.bound:.2f} points below full depth",
        "min_agreement": f"taken alone, agreement with full depth at least {100 * found.bound:.2f} %",
        "max_layers": f"taken alone, at most {found.bound:.2f} of {layers} layers on average",
    }
    return (
        f"{dial} {getattr(found, dial):g} keeps {name}={value:g} with confidence {confidence:g}: "
        f"{bounds[name]}\n"
        f"seen on {found.examples} examples: accuracy {100 * found.accuracy:.2f} % (full depth "
        f"{100 * found.full_depth_accuracy:.2f} %), agreement {100 * found.agreement:.2f} %, mean exit layer "
        f"{found.mean_exit_layer:.2f} of {layers}"
    )


def calibration_batches(data: LightningDataModule | Iterable[Batch]) -> Iterable[Batch]:
    """The batches to calibrate on; see `calibrate`."""
    if not isinstance(data, LightningDataModule):
        return data
    data.prepare_data()
    data.setup("validate")
    own = getattr(data, "calibration_dataloader", lambda: None)()
    return data.val_dataloader() if own is None else own


@dataclass(frozen=True)
class LayerAnswers:
    """What all layers say of labelled examples, on the CPU.

    Args:
        a: ``[examples, layers, classes]``.
        p: ``[examples, layers]``.
        y: ``[examples, layers, classes]``.
        target: int64 ``[examples]``.
        depths: int64 ``[examples]`` where the data knows the depth of its examples, else None.
    """

    a: Tensor
    p: Tensor
    y: Tensor
    target: Tensor
    depths: Tensor | None


@torch.no_grad()
def layer_answers(model: DACT, batches: Iterable[Batch]) -> LayerAnswers:
    """Run all layers on labelled batches; `model` is in eval mode, on the device that it should use."""
    answers, shares, classifications, targets, depths = [], [], [], [], []
    for batch in batches:
        if "labels" not in batch:
            raise ValueError(f"these batches need 'labels' [batch], got the keys {sorted(batch)}")
        output = model.full_depth(move(batch, model.device))
        assert output.layer_probabilities is not None
        assert output.h is not None
        a, p = functional.accumulate(output.layer_probabilities, output.h)
        answers.append(a.cpu())
        shares.append(p.cpu())
        classifications.append(output.layer_probabilities.cpu())
        targets.append(batch["labels"].cpu())
        if "depth" in batch:
            depths.append(batch["depth"].cpu())
    if sum(map(len, targets)) < 2:
        raise ValueError(f"at least two labelled examples are needed, got {sum(map(len, targets))}")
    return LayerAnswers(
        torch.cat(answers),
        torch.cat(shares),
        torch.cat(classifications),
        torch.cat(targets),
        torch.cat(depths) if depths else None,
    )


def choose_setting(
    answers: LayerAnswers,
    promise: Promise,
    halting: functional.HaltingRule = "exact",
    halting_tolerance: float = 0.0,
    halting_margin: float = 1.0,
) -> Calibration:
    """How to halt, as `calibrate` has it, from what all layers say; of the two dials one stays as it is given."""
    layers = answers.a.shape[1]

    def halting_at(setting: float) -> dict[str, float]:
        return {"halting_tolerance": halting_tolerance, "halting_margin": halting_margin, promise.dial: setting}

    def exits(setting: float) -> Tensor:
        dials = halting_at(setting)
        return functional.exit_layers(
            answers.a, answers.p, halting, dials["halting_tolerance"], y=answers.y, margin=dials["halting_margin"]
        )

    promise.check_layers(layers)
    if promise.max_layers is not None:
        setting, bound = _fewest_enough(exits, layers, promise)
    else:
        least = promise.max_accuracy_loss if promise.min_agreement is None else 1 - promise.min_agreement
        assert least is not None
        setting, rate = SETTINGS[promise.dial][0], 0.0  # by proof
        for next_setting in SETTINGS[promise.dial][1:]:
            faults = _faults(answers, exits(next_setting), promise)
            upper = binomial_upper_bound(int(faults.sum()), len(faults), promise.confidence)
            if upper > least:
                break
            setting, rate = next_setting, upper
        bound = rate if promise.min_agreement is None else 1 - rate
    at = exits(setting)
    early = functional.answer_at(answers.a, at).argmax(1)
    full = answers.a[:, -1].argmax(1)
    dials = halting_at(setting)
    return Calibration(
        halting,
        dials["halting_tolerance"],
        dials["halting_margin"],
        asdict(promise),
        bound,
        len(early),
        _share(early == answers.target),
        _share(full == answers.target),
        _share(early == full),
        at.double().mean().item(),
    )


def _faults(answers: LayerAnswers, exits: Tensor, promise: Promise) -> Tensor:
    """Which examples count against a promise, bool ``[examples]``."""
    early = functional.answer_at(answers.a, exits).argmax(1)
    full = answers.a[:, -1].argmax(1)
    if promise.min_agreement is not None:
        return early != full
    return (full == answers.target) & (early != answers.target)


def _fewest_enough(exits: Any, layers: int, promise: Promise) -> tuple[float, float]:
    """The most careful setting that keeps `max_layers`, tested from that of the fewest layers on."""
    assert promise.max_layers is not None
    settings = SETTINGS[promise.dial][::-1]
    setting, bound = None, float("nan")
    for next_setting in settings:
        upper = mean_upper_bound(exits(next_setting), layers, promise.confidence)
        if upper > promise.max_layers:
            break
        setting, bound = next_setting, upper
    if setting is None:
        fewest = mean_upper_bound(exits(settings[0]), layers, promise.confidence)
        train = ", train with a larger lambda_reg" if promise.dial == "halting_tolerance" else ""
        raise ValueError(
            f"max_layers={promise.max_layers:g} cannot be promised with confidence {promise.confidence:g}: the fewest that "
            f"can are {fewest:.2f} of {layers}, at {promise.dial} {settings[0]:g}. Promise that{train}, or give more examples"
        )
    return setting, bound


def binomial_upper_bound(faults: int, examples: int, confidence: float) -> float:
    """The one-sided Clopper–Pearson bound: a larger rate would give so few faults with probability 1 - confidence.

    Args:
        faults: In 0 … examples.
        examples: 1 or more.
        confidence: In (0, 1).

    Example:
        >>> round(binomial_upper_bound(0, 100, 0.95), 4)  # 1 - 0.05 ** (1 / 100)
        0.0295
    """
    from scipy.stats import beta

    return 1.0 if faults == examples else float(beta.ppf(confidence, faults + 1, examples - faults))


def mean_upper_bound(exits: Tensor, layers: int, confidence: float) -> float:
    r"""The empirical Bernstein bound on the mean exit layer (Maurer & Pontil 2009, theorem 4).

    With n examples, sample variance V and δ = 1 - confidence, for values in an interval of length N - 1:
    :math:`\text{mean} + \sqrt{2 V \ln(2/δ) / n} + 7 (N - 1) \ln(2/δ) / (3 (n - 1))`, and never above N.

    Args:
        exits: int64 ``[examples]``, in 1 … layers; at least two.
        layers: N.
        confidence: In (0, 1).
    """
    values, log = exits.double(), torch.tensor(2 / (1 - confidence)).log().item()
    n = len(values)
    spread = (2 * values.var().item() * log / n) ** 0.5 + 7 * (layers - 1) * log / (3 * (n - 1))
    return min(float(layers), values.mean().item() + spread)


def _share(flags: Tensor) -> float:
    return flags.double().mean().item()
