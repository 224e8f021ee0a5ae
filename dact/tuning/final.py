"""The final fit with all winners: checkpoints, measurements, pictures, and the model to take away."""

from __future__ import annotations

import dataclasses
import os
import shutil
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import yaml
from lightning.pytorch import LightningDataModule
from lightning.pytorch.loggers import TensorBoardLogger

from dact import plots
from dact.calibration import calibrate, describe, store_in_checkpoint
from dact.files import read_json, replacing, replacing_folder, write_json, write_text
from dact.model import DACT
from dact.tuning import pictures, tensorboard
from dact.tuning.evaluation import evaluate
from dact.tuning.fingerprints import digest, fingerprint_data
from dact.tuning.progress import Progress
from dact.tuning.recipe import Recipe
from dact.tuning.run import Run, Winners
from dact.tuning.shared import Shared
from dact.tuning.training import NonFiniteLoss, resumable_fit, seeded, without_collapse_warning

MEASURED_BATCH = 1024  # texts that early exit gets at a time where it is timed
MADE_OF = "made_of.json"  # what a final fit was made of; another one replaces it


@dataclass(frozen=True)
class FinalFit:
    """The final fit of a run.

    Args:
        run: The run.
        shared: What its fits share.
        winners: What the studies chose.
        compare_defaults: Whether to fit and measure what the factories make without tuning as well.
        progress: What the console shows.
    """

    run: Run
    shared: Shared
    winners: Winners
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
            RuntimeError: If the loss of the fit is not finite.
        """
        folder, old = self.run.final, self.run.folder / "final.old"
        metrics_path, model_path = folder / "metrics.json", folder / "checkpoints" / "best.ckpt"
        data = self._measured_data()
        test = fingerprint_data(data.test_dataloader())
        # The tolerance is set after the fit; a promise says which validation examples the fit may see.
        setting = {name: value for name, value in self.shared.identity.items() if name != "halting_tolerance"}
        fit = {"winners": asdict(self.winners), "setting": digest(setting)}
        promise = None if self.recipe.promise is None else asdict(self.recipe.promise)
        made_of = {"fit": fit, "test": test, "promise": promise, "tolerance": self.recipe.halting_tolerance}
        before = read_json(folder / MADE_OF) if (folder / MADE_OF).is_file() else {}
        if before.get("fit") != fit:
            _set_aside(folder, old)
        if before != made_of:
            metrics_path.unlink(missing_ok=True)  # another promise or test split measures the same fit again
            write_text(folder / "config.yaml", yaml.safe_dump(self._config(), sort_keys=False))
            write_json(folder / MADE_OF, made_of)
        if not (metrics_path.is_file() and model_path.is_file()):
            settings = self.winners.settings()
            self._fit(folder, settings, settings.pop("num_epochs"))
            self._measure(folder, data)
        elif self.compare_defaults:
            self._measure_defaults(folder / "defaults", data)
        shutil.rmtree(old, ignore_errors=True)
        self.progress.summary(folder, self.winners, self.recipe.epochs)
        return str(metrics_path), str(model_path)

    def _config(self) -> dict[str, Any]:
        """Return the configuration of the final fit: a whole file where the factories come from one."""
        settings = self.winners.settings()
        model, data = (getattr(factory, "section", None) for factory in (self.recipe.model, self.recipe.data))
        if model is None or data is None:
            return settings
        size = {"batch_size": settings.pop("batch_size")} if "batch_size" in settings else {}
        epochs = settings.pop("num_epochs", self.recipe.epochs)
        plain = {
            name: value for name, value in self.recipe.trainer.items() if isinstance(value, (str, int, float, bool))
        }
        return {
            "seed_everything": self.recipe.seed,
            "trainer": {**plain, "max_epochs": epochs},
            "model": {**model, **{n: _plain(v) for n, v in self.recipe.overrides(settings).items()}},
            "data": {**data, "init_args": {**(data.get("init_args") or {}), **size}},
        }

    def _fit(self, folder: Path, settings: Mapping[str, Any], epochs: int) -> None:
        """Fit with `settings`, keep the best epoch, and resume from the last one that an earlier call kept."""
        if (folder / "history.json").is_file():
            return
        with seeded(self.recipe.seed), self.progress.fit(f"{folder.name} fit, {epochs} epochs") as bar:
            model, data = self.shared.build(settings)
            try:
                history = resumable_fit(
                    self.recipe.trainer,
                    model,
                    data,
                    folder / "checkpoints",
                    epochs=epochs,
                    callbacks=[bar],
                    logger=TensorBoardLogger(folder.parent, name="", version=folder.name, default_hp_metric=False),
                    keep_best=True,
                )
            except NonFiniteLoss as error:
                raise RuntimeError(
                    f"the {folder.name} fit of {self.run.tag!r} broke: {error}. Its learning rate is "
                    f"{settings.get('learning_rate', 'that of the model')}: lower learning_rate's high in search_space, or "
                    "take precision 32-true, under another run_tag"
                ) from error
        write_json(folder / "history.json", history.epochs)
        (folder / "checkpoints" / "last.ckpt").unlink()  # of use only to a fit that is not done

    def _measure(self, folder: Path, data: LightningDataModule) -> None:
        """Write metrics.json, pictures and the model/ folder. The test split is looked at here, once."""
        recipe = self.recipe
        model = self._fitted(folder)
        before = model.calibration
        if recipe.promise is not None:
            promised = {name: value for name, value in asdict(recipe.promise).items() if value is not None}
            with recipe.precision():
                found = calibrate(model, data, **promised)
            self.progress.note(describe(found, model.encoder.num_layers))
        else:
            model.end_calibration()  # of a promise that is no longer asked for
        if model.calibration != before:
            store_in_checkpoint(folder / "checkpoints" / "best.ckpt", model)
        with self.progress.stage("measuring the final model"):
            validation = evaluate(model, data.val_dataloader(), precision=recipe.precision)
            test = evaluate(model, data.test_dataloader(), precision=recipe.precision)
        layers = model.encoder.num_layers
        metrics = {
            "validation": validation.entry,
            "test": test.entry,
            "tolerance_curve": validation.tolerance_curve,
            "margin_curve": validation.margin_curve,
            "history": read_json(folder / "history.json"),
            "lambda_reg": self.winners.lambda_reg,
            "halting_tolerance": model.halting_tolerance,
            "halting_margin": model.halting_margin,
            "layers": layers,
        }
        if recipe.promise is not None:
            metrics["calibration"] = model.calibration
        with replacing_folder(folder / "model") as partial:
            model.cpu().save_pretrained(partial)
            tokenizer = getattr(data, "tokenizer", None)
            if tokenizer is not None:
                tokenizer.save_pretrained(str(partial))
        figures = {
            "dials": pictures.dials_picture(validation.tolerance_curve, validation.margin_curve, layers),
            "exit histogram": pictures.exit_picture(test.entry),
        }
        if test.depths is not None:
            figures["depth against exit layer"] = plots.depth_against_exit(test.depths, test.exit_layers, layers)
        with tensorboard.writer(folder) as writer:
            for name, figure in figures.items():
                with replacing(folder / f"{name.replace(' ', '_')}.png") as picture:
                    figure.savefig(picture, format="png")
                writer.add_figure(name, figure)
        if self.compare_defaults:
            self._measure_defaults(folder / "defaults", data)
        write_json(folder / "metrics.json", metrics)  # last: it says that all is done

    def _measure_defaults(self, folder: Path, data: LightningDataModule) -> None:
        """Fit and measure what the factories make without tuning, in the same way: what tuning has to beat."""
        if (folder / "metrics.json").is_file():
            return
        with without_collapse_warning():
            self._fit(folder, {}, self.recipe.epochs)
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
        encoder = self.recipe.make_model().encoder
        given = encoder if encoder.config() is None else None  # one of the user's, which no checkpoint can rebuild
        model = DACT.load_from_checkpoint(folder / "checkpoints" / "best.ckpt", encoder=given).eval()
        return model.to(self.recipe.device)


def _set_aside(folder: Path, old: Path) -> None:
    """Keep a whole final fit of earlier winners as `old`; a later call must not resume from its checkpoints."""
    if (folder / "metrics.json").is_file():
        shutil.rmtree(old, ignore_errors=True)
        os.replace(folder, old)
    else:
        shutil.rmtree(folder, ignore_errors=True)


def _plain(value: Any) -> Any:
    return asdict(value) if dataclasses.is_dataclass(value) and not isinstance(value, type) else value
