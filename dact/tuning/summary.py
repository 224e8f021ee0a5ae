"""The last screen of a tuning run: the results of the final model, comparisons, and where
everything is."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from optuna.study import Study
from optuna.trial import FrozenTrial, TrialState
from rich.console import Console
from rich.table import Table

from dact.files import read_json
from dact.model_card import what_is_promised
from dact.tuning.search import PLANNED_EPOCHS
from dact.tuning.studies import finished

POINTS = 5  # operating points besides that of the run, at most; a warning takes the place of three


def show_summary(console: Console, folder: Path, verdict: str, studies: Sequence[Study]) -> None:
    """Print the summary, which fits on a screen of 80 × 24.

    Args:
        console: Console to print to.
        folder: Folder of the final fit.
        verdict: Text of the confirmation's verdict.
        studies: Studies of the run that this process has concluded.
    """
    metrics = read_json(folder / "metrics.json")
    unbroken = not console.is_terminal
    console.print(f"{headline(metrics)}.", soft_wrap=unbroken)
    console.print(f"The model is in {folder / 'model'}\n", soft_wrap=True)
    console.print(_comparison(metrics, folder / "defaults" / "metrics.json"))
    console.print()
    warnings = _warnings(metrics)
    console.print(_operating_points(metrics, POINTS - 3 * len(warnings)))
    for warning in warnings:
        console.print(f"warning: {warning}", soft_wrap=unbroken)
    console.print(f"settings: {_decisive(verdict)}", soft_wrap=unbroken)
    pruned = pruning_text(studies)
    if pruned:
        console.print(pruned)
    console.print(f"trials and pictures: tensorboard --logdir {folder.parent}", soft_wrap=True)


def _decisive(verdict: str) -> str:
    """Return a verdict with the comparisons of fits like the final one that decided; metrics.json
    has all of them."""
    name, bracket, rest = verdict.partition(" (")
    comparisons = [
        one for one in rest.removesuffix(")").split("; ") if " on frozen states" not in one
    ]
    won = [one for one in comparisons if one.startswith(f"{name} beats ")]
    return f"{name} ({'; '.join((won or comparisons)[-2:])})" if bracket else verdict


def _warnings(metrics: Mapping[str, Any]) -> list[str]:
    """Return what is wrong with the final model and what to do."""
    entry, layers, found = metrics["validation"], metrics["layers"], []
    if entry["majority_share"] == 1.0:
        found.append(
            "all validation examples get one class: try class_weights, more epochs, or another learning_rate"
        )
    calibration = metrics.get("calibration")
    if (
        1 < layers == entry["mean_exit_layer"]
        and calibration is not None
        and metrics["halting_margin"] == 1
    ):
        found.append(
            f"every validation example uses all {layers} layers: no margin passed on the {calibration['examples']} "
            "examples that it was set on. Give more validation examples, or a promise that allows more"
        )
    elif layers > 1 and (other := _collapse(entry["mean_exit_layer"], layers)):
        found.append(f"the depth has collapsed: every validation example uses {other}")
    return found


def _collapse(mean: float, layers: int) -> str:
    """Return how the depth has collapsed and what to do, an empty string if it has not."""
    if mean == 1:
        return "one layer. If that costs accuracy, try a smaller lambda_reg"
    return (
        f"all {layers} layers. Try a larger lambda_reg, or a promise that allows more"
        if mean == layers
        else ""
    )


def headline(metrics: Mapping[str, Any]) -> str:
    """Return the main result in one sentence, from the content of metrics.json."""
    test, baseline = metrics["test"], metrics["baseline"]
    text = f"{100 * test['accuracy']:.2f} % accuracy on test"
    if "difference_to_baseline" in test:
        text += f", {_difference(test)} points against the baseline of {baseline['layers']} layers"
    speed = test["texts_per_second"] / baseline["test"]["texts_per_second"]
    text += f", at {test['mean_exit_layer']:.2f} layers and {speed:.1f} times its speed"
    calibration, tolerance, margin = (
        metrics.get("calibration"),
        metrics["halting_tolerance"],
        metrics["halting_margin"],
    )
    if tolerance == 0 and margin == 1:
        return f"{text}, with the class of its own full depth by proof"
    if calibration is None:
        return f"{text}, at tolerance {tolerance:g} and margin {margin:g}, without a promise"
    promise = calibration["promise"]
    kept = what_is_promised(promise, "its own full depth", metrics["layers"])
    if promise["confidence"] is None:
        return f"{text}, by the estimate of {kept}"
    return f"{text}, under the promise of {kept} with {promise['confidence']:.0%} confidence"


def _difference(entry: Mapping[str, Any]) -> str:
    difference = entry.get("difference_to_baseline")
    if difference is None:
        return ""
    return f"{100 * difference['accuracy']:+.2f} ± {100 * difference['standard_error']:.2f}"


def _comparison(metrics: Mapping[str, Any], defaults: Path) -> Table:
    """Return the table of the final model next to the baseline and the defaults, on the test
    split."""
    test, layers, baseline = metrics["test"], metrics["layers"], metrics["baseline"]
    table = _plain_table("test", "accuracy", "to baseline", "macro F1", "layers", "texts/s")
    rows = {
        "baseline": (baseline["test"], float(baseline["layers"])),
        "full depth": (test["full_depth"], float(layers)),
        "early exit": (test, test["mean_exit_layer"]),
    }
    if defaults.is_file():
        entry = read_json(defaults)["test"]
        rows["untuned"] = (entry, entry["mean_exit_layer"])
    for name, (entry, mean) in rows.items():
        speed = f"{entry['texts_per_second']:,.0f}" if "texts_per_second" in entry else ""
        accuracy, macro_f1 = f"{100 * entry['accuracy']:.2f} %", f"{entry['macro_f1']:.3f}"
        table.add_row(name, accuracy, _difference(entry), macro_f1, f"{mean:.2f}", speed)
    return table


def _operating_points(metrics: Mapping[str, Any], most: int) -> Table:
    """Return the table of what up to `most` other margins would give on validation data, next to
    the run's setting."""
    entry = metrics["validation"]
    own = {**entry, "margin": metrics["halting_margin"]}
    calibration = metrics.get("calibration")
    by_estimate = calibration is not None and calibration["promise"]["confidence"] is None
    mark = "as set" if calibration is None else "set by an estimate" if by_estimate else "promised"
    if own["margin"] == 1 and metrics["halting_tolerance"] == 0:
        mark = "by proof"
    table = _plain_table(
        "margin", "accuracy", "to baseline", "layers", "texts/s", "estimates: validation"
    )
    points = _spread(metrics["margin_curve"], most) if most > 0 else []
    points = sorted(
        [own, *(point for point in points if point["margin"] != own["margin"])],
        key=lambda p: -p["margin"],
    )
    for point in points:
        numbers = f"{100 * point['accuracy']:.2f} %", _difference(point)
        layers = point["mean_exit_layer"]
        speed = f"{_speed(entry, layers, metrics['layers']):,.0f}"
        table.add_row(
            f"{point['margin']:.4g}", *numbers, f"{layers:.2f}", speed, mark if point is own else ""
        )
    return table


