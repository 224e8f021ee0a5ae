"""Tables from the records: accuracy at each budget, and paired differences over all test texts."""

from __future__ import annotations

import math
import statistics
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from benchmarks.encoders import ENCODERS, Encoder

from .methods import Method
from .records import ALL, read_all
from .rules import RULES

Key = tuple[str, int]  # a setting (data set and division) and a seed
Records = dict[str, dict[Key, dict[str, Any]]]  # by method

REAL = ("vader", "vader-2000", "tweets", "newspaper", "film", "product")
GENERATED = "generated"  # for a small encoder from scratch
OF_MPNET = ("vader-2000", "tweets", "newspaper-1000", "vader-2000-more", "vader")
# Data that have tables of their own, and are not pooled: their texts are in other data sets too.
ALONE = (GENERATED, "mpnet.vader-2000-more", "mpnet.vader")
TITLES = {"minilm": "MiniLM-L6", "mpnet": "MPNet-base"}
CUT_STYLES = {2: "^C2", 3: "vC3", 4: "DC4", 6: "PC6"}  # by number of layers


@dataclass(frozen=True)
class Entrant:
    """What takes part: a training, whose texts leave by the plain rule for its kind.

    Args:
        method: Name of the training, such as ``"dact-4"``.
        name: Its name in the tables.
    """

    method: str
    name: str

    @property
    def parsed(self) -> Method:
        return Method.parse(self.method)

    @property
    def adapts(self) -> bool:
        """Whether its layers follow a budget; an encoder runs all of its layers for every text."""
        return self.parsed.kind in RULES

    def keys(self, records: Records) -> set[Key]:
        """Return where it was trained."""
        return set(records.get(self.method, {}))

    def point(self, records: Records, key: Key, budget: float | None) -> dict[str, Any]:
        """Return its layers and accuracy at a budget; those of all its layers without one, or if
        it does not adapt."""
        rules = records[self.method][key]["rules"]
        if budget is None or not self.adapts:
            (everything,) = rules[ALL].values()
            return dict(everything)
        return dict(rules[next(iter(RULES[self.parsed.kind]))][str(float(budget))])


@dataclass(frozen=True)
class Field:
    """Everything that is compared with one encoder, and on which data."""

    encoder: Encoder

    @property
    def dact(self) -> Entrant:
        return Entrant(f"dact-{self.encoder.kept}-detached", "DACT")

    @property
    def peer(self) -> Entrant:
        return Entrant(f"multi-{self.encoder.kept}", "fair peer")

    @property
    def whole(self) -> Entrant:
        return Entrant(f"baseline-{self.encoder.num_layers}", "whole encoder")

    @property
    def taught(self) -> Entrant:
        """The whole encoder, trained again from itself, as all others are."""
        return Entrant(f"encoder-{self.encoder.num_layers}", "whole encoder, taught")

    @property
    def cuts(self) -> list[Entrant]:
        return [Entrant(f"encoder-{n}", f"encoder of {n} layers") for n in self.encoder.cuts]

    @property
    def peers(self) -> list[Entrant]:
        return [self.peer, *self.cuts, self.taught, self.whole]

    @property
    def data(self) -> list[str]:
        if self.encoder.name == "minilm":
            return [*REAL, GENERATED]
        return [f"{self.encoder.name}.{name}" for name in OF_MPNET]


def methods_of(encoder: Encoder) -> list[Method]:
    """Return the trainings that the tables of an encoder need."""
    field = Field(encoder)
    return [entrant.parsed for entrant in (field.whole, field.dact, *field.peers[:-1])]


def load() -> Records:
    records: Records = defaultdict(dict)
    for record in read_all():
        records[record["method"]][record["setting"], record["seed"]] = record
    return dict(records)


def data_of(key: Key) -> str:
    return key[0].rsplit(".", 1)[0]


def of_data(records: Records, data: Iterable[str]) -> Records:
    kept = set(data)
    return {
        method: {key: record for key, record in found.items() if data_of(key) in kept}
        for method, found in records.items()
    }


