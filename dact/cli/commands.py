"""The command line: LightningCLI with dact's model, callbacks, errors and commands of its own."""

from __future__ import annotations

import contextlib
import copy
import inspect
import shutil
import sys
from argparse import SUPPRESS
from dataclasses import asdict
from pathlib import Path
from typing import Any, Literal

import yaml
from jsonargparse import Namespace
from lightning.pytorch import Callback, LightningDataModule, LightningModule, Trainer
from lightning.pytorch.callbacks import Checkpoint, ModelCheckpoint, ProgressBar
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI, SaveConfigCallback
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.plugins import CheckpointIO
from lightning.pytorch.utilities.rank_zero import rank_zero_warn  # type: ignore[attr-defined]
from typing_extensions import override

from dact import signals
from dact.calibration import Promise, calibrate, describe
from dact.callbacks import LAST, ExitPlots, LastCheckpoint, MovableCheckpoint, SavePretrained
from dact.cli import LIGHTNING
from dact.cli.errors import OneLineParser, config_files, one_line_errors
from dact.cli.predictions import OUTPUT, PredictionWriter
from dact.cli.quiet import quiet
from dact.cli.reports import Bar, EpochLines, show_metrics
from dact.cli.request import EVALUATING, Request
from dact.cli.runs import (
    balanced_weights,
    check_set_aside,
    check_tag,
    checkpoint_to_resume,
    sole_writer,
    stored_model,
)
from dact.cli.stored import RUNS, check_estimate, check_storable, find_model, store_dial
from dact.cli.tune import add_tuner_arguments, stopped_by_user, tune
from dact.encoders import LayeredEncoder
from dact.factories import DataFactory
from dact.files import DurableCheckpointIO
from dact.model import DACT

Monitor = Literal["last", "val_loss", "val_task_loss", "val_accuracy", "val_macro_f1"]
FILE_OF = {
    "predict": "predict_file",
    "test": "test_file",
    "calibrate": "calibration_file",
    "validate": "val_file",
}
AT_INFERENCE = ("halting", "halting_tolerance", "halting_margin", "step_tokens", "window_tokens")


class SaveConfig(SaveConfigCallback):
    """Keep config.yaml next to what a fit logs; without a logger there is no folder for it."""

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if stage == "fit" and trainer.loggers:
            self.config = self.config.clone()
            self.config.ckpt_path = None  # of a resumed fit, which it describes as it began
            super().setup(trainer, pl_module, stage)


class DACTTrainer(Trainer):
    """Lightning's Trainer."""

    # The docstrings of the commands that dact adds are their help on the command line.

    @staticmethod
    def calibrate() -> None:
        """Find the halting margin, or tolerance, that keeps a promise, and store it with the
        model."""

    @staticmethod
    def tune() -> None:
        """Tune submodels, training and lambda_reg in three studies, then fit."""


class StoredModel(DACT):
    """The stored model, and what may be set where it is evaluated."""

    def __init__(self, encoder: LayeredEncoder | None = None, **kwargs: Any) -> None:
        super().__init__(encoder, **kwargs)  # type: ignore[arg-type]


