"""The output of a run: trials in TensorBoard, pictures, and the summary at the end."""

from __future__ import annotations

import time
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from optuna.study import Study
from optuna.trial import FrozenTrial
from rich.table import Table
from tensorboard.compat.proto.summary_pb2 import Summary
from tensorboard.plugins.hparams import api_pb2, metadata, plugin_data_pb2, summary_v2
from torch import Tensor
from torch.utils.tensorboard import SummaryWriter

from dact.calibration.answers import Measured
from dact.files import read_json, replacing_folder
from dact.model import DACT
from dact.model_card import what_is_promised
from dact.tuning.progress import Progress, format_seconds
from dact.tuning.settings import Settings

if TYPE_CHECKING:
    from matplotlib.figure import Figure

METRICS = ("val_loss", "val_task_loss", "val_accuracy", "val_exit_layer")
FEWEST_FOR_IMPORTANCES = 4  # completed trials; fewer say nothing about importance
FASTER = 0.02  # largest loss of accuracy at which a faster setting is worth a line

# ------------------------------------------------------------------ TensorBoard
# Lightning would show every trial in the HParams tab as a success, with a metric of -1.


def metrics_of(measured: Measured, class_weights: Tensor | None) -> dict[str, float]:
    """Return the metrics of early exit that the HParams tab shows."""
    return {
        "val_task_loss": measured.task_loss(class_weights),
        "val_accuracy": measured.accuracy,
        "val_exit_layer": measured.mean_exit_layer,
    }


def parameters_of(model: DACT, settings: Settings) -> dict[str, Any]:
    """Return what the HParams tab lists for a fit of `model`: its encoder, its kind of confidence
    and price, and all settings."""
    encoder, names = model.encoder, ("confidence_reads", "share_submodels", "ponder", "halting")
    size = f"{type(encoder).__name__} {encoder.num_layers} x {encoder.hidden_size}"
    kinds = {name: getattr(model, name) for name in (*names, "lambda_warmup")}
    kinds["pooling"] = getattr(encoder, "pooling", None)
    return {"encoder": size, **kinds, **settings.flat()}


def log_fit(
    folder: Path,
    parameters: Mapping[str, Any],
    metrics: Mapping[str, float],
    name: str,
    succeeded: bool = True,
) -> None:
    """Log a trial or another fit that has ended; pruned trials are failures.

    Args:
        folder: Folder of the fit.
        parameters: Parameters of the fit; see `parameters_of`.
        metrics: Metrics of the fit; those in `METRICS` are shown.
        name: Name of the session. The tab shows sessions of the same name as one trial.
        succeeded: Whether the fit ended by itself.
    """
    # The tab has no type for None.
    known = {name: "none" if value is None else value for name, value in parameters.items()}
    status = api_pb2.Status.Value("STATUS_SUCCESS" if succeeded else "STATUS_FAILURE")
    end = plugin_data_pb2.SessionEndInfo(status=status)
    data = plugin_data_pb2.HParamsPluginData(session_end_info=end)
    record = metadata.create_summary_metadata(data)
    value = Summary.Value(tag=metadata.SESSION_END_INFO_TAG, metadata=record)
    with SummaryWriter(str(folder)) as writer:
        for summary in (summary_v2.hparams_pb(known, trial_id=name), Summary(value=[value])):
            writer._get_file_writer().add_summary(summary)
        for metric in METRICS:
            if metric in metrics:
                writer.add_scalar(f"best/{metric}", metrics[metric])


def log_figures(figures: Mapping[str, Figure], folder: Path) -> None:
    """Write figures for TensorBoard and as PNG files."""
    with SummaryWriter(str(folder)) as writer:
        for name, figure in figures.items():
            figure.savefig(folder / f"{name.replace(' ', '_')}.png")
            writer.add_figure(name, figure)


def draw_study(folder: Path, study: Study, completed: int, chosen: FrozenTrial) -> None:
    """Draw a study with `completed` completed trials, using Optuna's figures."""
    from matplotlib import pyplot
    from optuna.visualization import matplotlib as draw

    axes: dict[str, Any] = {}
    # Optuna sets a style for the whole process and warns that its figures are experimental.
    with pyplot.style.context("default"), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        if len(study.directions) == 1:
            axes["optimization history"] = draw.plot_optimization_history(study)
            if completed >= FEWEST_FOR_IMPORTANCES:
                axes["parameter importances"] = draw.plot_param_importances(study)
        else:
            names = ["task loss", "exit layer"]
            for index, name in enumerate(names):
                value: Any = lambda trial, index=index: trial.values[index]  # noqa: E731
                history = draw.plot_optimization_history(study, target=value, target_name=name)
                axes[f"history of the {name}"] = history
            axes["Pareto front"] = draw.plot_pareto_front(study, target_names=names)
            axes["Pareto front"].plot(*chosen.values, "o", ms=14, mfc="none", mec="tab:red")
        with replacing_folder(folder) as partial:
            log_figures({name: one.get_figure() for name, one in axes.items()}, partial)


def draw_final(folder: Path, metrics: Mapping[str, Any]) -> None:
    """Draw the final model's dials and exits, from the content of metrics.json."""
    test, (exits, axes) = metrics["test"], _figure()
    axes.bar(range(1, metrics["layers"] + 1), test["exit_histogram"])
    title = f"test: mean exit layer {test['mean_exit_layer']:.2f}"
    axes.set(xlabel="exit layer", ylabel="texts", title=title)
    log_figures({"dials": dials_picture(metrics), "exit histogram": exits}, folder)


