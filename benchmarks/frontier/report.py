"""Tables from the records: accuracy at each budget, and paired differences over the texts of all divisions."""

from __future__ import annotations

import math
import statistics
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib import colormaps
from matplotlib.figure import Figure

from .records import ALL, read_all

Key = tuple[str, int]  # a setting (data set and division) and a seed
Records = dict[str, dict[Key, dict[str, Any]]]  # by method


@dataclass(frozen=True)
class Entrant:
    """What takes part: one or more trainings under one rule each, of which validation chooses for each budget.

    Args:
        name: For the table.
        choices: Method and rule, such as ``("dact-4", "margin")``.
    """

    name: str
    choices: tuple[tuple[str, str], ...]

    def keys(self, records: Records) -> set[Key]:
        """Where all of its trainings were run."""
        return set.intersection(*(set(records.get(method, {})) for method, _ in self.choices))

    def point(self, records: Records, key: Key, budget: float) -> dict[str, Any] | None:
        """Its point at a budget, by the highest accuracy on validation texts; None if it always takes more layers."""
        points = [point_of(records[method][key], rule, budget) for method, rule in self.choices]
        return max((p for p in points if p is not None), key=lambda p: p["val"]["accuracy"], default=None)


def point_of(record: dict[str, Any], rule: str, budget: float) -> dict[str, Any] | None:
    points = record["rules"][rule]
    if rule == ALL:
        ((layers, everything),) = points.items()
        return everything if float(layers) <= budget else None
    point: dict[str, Any] | None = points.get(f"{budget:.1f}")
    return point


def one(method: str, rule: str, name: str | None = None) -> Entrant:
    return Entrant(name or f"{method}, {rule}", ((method, rule),))


def load() -> Records:
    records: Records = defaultdict(dict)
    for record in read_all():
        records[record["method"]][record["setting"], record["seed"]] = record
    return dict(records)


@dataclass(frozen=True)
class Difference:
    """A paired difference of test accuracy, in points.

    Args:
        gain: Mean over the test texts of all divisions, each the mean over its seeds.
        text_error: Standard error from the texts alone.
        training_error: Standard error from the scatter between divisions, each weighed by its texts.
        val_gain: The same on validation texts, mean over the trainings.
        layers: Mean layers of the two sides.
        divisions: Number of data sets times divisions.
        trainings: Number of pairs of trainings.
        by_data: The gain on each data set.
    """

    gain: float
    text_error: float
    training_error: float
    val_gain: float
    layers: tuple[float, float]
    divisions: int
    trainings: int
    by_data: dict[str, float]

    def __str__(self) -> str:
        errors = [error for error in (self.text_error, self.training_error) if not math.isnan(error)]
        return f"{self.gain:+.2f} ± {max(errors):.2f} ({self.val_gain:+.2f})"


def difference(
    records: Records, left: Entrant, right: Entrant, budget: float, right_budget: float | None = None
) -> Difference | None:
    """How far `left` is above `right` at a budget, wherever both were trained."""
    by_setting: dict[str, list[Any]] = defaultdict(list)
    layers: list[tuple[float, float]] = []
    val_gains: list[float] = []
    for key in sorted(left.keys(records) & right.keys(records)):
        mine, theirs = left.point(records, key, budget), right.point(records, key, right_budget or budget)
        if not (mine and theirs and "correct" in mine and "correct" in theirs):
            continue
        by_setting[key[0]].append(mine["correct"].astype(float) - theirs["correct"].astype(float))
        val_gains.append(mine["val"]["accuracy"] - theirs["val"]["accuracy"])
        layers.append((mine["test"]["layers"], theirs["test"]["layers"]))
    if not by_setting:
        return None
    gains = {setting: 100 * np.mean(found, axis=0) for setting, found in by_setting.items()}
    pooled = np.concatenate(list(gains.values()))
    mean, count = float(pooled.mean()), len(gains)
    spread = sum((len(gain) * (gain.mean() - mean)) ** 2 for gain in gains.values())
    data: dict[str, list[Any]] = defaultdict(list)
    for setting, gain in gains.items():
        data[setting.rsplit(".", 1)[0]].append(gain)
    return Difference(
        gain=mean,
        text_error=float(pooled.std(ddof=1)) / math.sqrt(len(pooled)),
        training_error=math.sqrt(spread * count / (count - 1)) / len(pooled) if count > 1 else math.nan,
        val_gain=statistics.mean(val_gains),
        layers=(statistics.mean(mine for mine, _ in layers), statistics.mean(theirs for _, theirs in layers)),
        divisions=count,
        trainings=len(layers),
        by_data={name: float(np.concatenate(found).mean()) for name, found in data.items()},
    )


def accuracy_table(records: Records, data: str, entrants: Sequence[Entrant], budgets: Iterable[float]) -> list[str]:
    """Test accuracy at mean layers, mean over the divisions and seeds of one data set."""
    budgets = list(budgets)
    lines = ["| | " + " | ".join(f"{budget:g}" for budget in budgets) + " |", "|---|" + "---|" * len(budgets)]
    for entrant in entrants:
        keys = [key for key in entrant.keys(records) if key[0].rsplit(".", 1)[0] == data]
        cells = []
        for budget in budgets:
            points = [p for key in keys if (p := entrant.point(records, key, budget)) is not None]
            if not points:
                cells.append("")
                continue
            accuracy, layers = (statistics.mean(p["test"][what] for p in points) for what in ("accuracy", "layers"))
            cells.append(f"{accuracy:.2f} @{layers:.2f}")
        if any(cells):
            lines.append(f"| {entrant.name} ({len(keys)}) | " + " | ".join(cells) + " |")
    return lines


