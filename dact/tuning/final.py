"""The final fit: its dial, its measurements, its pictures, and its ``model/`` folder."""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

import yaml
from lightning.pytorch import LightningDataModule

from dact.calibration import calibrate, describe
from dact.calibration.answers import layer_answers
from dact.calibration.temperature import fit_temperatures
from dact.callbacks import AverageLastSteps, save_with_tokenizer
from dact.factories import accepted_by, build_model
from dact.files import replacing_folder, write_json, write_text
from dact.model import DACT
from dact.saving import store_in_checkpoint
from dact.submodels import SubmodelConfig
from dact.tuning import report
from dact.tuning.evaluation import (
    MARGINS,
    TOLERANCES,
    Evaluation,
    dial_curve,
    evaluate,
    texts_per_second,
)
from dact.tuning.fit import CheckpointedFit
from dact.tuning.prepared import Prepared
from dact.tuning.progress import Progress
from dact.tuning.recipe import is_plain
from dact.tuning.settings import Settings
from dact.tuning.trainer import MONITOR, NonFiniteLoss, averages, resumable_fit, seeded

MEASURED_BATCH = 1024  # texts per batch where models are measured and timed
BASELINE_KEYS = ("accuracy", "macro_f1", "task_loss", "texts_per_second")
Evaluations = Mapping[str, Evaluation]  # by split


def final_fit(
    prepared: Prepared, chosen: Settings, verdict: str, progress: Progress
) -> dict[str, str]:
    """Do the final fit, or reuse the re-fit of the chosen settings, and measure the model.

    Args:
        verdict: Result of the re-fit under new seeds, as text.

    Returns:
        The paths of ``metrics`` and ``checkpoint``, in ``<run>/final``.

    Raises:
        NonFiniteLoss: If the loss of the fit is not finite.
    """
    run, final = prepared.run, prepared.run.final
    fit = CheckpointedFit(prepared, final, chosen)
    confirmed = run.folder / "refit" / verdict.split()[0] / "fit"
    if confirmed.is_dir():
        shutil.rmtree(final, ignore_errors=True)
        os.replace(confirmed, final)
    fit("final fit", progress)
    write_text(final / "config.yaml", yaml.safe_dump(_config(fit), sort_keys=False))

    # Not the winner's batch size, so that times are comparable.
    data = prepared.recipe.data_for("fit", "test", batch_size=MEASURED_BATCH)
    write_json(final / "metrics.json", _measure(fit, data, verdict, progress))
    for lost in (run.folder / "refit").glob("*/fit/checkpoints"):
        shutil.rmtree(lost)
    return {"metrics": str(final / "metrics.json"), "checkpoint": str(fit.checkpoint)}


def _config(fit: CheckpointedFit) -> dict[str, Any]:
    """Return a configuration for `dact fit` if the factories come from a file, otherwise the
    settings of the final fit."""
    prepared, recipe, settings = fit.prepared, fit.prepared.recipe, fit.settings
    if getattr(recipe.model, "func", None) is not build_model:
        return settings.arguments()
    model, data = (one.args[0] for one in (recipe.model, recipe.data))  # type: ignore[union-attr]

    trainer = {name: value for name, value in recipe.trainer.items() if is_plain(value)}
    trainer["max_epochs"] = settings.num_epochs or recipe.epochs
    if not fit.keep_frozen and not averages(recipe.trainer):
        average = f"{AverageLastSteps.__module__}.{AverageLastSteps.__qualname__}"
        trainer["callbacks"] = [{"class_path": average}]

    overrides = recipe.overrides(fit.arguments)
    given = dict(data.get("init_args") or {})
    chosen: dict[str, Any] = {
        "batch_size": settings.batch_size,
        "calibration_fraction": recipe.calibration_fraction,
    }
    if prepared.teacher is not None and given.get("teacher") is None:
        chosen["teacher"] = str(prepared.run.folder / "whole_encoder" / "model")
    known = accepted_by(type(recipe.make_data())) or ()
    given |= {name: one for name, one in chosen.items() if one is not None and name in known}
    if prepared.teacher is not None and not given.get("teacher"):
        overrides["distillation"] = 0.0
    plain = {n: asdict(v) if isinstance(v, SubmodelConfig) else v for n, v in overrides.items()}
    return {
        "seed_everything": fit.seed,
        "trainer": trainer,
        "model": {**model, **plain},
        "data": {**data, "init_args": given},
    }


