"""Trials in TensorBoard's HParams tab, with their real metrics and status.

Lightning's own hyper-parameter logging gives every trial the status of success and a metric of -1,
so the records of the plugin are written here, through its public summaries."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from optuna.distributions import CategoricalDistribution, IntDistribution

from dact.files import replacing
from dact.tuning.space import Dimension

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from torch.utils.tensorboard import SummaryWriter

METRICS = ("val_loss", "val_task_loss", "val_accuracy", "val_exit_layer")


def writer(folder: Path) -> SummaryWriter:
    """Return a TensorBoard writer for `folder`, to be used in a ``with`` block."""
    from torch.utils.tensorboard import SummaryWriter

    return SummaryWriter(str(folder))


def log_parameters(writer: SummaryWriter, parameters: Mapping[str, Any], name: str) -> None:
    """Open the session of a trial. The tab takes sessions of one name for one trial, so names begin
    with the tag."""
    from tensorboard.plugins.hparams import summary_v2

    known = {
        name: "none" if value is None else value for name, value in parameters.items()
    }  # it has no type for None
    _write(writer, summary_v2.hparams_pb(known, trial_id=name))


def log_outcome(writer: SummaryWriter, metrics: Mapping[str, float], succeeded: bool) -> None:
    """Close the session of a trial with the metrics of its best epoch; pruned and failed trials
    count as failures."""
    from tensorboard.compat.proto.summary_pb2 import Summary
    from tensorboard.plugins.hparams import api_pb2, metadata, plugin_data_pb2

    for name in METRICS:
        if name in metrics:
            writer.add_scalar(f"best/{name}", metrics[name])
    status = "STATUS_SUCCESS" if succeeded else "STATUS_FAILURE"
    end = plugin_data_pb2.SessionEndInfo(status=api_pb2.Status.Value(status))
    record = metadata.create_summary_metadata(
        plugin_data_pb2.HParamsPluginData(session_end_info=end)
    )
    _write(
        writer, Summary(value=[Summary.Value(tag=metadata.SESSION_END_INFO_TAG, metadata=record)])
    )


def log_fit(
    folder: Path, parameters: Mapping[str, Any], metrics: Mapping[str, float], name: str
) -> None:
    """Log a finished fit as trials are logged.

    Args:
        folder: Folder of the fit.
        parameters: Its parameters.
        metrics: Metrics of its best epoch.
        name: Name of its session.
    """
    with writer(folder) as made:
        log_parameters(made, parameters, name)
        log_outcome(made, metrics, succeeded=True)


def log_experiment(writer: SummaryWriter, parameters: Mapping[str, Dimension]) -> None:
    """Write the record that tells the HParams tab which parameters and metrics there are.

    The tab uses the first such record below its folder for all runs there, so every record names
    those of all studies."""
    from tensorboard.plugins.hparams import summary_v2

    hparams = [
        summary_v2.HParam(name, _domain(dimension)) for name, dimension in parameters.items()
    ]
    metrics = [summary_v2.Metric(f"best/{name}", display_name=name) for name in METRICS]
    _write(writer, summary_v2.hparams_config_pb(hparams=hparams, metrics=metrics))


def log_figures(writer: SummaryWriter, figures: Mapping[str, Figure], folder: Path) -> None:
    """Write figures as pictures in TensorBoard, and as PNG files of a folder. Each is drawn
    once."""
    from tensorboard.compat.proto.summary_pb2 import Summary

    for name, figure in figures.items():
        with replacing(folder / f"{name.replace(' ', '_')}.png") as file:
            figure.savefig(file, format="png")
            drawn = file.read_bytes()
        width, height = figure.canvas.get_width_height()
        image = Summary.Image(width=width, height=height, colorspace=4, encoded_image_string=drawn)
        _write(writer, Summary(value=[Summary.Value(tag=name, image=image)]))


def _domain(dimension: Dimension) -> Any:
    """Return the range as the tab's filters need it."""
    from tensorboard.plugins.hparams import summary_v2

    if isinstance(dimension, CategoricalDistribution):  # which must be of one type
        kinds = {type(choice) for choice in dimension.choices}
        alike: Any = None if len(kinds) == 1 else float if kinds == {int, float} else str
        return summary_v2.Discrete(
            [choice if alike is None else alike(choice) for choice in dimension.choices]
        )
    if isinstance(dimension, IntDistribution):
        return summary_v2.IntInterval(int(dimension.low), int(dimension.high))
    return summary_v2.RealInterval(float(dimension.low), float(dimension.high))


def _write(writer: SummaryWriter, summary: Any) -> None:
    writer._get_file_writer().add_summary(summary)
