"""The command line: LightningCLI with dact's model, callbacks, errors and the tune command."""

from __future__ import annotations

import os
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import yaml
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Callback, LightningDataModule, LightningModule, Trainer
from lightning.pytorch.callbacks import Checkpoint, ModelCheckpoint, ProgressBar, RichProgressBar
from lightning.pytorch.cli import ArgsType, LightningArgumentParser, LightningCLI, SaveConfigCallback
from lightning.pytorch.plugins import CheckpointIO
from typing_extensions import override

from dact.calibration import Dial, Promise, calibrate, describe, store_in_checkpoint
from dact.callbacks import ExitPlots, PredictionWriter, SavePretrained
from dact.console import quiet_command, quiet_threads
from dact.files import DurableCheckpointIO
from dact.model import CONFIG_NAME, DACT, HALTING
from dact.usage import OneLineParser, one_line

USAGE_ERRORS = (ValueError, TypeError, KeyError, OSError, RuntimeError, MisconfigurationException)


class SaveConfig(SaveConfigCallback):
    """Keep config.yaml beside what a fit logs; without a logger there is no folder for it."""

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if stage == "fit" and trainer.loggers:
            super().setup(trainer, pl_module, stage)


class DACTTrainer(Trainer):
    """The Trainer, with the commands that dact adds."""

    def calibrate(
        self,
        model: DACT,
        datamodule: LightningDataModule,
        ckpt_path: str,
        max_accuracy_loss: float | None = None,
        min_agreement: float | None = None,
        max_layers: float | None = None,
        confidence: float = 0.95,
        dial: Dial = "halting_tolerance",
    ) -> None:
        """Find the halting tolerance or margin that keeps a promise, and store it in the checkpoint and its model/.

        Asked are the validation examples: the promise holds as far as nothing was chosen by them. The halting rule and
        the dial that is not moved are those of the configuration.

        Args:
            model: The model.
            datamodule: The data.
            ckpt_path: The checkpoint of a fit.
            max_accuracy_loss: Points of accuracy below full depth at the most, as a share: 0.005 is half a point.
            min_agreement: The least share of examples that get the class of full depth.
            max_layers: The most layers on average.
            confidence: The probability with which the promise holds for new examples of the same kind.
            dial: What is moved: halting_tolerance or halting_margin. The margin mostly takes fewer layers.
        """
        path = Path(ckpt_path)
        own = model.encoder if model.encoder.config() is None else None
        promise = Promise(max_accuracy_loss, min_agreement, max_layers, confidence, dial)
        rule = {name: getattr(model, name) for name in HALTING if name != dial}
        fitted = DACT.load_from_checkpoint(path, encoder=own, **rule).to(self.strategy.root_device)
        before = getattr(fitted, dial)
        found = calibrate(fitted, datamodule, **asdict(promise))
        store_in_checkpoint(path, fitted)
        print(f"{describe(found, fitted.encoder.num_layers)}\nthe {dial} of the checkpoint was {before:g}")
        beside = path.parent.parent / "model"
        if not (beside / CONFIG_NAME).is_file():
            print(f"there is no model in {beside}: only the checkpoint knows the {dial}")
            return
        weights = DACT.from_pretrained(beside, encoder=own).state_dict()
        if all(torch.equal(tensor.cpu(), weights[name]) for name, tensor in fitted.state_dict().items()):
            fitted.cpu().save_pretrained(beside)
        else:
            print(f"{beside} holds other weights than {path}, and keeps its {dial}")

    @staticmethod
    def tune() -> None:
        """Tune submodels, training and lambda_reg in three studies, then fit."""


