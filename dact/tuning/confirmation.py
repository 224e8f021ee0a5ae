"""The confirmation: the winners against the defaults under fresh seeds, before the final fit.

Of the runs of hyperparameter optimisation that improve on validation data, one in ten ends worse than the default
(arXiv 2506.19540): the best of many trials owes part of its lead to luck. So the defaults stay unless they are beaten.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from dact.answers import mean_and_error
from dact.files import read_json, write_json
from dact.tuning import tensorboard
from dact.tuning.fingerprints import digest
from dact.tuning.fitting import History, NonFiniteLoss, seeded
from dact.tuning.outcome import Outcome, mean_outcome, outcome_of
from dact.tuning.prepared import Prepared
from dact.tuning.progress import Progress
from dact.tuning.run import Run
from dact.tuning.trial import fit_settings

FOLDER = "confirmation"
SEEDS = {"frozen": 3, "finetune": 1}  # fits of each candidate
FIRST_SEED = 1000  # far from those of the studies


@dataclass(frozen=True)
class Candidate:
    """Settings that the final fit may take.

    Args:
        name: ``"default settings"``, ``"first trial"`` or ``"tuned"``.
        settings: See `Winners.settings`.
    """

    name: str
    settings: dict[str, Any]


@dataclass(frozen=True)
class Verdict:
    """What the confirmation found.

    Args:
        chosen: The candidate that the final fit takes.
        text: One sentence that says which won, and by how much.
    """

    chosen: Candidate
    text: str


def confirm(run: Run, shared: Prepared, candidates: Sequence[Candidate], progress: Progress) -> Verdict:
    """Fit each candidate under fresh seeds, and let the first stay unless another one beats it.

    A candidate beats another if it takes fewer layers at the same loss of accuracy, or loses less at the same layers,
    by more than one standard error of the paired difference over the validation examples. Fits that an earlier call did
    are read from disk.

    Args:
        run: The run.
        shared: What its fits share.
        candidates: Candidates; the first are the defaults.
        progress: What the console shows.
    """
    unique = list({digest(candidate.settings): candidate for candidate in reversed(candidates)}.values())[::-1]
    best, found, text = unique[0], _outcome(run, shared, unique[0], progress), ""
    if len(unique) == 1:
        return Verdict(best, "tuning chose the default settings")
    for candidate in unique[1:]:
        other = _outcome(run, shared, candidate, progress)
        difference = _compare(found, other)
        wins = other is not None and (found is None or difference.beats)
        text = f"{text}{'; ' if text else ''}{candidate.name} {'beats' if wins else 'does not beat'} {best.name}"
        text += f" ({difference})" if found is not None and other is not None else ""
        if wins:
            best, found = candidate, other
    what = "default settings are those of the model and the data without tuning, first trial those that paid elsewhere"
    return Verdict(best, f"confirmation under fresh seeds: {text} ({what})")


@dataclass(frozen=True)
class _Difference:
    """Paired differences, second less first: mean and standard error of layers and of the loss of accuracy."""

    layers: tuple[float, float]
    lost: tuple[float, float]

    @property
    def beats(self) -> bool:
        (layers, layers_error), (lost, lost_error) = self.layers, self.lost
        fewer = layers + layers_error < 0 and lost <= lost_error
        return fewer or (lost + lost_error < 0 and layers <= layers_error)

    def __str__(self) -> str:
        return (
            f"{self.layers[0]:+.2f} ± {self.layers[1]:.2f} layers, {-100 * self.lost[0]:+.2f} ± "
            f"{100 * self.lost[1]:.2f} points of accuracy"
        )


def _compare(first: Outcome | None, second: Outcome | None) -> _Difference:
    if first is None or second is None:
        return _Difference((0.0, 0.0), (0.0, 0.0))
    return _Difference(mean_and_error(second.exits - first.exits), mean_and_error(second.lost - first.lost))


def _outcome(run: Run, shared: Prepared, candidate: Candidate, progress: Progress) -> Outcome | None:
    """Return the mean outcome of a candidate's fits; None if its loss is not finite."""
    recipe = shared.recipe
    seeds = range(FIRST_SEED + recipe.seed, FIRST_SEED + recipe.seed + SEEDS[recipe.encoder_training])
    folder = run.folder / FOLDER / candidate.name.replace(" ", "_")
    origin = digest([candidate.settings, shared.identity, list(seeds)])
    record = folder / "outcome.json"
    if record.is_file() and read_json(record)["origin"] == origin:
        stored = read_json(record)
        return None if stored["broken"] else Outcome.read(folder)
    outcomes = []
    try:
        with progress.stage(f"confirmation of the {candidate.name}"):
            for seed in seeds:
                history = History()
                with seeded(seed):
                    model = fit_settings(shared, candidate.settings, seed, history)
                assert history.answers is not None
                right = shared.baseline.right(history.answers.target)
                outcomes.append(outcome_of(history.answers, model, recipe.promise, right))
    except NonFiniteLoss:
        write_json(record, {"origin": origin, "broken": True})
        return None
    mean = mean_outcome(outcomes)
    mean.save(folder)
    _log(run, candidate, mean)
    write_json(record, {"origin": origin, "broken": False, "settings": candidate.settings})  # last: it is all there
    return mean


def _log(run: Run, candidate: Candidate, mean: Outcome) -> None:
    """Let TensorBoard show the candidate as it shows trials."""
    name = candidate.name.replace(" ", "_")
    with tensorboard.writer(run.folder / FOLDER / name) as writer:
        tensorboard.log_parameters(writer, flat(candidate.settings), f"{FOLDER}/{name}")
        metrics = {"val_task_loss": mean.loss, "val_exit_layer": mean.layers}
        tensorboard.log_outcome(writer, metrics, succeeded=True)


def flat(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Return nested settings under the names of the studies' parameters."""
    flat: dict[str, Any] = {}
    for name, value in settings.items():
        flat |= (
            {f"{name}_{key}": entry for key, entry in value.items()} if isinstance(value, Mapping) else {name: value}
        )
    return flat