def _figure() -> tuple[Figure, Any]:
    """Return a figure with axes, outside of pyplot: no global state changes."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6, 4), dpi=120, layout="constrained")
    return figure, figure.subplots()


def dials_picture(metrics: Mapping[str, Any]) -> Figure:
    """Return a figure of accuracy against mean exit layer for each dial, on validation examples."""
    own, whole = metrics["validation"], metrics["baseline"]["validation"]
    figure, axes = _figure()
    for dial in ("tolerance", "margin"):
        curve = metrics[f"{dial}_curve"]
        places = [(point["mean_exit_layer"], 100 * point["accuracy"]) for point in curve]
        axes.plot(*zip(*places, strict=True), "o-", label=f"halting_{dial}")
        # Where several settings coincide, only the last one is labelled.
        for place, point in dict(zip(places, curve, strict=True)).items():
            axes.annotate(f"{point[dial]:g}", place, fontsize=7)
    axes.axhline(100 * whole["accuracy"], color="grey", linestyle="--", label="whole encoder")
    place = own["mean_exit_layer"], 100 * own["accuracy"]
    axes.plot(*place, "s", ms=9, mfc="none", mec="tab:red", label="as set")
    axes.legend(fontsize=7)
    title = "validation, with the setting of the dial at each point"
    axes.set(xlabel="mean exit layer", ylabel="accuracy, %", title=title)
    return figure


def show_summary(progress: Progress, folder: Path) -> None:
    """Print the summary of a run, from the `folder` of its final fit."""
    metrics, defaults = read_json(folder / "metrics.json"), folder / "defaults" / "metrics.json"
    untuned = read_json(defaults) if defaults.is_file() else None
    console = progress.console
    lines = [
        f"Found: {metrics['confirmation']}",
        f"Result: {result(metrics)}",
        guarantee(metrics),
        *faster(metrics),
        f"Next: dact serve --model {folder / 'model'}",
    ]
    if metrics["validation"]["majority_share"] == 1:
        lines.append("Warning: all texts get one class: try class_weights or more epochs")
    for line in lines:
        console.print(line, soft_wrap=not console.is_terminal, highlight=False)
    console.print()
    console.print(_table(metrics, untuned))
    console.print(f"\nTotal time: {format_seconds(time.monotonic() - progress.started)}")


def result(metrics: Mapping[str, Any]) -> str:
    """Return accuracy, layers and speed on test beside the whole encoder's, from metrics.json."""
    test, baseline = metrics["test"], metrics["baseline"]
    speed = test["texts_per_second"] / baseline["test"]["texts_per_second"]
    return (
        f"{100 * test['accuracy']:.2f} % accuracy on test with {test['mean_exit_layer']:.2f} "
        f"layers, where the whole encoder has {100 * baseline['test']['accuracy']:.2f} % with "
        f"{baseline['layers']}; {speed:.1f} times its speed"
    )


def guarantee(metrics: Mapping[str, Any]) -> str:
    """Return a line about what is guaranteed for new texts, from metrics.json."""
    layers, margin = metrics["layers"], metrics["halting_margin"]
    calibration = metrics.get("calibration")
    if metrics["halting_tolerance"] == 0 and margin == 1:
        return f"Guaranteed by proof: each text gets the answer of all {layers} layers"
    if calibration is None:
        return f"Nothing is guaranteed at margin {margin:.4g}"
    promise = calibration["promise"]
    kept = what_is_promised(promise, "the same model without early exit", layers)
    if promise["confidence"] is None:
        return f"Estimated, without a guarantee: {kept}"
    return f"Guaranteed with {promise['confidence']:.0%} confidence on new texts: {kept}"


def faster(metrics: Mapping[str, Any]) -> list[str]:
    """Return a line about a margin that saves layers without a guarantee, if there is one."""
    own = metrics["validation"]
    least = own["accuracy"] - FASTER
    points = [point for point in metrics["margin_curve"] if point["accuracy"] >= least]
    best = min(points, key=lambda point: point["mean_exit_layer"], default=own)
    if best["mean_exit_layer"] > own["mean_exit_layer"] - 0.1:
        return []
    gain = 100 * (best["accuracy"] - own["accuracy"])
    return [
        f"Faster without a guarantee: --halting_margin {best['margin']:g} takes "
        f"{best['mean_exit_layer']:.2f} layers at {gain:+.1f} points on validation"
    ]


def _table(metrics: Mapping[str, Any], untuned: Mapping[str, Any] | None) -> Table:
    """Return the results on test, side by side."""
    test, layers, baseline = metrics["test"], metrics["layers"], metrics["baseline"]
    rows = [
        ("whole encoder", baseline["test"], baseline["layers"]),
        (f"all {layers} layers", test["full_depth"], layers),
        (metrics["confirmation"].split()[0], test, test["mean_exit_layer"]),
    ]
    if untuned is not None:
        rows.append(("your file", untuned["test"], untuned["test"]["mean_exit_layer"]))
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    for head in ("test", "accuracy", "to whole encoder", "macro F1", "layers", "texts/s"):
        table.add_column(head, justify="left" if head == "test" else "right")
    for name, entry, mean in rows:
        points, difference = "", entry.get("difference_to_baseline")
        if difference is not None:
            error = difference["standard_error"]
            points = f"{100 * difference['accuracy']:+.2f} ± {100 * error:.2f}"
        speed = entry.get("texts_per_second")
        table.add_row(
            name,
            f"{100 * entry['accuracy']:.2f} %",
            points,
            f"{entry['macro_f1']:.3f}",
            f"{mean:.2f}",
            speed and f"{speed:,.0f}",
        )
    return table
