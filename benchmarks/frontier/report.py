"""Tables from the records: accuracy at each budget, and paired differences over the texts of all
divisions."""

from __future__ import annotations

import math
import statistics
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from .methods import FULL, Method
from .records import ALL, read_all
from .rules import BUDGETS, FITS

Key = tuple[str, int]  # a setting (data set and division) and a seed
Records = dict[str, dict[Key, dict[str, Any]]]  # by method

REAL = ("vader", "vader-2000", "tweets", "newspaper", "film", "product")  # for MiniLM
DATA = (*REAL, "generated")  # the last one for a small encoder from scratch


@dataclass(frozen=True)
class Entrant:
    """What takes part: a training, whose texts leave by a rule.

    Args:
        method: Name of the training, such as ``"dact-4"``.
        name: For the tables.
        rule: When a text leaves; by default the plain rule for its kind.
    """

    method: str
    name: str = ""
    rule: str = ""

    def __str__(self) -> str:
        return self.name or f"`{self.method}`"

    @property
    def parsed(self) -> Method:
        return Method.parse(self.method)

    @property
    def adapts(self) -> bool:
        """Whether its layers follow a budget; an encoder runs all of its layers for every text."""
        return self.parsed.kind in FITS

    def keys(self, records: Records) -> set[Key]:
        """Where it was trained."""
        return set(records.get(self.method, {}))

    def point(self, records: Records, key: Key, budget: float | None) -> dict[str, Any]:
        """Its layers and accuracy at a budget; those of all its layers without one, or if it does
        not adapt."""
        rules = records[self.method][key]["rules"]
        if budget is None or not self.adapts:
            (everything,) = rules[ALL].values()
            return dict(everything)
        return dict(rules[self.rule or next(iter(FITS[self.parsed.kind]))][f"{budget:.1f}"])


