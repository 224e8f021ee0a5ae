"""The confirmation: the winners against the defaults under fresh seeds, before the final model is measured.

Of the runs of hyperparameter optimisation that improve on validation data, one in ten ends worse than the default
(arXiv 2506.19540): the best of many trials owes part of its lead to luck. So the defaults stay unless something beats
them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor

from dact.answers import LayerAnswers, careful_mean_and_error, layer_answers, mean_and_error
from dact.files import read_json, read_tensors, write_json, write_tensors
from dact.tuning import tensorboard
from dact.tuning.checkpointed_fit import FRESH_SEED, CheckpointedFit
from dact.tuning.digests import digest
from dact.tuning.fitting import NonFiniteLoss
from dact.tuning.outcome import MEASURE, Outcome, mean_outcome, outcome_of
from dact.tuning.prepared import Prepared
from dact.tuning.progress import Progress
from dact.tuning.run import Run
from dact.tuning.stages import flat
from dact.tuning.trial import fit_settings

FOLDER = "confirmation"
SEEDS = 3  # fits of each candidate on frozen states
SCATTER = 0.15  # rms difference of the mean exit layer between fits of the same settings (three pairs on 2,000 texts)
SAME_LOSS = 0.005  # of a candidate outside the promise: largest loss of accuracy that may count as none


@dataclass(frozen=True)
class Candidate:
    """Settings that the final model may have.

    Args:
        name: ``"default settings"``, ``"first trial"``, ``"tuned"`` or ``"runner-up"``, which has another λ.
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


def confirm(run: Run, prepared: Prepared, candidates: Sequence[Candidate], progress: Progress) -> Verdict:
    """Fit the candidates under fresh seeds, and choose the first unless another one beats it.

    A candidate beats another if it takes fewer layers at the same loss of accuracy, or loses less at the same layers,
    by more than one standard error of the paired difference over the validation examples. That of the accuracy is that
    with two more examples, see `careful_mean_and_error`, and that of the layers has the scatter between fits as well. A
    loss that is larger by no more than its error is the same loss; but if it is more than the promise allows, measured
    from the baseline, only up to half a point. One that loses more than is allowed, and that much more than another,
    both by two standard errors, is beaten by it whatever the layers. The winner has beaten the first candidate, and the
    best before it.

    Candidates are fitted like the final model, which reuses the fit of the winner. Frozen mode fits only two of them in
    this way: the first, and that of the others which wins on the frozen states. If the final model keeps the frozen
    encoder, only these states decide. Fits of an earlier call are not repeated.

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
    on_states = partial(_on_states, run, prepared, progress)
    keep_frozen = prepared.recipe.final_training == "frozen"
    as_final = on_states if keep_frozen else partial(_as_final, run, prepared, progress)
    comparisons: list[str] = []
    if not keep_frozen and prepared.states is not None and len(others) > 1:
        others = [_best(others, on_states, allowed, comparisons, " on frozen states")]
    best = _best([default, *others], as_final, allowed, comparisons)
    return Verdict(best, f"{best.name} ({'; '.join(comparisons)})")


Measure = Callable[[Candidate], Outcome | None]  # None where the loss is not finite


def _best(
    candidates: Sequence[Candidate], measure: Measure, allowed: float | None, comparisons: list[str], where: str = ""
) -> Candidate:
    """Compare candidates in their order, append the comparisons as text, and return the last winner.

    A candidate wins if it beats the best before it and the first, since losses that are within the error add up.
    """
    first, *others = candidates
    best, found = first, {first.name: measure(first)}
    for candidate in others:
        found[candidate.name] = measure(candidate)
        for rival in (best,) if best is first else (best, first):
            wins, text = _compare(found[candidate.name], found[rival.name], allowed)
            comparisons.append(f"{candidate.name} {'beats' if wins else 'does not beat'} {rival.name}{where}{text}")
            if not wins:
                break
        else:
            best = candidate
    return best


def _compare(other: Outcome | None, found: Outcome | None, allowed: float | None) -> tuple[bool, str]:
    """Return whether the candidate of `other` beats that of `found`, and a text about the difference."""
    if other is None or found is None:
        return other is not None, ""
    within = other.lost.double().mean().item() <= (allowed or 0.0)
    lost = careful_mean_and_error(other.lost - found.lost)
    fewer, error = mean_and_error(other.exits - found.exits)
    layers = fewer, math.hypot(error, SCATTER)
    own, spread = careful_mean_and_error(found.lost)
    # As one that answers with one class after the first layer: nothing takes fewer layers.
    fails = allowed is not None and min(own - 2 * spread, -lost[0] - 2 * lost[1]) > allowed
    text = f": {layers[0]:+.2f} ± {layers[1]:.2f} layers, {0 - 100 * lost[0]:+.2f} ± {100 * lost[1]:.2f} points"
    return fails or _beats(layers, lost, within), text


def _beats(layers: tuple[float, float], lost: tuple[float, float], within: bool) -> bool:
    """Return whether the second of two candidates beats the first.

    Args:
        layers: Mean and standard error, with the scatter between fits, of the paired difference in layers, second
            minus first.
        lost: The same of the loss of accuracy.
        within: Whether the second loses no more than is allowed.
    """
    fewer = sum(layers) < 0 and lost[0] <= (lost[1] if within else min(lost[1], SAME_LOSS))
    return fewer or (sum(lost) < 0 and layers[0] <= layers[1])


def _as_final(run: Run, prepared: Prepared, progress: Progress, candidate: Candidate) -> Outcome | None:
    """Return the outcome of a candidate that is fitted like the final model."""
    fit, recipe = candidate.fit(run, prepared), prepared.recipe
    path, origin = candidate.folder(run) / "answers.safetensors", digest(fit.identity)
    known = path.is_file() and read_tensors(path)[1].get("origin") == origin
    stored = read_tensors(path)[0] if known else _fit_and_ask(fit, candidate, progress)
    found = None
    if stored:
        answers = LayerAnswers(**stored)
        right = prepared.baseline.right(answers.target)
        found = outcome_of(answers, recipe.make_model(), recipe.promise, right)
        if not known:
            _log(run, candidate, found, right, candidate.folder(run))
    if not known:
        write_tensors(path, stored, {"origin": origin})  # kept, since the final model may take over the fit itself
    return found


def _fit_and_ask(fit: CheckpointedFit, candidate: Candidate, progress: Progress) -> dict[str, Tensor]:
    """Fit a candidate, and return all its layers' answers to the validation examples; empty if the fit broke."""
    try:
        fit(f"confirmation of the {candidate.name}", progress)
    except NonFiniteLoss as error:
        progress.note(str(error))
        return {}
    recipe = fit.prepared.recipe
    data = recipe.data_for("fit")
    with recipe.precision():
        answers = layer_answers(fit.model(), data.val_dataloader())
    return {name: tensor for name, tensor in vars(answers).items() if tensor is not None}