class DACTCLI(LightningCLI):
    """``dact fit | validate | test | predict | calibrate | tune``, all of which read the same
    files."""

    def __init__(self, request: Request, **arguments: Any) -> None:
        self.request = request
        self._data: LightningDataModule | None = None  # built before the model that depends on it
        super().__init__(DACT, LightningDataModule, **arguments)

    @staticmethod
    @override
    def subcommands() -> dict[str, set[str]]:
        commands = LightningCLI.subcommands()
        predict = commands["predict"] | {"return_predictions"}
        return {**commands, "predict": predict, "calibrate": set(), "tune": set()}

    # ------------------------------------------------------------------ options

    @override
    def _prepare_subcommand_parser(
        self, klass: type, subcommand: str, **kwargs: Any
    ) -> LightningArgumentParser:
        if (
            subcommand != self.request.command
        ):  # adding options takes time, so only this command gets them
            return self.init_parser(**kwargs)
        parser = super()._prepare_subcommand_parser(klass, subcommand, **kwargs)
        if subcommand == "tune":
            add_tuner_arguments(parser)
            _ignore(parser, "ckpt_path", "weights_only")
        else:
            parser.add_argument(
                "--tuner", type=dict[str, Any] | None, default=None, help="options of dact tune"
            )
            if subcommand == "calibrate":
                parser.add_class_arguments(Promise, instantiate=False)
                text = "checkpoint of a fit, model/ folder, or folder of a run; --model takes the last two as well"
                parser.add_argument("--ckpt_path", type=str | None, default=None, help=text)
                _ignore(parser, "weights_only")
            else:
                parser.set_defaults(
                    {"weights_only": True}
                )  # a checkpoint from elsewhere must not run code
        if subcommand in ("fit", "tune"):
            text = "name of the run, and of its folder in lightning_logs; giving the same name again resumes the run"
            parser.add_argument("--run_tag", type=str, default="", help=text)
        else:
            _ignore(parser, "run_tag")
        if subcommand == "fit":
            text = "epoch that the model is of: the last one, or the best by this metric"
            parser.add_argument("--monitor", type=Monitor, default="last", help=text)
        else:
            _ignore(parser, "monitor")
        if subcommand == "predict":
            text = "file to write to: .csv, .jsonl or .parquet; - writes csv to standard output"
            parser.add_argument("--output", type=str, default=OUTPUT, help=text)
        return parser

    @override
    def add_core_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        evaluating = self.request.command in EVALUATING
        # The skipped options are added below, each with one more type of value.
        parser.add_class_arguments(
            StoredModel if evaluating else DACT,
            "model",
            skip={"class_weights", "output_dimension"},
            fail_untyped=False,
            sub_configs=True,
            instantiate=not evaluating,
        )
        text = "number of classes; that of the data if left out"
        groups = parser.groups or {}
        model = groups["model"]
        model.add_argument("--model.output_dimension", type=int | None, default=None, help=text)
        model.add_argument(
            "--model.class_weights",
            type=list[float] | Literal["balanced"] | None,
            default=None,
            help="one weight per class for the losses; balanced: in inverse proportion to the training examples",
        )
        for action in parser._actions if evaluating else []:
            name = action.dest.removeprefix("model.")
            if action.dest == "model":
                action.metavar, action.help = "RUN", "model/ folder, folder of a run, or Hub id"
            elif (
                name != action.dest and not name.startswith("encoder") and name not in AT_INFERENCE
            ):
                # of training: the config.yaml of a fit holds it, and nothing else may set it
                action.help = SUPPRESS
        parser.add_lightning_class_args(
            LightningDataModule, "data", subclass_mode=True, required=not evaluating
        )
        groups[
            "data"
        ].title = "The data: TextClassificationData for one's own files, or any LightningDataModule"
        parser.add_lightning_class_args(self.trainer_class, "trainer")
        parser.set_defaults(
            {f"trainer.{name}": value for name, value in self.trainer_defaults.items()}
        )

    @override
    def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:
        self.config = parser.parse_args(self.request.words)

    @override
    def _parse_ckpt_path(self) -> None:
        """Leave the configuration as it is: `load_model` reads the model from the checkpoint."""

    # ------------------------------------------------------------------ building

    @override
    def instantiate_classes(self) -> None:
        if self.subcommand == "tune":  # tuning builds both for every trial
            return
        config = self.config[str(self.subcommand)]
        if self.subcommand in EVALUATING:
            self._build_stored(config)
            return
        self._resume(config)
        self._complete_model(config)
        super().instantiate_classes()
        self.datamodule = self._data or self.datamodule  # its texts are already tokenized

    def _build_stored(self, config: Namespace) -> None:
        """Build the model from a checkpoint or folder, and the data from the configuration."""
        if config.ckpt_path is not None and self.request.model is not None:
            raise ValueError("give --model or --ckpt_path, not both")
        if self.request.model is None and config.ckpt_path is None:
            raise ValueError(
                f"dact {self.subcommand} needs a model: --model with a model/ folder, the folder of a run, such as "
                f"{RUNS}/version_0, or a Hub id, or --ckpt_path with a checkpoint"
            )
        self.source = self.request.model or find_model(config.ckpt_path)
        overrides = self._overrides()
        self.model = stored_model(self.source, config.model.get("encoder"), **overrides)
        self._name_ignored_dials(config.model, overrides)
        config.ckpt_path = config.optimizer = config.lr_scheduler = None
        file = self.request.own_data(config, self.model)
        config.model = Namespace()  # type: ignore[no-untyped-call]
        self.config_init = self.parser.instantiate_classes(self.config)
        self.datamodule = file or self._get(self.config_init, "data")
        if self.datamodule is None:
            raise ValueError(
                f"dact {self.subcommand} needs data: a file with a data: section, given by --config, or "
                f"--data.{FILE_OF[str(self.subcommand)]}"
            )
        self.trainer = self.instantiate_trainer()

    def _overrides(self) -> dict[str, Any]:
        """Return the inference settings on the command line; those in files belong to the fit, and
        are ignored."""
        words = self.request.model_words()
        if not words:
            return {}
        given = self._parser(self.subcommand).parse_args(words, defaults=False).model
        for name in vars(given):
            if name not in AT_INFERENCE:
                raise ValueError(
                    f"dact {self.subcommand} evaluates a stored model as it is: leave --model.{name} out (of the "
                    f"model only {', '.join(AT_INFERENCE)} can be set)"
                )
        return {name: given[name] for name in AT_INFERENCE if name in given}

    def _name_ignored_dials(self, given: Namespace, overrides: dict[str, Any]) -> None:
        """Warn if a file sets inference settings, other than the usual ones, that the stored model
        does not have."""
        usual = inspect.signature(DACT.__init__).parameters
        for name in AT_INFERENCE:
            value, own = given.get(name), getattr(self.model, name)
            if name not in overrides and value not in (None, usual[name].default, own):
                rank_zero_warn(
                    f"{name} is {own} in the stored model, and not {value} as in the file, which is for a fit: give "
                    f"--model.{name} {value} to use that"
                )

    def _complete_model(self, config: Namespace) -> None:
        """Complete a configuration with the number of classes, and balanced class weights, of the
        training data."""
        asked = config.model.class_weights == "balanced"
        if not asked and config.model.output_dimension is not None:
            return
        if self._data is None:
            plain = yaml.safe_load(self._parser(self.subcommand).dump(config, skip_none=False))
            self._data = DataFactory(plain["data"])()
        data = self._data
        if getattr(data, "class_names", None) is None or asked:
            data.prepare_data()
            data.setup("fit")
        names = getattr(data, "class_names", None)
        if config.model.output_dimension is None:
            if names is None:
                raise ValueError(
                    "model.output_dimension, the number of classes, is needed: the data does not name them"
                )
            config.model.output_dimension = len(names)
        if asked:
            config.model.class_weights = balanced_weights(data, config.model.output_dimension)

    @override
    def _instantiate_trainer(self, config: dict[str, Any], callbacks: list[Callback]) -> Trainer:
        given = config.get("callbacks") or []
        given = given if isinstance(given, list) else [given]
        added: list[Callback] = [signals.StopOnSignal()]
        if config.get("enable_progress_bar") is not False and not _has(given, ProgressBar):
            to_output = self.subcommand == "predict" and self._get(self.config, "output") == "-"
            shown = (
                sys.stdout.isatty()
                if not to_output
                else sys.stderr.isatty() and not sys.stdout.isatty()
            )
            if shown or config.get("enable_progress_bar"):
                added.append(Bar(console_kwargs={"stderr": to_output}))
            else:
                config = {**config, "enable_progress_bar": False}
        if self.subcommand == "fit":
            config = {**config, "logger": self._logger(config)}
            monitor = self._get(self.config, "monitor")
            monitor, after = ("epoch", True) if monitor == "last" else (monitor, None)
            mode = "min" if monitor.endswith("loss") else "max"
            own = [one for one in given if isinstance(one, ModelCheckpoint)]
            beside = [one for one in own if one.dirpath == own[0].dirpath]
            if config.get("enable_checkpointing") is not False and not _has(given, Checkpoint):
                chosen: dict[str, Any] = {
                    "monitor": monitor,
                    "mode": mode,
                    "save_on_train_epoch_end": after,
                }
                best = MovableCheckpoint(filename="best", enable_version_counter=False, **chosen)
                added += [best, LastCheckpoint(best)]
            elif own and not any(one.save_last or one.filename == "last" for one in beside):
                added.append(LastCheckpoint(own[0]))
            added += [ExitPlots(), SavePretrained(), EpochLines(monitor, mode)]
        elif config.get("logger") is None:
            config = {
                **config,
                "logger": False,
            }  # its folder would hold nothing that is not printed
        plugins = config.get("plugins") or []
        plugins = plugins if isinstance(plugins, list) else [plugins]
        if not _has(plugins, CheckpointIO):
            config = {**config, "plugins": [*plugins, DurableCheckpointIO()]}
        return super()._instantiate_trainer(config, [*callbacks, *added])

    def _logger(self, config: dict[str, Any]) -> Any:
        tag, logger = self._get(self.config, "run_tag"), config.get("logger")
        if not tag:
            return logger
        if logger not in (None, True):
            raise ValueError(
                "--run_tag names the folder of the default logger: leave trainer.logger out, or the tag"
            )
        return TensorBoardLogger(config.get("default_root_dir") or ".", name=RUNS, version=tag)

    # ------------------------------------------------------------------ commands

    @override
    def _run_subcommand(self, subcommand: str) -> None:
        signals.install()
        if subcommand == "tune":
            config = self.config["tune"]
            if config.data is not None:
                self._complete_model(config)
            tune(self._parser("tune"), config, DACTTrainer, self.request)
        elif subcommand == "calibrate":
            names = ("max_accuracy_loss", "min_agreement", "max_layers", "confidence", "dial")
            self.calibrate(Promise(**{name: self._get(self.config, name) for name in names}))
        else:
            try:
                super()._run_subcommand(subcommand)
            except BaseException:  # Lightning makes a SystemExit of its own of Ctrl-C
                if subcommand != "fit" and signals.stop_requested():
                    raise KeyboardInterrupt from None
                raise

    def _resume(self, config: Namespace) -> None:
        """Configure a fit with the tag of an earlier one to resume it."""
        checkpoint = config.ckpt_path
        if checkpoint is not None and Path(checkpoint).is_dir():
            raise ValueError(
                f"--ckpt_path {checkpoint} is a folder; a checkpoint is a file, such as "
                f"{RUNS}/version_0/checkpoints/{LAST}"
            )
        if not config.run_tag:
            return
        folder = check_tag(
            Path(config.trainer.default_root_dir or ".") / RUNS, config.run_tag, "fit"
        )
        if checkpoint is None and (
            any(folder.glob("checkpoints/*.ckpt")) or (folder / "model").exists()
        ):
            self._complete_model(config)
            now = yaml.safe_load(self._parser("fit").dump(config, skip_none=False))
            config.ckpt_path = checkpoint_to_resume(folder, now)

    def fit(self, **arguments: Any) -> None:
        """Fit. A run that fails before its first epoch leaves no folder; one that is stopped keeps
        its best model."""
        if getattr(self.datamodule, "needs_teacher", False):
            raise ValueError(
                "texts without labels need a teacher: give data.teacher, and the model a distillation above 0, or "
                "leave the unlabelled_file out"
            )
        folder = (
            Path(self.trainer.log_dir) if self.trainer.loggers and self.trainer.log_dir else None
        )
        is_new = folder is not None and not folder.exists()
        try:
            with sole_writer(folder if self.trainer.is_global_zero else None):
                self.trainer.fit(**arguments)
        except BaseException:
            if signals.stop_requested():
                self._stopped(folder)
            if (
                folder is not None
                and is_new
                and self.trainer.current_epoch == 0
                and not any(folder.glob("checkpoints/*"))
            ):
                shutil.rmtree(folder, ignore_errors=True)
                with contextlib.suppress(OSError):
                    folder.parent.rmdir()  # if nothing else is in it
            raise

    def _stopped(self, folder: Path | None) -> None:
        """Keep the chosen epoch so far as a model, print how to resume, and end the process."""
        checkpoint = self.trainer.checkpoint_callback
        last = Path(getattr(checkpoint, "dirpath", None) or "") / LAST
        if not isinstance(checkpoint, ModelCheckpoint) or not last.is_file():
            raise SystemExit(
                stopped_by_user("before its first epoch ended: there is nothing to resume")
            )
        SavePretrained().on_fit_end(self.trainer, self.model)
        is_default = (
            folder is not None and folder.parent.name == RUNS and last.parent.parent == folder
        )
        name, value = (
            ("run_tag", folder.name)
            if is_default and folder is not None
            else ("ckpt_path", str(last))
        )
        raise SystemExit(stopped_by_user(resume_with=self.request.again(name, value)))

    def predict(self, **arguments: Any) -> None:
        output = self._get(self.config, "output")
        writer = PredictionWriter(output)
        self.trainer.callbacks.append(writer)  # type: ignore[attr-defined]
        self.trainer.predict(**arguments, return_predictions=False)
        without = (
            f", and {writer.unlabelled} without a label, with the reason"
            if writer.unlabelled
            else ""
        )
        place = "standard output" if output == "-" else writer.path
        print(f"{writer.labelled} predictions are in {place}{without}", file=sys.stderr)

    def validate(self, verbose: bool = True, **arguments: Any) -> None:
        self.trainer.validate(**arguments, verbose=False)
        show_metrics(self.trainer, self.model, verbose)

    def test(self, verbose: bool = True, **arguments: Any) -> None:
        self.trainer.test(**arguments, verbose=False)
        show_metrics(self.trainer, self.model, verbose, promise=True)

    def calibrate(self, promise: Promise) -> None:
        """Calibrate the stored model, and write the dial to its checkpoint and its folder."""
        if any(word.startswith(f"--model.{promise.dial}") for word in self.request.model_words()):
            raise ValueError(
                f"dact calibrate finds {promise.dial} itself: leave --model.{promise.dial} out"
            )
        plain = yaml.safe_load(
            self._parser("calibrate").dump(self.config["calibrate"], skip_none=False)
        )
        check_set_aside(self.source, plain.get("data") or {})
        check_storable(self.source)
        model, plugin = self.model, self.trainer.precision_plugin
        before = getattr(model, promise.dial)
        measured: Any = plugin.convert_module(copy.deepcopy(model)).to(
            self.trainer.strategy.root_device
        )
        with plugin.forward_context():
            found = calibrate(measured, self.datamodule, **asdict(promise))
        check_estimate(found, promise)
        model.exit_rule = measured.exit_rule
        model.calibration, model.temperatures = measured.calibration, measured.temperatures
        print(describe(found, model.num_layers))
        print(*store_dial(self.source, model, promise.dial), sep="\n")
        print(f"{promise.dial} was {before:.8g}, and is {getattr(model, promise.dial):.8g}")


