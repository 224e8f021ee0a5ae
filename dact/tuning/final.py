"""The final fit with all winners: checkpoints, measurements, pictures, and the model to take away."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml
from lightning.pytorch import LightningDataModule
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import TensorBoardLogger

from dact import plots
from dact.calibration import calibrate, describe, store_in_checkpoint
from dact.files import replacing, replacing_folder, write_json, write_text
from dact.model import DACT
from dact.tuning import pictures, report, tensorboard
from dact.tuning.objective import History, fit, make_trainer, seed_trial

if TYPE_CHECKING:
    from dact.tuning.engine import TuningEngine

MEASURED_BATCH = 1024  # texts that early exit gets at a time where it is timed


def fit_winners(engine: TuningEngine, folder: Path, winners: Mapping[str, Any]) -> tuple[str, str]:
    """Fit, measure and write `folder`, as far as it is not done. One process at a time.

    Args:
        engine: What makes models and data.
        folder: ``<run>/final``.
        winners: What the studies chose.

    Returns:
        The paths of metrics.json and of the best checkpoint.
    """
    metrics_path, model_path = folder / "metrics.json", folder / "checkpoints" / "best.ckpt"
    chosen: dict[str, Any] = dict(winners)
    if engine.halting_tolerance is not None:
        chosen["halting_tolerance"] = engine.halting_tolerance
    if engine.promise is not None:
        chosen["promise"] = asdict(engine.promise)
    config_path = folder / "config.yaml"
    before = yaml.safe_load(config_path.read_text()) if config_path.is_file() else {}
    if {name: before.get(name) for name in winners} != dict(winners):
        shutil.rmtree(folder, ignore_errors=True)  # of other winners; a later call must not go on with its checkpoints
    if before != chosen:
        metrics_path.unlink(missing_ok=True)  # of another tolerance or promise
        write_text(config_path, yaml.safe_dump(chosen, sort_keys=False))
    if not (metrics_path.is_file() and model_path.is_file()):
        settings = {name: value for name, value in winners.items() if name != "num_epochs"}
        history = _fit(engine, folder, settings, winners["num_epochs"])
        _measure(engine, folder, history)
    elif engine.compare_defaults:
        _measure_defaults(engine, folder / "defaults", None)
    engine.display.summary(engine, folder)
    return str(metrics_path), str(model_path)


def _fit(engine: TuningEngine, folder: Path, settings: Mapping[str, Any], epochs: int) -> History:
    """Fit with `settings` and keep the best epoch and the last; goes on with the last one that an earlier call kept."""
    seed_trial(engine.seed)
    model, data = engine.build(settings)
    checkpoint = ModelCheckpoint(
        folder / "checkpoints", "best", monitor="val_loss", save_last=True, enable_version_counter=False
    )
    history = History()
    last = folder / "checkpoints" / "last.ckpt"
    with engine.display.fit(f"{folder.name} fit, {epochs} epochs") as progress:
        trainer = make_trainer(
            engine.trainer,
            max_epochs=epochs,
            logger=TensorBoardLogger(folder.parent, name="", version=folder.name, default_hp_metric=False),
            callbacks=[history, progress, checkpoint],
            enable_checkpointing=True,
        )
        ckpt_path = str(last) if last.is_file() else None
        fit(trainer, model, data, ckpt_path=ckpt_path, final=folder.name == "final")
    return history


def _measure(engine: TuningEngine, folder: Path, history: History) -> None:
    """metrics.json, pictures and the model/ folder. The test split is looked at here, once."""
    data = _measured_data(engine)
    model = _fitted(engine, folder)
    before = model.calibration
    if engine.promise is not None:
        promised = {name: value for name, value in asdict(engine.promise).items() if value is not None}
        engine.display.note(describe(calibrate(model, data, **promised), model.encoder.num_layers))
    else:
        model.end_calibration()  # of a promise that is not asked for any more
    if model.calibration != before:
        store_in_checkpoint(folder / "checkpoints" / "best.ckpt", model)
    with engine.display.stage("measuring the final model"):
        validation = report.evaluate(model, data.val_dataloader())
        test = report.evaluate(model, data.test_dataloader())
    metrics = {
        "validation": validation.entry,
        "test": test.entry,
        "tolerance_curve": validation.tolerance_curve,
        "history": history.epochs,
        "lambda_reg": engine.lambda_reg,
        "halting_tolerance": model.halting_tolerance,
        "layers": model.encoder.num_layers,
    }
    if model.halting_margin < 1:
        metrics |= {"halting_margin": model.halting_margin, "margin_curve": validation.margin_curve}
    if engine.promise is not None:
        metrics["calibration"] = model.calibration
    with replacing_folder(folder / "model") as partial:
        model.cpu().save_pretrained(partial)
        tokenizer = getattr(data, "tokenizer", None)
        if tokenizer is not None:
            tokenizer.save_pretrained(str(partial))
    figures = {
        "dials": pictures.dials_picture(validation.tolerance_curve, validation.margin_curve, model.encoder.num_layers),
        "exit histogram": pictures.exit_picture(test.entry),
    }
    if test.depths is not None:
        layers = model.encoder.num_layers
        figures["depth against exit layer"] = plots.depth_against_exit(test.depths, test.exit_layers, layers)
    with tensorboard.writer(folder) as writer:
        for name, figure in figures.items():
            with replacing(folder / f"{name.replace(' ', '_')}.png") as picture:
                figure.savefig(picture, format="png")
            writer.add_figure(name, figure)
    if engine.compare_defaults:
        _measure_defaults(engine, folder / "defaults", data)
    write_json(folder / "metrics.json", metrics)  # last: it says that all is done


def _measure_defaults(engine: TuningEngine, folder: Path, data: LightningDataModule | None) -> None:
    """Fit and measure what the factories make by themselves, the same way: what tuning has to beat."""
    if (folder / "metrics.json").is_file():
        return
    data = data or _measured_data(engine)
    _fit(engine, folder, {}, engine.trainer["max_epochs"])
    model = _fitted(engine, folder)
    loaders = {"validation": data.val_dataloader(), "test": data.test_dataloader()}
    entries = {name: report.evaluate(model, loader, timed=False).entry for name, loader in loaders.items()}
    write_json(folder / "metrics.json", entries)
    shutil.rmtree(folder / "checkpoints")


def _measured_data(engine: TuningEngine) -> LightningDataModule:
    data = engine.make_data(batch_size=MEASURED_BATCH)  # not the winner's size: times would not compare
    data.prepare_data()
    for stage in ("fit", "test"):
        data.setup(stage)
    return data


def _fitted(engine: TuningEngine, folder: Path) -> DACT:
    """The model of the best epoch, on the device that it should use."""
    encoder = engine.make_model().encoder
    own = encoder if encoder.config() is None else None  # one of the user's, which no checkpoint can rebuild
    model = DACT.load_from_checkpoint(folder / "checkpoints" / "best.ckpt", encoder=own).eval()
    return model.to(engine.device)
