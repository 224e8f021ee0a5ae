"""The pictures of a run: one set per study, and one for the final model."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from optuna.study import Study
from optuna.trial import FrozenTrial

from dact import plots
from dact.files import replacing_folder
from dact.tuning import tensorboard
from dact.tuning.outcome import EXIT_HISTOGRAM
from dact.tuning.selection import Point, pareto_front
from dact.tuning.space import Dimension

if TYPE_CHECKING:
    from matplotlib.figure import Figure

FEWEST_FOR_IMPORTANCES = 4  # completed trials; fewer say nothing about importance


def draw_study(
    folder: Path,
    study: Study,
    completed: Sequence[FrozenTrial],
    chosen: FrozenTrial,
    spaces: Mapping[str, Mapping[str, Dimension]],
) -> None:
    """Draw a study for TensorBoard and as files.

    Args:
        folder: Destination; written whole or not at all.
        study: The study.
        completed: Its trials that gave a value, one or more.
        chosen: Its winner.
        spaces: Dimension of each parameter, by stage.
    """
    figures = study_pictures(study, len(completed))
    if len(study.directions) == 2:
        points = {
            trial.number: Point(trial.params["lambda_reg"], *trial.values) for trial in completed
        }
        figures["Pareto front"] = pareto_picture(list(points.values()), points[chosen.number])
        exits = [
            (trial.params["lambda_reg"], trial.user_attrs[EXIT_HISTOGRAM])
            for trial in completed
            if EXIT_HISTOGRAM in trial.user_attrs  # a trial that was added by hand has none
        ]
        if exits:
            figures["exit histogram"] = exits_picture(exits, chosen.params["lambda_reg"])
    with replacing_folder(folder) as partial_folder:
        with tensorboard.writer(partial_folder) as writer:
            dimensions = {
                name: dimension for space in spaces.values() for name, dimension in space.items()
            }
            tensorboard.log_experiment(writer, dimensions)
            tensorboard.log_figures(writer, figures, partial_folder)


def study_pictures(study: Study, completed: int) -> dict[str, Figure]:
    """Return Optuna's own pictures of a study, by name.

    Args:
        study: Study with one objective, or with two (task loss and exit layer).
        completed: Number of its trials that gave a value, 1 or more.
    """
    from matplotlib import pyplot
    from optuna.visualization import matplotlib as draw

    names = ["validation loss"] if len(study.directions) == 1 else ["task loss", "exit layer"]
    figures: dict[str, Any] = {}
    # Optuna sets a style for the whole process and warns that its pictures are experimental.
    with pyplot.style.context("default"), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for index, name in enumerate(names):
            title = "optimization history" if len(names) == 1 else f"history of the {name}"
            value: Any = None if len(names) == 1 else lambda trial, index=index: trial.values[index]
            axes: Any = draw.plot_optimization_history(study, target=value, target_name=name)
            axes.set(title=title, xlabel="trial", ylabel=name)
            axes.xaxis.get_major_locator().set_params(integer=True)
            figures[title] = axes.get_figure()
        if len(names) == 1 and completed >= FEWEST_FOR_IMPORTANCES:
            figures["parameter importances"] = draw.plot_param_importances(study).get_figure()
        for figure in figures.values():
            figure.set_layout_engine("constrained")
            pyplot.close(figure)
    return figures


def pareto_picture(points: list[Point], chosen: Point) -> Any:
    """Draw task loss against layers for all trials, with the Pareto front and the chosen trial."""
    figure, axes = plots.new_figure()
    front = pareto_front(points)
    colours = axes.scatter(
        [point.layers for point in points],
        [point.loss for point in points],
        c=[point.lambda_reg for point in points],
        norm="log" if all(point.lambda_reg > 0 for point in points) else "linear",
        label="trials",
    )
    axes.plot(
        [point.layers for point in front],
        [point.loss for point in front],
        "-",
        alpha=0.5,
        label="Pareto front",
    )
    axes.plot(
        chosen.layers, chosen.loss, "o", ms=14, mfc="none", mec="tab:red", mew=2, label="chosen"
    )
    axes.set(
        xlabel="mean exit layer", ylabel="task loss", title="loss against layers, by lambda_reg"
    )
    axes.legend()
    figure.colorbar(colours, label="lambda_reg")
    return figure


def dials_picture(
    tolerances: list[dict[str, float]],
    margins: list[dict[str, float]],
    layers: int,
    own: tuple[float, float],
    baseline: float,
) -> Any:
    """Draw accuracy and agreement against the mean exit layer, over the tolerance and over the
    margin.

    Args:
        tolerances: One record per tolerance.
        margins: One record per margin.
        layers: Number of layers of the model.
        own: Mean exit layer and accuracy of the model at the setting of its dials.
        baseline: Accuracy of the baseline.
    """
    figure, _ = plots.new_figure(height=5)
    figure.clear()
    upper, lower = figure.subplots(2, 1, sharex=True)  # their ranges differ too much for one axis
    depths = [point["mean_exit_layer"] for point in (*tolerances, *margins)]
    for axes, name in ((upper, "accuracy"), (lower, "agreement")):
        for dial, curve, below in (("tolerance", tolerances, True), ("margin", margins, False)):
            places = [(point["mean_exit_layer"], 100 * point[name]) for point in curve]
            (line,) = axes.plot(*zip(*places, strict=True), "o-", label=f"halting_{dial}")
            written = float("inf")
            for point, place in zip(curve, places, strict=True):
                # From most layers to fewest; labels must not overlap.
                if written - place[0] > 0.05 * (max(depths) - min(depths)):
                    written = place[0]
                    axes.annotate(
                        f"{point[dial]:g}",
                        place,
                        xytext=(0, -11 if below else 5),
                        textcoords="offset points",
                        fontsize=7,
                        ha="center",
                        color=line.get_color(),
                    )
        axes.margins(y=0.2)
    upper.axhline(100 * baseline, color="grey", linestyle="--", linewidth=1, label="baseline")
    upper.plot(
        own[0],
        100 * own[1],
        "o",
        ms=12,
        mfc="none",
        mec="tab:red",
        mew=2,
        linestyle="none",
        label="as set",
    )
    upper.legend(fontsize=7)
    upper.set(ylabel="accuracy, %", title="validation, with the setting of the dial at each point")
    lower.set(xlabel=f"mean exit layer of {layers}", ylabel="agreement with\nfull depth, %")
    return figure


def exit_picture(entry: Mapping[str, Any]) -> Any:
    """Draw how many examples leave after each layer."""
    figure, axes = plots.new_figure()
    counts = entry["exit_histogram"]
    axes.bar(range(1, len(counts) + 1), counts)
    axes.set(
        xlabel="exit layer",
        ylabel="examples",
        title=f"test: mean exit layer {entry['mean_exit_layer']:.2f}",
    )
    return figure


def exits_picture(trials: Sequence[tuple[float, Sequence[int]]], chosen: float) -> Any:
    """Draw the shares of validation examples that leave after each layer, for each λ that was
    tried.

    Args:
        trials: λ and exit histogram of each trial.
        chosen: λ that was chosen.
    """
    from matplotlib import colormaps

    trials = sorted(trials)
    figure, axes = plots.new_figure()
    base = [0.0] * len(trials)
    layers = len(trials[0][1])
    for layer in range(layers):
        shares = [counts[layer] / sum(counts) for _, counts in trials]
        shade = colormaps["viridis_r"]((layer + 1) / layers)  # deeper layers are darker
        axes.bar(
            range(len(trials)),
            shares,
            bottom=base,
            width=0.9,
            color=shade,
            label=f"layer {layer + 1}",
        )
        base = [under + share for under, share in zip(base, shares, strict=True)]
    names = [f"{value:.2g}" + (" *" if value == chosen else "") for value, _ in trials]
    axes.set_xticks(range(len(trials)), names, rotation=60, fontsize=7)
    axes.set(
        xlabel="lambda_reg (* chosen)",
        ylabel="share of the validation examples",
        title="exit histogram by trial",
    )
    figure.legend(
        *axes.get_legend_handles_labels(), loc="outside right center", reverse=True, fontsize=7
    )
    return figure