def difference_table(records: Records, pairs: Iterable[tuple[Entrant, Entrant]], budgets: Iterable[float]) -> list[str]:
    budgets = list(budgets)
    lines = ["| | " + " | ".join(f"{budget:g}" for budget in budgets) + " |", "|---|" + "---|" * len(budgets)]
    for left, right in pairs:
        if left == right:
            continue
        found = [difference(records, left, right, budget) for budget in budgets]
        if any(found):
            count = max((d.divisions, d.trainings) for d in found if d)
            cells = " | ".join("" if d is None else str(d) for d in found)
            lines.append(f"| {left.name} ({count[0]} divisions) | {cells} |")
    return lines


def rule_table(records: Records, kind: str, budgets: Iterable[float]) -> list[str]:
    """What each rule gains over the plain one, which comes first: mean over all trainings of a kind.

    A cell has the gain on test texts ± its standard error over the trainings and, in brackets, that on validation texts,
    where each half is measured with what was fitted to the other.
    """
    budgets = list(budgets)
    found = [record for name, by_key in records.items() if name.startswith(f"{kind}-") for record in by_key.values()]
    if not found:
        return []
    plain, *others = dict.fromkeys(rule for record in found for rule in record["rules"] if rule != ALL)
    lines = [
        f"| {len(found)} trainings, less `{plain}` | " + " | ".join(f"{budget:g}" for budget in budgets) + " |",
        "|---|" + "---|" * len(budgets),
    ]
    for rule in others:
        having = [record for record in found if rule in record["rules"]]  # a rule may be younger than a record
        cells = []
        for budget in budgets:
            gains = {
                split: [
                    r["rules"][rule][f"{budget:.1f}"][split]["accuracy"]
                    - r["rules"][plain][f"{budget:.1f}"][split]["accuracy"]
                    for r in having
                ]
                for split in ("val", "test")
            }
            error = statistics.stdev(gains["test"]) / math.sqrt(len(having)) if len(having) > 1 else math.nan
            cells.append(f"{statistics.mean(gains['test']):+.2f} ± {error:.2f} ({statistics.mean(gains['val']):+.2f})")
        count = "" if len(having) == len(found) else f" ({len(having)} trainings)"
        lines.append(f"| {rule}{count} | " + " | ".join(cells) + " |")
    return lines


def oracle_table(records: Records, data: str) -> list[str]:
    """What the layers of each method could do, mean over its trainings; see `rules.oracle`."""
    lines = [
        "| | right at some layer, % | first such layer | all layers, % | first layer with that class | by layer, % |",
        "|---|---|---|---|---|---|",
    ]
    for method, by_key in sorted(records.items()):
        found = [r for key, r in by_key.items() if key[0].rsplit(".", 1)[0] == data and "oracle" in r]
        if not found:
            continue
        known = {name: statistics.mean(r["oracle"][name] for r in found) for name in found[0]["oracle"]}
        depths = [100 * statistics.mean(values) for values in zip(*(r["by layer"] for r in found), strict=True)]
        lines.append(
            f"| {method} ({len(found)}) | {known['accuracy']:.1f} | {known['layers']:.2f} | {depths[-1]:.2f} "
            f"| {known['layers for the class of all']:.2f} | {' / '.join(f'{depth:.1f}' for depth in depths)} |"
        )
    return lines


def draw(records: Records, entrants: Sequence[Entrant], budgets: Sequence[float], path: Path) -> None:
    """Accuracy against layers, one panel for each data set."""
    names = data_sets(records)
    figure = Figure(figsize=(5 * len(names) + 3, 4.5), layout="constrained")
    for axes, data in zip(figure.subplots(1, len(names), squeeze=False)[0], names, strict=True):
        for number, entrant in enumerate(entrants):  # one colour in all panels
            keys = [key for key in entrant.keys(records) if key[0].rsplit(".", 1)[0] == data]
            points = []
            for budget in budgets:
                found = [p["test"] for key in keys if (p := entrant.point(records, key, budget)) is not None]
                if found:
                    points.append([statistics.mean(p[what] for p in found) for what in ("layers", "accuracy")])
            if points:
                marker = "s:" if len(points) == 1 else "o-" if entrant.name.startswith("dact") else "o--"
                axes.plot(*zip(*points, strict=True), marker, label=entrant.name, color=colormaps["tab20"](number % 20))
        axes.set(title=data, xlabel="mean layers", ylabel="test accuracy, %")
    labelled = {
        name: line for axes in figure.axes for line, name in zip(*axes.get_legend_handles_labels(), strict=True)
    }
    figure.legend(labelled.values(), labelled.keys(), loc="outside right upper", fontsize=8)
    figure.savefig(path, dpi=100)


def data_sets(records: Records) -> list[str]:
    return sorted({key[0].rsplit(".", 1)[0] for found in records.values() for key in found})