@dataclass(frozen=True)
class Difference:
    """A paired difference of test accuracy, in points.

    Args:
        gain: Mean over the test texts of all divisions, each the mean over its seeds.
        text_error: Standard error from the texts alone.
        training_error: Standard error from the scatter between divisions, each weighed by its
            texts.
        divisions: Number of data sets times divisions.
        trainings: Number of pairs of trainings.
    """

    gain: float
    text_error: float
    training_error: float
    divisions: int
    trainings: int

    def __str__(self) -> str:
        errors = (self.text_error, self.training_error)
        return f"{self.gain:+.2f} ± {max(error for error in errors if not math.isnan(error)):.2f}"


def difference(records: Records, left: Entrant, right: Entrant, budget: float) -> Difference | None:
    """Return how far `left` is above `right` at a budget, wherever both were trained."""
    by_setting: dict[str, list[Any]] = defaultdict(list)
    keys = left.keys(records) & right.keys(records)
    for key in sorted(keys):
        mine, theirs = left.point(records, key, budget), right.point(records, key, budget)
        by_setting[key[0]].append(mine["correct"].astype(float) - theirs["correct"].astype(float))
    if not keys:
        return None

    gains = [100 * np.mean(found, axis=0) for found in by_setting.values()]
    pooled = np.concatenate(gains)
    mean, count = float(pooled.mean()), len(gains)
    spread = sum((len(gain) * (gain.mean() - mean)) ** 2 for gain in gains)
    training_error = math.nan
    if count > 1:
        training_error = math.sqrt(spread * count / (count - 1)) / len(pooled)
    text_error = float(pooled.std(ddof=1)) / math.sqrt(len(pooled))
    return Difference(mean, text_error, training_error, count, len(keys))


def mean_point(
    records: Records, entrant: Entrant, keys: Iterable[Key], budget: float | None
) -> tuple[float, float]:
    """Return mean layers and test accuracy in %, weighed as in `difference`."""
    by_setting: dict[str, list[tuple[float, float, float]]] = defaultdict(list)
    for key in keys:
        point = entrant.point(records, key, budget)["test"]
        texts = records[entrant.method][key]["texts"]["test"]
        by_setting[key[0]].append((texts, point["layers"], point["accuracy"]))
    divisions = np.array([np.mean(found, axis=0) for found in by_setting.values()])
    layers, accuracy = divisions[:, 0] @ divisions[:, 1:] / divisions[:, 0].sum()
    return float(layers), float(accuracy)


def overview_table(records: Records, field: Field, data: Iterable[str]) -> list[str]:
    """Return one line per data set, at the three middle budgets."""
    budgets = field.encoder.budgets[1:4]
    at = "at " + " / ".join(f"{budget:g}" for budget in budgets)
    cuts = " / ".join(map(str, field.encoder.cuts))
    columns = ["whole encoder", "the same, taught", f"encoder of {cuts}"]
    columns += [f"DACT {at}", f"fair peer {at}", f"DACT less peer {at}"]
    lines = _head("test accuracy, % (trainings)", columns)
    for name in data:
        own = of_data(records, [name])
        shared = field.dact.keys(own) & field.whole.keys(own)
        cells = []
        for entrants in ([field.whole], [field.taught], field.cuts):
            cells.append(" / ".join(_accuracy(own, one, shared, None) for one in entrants))
        for entrant in (field.dact, field.peer):
            cells.append(" / ".join(_accuracy(own, entrant, shared, at) for at in budgets))
        gains = [difference(own, field.dact, field.peer, budget) for budget in budgets]
        cells.append(" / ".join(_cell(gain) for gain in gains))
        lines.append(_row(f"{name} ({len(shared)})", cells))
    return lines


def accuracy_table(records: Records, field: Field, data: str) -> list[str]:
    """Return test accuracy at mean layers on one data set, of what was trained wherever DACT
    was."""
    records = of_data(records, [data])
    shared = field.dact.keys(records) & field.whole.keys(records)
    budgets = field.encoder.budgets
    lines = _head(f"{data}: test accuracy, %", [*map("{:g}".format, budgets), "all layers"])
    for entrant in (field.dact, *field.peers):
        if not shared <= entrant.keys(records):
            continue
        cells = [] if entrant.adapts else [""] * len(budgets)
        for budget in (*budgets, None) if entrant.adapts else [None]:
            layers, accuracy = mean_point(records, entrant, shared, budget)
            cells.append(f"{accuracy:.2f} @{layers:.2f}")
        lines.append(_row(f"{entrant.name} ({len(shared)})", cells))
    return lines