def _measure(
    fit: CheckpointedFit, data: LightningDataModule, verdict: str, progress: Progress
) -> dict[str, Any]:
    """Measure the final model, write its pictures and its model/ folder, and return the content of
    metrics.json. The test split is used only here, once."""
    prepared, recipe, folder = fit.prepared, fit.prepared.recipe, fit.folder
    model, baseline = fit.model(), prepared.whole_encoder()
    progress.note(_set_dial(prepared, model, data))
    with recipe.precision():
        answers = layer_answers(model, data.val_dataloader())
    model.temperatures = fit_temperatures(answers, answers.exit_layers(model.exit_rule))
    store_in_checkpoint(fit.checkpoint, model)

    with progress.stage("measuring the final model and the whole encoder"):
        against = _evaluate(prepared, baseline, data)
        found = _evaluate(prepared, model, data, against)
        for split, batches in _splits(data).items():
            entry = found[split].entry
            sides = [(model, model.halting), (model, "never"), (baseline, "never")]
            entries = [entry, entry["full_depth"], against[split].entry]
            speeds = texts_per_second(sides, batches, recipe.precision)
            for one, speed in zip(entries, speeds, strict=True):
                one["texts_per_second"] = speed
    del found["validation"].entry["calibration_error"]  # temperatures were fitted on this split

    reference: dict[str, Any] = {"layers": baseline.num_layers}
    for split, one in against.items():
        reference[split] = {key: one.entry[key] for key in BASELINE_KEYS}
    metrics = {
        **_result(model, found),
        "baseline": reference,
        "tolerance_curve": dial_curve(model, answers, "halting_tolerance", TOLERANCES),
        "margin_curve": dial_curve(model, answers, "halting_margin", MARGINS),
        "history": fit.history,
        "lambda_reg": model.lambda_reg,
        "confirmation": verdict,
    }
    with replacing_folder(folder / "model") as partial:
        save_with_tokenizer(model.cpu(), data, partial, metrics=metrics)
    report.draw_final(folder, metrics)
    shown = report.metrics_of(found["validation"].measured, model.class_weights)
    prepared.log(folder, fit.settings, {MONITOR: fit.val_loss, **shown})
    if recipe.compare_defaults:
        _measure_defaults(prepared, data, against, progress)
    return metrics


def _set_dial(prepared: Prepared, model: DACT, data: LightningDataModule) -> str:
    """Set the dial of a model for the promise of the run, and return a line about the result."""
    promise = prepared.recipe.promise
    if promise is None:
        return "there is no promise: the margin and the tolerance stay as given"
    with prepared.recipe.precision():
        try:
            found = calibrate(model, data, **asdict(promise))
            return describe(vars(found), model.num_layers)
        except ValueError as error:
            # The results of the run are kept, without a promise.
            return f"the promise cannot be kept: {error}"


def _splits(data: LightningDataModule) -> dict[str, Any]:
    return {"validation": data.val_dataloader(), "test": data.test_dataloader()}


def _evaluate(
    prepared: Prepared, model: DACT, data: LightningDataModule, against: Evaluations | None = None
) -> Evaluations:
    precision, whole = prepared.recipe.precision, against or {}
    return {
        split: evaluate(model, batches, precision=precision, baseline=whole.get(split))
        for split, batches in _splits(data).items()
    }


def _result(model: DACT, found: Evaluations) -> dict[str, Any]:
    """Return the entries of metrics.json about a model."""
    names = ("calibration", "halting_tolerance", "halting_margin")
    return {
        **{split: one.entry for split, one in found.items()},
        "layers": model.num_layers,
        **{name: getattr(model, name) for name in names},
    }


def _measure_defaults(
    prepared: Prepared, data: LightningDataModule, against: Evaluations, progress: Progress
) -> None:
    """Fit the factories' settings without tuning, and measure them under the run's promise."""
    recipe, folder = prepared.recipe, prepared.run.final / "defaults"
    checkpoints, epochs = folder / "checkpoints", recipe.epochs
    try:
        with seeded(recipe.seed), progress.fit("your file", epochs) as bar:
            model, own = recipe.model(), recipe.make_data()
            history = resumable_fit(recipe.trainer, model, own, checkpoints, bar, epochs=epochs)
    except (NonFiniteLoss, ValueError) as error:  # a teacher may be missing
        progress.note(f"your file is not in the table: {error}")
        return
    model.eval().to(recipe.device)
    _set_dial(prepared, model, data)
    with progress.stage("measuring your file"):
        found = _evaluate(prepared, model, data, against)
    loss, settings = history.epochs[-1][MONITOR], Settings(num_epochs=epochs)
    shown = report.metrics_of(found["validation"].measured, model.class_weights)
    prepared.log(folder, settings, {MONITOR: loss, **shown})
    write_json(folder / "metrics.json", _result(model, found))
    shutil.rmtree(checkpoints)
