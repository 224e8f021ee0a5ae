"""The final fit with all winners: checkpoints, measurements, pictures, and the model to take
away."""

from __future__ import annotations

import inspect
import os
import shutil
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import yaml
from lightning.pytorch import LightningDataModule

from dact import plots
from dact.calibration import calibrate, describe
from dact.calibration.answers import layer_answers, mean_and_error
from dact.calibration.temperature import fit_temperatures
from dact.callbacks import AverageLastSteps, save_with_tokenizer
from dact.files import read_json, replacing_folder, write_json, write_text
from dact.model import DACT
from dact.saving import store_in_checkpoint
from dact.submodels import SubmodelConfig
from dact.tuning import pictures, tensorboard
from dact.tuning.checkpointed_fit import CheckpointedFit
from dact.tuning.confirmation import FOLDER, Verdict
from dact.tuning.digests import data_digest
from dact.tuning.evaluation import (
    MARGINS,
    TOLERANCES,
    Evaluation,
    dial_curve,
    evaluate,
    texts_per_second,
)
from dact.tuning.fitting import NonFiniteLoss, averages
from dact.tuning.prepared import Prepared
from dact.tuning.progress import Progress
from dact.tuning.recipe import Recipe, is_plain
from dact.tuning.run import Run
from dact.tuning.stages import flat

MEASURED_BATCH = 1024  # texts that early exit gets at a time where it is timed