def peer_table(records: Records, field: Field, corner: str) -> list[str]:
    """Return how far DACT is above each of its peers; above a cut encoder at the budget of its
    layers, or at the largest one."""
    budgets = field.encoder.budgets
    lines = _head(corner, map("{:g}".format, budgets))
    for peer in field.peers:
        depth = peer.parsed.layers
        found: list[Difference | None] = []
        for budget in budgets:
            fits = peer.adapts or depth == field.encoder.num_layers
            meets = fits or budget == min(depth, budgets[-1])
            found.append(difference(records, field.dact, peer, budget) if meets else None)
        known = [each for each in found if each]
        if known:
            size = f"{known[0].divisions} divisions, {known[0].trainings} trainings"
            lines.append(_row(f"DACT less {peer.name} ({size})", map(_cell, found)))
    return lines


def tables(records: Records) -> str:
    """Return all tables, as Markdown."""
    parts: list[str | list[str]] = [
        "# The frontier's tables",
        "Written by `python -m benchmarks.frontier --report`; what they say stands in "
        "benchmarks/README.md. Differences are in points ± the larger of the errors from texts and "
        "from divisions. A text that is in several data sets counts in each.",
    ]
    for encoder in ENCODERS.values():
        field = Field(encoder)
        data = [name for name in field.data if field.dact.keys(of_data(records, [name]))]
        if not data:
            continue
        real = [name for name in data if name not in ALONE]
        parts.append(f"## {encoder.name}: DACT next to its peers")
        parts.append(peer_table(of_data(records, real), field, "real texts, pooled"))
        parts.append(overview_table(records, field, data))
        for name in data:
            parts.append(accuracy_table(records, field, name))
            parts.append(peer_table(of_data(records, [name]), field, name))
    return "\n\n".join(part if isinstance(part, str) else "\n".join(part) for part in parts) + "\n"


def draw(records: Records, path: Path) -> None:
    """Draw accuracy against layers, one panel for each data set."""
    fields = [Field(encoder) for encoder in ENCODERS.values()]
    panels = [(field, name) for field in fields for name in field.data]
    panels = [(field, name) for field, name in panels if field.dact.keys(of_data(records, [name]))]
    columns = min(4, len(panels))
    rows = math.ceil(len(panels) / columns)
    figure = Figure(figsize=(3.2 * columns, 3.2 * rows), layout="constrained")
    places = [*figure.subplots(rows, columns, squeeze=False).flat]
    for axes, (field, name) in zip(places, panels, strict=False):
        own = of_data(records, [name])
        shared = field.dact.keys(own) & field.whole.keys(own)
        entrants = (field.dact, field.peer, *field.cuts, field.whole)
        cuts = [CUT_STYLES[layers] for layers in field.encoder.cuts]
        styles = ("o-C0", "s--C1", *cuts, "*C5")
        for entrant, style in zip(entrants, styles, strict=True):
            if not shared <= entrant.keys(own):
                continue
            points = [
                [
                    statistics.mean(entrant.point(own, key, budget)["test"][what] for key in shared)
                    for what in ("layers", "accuracy")
                ]
                for budget in ((*field.encoder.budgets, None) if entrant.adapts else (None,))
            ]
            axes.plot(*zip(*points, strict=True), style, label=entrant.name)
        title = f"{TITLES[field.encoder.name]}: {name.split('.')[-1]}"
        axes.set(title=title, xlabel="mean layers", ylabel="test accuracy, %")
    for axes in places[len(panels) :]:
        axes.set_axis_off()

    labelled = {}
    for axes in figure.axes:
        lines, labels = axes.get_legend_handles_labels()
        labelled |= dict(zip(labels, lines, strict=True))
    names, lines = list(labelled), list(labelled.values())
    figure.legend(lines, names, loc="outside lower center", ncols=4)
    figure.savefig(path, dpi=100)


def _accuracy(records: Records, entrant: Entrant, keys: set[Key], budget: float | None) -> str:
    if not keys <= entrant.keys(records):
        return "–"
    return f"{mean_point(records, entrant, keys, budget)[1]:.2f}"


def _head(corner: str, columns: Iterable[str]) -> list[str]:
    columns = list(columns)
    return [_row(corner, columns), "|---|" + "---|" * len(columns)]


def _row(name: str, cells: Iterable[str]) -> str:
    return f"| {name} | " + " | ".join(cells) + " |"


def _cell(found: Difference | None) -> str:
    return "" if found is None else str(found)
