"""The final fit with all winners: checkpoints, measurements, pictures, and the model to take away."""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import yaml
from lightning.pytorch import LightningDataModule

from dact import plots
from dact.answers import layer_answers, mean_and_error
from dact.calibration import calibrate, describe, store_in_checkpoint
from dact.callbacks import save_with_tokenizer
from dact.files import read_json, replacing, replacing_folder, write_json, write_text
from dact.model import DACT
from dact.scores import fit_temperatures
from dact.submodels import SubmodelConfig
from dact.tuning import pictures, tensorboard
from dact.tuning.confirmation import Verdict, flat
from dact.tuning.final_metrics import Evaluation, evaluate
from dact.tuning.fingerprints import digest, fingerprint_data
from dact.tuning.fitting import NonFiniteLoss, resumable_fit, seeded, without_collapse_warning
from dact.tuning.prepared import Prepared
from dact.tuning.progress import Progress
from dact.tuning.recipe import Recipe
from dact.tuning.run import Run

MEASURED_BATCH = 1024  # texts that early exit gets at a time where it is timed
MADE_OF = "made_of.json"  # what a final fit was made of; another one replaces it


@dataclass(frozen=True)
class FinalFit:
    """The final fit of a run.

    Args:
        run: The run.
        shared: What its fits share.
        verdict: What the confirmation chose.
        keep_frozen: Whether the encoder of frozen mode stays frozen.
        compare_defaults: Whether to fit and measure what the factories make without tuning as well.
        progress: What the console shows.
    """

    run: Run
    shared: Prepared
    verdict: Verdict
    keep_frozen: bool
    compare_defaults: bool
    progress: Progress

    @property
    def recipe(self) -> Recipe:
        """What fits of the run are made of."""
        return self.shared.recipe

    def __call__(self) -> tuple[str, str]:
        """Fit, measure and write ``<run>/final`` as far as it is not done. One process at a time.

        The final model of earlier winners stays as ``final.old`` until the new one is whole.

        Returns:
            The paths of metrics.json and of the best checkpoint.

        Raises:
            NonFiniteLoss: If the loss of the fit is not finite.
        """
        folder, old = self.run.final, self.run.folder / "final.old"
        metrics_path, model_path = folder / "metrics.json", folder / "checkpoints" / "best.ckpt"
        data = self._measured_data()
        test = fingerprint_data(data.test_dataloader())
        # The tolerance is set after the fit; of the promise, the fit knows which examples it may see.
        setting = {n: v for n, v in self.shared.identity.items() if n not in ("halting_tolerance", "promise")}
        settings = self.verdict.chosen.settings
        fit = {"settings": settings, "setting": digest(setting), "keep_frozen": self.keep_frozen}
        promise = None if self.recipe.promise is None else asdict(self.recipe.promise)
        made_of = {"fit": fit, "test": test, "promise": promise, "tolerance": self.recipe.halting_tolerance}
        before = read_json(folder / MADE_OF) if (folder / MADE_OF).is_file() else {}
        if before.get("fit") != fit:
            _set_aside(folder, old)
        if before != made_of:
            metrics_path.unlink(missing_ok=True)  # another promise or test split measures the same fit again
            if before.get("test") != test:
                shutil.rmtree(folder / "defaults", ignore_errors=True)
            write_text(folder / "config.yaml", yaml.safe_dump(self._config(settings), sort_keys=False))
            write_json(folder / MADE_OF, made_of)
        if not (metrics_path.is_file() and model_path.is_file()):
            self._fit(folder, settings)
            self._measure(folder, data)
        elif self.compare_defaults:
            self._measure_defaults(folder / "defaults", data)
        shutil.rmtree(old, ignore_errors=True)
        self.progress.summary(folder, self.verdict.text)
        return str(metrics_path), str(model_path)

    def _config(self, settings: Mapping[str, Any]) -> dict[str, Any]:
        """Return the configuration of the final fit: a whole file where the factories come from one."""
        model, data = (getattr(factory, "section", None) for factory in (self.recipe.model, self.recipe.data))
        chosen = dict(settings)
        if model is None or data is None:
            return chosen
        size = {"batch_size": chosen.pop("batch_size")} if "batch_size" in chosen else {}
        epochs = chosen.pop("num_epochs", self.recipe.epochs)
        plain = {n: value for n, value in self.recipe.trainer.items() if isinstance(value, (str, int, float, bool))}
        arguments = self.recipe.overrides({**self.shared.learning, **chosen})
        overrides = {n: asdict(v) if isinstance(v, SubmodelConfig) else v for n, v in arguments.items()}
        return {
            "seed_everything": self.recipe.seed,
            "trainer": {**plain, "max_epochs": epochs},
            "model": {**model, **overrides},
            "data": {**data, "init_args": {**(data.get("init_args") or {}), **size}},
        }

    def _fit(self, folder: Path, settings: Mapping[str, Any] | None) -> None:
        """Fit with `settings`, keep the best epoch, and resume from the last one that an earlier call kept.

        Without settings it is what the factories make: no teacher, and no start from the baseline.
        """
        last = folder / "checkpoints" / "last.ckpt"  # of use only to a fit that is not done
        if (folder / "history.json").is_file():
            last.unlink(missing_ok=True)  # a kill may have come just before
            return
        chosen = dict(settings or {})
        epochs = chosen.pop("num_epochs", self.recipe.epochs)
        with seeded(self.recipe.seed), self.progress.fit(f"{folder.name} fit, {epochs} epochs") as bar:
            if settings is None:
                model, data = self.recipe.model(), self.recipe.make_data()
            else:
                model, data = self.shared.build(chosen, whole=not self.keep_frozen)
            history = resumable_fit(
                self.recipe.trainer,
                model,
                data,
                folder / "checkpoints",
                what=f"the {folder.name} fit of {self.run.tag!r}",
                epochs=epochs,
                callbacks=[bar],
                log=folder,
                keep_best=True,
            )
        tensorboard.log_fit(folder, flat(settings or {}), history.best, str(folder.relative_to(self.run.folder)))
        write_json(folder / "history.json", history.epochs)
        last.unlink()

    def _measure(self, folder: Path, data: LightningDataModule) -> None:
        """Write metrics.json, pictures and the model/ folder. The test split is looked at here, once."""
        recipe = self.recipe
        model = self._fitted(folder)
        self._keep_promise(folder, model, data)
        with self.progress.stage("measuring the final model and the baseline"):
            loaders = {"validation": data.val_dataloader(), "test": data.test_dataloader()}
            found = {name: evaluate(model, loader, precision=recipe.precision) for name, loader in loaders.items()}
            whole = self.shared.baseline.load(recipe.make_model().at_full_depth()).eval().to(recipe.device)
            against = {name: evaluate(whole, loader, precision=recipe.precision) for name, loader in loaders.items()}
        for name, evaluation in found.items():
            if len(evaluation.right) == len(against[name].right):
                mean, error = mean_and_error(evaluation.right.double() - against[name].right.double())
                evaluation.entry["difference_to_baseline"] = {"accuracy": mean, "standard_error": error}
        kept = ("accuracy", "macro_f1", "task_loss", "texts_per_second")
        baseline = {name: {key: entry.entry[key] for key in kept} for name, entry in against.items()}
        metrics = {
            **{name: evaluation.entry for name, evaluation in found.items()},
            "baseline": {"layers": whole.num_layers, **baseline},
            "tolerance_curve": found["validation"].tolerance_curve,
            "margin_curve": found["validation"].margin_curve,
            "history": read_json(folder / "history.json"),
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
        self._draw(folder, found["validation"], found["test"], model.num_layers)
        if self.compare_defaults:
            self._measure_defaults(folder / "defaults", data)
        write_json(folder / "metrics.json", metrics)  # last: it says that all is done

    def _keep_promise(self, folder: Path, model: DACT, data: LightningDataModule) -> None:
        """Set the dial of the promise, and the temperatures of scores, and store both with the checkpoint."""
        promise, before = self.recipe.promise, (model.calibration, model.temperatures)
        with self.recipe.precision():
            if promise is not None and (promise.max_layers or 0) >= model.num_layers:
                model.end_calibration()
                self.progress.note(
                    f"max_layers={promise.max_layers:g} holds at every margin: the model has fewer layers"
                )
            elif promise is not None:
                self.progress.note(describe(calibrate(model, data, **asdict(promise)), model.num_layers))
            else:
                model.end_calibration()  # of a promise that is no longer asked for
            answers = layer_answers(model, data.val_dataloader())
        model.temperatures = fit_temperatures(answers, answers.exit_layers(model.exit_rule))
        if (model.calibration, model.temperatures) != before:
            store_in_checkpoint(folder / "checkpoints" / "best.ckpt", model)

    def _draw(self, folder: Path, validation: Evaluation, test: Evaluation, layers: int) -> None:
        figures = {
            "dials": pictures.dials_picture(validation.tolerance_curve, validation.margin_curve, layers),
            "exit histogram": pictures.exit_picture(test.entry),
        }
        if test.answers.depths is not None:
            figures["depth against exit layer"] = plots.depth_against_exit(
                test.answers.depths, test.exit_layers, layers
            )
        with tensorboard.writer(folder) as writer:
            for name, figure in figures.items():
                with replacing(folder / f"{name.replace(' ', '_')}.png") as picture:
                    figure.savefig(picture, format="png")
                writer.add_figure(name, figure)
            for step, point in enumerate(validation.margin_curve):
                for name in ("accuracy", "mean_exit_layer", "agreement"):
                    writer.add_scalar(f"operating points by margin/{name}", point[name], step)

    def _measure_defaults(self, folder: Path, data: LightningDataModule) -> None:
        """Fit and measure what the factories make without tuning: what tuning has to beat."""
        if (folder / "metrics.json").is_file():
            return
        try:
            with without_collapse_warning():
                self._fit(folder, None)
        except NonFiniteLoss as error:
            self.progress.note(f"the defaults are not in the table: {error}")
            return
        model = self._fitted(folder)
        loaders = {"validation": data.val_dataloader(), "test": data.test_dataloader()}
        entries = {
            name: evaluate(model, loader, precision=self.recipe.precision, timed=False).entry
            for name, loader in loaders.items()
        }
        write_json(folder / "metrics.json", entries)
        shutil.rmtree(folder / "checkpoints")

    def _measured_data(self) -> LightningDataModule:
        data = self.recipe.make_data(batch_size=MEASURED_BATCH)  # not the winner's size: times would not compare
        data.prepare_data()
        for stage in ("fit", "test"):
            data.setup(stage)
        return data

    def _fitted(self, folder: Path) -> DACT:
        """Return the model of the best epoch, on the device that it should use."""
        made = self.recipe.make_model()
        given = made.encoder if made.encoder.config() is None else None  # the user's own: no checkpoint can rebuild it
        model = type(made).load_from_checkpoint(folder / "checkpoints" / "best.ckpt", encoder=given).eval()
        return model.to(self.recipe.device)


def _set_aside(folder: Path, old: Path) -> None:
    """Keep a whole final fit of earlier winners as `old`; a later call must not resume from its checkpoints."""
    if (folder / "metrics.json").is_file():
        shutil.rmtree(old, ignore_errors=True)
        os.replace(folder, old)
    else:
        shutil.rmtree(folder, ignore_errors=True)