def _on_states(run: Run, prepared: Prepared, progress: Progress, candidate: Candidate) -> Outcome | None:
    """Return the mean outcome of a candidate over several fits on the states of frozen mode."""
    recipe = prepared.recipe
    seeds = [recipe.seed + FRESH_SEED + number for number in range(SEEDS)]
    folder = candidate.folder(run)
    origin = digest([candidate.settings, prepared.identity, seeds, MEASURE])
    record = folder / "outcome.json"
    if record.is_file() and read_json(record)["origin"] == origin:
        return None if read_json(record)["broken"] else Outcome.read(folder)
    outcomes = []
    try:
        with progress.stage(f"{candidate.name} on frozen states, under fresh seeds"):
            for seed in seeds:
                fit = fit_settings(prepared, candidate.settings, seed)
                outcomes.append(fit.outcome(prepared))
    except NonFiniteLoss:
        write_json(record, {"origin": origin, "broken": True})
        return None
    mean = mean_outcome(outcomes)
    mean.save(folder)
    _log(run, candidate, mean, fit.right(prepared), folder / "on_states")
    write_json(
        record, {"origin": origin, "broken": False, "settings": candidate.settings}
    )  # last, since it marks the fits as done
    return mean


def _log(run: Run, candidate: Candidate, mean: Outcome, right: Tensor | None, folder: Path) -> None:
    """Log the candidate to TensorBoard as trials are logged; see `outcome_of` for `right`."""
    name = f"{run.tag}/{folder.relative_to(run.folder)}"
    tensorboard.log_fit(folder, flat(candidate.settings), mean.metrics(right), name)