@dataclass(frozen=True)
class FinalFit:
    """The final fit of a run.

    Args:
        run: The run.
        prepared: Shared inputs of its fits.
        verdict: Result of the confirmation.
        progress: Console of the run.
    """

    run: Run
    prepared: Prepared
    verdict: Verdict
    progress: Progress

    @property
    def recipe(self) -> Recipe:
        """The recipe of the run."""
        return self.prepared.recipe

    def __call__(self) -> tuple[str, str]:
        """Fit, measure and write ``<run>/final``, except for what is already done. The caller holds
        the run's lock.

        A fit that the confirmation has finished is reused. The final model of earlier winners stays
        as ``final.old`` until the new one is complete.

        Returns:
            The paths of metrics.json and of the best checkpoint.

        Raises:
            NonFiniteLoss: If the loss of the fit is not finite.
        """
        folder, old = self.run.final, self.run.folder / "final.old"
        # Not the winner's batch size, so that times are comparable.
        data = self.recipe.data_for("fit", "test", batch_size=MEASURED_BATCH)
        metrics = folder / "metrics.json"
        fit = CheckpointedFit(self.prepared, folder, self.verdict.chosen.settings)
        self._make_room(fit, old, data)
        if not (metrics.is_file() and fit.checkpoint.is_file()):
            fit(f"the final fit of {self.run.tag!r}", self.progress)
            self._measure(folder, fit, data)
        else:
            stored = read_json(metrics)
            if stored.get("confirmation") != self.verdict.text:  # against other candidates
                write_json(metrics, {**stored, "confirmation": self.verdict.text})
            if self.recipe.compare_defaults:
                self._measure_defaults(folder / "defaults", data)
        shutil.rmtree(old, ignore_errors=True)
        for checkpoints in (self.run.folder / FOLDER).glob("*/fit/checkpoints"):
            shutil.rmtree(checkpoints)  # of those that lost
        return str(metrics), str(fit.checkpoint)

    def _make_room(self, fit: CheckpointedFit, old: Path, data: LightningDataModule) -> None:
        """Remove from ``<run>/final`` what does not belong to a fit, and put there what the
        confirmation did of it."""
        folder, recipe = fit.folder, self.recipe
        promise = None if recipe.promise is None else asdict(recipe.promise)
        aside: Any = (
            data.calibration_dataloader() if hasattr(data, "calibration_dataloader") else None
        )
        measurement = {
            "test": data_digest(data.test_dataloader()),
            "calibration": data_digest(aside) if promise and hasattr(aside, "dataset") else None,
            "promise": promise,
            "tolerance": recipe.halting_tolerance,
        }
        if not fit.is_begun:
            if (
                folder / "metrics.json"
            ).is_file():  # an earlier final model stays until the new one is complete
                shutil.rmtree(old, ignore_errors=True)
                os.replace(folder, old)
            shutil.rmtree(folder, ignore_errors=True)
            confirmed = self.verdict.chosen.fit(self.run, self.prepared)
            if confirmed.is_done:
                os.replace(confirmed.folder, folder)
        if fit.made_of() != {"fit": fit.identity, **measurement}:
            (folder / "metrics.json").unlink(
                missing_ok=True
            )  # another promise or test split measures the fit again
            shutil.rmtree(folder / "defaults", ignore_errors=True)
            write_text(folder / "config.yaml", yaml.safe_dump(self._config(fit), sort_keys=False))
            fit.record(**measurement)

    def _config(self, fit: CheckpointedFit) -> dict[str, Any]:
        """Return the configuration of the final fit: a complete file if the factories come from
        one.

        Data that can name a teacher names the baseline's model; other data leaves ``dact fit``
        without a teacher."""
        model, data = (
            getattr(factory, "section", None) for factory in (self.recipe.model, self.recipe.data)
        )
        chosen = dict(fit.settings or {})
        if model is None or data is None:
            return chosen
        size = {"batch_size": chosen.pop("batch_size")} if "batch_size" in chosen else {}
        epochs = chosen.pop("num_epochs", self.recipe.epochs)
        plain = {name: value for name, value in self.recipe.trainer.items() if is_plain(value)}
        if fit.finetunes and not averages(self.recipe.trainer):
            plain["callbacks"] = [
                {"class_path": f"{AverageLastSteps.__module__}.{AverageLastSteps.__qualname__}"}
            ]
        arguments = self.recipe.overrides({**fit.learning, **chosen})
        overrides = {
            n: asdict(v) if isinstance(v, SubmodelConfig) else v for n, v in arguments.items()
        }
        given = {**(data.get("init_args") or {}), **size}
        known = inspect.signature(type(self.recipe.make_data()).__init__).parameters
        passes_on = any(parameter.kind is parameter.VAR_KEYWORD for parameter in known.values())
        if self.recipe.calibration_fraction is not None and (
            "calibration_fraction" in known or passes_on
        ):
            given["calibration_fraction"] = self.recipe.calibration_fraction
        if self.prepared.teacher is not None and given.get("teacher") is None:
            if "teacher" in known:
                given["teacher"] = str(self.run.folder / "baseline" / "model")
            else:
                overrides["distillation"] = 0.0
        return {
            "seed_everything": fit.seed,
            "trainer": {**plain, "max_epochs": epochs},
            "model": {**model, **overrides},
            "data": {**data, "init_args": given},
        }

    def _measure(self, folder: Path, fit: CheckpointedFit, data: LightningDataModule) -> None:
        """Write metrics.json, pictures and the model/ folder. Only here, once, is the test split
        used."""
        model, baseline = fit.model(), self._baseline()
        before = (model.calibration, model.temperatures)
        try:
            note = self._set_dial(model, data)
        except ValueError as error:  # all that was computed is kept
            note = f"the model is kept without its promise: {error}"
        if note:
            self.progress.note(note)
        with self.recipe.precision():
            answers = layer_answers(model, data.val_dataloader())
        model.temperatures = fit_temperatures(answers, answers.exit_layers(model.exit_rule))
        if (model.calibration, model.temperatures) != before:
            store_in_checkpoint(fit.checkpoint, model)
        with self.progress.stage("measuring the final model and the baseline"):
            found, against = self._evaluate(model, data), self._evaluate(baseline, data)
            self._time(model, baseline, data, found, against)
        del found["validation"].entry["calibration_error"]  # its examples have set the temperatures
        kept = ("accuracy", "macro_f1", "task_loss", "texts_per_second")
        answers, reference = (
            found["validation"].answers,
            against["validation"].answers.a[:, -1].argmax(dim=1),
        )
        tolerances = dial_curve(model, answers, "halting_tolerance", TOLERANCES, reference)
        margins = dial_curve(model, answers, "halting_margin", MARGINS, reference)
        metrics = {
            **_entries(found, against),
            "baseline": {
                "layers": baseline.num_layers,
                **{
                    name: {key: entry.entry[key] for key in kept} for name, entry in against.items()
                },
            },
            "tolerance_curve": tolerances,
            "margin_curve": margins,
            "history": fit.history,
            "lambda_reg": model.lambda_reg,
            "halting_tolerance": model.halting_tolerance,
            "halting_margin": model.halting_margin,
            "layers": model.num_layers,
            "confirmation": self.verdict.text,
        }
        if model.calibration is not None:
            metrics["calibration"] = model.calibration
        with replacing_folder(folder / "model") as partial:
            save_with_tokenizer(model.cpu(), data, partial, metrics=metrics)
        self._draw(folder, found, metrics)
        self._log(fit, found["validation"])
        if self.recipe.compare_defaults:
            self._measure_defaults(folder / "defaults", data, against)
        write_json(folder / "metrics.json", metrics)  # last, since it marks everything as done

    def _set_dial(self, model: DACT, data: LightningDataModule) -> str:
        """Set the dial of a model for the promise of the run, and return a text about the result,
        or an empty one."""
        promise = self.recipe.promise
        if promise is None or (promise.max_layers or 0) >= model.num_layers:
            model.calibration = None  # the promise is no longer asked for
            return (
                ""
                if promise is None
                else f"max_layers={promise.max_layers:g} holds at every margin: the model has {model.num_layers} layers"
            )
        with self.recipe.precision():
            return describe(calibrate(model, data, **asdict(promise)), model.num_layers)

    def _baseline(self) -> DACT:
        whole = self.recipe.whole(self.recipe.make_model())
        return self.prepared.baseline.load(whole.at_full_depth()).eval().to(self.recipe.device)

    def _evaluate(self, model: DACT, data: LightningDataModule) -> dict[str, Evaluation]:
        return {
            name: evaluate(model, loader, precision=self.recipe.precision)
            for name, loader in _splits(data)
        }

    def _time(
        self,
        model: DACT,
        baseline: DACT,
        data: LightningDataModule,
        found: Mapping[str, Evaluation],
        against: Mapping[str, Evaluation],
    ) -> None:
        """Measure the speed of early exit, of the model's full depth and of the baseline in
        turns."""
        for name, loader in _splits(data):
            entries = [found[name].entry, found[name].entry["full_depth"], against[name].entry]
            sides = [(model, model.halting), (model, "never"), (baseline, "never")]
            speeds = texts_per_second(sides, loader, self.recipe.precision)
            for entry, speed in zip(entries, speeds, strict=True):
                entry["texts_per_second"] = speed

    def _log(self, fit: CheckpointedFit, validation: Evaluation) -> None:
        """Log a fit to TensorBoard as trials are logged, with its metrics at the setting of its
        dial."""
        metrics = {f"val_{name}": validation.entry[name] for name in ("task_loss", "accuracy")}
        metrics |= {
            "val_loss": fit.kept["val_loss"],
            "val_exit_layer": validation.entry["mean_exit_layer"],
        }
        name = f"{self.run.tag}/{fit.folder.relative_to(self.run.folder)}"
        tensorboard.log_fit(fit.folder, flat(fit.settings or {}), metrics, name)

    def _draw(
        self, folder: Path, found: Mapping[str, Evaluation], metrics: Mapping[str, Any]
    ) -> None:
        validation, test, layers = found["validation"].entry, found["test"], metrics["layers"]
        own, baseline = (
            (validation["mean_exit_layer"], validation["accuracy"]),
            metrics["baseline"]["validation"],
        )
        curves = metrics["tolerance_curve"], metrics["margin_curve"]
        figures = {
            "dials": pictures.dials_picture(*curves, layers, own, baseline["accuracy"]),
            "exit histogram": pictures.exit_picture(test.entry),
        }
        if test.answers.depths is not None:
            figures["depth against exit layer"] = plots.depth_against_exit(
                test.answers.depths, test.exit_layers, layers
            )
        with tensorboard.writer(folder) as writer:
            tensorboard.log_figures(writer, figures, folder)
            for point in reversed(metrics["margin_curve"]):
                for name in ("accuracy", "mean_exit_layer", "agreement"):
                    writer.add_scalar(
                        f"operating points by margin in %/{name}",
                        point[name],
                        round(100 * point["margin"]),
                    )

    def _measure_defaults(
        self,
        folder: Path,
        data: LightningDataModule,
        against: Mapping[str, Evaluation] | None = None,
    ) -> None:
        """Fit the untuned defaults of the factories, and measure them under the promise of the
        run."""
        fit = CheckpointedFit(self.prepared, folder, None)
        if (folder / "metrics.json").is_file():
            return
        try:
            fit("the fit of the defaults", self.progress)
        except NonFiniteLoss as error:
            self.progress.note(f"the defaults are not in the table: {error}")
            return
        model = fit.model()
        try:
            self._set_dial(model, data)
        except ValueError as error:  # they cannot keep it
            self.progress.note(f"the defaults are not in the table: {error}")
            return
        with self.progress.stage("measuring the defaults"):
            found = self._evaluate(model, data)
            against = against or self._evaluate(self._baseline(), data)
        self._log(fit, found["validation"])
        dials = {
            "halting_tolerance": model.halting_tolerance,
            "halting_margin": model.halting_margin,
        }
        entries = {
            **_entries(found, against),
            **dials,
            "layers": model.num_layers,
            "calibration": model.calibration,
        }
        write_json(folder / "metrics.json", entries)
        shutil.rmtree(fit.checkpoint.parent)


def _splits(data: LightningDataModule) -> tuple[tuple[str, Any], ...]:
    return ("validation", data.val_dataloader()), ("test", data.test_dataloader())


def _entries(
    found: Mapping[str, Evaluation], against: Mapping[str, Evaluation]
) -> dict[str, dict[str, Any]]:
    """Return the entries of a model, each with its paired difference to the baseline."""
    for name, evaluation in found.items():
        if len(evaluation.right) == len(against[name].right):
            mean, error = mean_and_error(evaluation.right.double() - against[name].right.double())
            evaluation.entry["difference_to_baseline"] = {"accuracy": mean, "standard_error": error}
    return {name: evaluation.entry for name, evaluation in found.items()}