DACT = Entrant("dact-4-detached", "DACT")
PEER = Entrant("multi-4", "fair peer")  # a multi-exit of the same layers
ENCODERS = tuple(
    Entrant(f"encoder-{layers}", f"encoder of {layers} layers") for layers in (2, 3, 4)
)
WHOLE = Entrant(f"baseline-{FULL}", "full depth")
TAUGHT = Entrant(
    f"encoder-{FULL}", "full depth, taught"
)  # trained again from WHOLE, as all others are
PEERS = (PEER, Entrant("multi-3", "multi-exit of 3 layers"), *ENCODERS, TAUGHT, WHOLE)


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
        val_gain: The same on validation texts, mean over the trainings.
        divisions: Number of data sets times divisions.
        trainings: Number of pairs of trainings.
        data: Names of the data sets.
    """

    gain: float
    text_error: float
    training_error: float
    val_gain: float
    divisions: int
    trainings: int
    data: tuple[str, ...]

    @property
    def error(self) -> float:
        """The larger of the two."""
        return max(
            error for error in (self.text_error, self.training_error) if not math.isnan(error)
        )

    def __str__(self) -> str:
        return f"{self.gain:+.2f} ± {self.error:.2f} ({self.val_gain:+.2f})"


def difference(records: Records, left: Entrant, right: Entrant, budget: float) -> Difference | None:
    """How far `left` is above `right` at a budget, wherever both were trained."""
    by_setting: dict[str, list[Any]] = defaultdict(list)
    val_gains: list[float] = []
    keys = sorted(left.keys(records) & right.keys(records))
    for key in keys:
        mine, theirs = left.point(records, key, budget), right.point(records, key, budget)
        by_setting[key[0]].append(mine["correct"].astype(float) - theirs["correct"].astype(float))
        val_gains.append(mine["val"]["accuracy"] - theirs["val"]["accuracy"])
    if not keys:
        return None
    gains = [100 * np.mean(found, axis=0) for found in by_setting.values()]
    pooled = np.concatenate(gains)
    mean, count = float(pooled.mean()), len(gains)
    spread = sum((len(gain) * (gain.mean() - mean)) ** 2 for gain in gains)
    return Difference(
        gain=mean,
        text_error=float(pooled.std(ddof=1)) / math.sqrt(len(pooled)),
        training_error=math.sqrt(spread * count / (count - 1)) / len(pooled)
        if count > 1
        else math.nan,
        val_gain=statistics.mean(val_gains),
        divisions=count,
        trainings=len(keys),
        data=tuple(dict.fromkeys(data_of(key) for key in keys)),
    )


def mean_point(
    records: Records, entrant: Entrant, keys: Iterable[Key], budget: float | None
) -> tuple[float, float]:
    """Mean layers and test accuracy in %, over the texts of all divisions, each the mean over its
    seeds as in `difference`."""
    by_setting: dict[str, list[tuple[float, float, float]]] = defaultdict(list)
    for key in keys:
        point = entrant.point(records, key, budget)["test"]
        texts = records[entrant.method][key]["texts"]["test"]
        by_setting[key[0]].append((texts, point["layers"], point["accuracy"]))
    divisions = np.array([np.mean(found, axis=0) for found in by_setting.values()])
    layers, accuracy = divisions[:, 0] @ divisions[:, 1:] / divisions[:, 0].sum()
    return float(layers), float(accuracy)


def overview_table(records: Records, data: Iterable[str]) -> list[str]:
    """One line per data set, at 2, 2.5 and 3 mean layers."""
    budgets = (2.0, 2.5, 3.0)
    at = "at 2 / 2.5 / 3"
    lines = [
        f"| test accuracy, % (trainings) | full depth | the same, taught | encoder of 2 / 3 / 4 | DACT {at} | fair peer {at} "
        f"| DACT less peer {at} |",
        "|---|---|---|---|---|---|---|",
    ]
    for name in data:
        own = of_data(records, [name])
        shared = DACT.keys(own) & WHOLE.keys(own)

        def cell(
            *places: tuple[Entrant, float | None], own: Records = own, shared: set[Key] = shared
        ) -> str:
            return " / ".join(
                f"{mean_point(own, entrant, shared, budget)[1]:.2f}"
                if shared <= entrant.keys(own)
                else "–"
                for entrant, budget in places
            )

        gains = [difference(own, DACT, PEER, budget) for budget in budgets]
        cells = [
            cell((WHOLE, None)),
            cell((TAUGHT, None)),
            cell(*((encoder, None) for encoder in ENCODERS)),
            *(cell(*((entrant, budget) for budget in budgets)) for entrant in (DACT, PEER)),
            " / ".join(
                "" if gain is None else f"{gain.gain:+.2f} ± {gain.error:.2f}" for gain in gains
            ),
        ]
        lines.append(_row(f"{name} ({len(shared)})", cells))
    return lines


def accuracy_table(records: Records, data: str) -> list[str]:
    """Test accuracy at mean layers of what is compared on one data set; of what has been trained
    wherever DACT has."""
    records = of_data(records, [data])
    shared = DACT.keys(records) & WHOLE.keys(records)
    lines = _head(f"{data}: test accuracy, %", "all layers")
    for entrant in (DACT, *PEERS):
        if not shared <= entrant.keys(records):
            continue
        cells = [] if entrant.adapts else [""] * len(BUDGETS)
        for budget in (*BUDGETS, None) if entrant.adapts else [None]:
            layers, accuracy = mean_point(records, entrant, shared, budget)
            cells.append(f"{accuracy:.2f} @{layers:.2f}")
        lines.append(_row(f"{entrant} ({len(shared)})", cells))
    return lines


def peer_table(records: Records, corner: str) -> list[str]:
    """How far DACT is above each of its peers; above a cut encoder at the budget of its layers, or
    at the largest one."""
    lines = _head(corner)
    for peer in PEERS:
        depth = peer.parsed.layers
        own = min(depth, BUDGETS[-1])
        budgets = [
            budget
            for budget in BUDGETS
            if (peer.adapts and budget <= depth) or depth == FULL or budget == own
        ]
        found = {budget: difference(records, DACT, peer, budget) for budget in budgets}
        if any(found.values()):
            lines.append(
                _row(
                    f"DACT less {peer} ({_size(found.values())})",
                    map(_cell, map(found.get, BUDGETS)),
                )
            )
    return lines


def idea_table(records: Records, kind: str) -> list[str]:
    """What each option changes: less the same training without it, or of 4 layers, wherever both
    were trained."""
    lines = _head("less the same without the option, or of 4 layers")
    for method in sorted(records):
        parsed = Method.parse(method)
        layers = PEER.parsed.layers
        detached = {"detached"} & set(parsed.options)
        if parsed.kind != kind or (parsed.layers == layers and not parsed.options):
            continue
        kept = (
            parsed.options
            if parsed.layers != layers
            else detached
            if len(parsed.options) > 1
            else ()
        )
        plain = Entrant(str(Method(kind, layers, tuple(kept))))
        found = [difference(records, Entrant(method), plain, budget) for budget in BUDGETS]
        if found[0]:
            lines.append(
                _row(f"`{method}`, {', '.join(found[0].data)} ({_size(found)})", map(_cell, found))
            )
    return lines


def rule_table(records: Records, kind: str) -> list[str]:
    """What each rule gains over the plain one, which comes first: mean over all trainings of a
    kind.

    A cell has the gain on test texts ± its standard error over the divisions and, in brackets, that
    on validation texts, where each half is measured with what was fitted to the other."""
    found = [
        record
        for name, by_key in records.items()
        if name.startswith(f"{kind}-")
        for record in by_key.values()
    ]
    plain, *others = FITS[kind]
    lines = _head(f"{len(found)} trainings, less `{plain}`")
    for rule in others:
        having = [
            record for record in found if rule in record["rules"]
        ]  # a rule may be younger than a record
        if not having:
            continue
        cells = []
        for budget in (f"{budget:.1f}" for budget in BUDGETS):
            gains: dict[str, list[tuple[str, float]]] = {
                split: [
                    (
                        record["setting"],
                        points[rule][budget][split]["accuracy"]
                        - points[plain][budget][split]["accuracy"],
                    )
                    for record in having
                    for points in [record["rules"]]
                ]
                for split in ("val", "test")
            }
            mean, val = (
                statistics.mean(gain for _, gain in gains[split]) for split in ("test", "val")
            )
            cells.append(f"{mean:+.2f} ± {_error(gains['test']):.2f} ({val:+.2f})")
        lines.append(
            _row(rule + ("" if len(having) == len(found) else f" ({len(having)} trainings)"), cells)
        )
    return lines


def oracle_table(records: Records, data: str) -> list[str]:
    """What the layers of DACT and its peer could do, mean over the trainings; see
    `rules.oracle`."""
    lines = [
        f"| {data} | right at some layer, % | first such layer | all layers, % | first layer with that class | by layer, % |",
        "|---|---|---|---|---|---|",
    ]
    for entrant in (DACT, PEER):
        found = list(of_data(records, [data]).get(entrant.method, {}).values())
        if not found:
            continue
        known = {
            name: statistics.mean(r["oracle"][name] for r in found) for name in found[0]["oracle"]
        }
        depths = [
            100 * statistics.mean(values)
            for values in zip(*(r["by layer"] for r in found), strict=True)
        ]
        lines.append(
            f"| {entrant} ({len(found)}) | {known['accuracy']:.1f} | {known['layers']:.2f} | {depths[-1]:.2f} "
            f"| {known['layers for the class of all']:.2f} | {' / '.join(f'{depth:.1f}' for depth in depths)} |"
        )
    return lines


def tables(records: Records) -> str:
    """Return all tables, as Markdown."""
    data = [name for name in DATA if DACT.keys(of_data(records, [name]))]
    parts = [
        "# The frontier's tables",
        "Written by `python -m benchmarks.frontier --report`; what they say stands in benchmarks/README.md. Differences are in "
        "points ± the larger of the errors from texts and from divisions, in brackets on validation texts, each half by "
        "what the other half chose. A text that is in several data sets counts in each.",
        "## DACT next to its peers",
        peer_table(of_data(records, REAL), "real texts, pooled"),
        peer_table(of_data(records, data), "all data sets, pooled"),
        overview_table(records, data),
    ]
    for name in data:
        parts += [accuracy_table(records, name), peer_table(of_data(records, [name]), name)]
    parts += ["## Options", *(idea_table(records, kind) for kind in FITS)]
    parts += [
        "## Rules, and what is fitted after training",
        *(rule_table(records, kind) for kind in FITS),
    ]
    parts += ["## What the layers could do", *(oracle_table(records, name) for name in data)]
    return "\n\n".join(part if isinstance(part, str) else "\n".join(part) for part in parts) + "\n"


def draw(records: Records, path: Path) -> None:
    """Accuracy against layers, one panel for each data set."""
    names = [name for name in DATA if DACT.keys(of_data(records, [name]))]
    columns = min(4, len(names))
    rows = math.ceil(len(names) / columns)
    figure = Figure(figsize=(3.2 * columns, 3.2 * rows), layout="constrained")
    panels = [*figure.subplots(rows, columns, squeeze=False).flat]
    for axes, name in zip(panels, names, strict=False):
        own = of_data(records, [name])
        shared = DACT.keys(own) & WHOLE.keys(own)
        styles = ("o-C0", "s--C1", "^C2", "vC3", "DC4", "*C5")
        for entrant, style in zip((DACT, PEER, *ENCODERS, WHOLE), styles, strict=True):
            if not shared <= entrant.keys(own):
                continue
            points = [
                [
                    statistics.mean(entrant.point(own, key, budget)["test"][what] for key in shared)
                    for what in ("layers", "accuracy")
                ]
                for budget in ((*BUDGETS, None) if entrant.adapts else (None,))
            ]
            axes.plot(*zip(*points, strict=True), style, label=str(entrant))
        axes.set(title=name, xlabel="mean layers", ylabel="test accuracy, %")
    for axes in panels[len(names) :]:
        axes.set_axis_off()
    labelled = {
        label: line
        for axes in figure.axes
        for line, label in zip(*axes.get_legend_handles_labels(), strict=True)
    }
    figure.legend(
        labelled.values(), labelled.keys(), loc="outside lower center", ncols=len(labelled)
    )
    figure.savefig(path, dpi=100)


def _error(gains: Sequence[tuple[str, float]]) -> float:
    """The standard error of the mean of gains by setting; trainings of one setting share their
    texts."""
    mean = statistics.mean(gain for _, gain in gains)
    by_setting: dict[str, float] = defaultdict(float)
    for setting, gain in gains:
        by_setting[setting] += gain - mean
    count = len(by_setting)
    if count < 2:
        return math.nan
    return math.sqrt(sum(off**2 for off in by_setting.values()) * count / (count - 1)) / len(gains)


def _head(corner: str, *more: str) -> list[str]:
    columns = [*(f"{budget:g}" for budget in BUDGETS), *more]
    return [_row(corner, columns), "|---|" + "---|" * len(columns)]


def _row(name: str, cells: Iterable[str]) -> str:
    return f"| {name} | " + " | ".join(cells) + " |"


def _cell(found: Difference | None) -> str:
    return "" if found is None else str(found)


def _size(found: Iterable[Difference | None]) -> str:
    known: Sequence[Difference] = [each for each in found if each]
    divisions, trainings = known[0].divisions, known[0].trainings
    return (
        f"{divisions} division{'s' * (divisions > 1)}, {trainings} training{'s' * (trainings > 1)}"
    )
