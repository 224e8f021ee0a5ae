"""The re-fit under new seeds: the tuned settings against the recommended ones.

The tuned settings replace the recommended ones if they take fewer layers by more than a standard
error (at least 0.15) and lose at most half a point within its error, or gain accuracy by more than
a standard error at no more layers. Otherwise the recommended ones stay.

Part of the advantage of the best of many trials is luck: one in ten searches that improve on
validation data ends worse than the settings it started from (arXiv 2506.19540).
"""

from __future__ import annotations

from typing import Any

from dact.calibration.answers import careful_mean_and_error, layer_answers, mean_and_error
from dact.tuning.fit import CheckpointedFit
from dact.tuning.outcome import Outcome, outcome_of
from dact.tuning.prepared import Prepared
from dact.tuning.progress import Progress
from dact.tuning.settings import Settings
from dact.tuning.trainer import MONITOR, NonFiniteLoss

# rms difference in mean exit layer between fits of the same settings (three pairs, 2,000 texts)
SCATTER = 0.15
MOST_LOST = 0.005  # share of the texts


def confirm(prepared: Prepared, tuned: Settings, progress: Progress) -> dict[str, Any]:
    """Choose between the recommended and the tuned settings, by fitting both like the final model.

    The final fit reuses the fit of the winner. Nothing is fitted if no study ran or both settings
    are equal.

    Returns:
        The ``name`` of the chosen settings, the ``settings`` as plain data, and a ``text`` with the
        reason.
    """
    recommended = prepared.plan.recommended
    candidates = {"recommended": recommended, "tuned": recommended.updated(tuned)}
    first, second = ({**prepared.plan.parameters, **one.flat()} for one in candidates.values())
    if tuned == Settings():
        name, why = "recommended", "no study ran"
    elif first == second:
        name, why = "recommended", "the studies chose the same ones"
    else:
        try:
            fits = [_refit(prepared, one, both, progress) for one, both in candidates.items()]
            name, why = _choose(*fits)
        except NonFiniteLoss as error:
            name, why = "recommended", str(error)
    chosen = candidates[name].arguments()
    return {"name": name, "settings": chosen, "text": f"{name} settings ({why})"}


def _refit(prepared: Prepared, name: str, settings: Settings, progress: Progress) -> Outcome:
    """Fit settings, and return their outcome on validation examples under the promise."""
    folder, recipe = prepared.run.folder / "refit" / name, prepared.recipe
    fit = CheckpointedFit(prepared, folder / "fit", settings)
    fit(f"{name} settings under a new seed", progress)
    model, data = fit.model(), recipe.data_for("fit")
    with recipe.precision():
        answers = layer_answers(model, data.val_dataloader())
    right = prepared.right(answers.target)
    outcome = outcome_of(answers, model, recipe.promise, right)
    prepared.log(folder, settings, {MONITOR: fit.val_loss, **outcome.metrics(right)})
    return outcome


def _choose(recommended: Outcome, tuned: Outcome) -> tuple[str, str]:
    """Return the name of the winner, and the measured differences as text."""
    layers, layers_error = mean_and_error(tuned.exits - recommended.exits)
    gain, gain_error = careful_mean_and_error(recommended.lost - tuned.lost)
    layers_error = max(layers_error, SCATTER)
    saves_layers = layers < -layers_error and gain >= -min(MOST_LOST, gain_error)
    gains_accuracy = gain > gain_error and layers <= layers_error
    winner = "tuned" if saves_layers or gains_accuracy else "recommended"
    text = (
        f"under new seeds the tuned ones differ by {layers:+.2f} ± {layers_error:.2f} layers and "
        f"{100 * gain:+.2f} ± {100 * gain_error:.2f} points; more accuracy counts only without "
        "more layers"
    )
    return winner, text