def _spread(points: Sequence[Mapping[str, Any]], most: int) -> list[Mapping[str, Any]]:
    """Return about `most` points of a curve that differ in their layers."""
    depths = [point["mean_exit_layer"] for point in points]
    chosen: list[Mapping[str, Any]] = []
    for point in points:
        apart = max(0.05, (max(depths) - min(depths)) / most)
        if not chosen or chosen[-1]["mean_exit_layer"] - point["mean_exit_layer"] >= apart:
            chosen.append(point)
    return chosen


def _speed(entry: Mapping[str, Any], layers: float, num_layers: int) -> float:
    """Return texts per second at a mean exit layer, on the line through the times of early exit and
    full depth.

    No layer takes less than no time, or more than its share: two times that are close say little
    about the slope."""
    early, full = 1 / entry["texts_per_second"], 1 / entry["full_depth"]["texts_per_second"]
    own = entry["mean_exit_layer"]
    slope = (full - early) / (num_layers - own) if num_layers - own >= 1 else early / own
    return 1 / (early + min(max(slope, 0.0), early / own) * (layers - own))


def _plain_table(first: str, *others: str) -> Table:
    table = Table(first, box=None, pad_edge=False, padding=(0, 2, 0, 0))
    for head in others:
        table.add_column(head, justify="left" if ":" in head else "right")
    return table


def pruning_text(studies: Sequence[Study]) -> str:
    """Return a text about what pruning saved, or an empty string if no study prunes.

    The full time of a pruned trial is estimated from its pace and its planned number of epochs.
    """
    ended = [trial for study in studies if len(study.directions) == 1 for trial in finished(study)]
    if not ended:
        return ""
    complete = [trial for trial in ended if trial.state == TrialState.COMPLETE]
    pruned = [
        trial for trial in ended if trial.state == TrialState.PRUNED and trial.intermediate_values
    ]
    # Validations per planned epoch: frozen mode has several.
    rate = max(
        (
            len(trial.intermediate_values) / trial.user_attrs.get(PLANNED_EPOCHS, 1)
            for trial in complete
        ),
        default=0,
    )
    saved = 0.0
    for trial in pruned:
        planned = rate * trial.user_attrs.get(PLANNED_EPOCHS, 1)
        saved += _seconds(trial) * max(0.0, planned / len(trial.intermediate_values) - 1)
    if not saved:
        return f"pruning ended none of {len(ended)} trials early"
    share = saved / (saved + sum(map(_seconds, ended)))
    return f"pruning ended {len(pruned)} of {len(ended)} trials early and saved {share:.0%} of the time of all of them"


def _seconds(trial: FrozenTrial) -> float:
    return 0.0 if trial.duration is None else trial.duration.total_seconds()