class DACTCLI(LightningCLI):
    """``dact fit | validate | test | predict | calibrate | tune``, all of which read the same file."""

    @staticmethod
    @override
    def subcommands() -> dict[str, set[str]]:
        commands = LightningCLI.subcommands()
        built = {"model", "datamodule"}
        return {**commands, "predict": commands["predict"] | {"return_predictions"}, "calibrate": built, "tune": set()}

    @override
    def _prepare_subcommand_parser(self, klass: type, subcommand: str, **kwargs: Any) -> LightningArgumentParser:
        if subcommand == "tune":
            return self._prepare_tune_parser(**kwargs)
        parser = super()._prepare_subcommand_parser(klass, subcommand, **kwargs)
        parser.add_argument("--tuner", type=dict[str, Any] | None, default=None, help="read by `dact tune` alone")
        if subcommand == "calibrate":
            _ignore(parser, "weights_only")
        else:
            parser.set_defaults({"weights_only": True})  # a checkpoint from elsewhere must not run code
        if subcommand == "predict":
            parser.add_argument(
                "--output", type=str, default="predictions.csv", help="where to: .csv, .jsonl or .parquet"
            )
        return parser

    def _prepare_tune_parser(self, **kwargs: Any) -> LightningArgumentParser:
        parser = self.init_parser(**kwargs)
        self._add_arguments(parser)
        _add_tuner_arguments(parser)
        parser.add_argument("--run_tag", type=str, default="", help="name of the run; the same again goes on with it")
        _ignore(parser, "ckpt_path", "weights_only")
        self._subcommand_method_arguments["tune"] = []
        return parser

    @override
    def _parse_ckpt_path(self) -> None:
        """The configuration says which model to build; the checkpoint gives its weights, which must fit."""

    @override
    def instantiate_classes(self) -> None:
        if self.subcommand != "tune":  # tuning builds anew for every trial
            super().instantiate_classes()

    @override
    def _run_subcommand(self, subcommand: str) -> None:
        if subcommand == "tune":
            self._tune()
            return
        ckpt_path = self._get(self.config, "ckpt_path", default=None)
        if ckpt_path is not None and Path(ckpt_path).is_dir():
            raise ValueError(
                f"--ckpt_path {ckpt_path} is a folder; a checkpoint is a file, such as "
                "lightning_logs/version_0/checkpoints/best.ckpt"
            )
        if subcommand in ("validate", "test", "predict") and ckpt_path is None:
            raise ValueError(
                f"dact {subcommand} needs --ckpt_path, the checkpoint of a fit, such as "
                "lightning_logs/version_0/checkpoints/best.ckpt: without one the model has learned nothing"
            )
        super()._run_subcommand(subcommand)

    @override
    def _instantiate_trainer(self, config: dict[str, Any], callbacks: list[Callback]) -> Trainer:
        given = config.get("callbacks") or []
        given = given if isinstance(given, list) else [given]
        added: list[Callback] = []
        if config.get("enable_progress_bar") is not False and not _has(given, ProgressBar):
            added.append(RichProgressBar())
        if self.subcommand == "fit":
            added += [ExitPlots(), SavePretrained()]
            if config.get("enable_checkpointing") is not False and not _has(given, Checkpoint):
                added.append(ModelCheckpoint(monitor="val_loss", filename="best", save_last=True))
        if self.subcommand in ("predict", "calibrate") and config.get("logger") is None:
            config = {**config, "logger": False}  # nothing is logged, and an empty folder would be left
        plugins = config.get("plugins") or []
        plugins = plugins if isinstance(plugins, list) else [plugins]
        if not _has(plugins, CheckpointIO):
            config = {**config, "plugins": [*plugins, DurableCheckpointIO()]}
        return super()._instantiate_trainer(config, [*callbacks, *added])

    def predict(self, **arguments: Any) -> None:
        self.trainer.callbacks.append(PredictionWriter(self._get(self.config, "output")))  # type: ignore[attr-defined]
        self.trainer.predict(**arguments, return_predictions=False)

    def _tune(self) -> None:
        """Hand the sections of the file to the engine, model and data as factories."""
        from dact import signals
        from dact.factories import DataFactory, ModelFactory
        from dact.tuning import TuningEngine

        parser, config = self._parser("tune"), self.config["tune"]
        plain = yaml.safe_load(parser.dump(config, skip_none=False))
        if plain.get("data") is None:
            raise ValueError("dact tune needs a data: section; configs/quickstart.yaml shows one")
        # Only these two sections are built here, with a parser of their own.
        builder = LightningArgumentParser(exit_on_error=False)
        builder.add_lightning_class_args(DACTTrainer, "trainer")
        _add_tuner_arguments(builder)
        ready = builder.instantiate_classes(
            builder.parse_object({"trainer": plain["trainer"], "tuner": plain["tuner"]})
        )
        trainer = {name: value for name, value in vars(ready.trainer).items() if value is not None}
        engine = TuningEngine(
            plain["model"]["output_dimension"],
            model=ModelFactory(plain["model"]),
            data=DataFactory(plain["data"]),
            trainer=trainer,
            seed=plain["seed_everything"] or 0,
            **vars(ready.tuner),
        )
        tag = config.run_tag or engine.run_tag
        signals.install()
        quiet_threads()
        try:
            engine.run_pipeline(tag)
        except KeyboardInterrupt:
            words = [word for word in sys.argv[1:] if word not in ("--run_tag", tag, f"--run_tag={tag}")]
            print(f"\ndact: stopped; go on with: dact {' '.join(words)} --run_tag {tag}", file=sys.stderr)
            raise SystemExit(130) from None


def _ignore(parser: LightningArgumentParser, *names: str) -> None:
    """Take what the config.yaml of a fit holds, and this command has no use for."""
    for name in names:
        parser.add_argument(f"--{name}", type=Any, default=None, help="read by other commands")


def _add_tuner_arguments(parser: LightningArgumentParser) -> None:
    from dact.tuning import TuningEngine

    elsewhere: set[int | str] = {"output_dimension", "model", "data", "trainer", "seed"}  # in sections of their own
    parser.add_class_arguments(TuningEngine, "tuner", skip=elsewhere, sub_configs=True, instantiate=False)


def _has(given: list[Any], kind: type) -> bool:
    return any(isinstance(one, kind) for one in given)


def run(args: ArgsType = None) -> DACTCLI:
    """Run the command line, by default that of this process."""
    quiet_command()
    # jsonargparse's own usage line names a hundred options, which the groups below it explain anyway.
    usages = {name: {"usage": f"dact {name} --config FILE [--OPTION VALUE ...]"} for name in DACTCLI.subcommands()}
    return DACTCLI(
        DACT,
        LightningDataModule,
        trainer_class=DACTTrainer,
        subclass_mode_data=True,
        seed_everything_default=0,
        save_config_callback=SaveConfig,
        parser_class=OneLineParser,
        save_config_kwargs={"overwrite": True},
        trainer_defaults={"enable_model_summary": False},
        parser_kwargs={
            "prog": "dact",
            "description": "Classifiers that spend only as many layers as each example needs.",
            **usages,
        },
        args=args,
    )


def main() -> None:
    """Run the command line of this process; an error of use ends it with one line, not with a traceback."""
    try:
        run()
    except USAGE_ERRORS as error:
        if os.environ.get("DACT_TRACEBACK"):
            raise
        message = error.args[0] if isinstance(error, KeyError) and error.args else error
        print(f"dact: error: {one_line(str(message))}", file=sys.stderr)
        raise SystemExit(1) from None
