"""The confirmation: the winners against the defaults under fresh seeds, before the final model is
measured.

Of the runs of hyperparameter optimisation that improve on validation data, one in ten ends worse
than the default (arXiv 2506.19540): the best of many trials owes part of its lead to luck. So the
defaults stay unless something beats them."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any

from torch import Tensor

from dact.calibration import SETTINGS
from dact.calibration.answers import (
    LayerAnswers,
    careful_mean_and_error,
    exits_by_setting,
    layer_answers,
    mean_and_error,
)
from dact.files import read_json, read_tensors, write_json, write_tensors
from dact.model import DACT
from dact.tuning import tensorboard
from dact.tuning.checkpointed_fit import FRESH_SEED, CheckpointedFit
from dact.tuning.digests import digest
from dact.tuning.fitting import NonFiniteLoss
from dact.tuning.outcome import Outcome, mean_outcome, outcome_at, outcome_of
from dact.tuning.prepared import Prepared
from dact.tuning.progress import Progress
from dact.tuning.run import Run
from dact.tuning.stages import flat
from dact.tuning.trial import fit_settings

FOLDER = "confirmation"
FIRST_TRIAL = "first trial"  # the candidate with the recommended settings
SEEDS = 3  # fits of each candidate on frozen states
# rms difference of the mean exit layer between fits of the same settings (three pairs on 2,000
# texts)
SCATTER = 0.15
SAME_LOSS = (
    0.005  # of a candidate outside the promise: largest loss of accuracy that may count as none
)


@dataclass(frozen=True)
class Candidate:
    """Settings that the final model may have.

    Args:
        name: ``"default settings"``, ``"first trial"``, ``"tuned"`` or ``"runner-up"``, which has
            another λ.
        settings: See `Winners.settings`.
    """

    name: str
    settings: dict[str, Any]

    def folder(self, run: Run) -> Path:
        """Return its folder in the confirmation."""
        return run.folder / FOLDER / self.name.replace(" ", "_")

    def fit(self, run: Run, prepared: Prepared) -> CheckpointedFit:
        """Return its fit, done as the final fit is."""
        return CheckpointedFit(prepared, self.folder(run) / "fit", self.settings)


@dataclass(frozen=True)
class Verdict:
    """The result of the confirmation.

    Args:
        chosen: Candidate that the final model gets.
        text: Text that says which candidate won, and by how much.
    """

    chosen: Candidate
    text: str


def confirm(
    run: Run, prepared: Prepared, candidates: Sequence[Candidate], progress: Progress
) -> Verdict:
    """Fit the candidates under fresh seeds, and choose the first unless another one beats it.

    A candidate beats another if it takes fewer layers at the same loss of accuracy, or loses less
    at the same layers, by more than one standard error of the paired difference over the validation
    examples. Of one that takes more layers, where the promise lets examples leave, the dial is
    turned until it takes no more than the other: each would gain accuracy by taking more. The error
    of the accuracy is that with two more examples, see `careful_mean_and_error`, and that of the
    layers has the scatter between fits as well. A loss that is larger by no more than its error is
    the same loss; but if it is more than the promise allows, measured from the baseline, only up to
    half a point. One that loses more than is allowed, and that much more than another, both by two
    standard errors, is beaten by it whatever the layers. The winner has beaten the first candidate,
    and the best before it.

    Candidates are fitted like the final model, which reuses the fit of the winner. Frozen mode fits
    only two of them in this way: the first, and that of the others which wins on the frozen states;
    where the first stays, also the first trial, if that has other settings. If the final model
    keeps the frozen encoder, only these states decide. Fits of an earlier call are not repeated.

    Args:
        run: The run.
        prepared: Shared inputs of its fits.
        candidates: Candidates, beginning with the defaults.
        progress: Console of the run.
    """
    unique: dict[str, Candidate] = {}
    for candidate in candidates:
        unique.setdefault(digest(candidate.settings), candidate)
    default, *others = unique.values()
    if not others:
        return Verdict(default, f"{default.name}, which tuning chose as well")
    promise = prepared.recipe.promise
    allowed = None if promise is None else promise.max_accuracy_loss
    given = run, prepared, prepared.recipe.make_model(), progress
    on_states = partial(_on_states, *given)
    keep_frozen = prepared.recipe.final_training == "frozen"
    as_final = on_states if keep_frozen else partial(_as_final, *given)
    comparisons: list[str] = []
    recommended: list[Candidate] = []
    if not keep_frozen and prepared.states is not None and len(others) > 1:
        winner = _best(others, on_states, allowed, comparisons, " on frozen states")
        recommended = [
            other for other in others if other.name == FIRST_TRIAL and other is not winner
        ]
        others = [winner]
    best = _best([default, *others], as_final, allowed, comparisons)
    if (
        best is default and recommended
    ):  # what wins on frozen states may be too greedy once the encoder learns
        best = _best([default, *recommended], as_final, allowed, comparisons)
    return Verdict(best, f"{best.name} ({'; '.join(comparisons)})")


@dataclass(frozen=True)
class Answered:
    """A candidate's early exit on the validation examples.

    Args:
        prepared: Shared inputs of its fits.
        model: A model of the run, for its halting rule and class weights.
        answers: Answers of each of its fits.
    """

    prepared: Prepared
    model: DACT
    answers: Sequence[LayerAnswers]

    @cached_property
    def right(self) -> Tensor | None:
        """Whether the baseline classifies each example correctly; None if that is unknown."""
        return self.prepared.baseline.right(self.answers[0].target)

    @cached_property
    def outcome(self) -> Outcome:
        """The mean outcome where the promise lets examples leave."""
        promise = self.prepared.recipe.promise
        return mean_outcome(
            [outcome_of(one, self.model, promise, self.right) for one in self.answers]
        )

    def turned_down(self, layers: float) -> Outcome | None:
        """Return the mean outcome with the dial turned until `layers` are enough; None if there is
        no such setting."""
        promise, rule, outcomes = self.prepared.recipe.promise, self.model.exit_rule, []
        if promise is None:
            return None
        for one in self.answers:
            exits = exits_by_setting(one, rule, promise.dial)
            enough = (
                value for value in SETTINGS[promise.dial] if exits(value).double().mean() <= layers
            )
            if (setting := next(enough, None)) is None:
                return None
            dial: dict[str, Any] = {promise.dial.removeprefix("halting_"): setting}
            outcomes.append(outcome_at(replace(rule, **dial), one, self.model, self.right))
        return mean_outcome(outcomes)


Measure = Callable[[Candidate], Answered | None]  # None where the loss is not finite


def _best(
    candidates: Sequence[Candidate],
    measure: Measure,
    allowed: float | None,
    comparisons: list[str],
    where: str = "",
) -> Candidate:
    """Compare candidates in their order, append the comparisons as text, and return the last
    winner.

    A candidate wins if it beats the best before it and the first, since losses that are within the
    error add up."""
    first, *others = candidates
    best, found = first, {first.name: measure(first)}
    for candidate in others:
        found[candidate.name] = measure(candidate)
        for rival in (best,) if best is first else (best, first):
            wins, text = _compare(found[candidate.name], found[rival.name], allowed)
            comparisons.append(
                f"{candidate.name} {'beats' if wins else 'does not beat'} {rival.name}{where}{text}"
            )
            if not wins:
                break
        else:
            best = candidate
    return best


def _compare(
    challenger: Answered | None, rival: Answered | None, allowed: float | None
) -> tuple[bool, str]:
    """Return whether one candidate beats another, and a text about the difference.

    Args:
        challenger, rival: Their answers; None where the loss is not finite.
        allowed: Loss of accuracy that the promise allows.
    """
    if challenger is None or rival is None:
        return challenger is not None, ""
    other, found = challenger.outcome, rival.outcome
    within = other.lost.double().mean().item() <= (allowed or 0.0)
    lost = careful_mean_and_error(other.lost - found.lost)
    fewer, error = mean_and_error(other.exits - found.exits)
    layers = fewer, math.hypot(error, SCATTER)
    own, spread = careful_mean_and_error(found.lost)
    # As one that answers with one class after the first layer: nothing takes fewer layers.
    beaten = allowed is not None and min(own - 2 * spread, -lost[0] - 2 * lost[1]) > allowed
    text = f": {layers[0]:+.2f} ± {layers[1]:.2f} layers, {0 - 100 * lost[0]:+.2f} ± {100 * lost[1]:.2f} points"
    turned = challenger.turned_down(found.layers) if other.layers > found.layers else None
    if turned is not None:
        less, spread = careful_mean_and_error(turned.lost - found.lost)
        text += f", {0 - 100 * less:+.2f} ± {100 * spread:.2f} at as many layers"
        beaten = beaten or less + spread < 0
    return beaten or _beats(layers, lost, within), text


def _beats(layers: tuple[float, float], lost: tuple[float, float], within: bool) -> bool:
    """Return whether the second of two candidates beats the first.

    Args:
        layers: Mean and standard error, with the scatter between fits, of the paired difference in
            layers, second minus first.
        lost: The same of the loss of accuracy.
        within: Whether the second loses no more than is allowed.
    """
    fewer = sum(layers) < 0 and lost[0] <= (lost[1] if within else min(lost[1], SAME_LOSS))
    return fewer or (sum(lost) < 0 and layers[0] <= layers[1])


def _as_final(
    run: Run, prepared: Prepared, model: DACT, progress: Progress, candidate: Candidate
) -> Answered | None:
    """Return the answers of a candidate that is fitted like the final model."""
    fit = candidate.fit(run, prepared)
    path, origin = candidate.folder(run) / "answers.safetensors", digest(fit.identity)
    known = path.is_file() and read_tensors(path)[1].get("origin") == origin
    stored = read_tensors(path)[0] if known else _fit_and_ask(fit, candidate, progress)
    found = None
    if stored:
        found = Answered(prepared, model, [LayerAnswers(**stored)])
        if not known:
            _log(run, candidate, found, candidate.folder(run))
    if not known:
        write_tensors(
            path, stored, {"origin": origin}
        )  # kept, since the final model may take over the fit itself
    return found


def _fit_and_ask(
    fit: CheckpointedFit, candidate: Candidate, progress: Progress
) -> dict[str, Tensor]:
    """Fit a candidate, and return all its layers' answers to the validation examples; empty if the
    fit broke."""
    try:
        fit(f"confirmation of the {candidate.name}", progress)
    except NonFiniteLoss as error:
        progress.note(str(error))
        return {}
    recipe = fit.prepared.recipe
    data = recipe.data_for("fit")
    with recipe.precision():
        return _tensors(layer_answers(fit.model(), data.val_dataloader()))


def _tensors(answers: LayerAnswers) -> dict[str, Tensor]:
    return {name: tensor for name, tensor in vars(answers).items() if tensor is not None}


def _on_states(
    run: Run, prepared: Prepared, model: DACT, progress: Progress, candidate: Candidate
) -> Answered | None:
    """Return the answers of several fits of a candidate on the states of frozen mode."""
    seeds = [prepared.recipe.seed + FRESH_SEED + number for number in range(SEEDS)]
    folder = candidate.folder(run) / "on_states"
    origin = digest([candidate.settings, prepared.identity, seeds])
    record, files = (
        folder / "made_of.json",
        [folder / f"answers_{seed}.safetensors" for seed in seeds],
    )
    if record.is_file() and (stored := read_json(record))["origin"] == origin:
        found = (
            [] if stored["broken"] else [LayerAnswers(**read_tensors(file)[0]) for file in files]
        )
        return Answered(prepared, model, found) if found else None
    try:
        with progress.stage(f"{candidate.name} on frozen states, under fresh seeds"):
            found = [
                fit_settings(prepared, candidate.settings, seed).known_answers for seed in seeds
            ]
    except NonFiniteLoss:
        write_json(record, {"origin": origin, "broken": True})
        return None
    for file, answers in zip(files, found, strict=True):
        write_tensors(file, _tensors(answers))
    answered = Answered(prepared, model, found)
    _log(run, candidate, answered, folder)
    # Last, since it marks the fits as done.
    write_json(record, {"origin": origin, "broken": False, "settings": candidate.settings})
    return answered


def _log(run: Run, candidate: Candidate, answered: Answered, folder: Path) -> None:
    """Log the candidate to TensorBoard as trials are logged."""
    name = f"{run.tag}/{folder.relative_to(run.folder)}"
    tensorboard.log_fit(
        folder, flat(candidate.settings), answered.outcome.metrics(answered.right), name
    )