def _ignore(parser: LightningArgumentParser, *names: str) -> None:
    """Accept options that the config.yaml of a fit holds and this command ignores."""
    for name in names:
        parser.add_argument(f"--{name}", type=Any, default=None, help=SUPPRESS)


def _has(given: list[Any], kind: type) -> bool:
    return any(isinstance(one, kind) for one in given)


def run() -> DACTCLI:
    """Run the command line of this process."""
    quiet()
    # A configuration may name classes of files next to it, or in this folder.
    sys.path += [
        str(folder.absolute())
        for folder in (Path(), *(file.parent for file in config_files(sys.argv[1:])))
    ]
    request = Request.read(sys.argv[1:])
    # jsonargparse's own usage line names a hundred options, which the groups below it explain
    # anyway.
    files = {name: f"--model RUN --data.{option} FILE" for name, option in FILE_OF.items()}
    texts = {
        name: {
            "usage": f"dact {name} {files.get(name, '--config FILE')} [--OPTION ...]",
            "description": text,
        }
        for name, text in LIGHTNING.items()
    }
    return DACTCLI(
        request,
        trainer_class=DACTTrainer,
        seed_everything_default=0,
        save_config_callback=SaveConfig,
        parser_class=OneLineParser,
        save_config_kwargs={"overwrite": True},
        trainer_defaults={"enable_model_summary": False},
        parser_kwargs={"prog": "dact", **texts},
        subclass_mode_data=True,
    )


def main() -> None:
    """Run the command line of this process; an error of use ends it with one line instead of a
    traceback."""
    with one_line_errors():
        run()
