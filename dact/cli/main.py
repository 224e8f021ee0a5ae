"""``dact fit`` and ``dact tune``: LightningCLI with dact's model, callbacks and engine."""

from __future__ import annotations

import shlex
import sys
from functools import partial
from inspect import signature
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal, NoReturn

import torch
import yaml
from jsonargparse import Namespace
from lightning.pytorch import Callback, LightningDataModule, Trainer
from lightning.pytorch.callbacks import Checkpoint, ModelCheckpoint, ProgressBar
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.plugins import CheckpointIO
from typing_extensions import override

from dact import signals
from dact.calibration import Measured, Promise, settle
from dact.callbacks import LAST, ExitPlots, LastCheckpoint, SavePretrained
from dact.cli import TRAINING
from dact.cli.errors import UsageError, find_class, parse
from dact.cli.output import Bar, EpochLines, quiet
from dact.cli.stored import RUNS, is_tuned, load_model, measure, store
from dact.factories import build_data, build_few_data, build_model
from dact.files import DurableCheckpointIO, read_checkpoint, write_text
from dact.functional import UNLABELLED
from dact.model import DACT

Monitor = Literal["last", "val_loss", "val_task_loss", "val_accuracy", "val_macro_f1"]
# Trainer options that may differ when a fit is resumed.
CHANGEABLE = ("max_epochs", "logger", "log_every_n_steps", "enable_progress_bar", "accelerator")
OF_COMMAND = ("ckpt_path", "run_tag", "tuner", "fast", "calibrate")


class TrainingCLI(LightningCLI):
    """The options of ``dact fit`` and ``dact tune``, which read the same files."""

    def __init__(self, command: str, words: list[str]) -> None:
        self.command, self.words = command, words
        self.data: LightningDataModule | None = None
        self.folder: Path | None = None  # the run folder of a fit with a run tag
        super().__init__(
            DACT,
            LightningDataModule,
            run=False,
            subclass_mode_data=True,
            seed_everything_default=0,
            save_config_callback=None,
            auto_configure_optimizers=False,
            parser_kwargs={
                "prog": f"dact {command}",
                "usage": f"dact {command} --config FILE [--OPTION ...]",
                "description": TRAINING[command],
                "exit_on_error": False,
                "allow_abbrev": False,
            },
        )

    @property
    def plain(self) -> dict[str, Any]:
        """The configuration as plain data."""
        return yaml.safe_load(self.parser.dump(self.config, skip_none=False))

    # ------------------------------------------------------------------ options

    @override
    def add_core_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        # The skipped options are added below, with one more type of value.
        parser.add_class_arguments(
            DACT,
            "model",
            skip={"class_weights", "output_dimension"},
            fail_untyped=False,
            sub_configs=True,
            instantiate=self.command == "fit",
        )
        parser.add_argument(
            "--model.output_dimension",
            type=int | None,
            default=None,
            help="number of classes; taken from the data if left out",
        )
        parser.add_argument(
            "--model.class_weights",
            type=list[float] | Literal["balanced"] | None,
            default=None,
            help="one weight per class for the losses; balanced: inversely proportional to the "
            "training examples of the class",
        )
        parser.add_lightning_class_args(LightningDataModule, "data", subclass_mode=True)
        parser.set_defaults({"data": {"class_path": "dact.data.TextClassificationData"}})
        parser.add_lightning_class_args(Trainer, "trainer")
        parser.set_defaults({"trainer.enable_model_summary": False})

    @override
    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        help = "name of the run and its folder in lightning_logs; the same name resumes the run"
        parser.add_argument("--run_tag", type=str, default="", help=help)
        help = "checkpoint to resume a fit from"
        parser.add_argument("--ckpt_path", type=str | None, default=None, help=help)
        help = "epoch whose model a fit keeps: the last one, or the best by this metric"
        parser.add_argument("--monitor", type=Monitor, default="last", help=help)
        help = "calibrate the margin after a fit, on validation examples that are set aside"
        parser.add_argument("--calibrate", type=bool, default=True, help=help)
        if self.command == "fit":
            help = "options of dact tune"
            parser.add_argument("--tuner", type=dict[str, Any] | None, default=None, help=help)
            return
        help = "tune with 16 texts per split and one trial per study, as a smoke test"
        parser.add_argument("--fast", action="store_true", help=help)
        from dact.tuning import TuningEngine
        from dact.tuning.recipe import TRAINER_DEFAULTS

        elsewhere = {"output_dimension", "model", "data", "trainer", "seed", "callbacks"}
        parser.add_class_arguments(
            TuningEngine, "tuner", skip=elsewhere, sub_configs=True, instantiate=False
        )
        parser.set_defaults({f"trainer.{name}": value for name, value in TRAINER_DEFAULTS.items()})
        # The bound is left out, or it would be added to the bound that a file sets.
        parser.set_defaults({"tuner.promise": {"confidence": Promise().confidence}})

    @override
    def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:
        self.config = parse(parser, self.words)

    # ------------------------------------------------------------------ building

    @override
    def instantiate_classes(self) -> None:
        self._complete()
        if self.command == "fit":
            # config.yaml starts a new fit, without the checkpoint.
            begun = self.config.clone()
            begun.ckpt_path = None
            self.written = self.parser.dump(begun, skip_none=False)
            self._resume()
            self.config.trainer.logger = self._loggers()
            super().instantiate_classes()
            # Reuse the datamodule of _complete: its texts are already tokenized.
            self.datamodule = self.data or self.datamodule

    def _complete(self) -> None:
        """Fill in the options that follow from the encoder and the data."""
        model, data = self.config.model, self.config.data.init_args
        trainer, mkldnn = self.config.trainer, torch.backends.mkldnn
        fast = mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported()
        on_cpu = trainer.accelerator == "cpu" or not torch.accelerator.is_available()
        if on_cpu and not fast and str(trainer.precision).startswith("bf16"):
            print(f"precision is 32-true: this processor is far slower in {trainer.precision}")
            trainer.precision = "32-true"
        if "tokenizer" in data and data.tokenizer is None:
            data.tokenizer = model.encoder.init_args.get("pretrained")
        aside = self.command == "fit" and self.config.calibrate and not data.get("calibration_file")
        if aside and data.get("calibration_fraction") == 0:
            data.calibration_fraction = 0.5
        balanced = model.class_weights == "balanced"
        if model.output_dimension is not None and not balanced:
            return
        self.data = build_data(self.plain["data"])
        self.data.prepare_data()
        self.data.setup("fit")
        names = getattr(self.data, "class_names", None)
        if model.output_dimension is None:
            if names is None:
                raise ValueError("give model.output_dimension: the data does not name its classes")
            model.output_dimension = len(names)
        if balanced:
            model.class_weights = balanced_weights(self.data, model.output_dimension)

    def _resume(self) -> None:
        """Resume the earlier fit with the same run tag, if there is one."""
        config = self.config
        if not config.run_tag:
            return
        root = Path(config.trainer.default_root_dir or ".", RUNS)
        folder = self.folder = run_folder(root, config.run_tag, "fit")
        last = folder / "checkpoints" / LAST
        if config.ckpt_path is not None or not last.is_file():
            return
        file = folder / "config.yaml"
        before, now = yaml.safe_load(file.read_text(encoding="utf-8")), self.plain
        for one in (before, now):
            for name in OF_COMMAND:
                one.pop(name, None)
            for name in CHANGEABLE:
                one["trainer"].pop(name, None)
        from dact.tuning.run import differences

        for name, then, wanted in differences(before, now):
            raise ValueError(
                f"run {folder.name} was started with {name} {then!r}, and now it is {wanted!r}: "
                f"use the value in {file}, or give another --run_tag"
            )
        done = read_checkpoint(last)["epoch"] + 1
        if 0 < (config.trainer.max_epochs or 1000) <= done:
            raise ValueError(
                f"run {folder.name} has finished epoch {done}, its last: raise "
                "--trainer.max_epochs, or give another --run_tag"
            )
        print(f"resuming {folder} after epoch {done}")
        config.ckpt_path = str(last)

    def _loggers(self) -> Any:
        """Return the loggers of a fit; the first one has the run tag as its version or name."""
        given = self.config.trainer.logger
        if given in (None, True):
            root, tag = self.config.trainer.default_root_dir or ".", self.config.run_tag or None
            return TensorBoardLogger(root, name=RUNS, version=tag, default_hp_metric=False)
        if given is False:
            return given
        built: list[Any] = []
        # One by one, so that an error says which library is missing.
        for one in _listed(given):
            kind = find_class(one.class_path, "lightning.pytorch.loggers")
            arguments = {**one.init_args.as_dict(), **(one.get("dict_kwargs") or {})}
            names = [n for n in ("version", "name", "run_name") if n in signature(kind).parameters]
            if self.folder is not None and not built:
                arguments |= dict.fromkeys(names[:1], self.folder.name)
            built.append(kind(**arguments))
        return built

    @override
    def _instantiate_trainer(self, config: dict[str, Any], callbacks: list[Callback]) -> Trainer:
        given, plugins = _listed(config.get("callbacks")), _listed(config.get("plugins"))
        added: list[Callback] = [signals.StopOnSignal()]
        if config.get("enable_progress_bar") is None:
            config["enable_progress_bar"] = sys.stdout.isatty()
        if config["enable_progress_bar"] and not _has(given, ProgressBar):
            added.append(Bar())
        monitor = "epoch" if self.config.monitor == "last" else self.config.monitor
        own = [one for one in given if isinstance(one, ModelCheckpoint)]
        if not _has(given, Checkpoint) and config.get("enable_checkpointing") is not False:
            best = ModelCheckpoint(
                filename="best",
                monitor=monitor,
                mode="min" if monitor.endswith("loss") else "max",
                enable_version_counter=False,
                save_on_train_epoch_end=True if monitor == "epoch" else None,
            )
            own = [best]
            added.append(best)
        for one in own[:1]:
            if self.folder is not None and one.dirpath is None:
                one.dirpath = str(self.folder / "checkpoints")
            added.append(LastCheckpoint(one))
        added += [ExitPlots(), SavePretrained(), EpochLines(self.config.calibrate)]
        if not _has(plugins, CheckpointIO):
            config["plugins"] = [*plugins, DurableCheckpointIO()]
        return super()._instantiate_trainer(config, [*callbacks, *added])

    # ------------------------------------------------------------------ commands

    def fit(self) -> None:
        """Fit; if stopped, save the model so far and print the command that resumes the fit."""
        trainer = self.trainer
        folder = self.folder
        if folder is None and trainer.loggers and trainer.log_dir:
            folder = Path(trainer.log_dir)
        if folder is not None and trainer.is_global_zero:
            folder.mkdir(parents=True, exist_ok=True)
            write_text(folder / "config.yaml", self.written)
        try:
            trainer.fit(self.model, self.datamodule, ckpt_path=self.config.ckpt_path)
        except BaseException:
            # Lightning turns Ctrl-C into a SystemExit.
            if not signals.stop_requested():
                raise
            last = Path(getattr(trainer.checkpoint_callback, "dirpath", None) or "", LAST)
            if not last.is_file():
                raise KeyboardInterrupt from None
            SavePretrained().on_fit_end(trainer, self.model)
            if folder is not None and folder.parent.name == RUNS and folder in last.parents:
                self._stopped("run_tag", folder.name)
            self._stopped("ckpt_path", str(last))
        if folder is not None and (folder / "model").is_dir() and trainer.is_global_zero:
            own = self.model.encoder if self.model.encoder.config() is None else None
            model = load_model(folder / "model", own).to(self.model.device)
            if self.config.calibrate:
                print(settle(model, self.datamodule))
                store(model, folder / "model")
            measured = measure(model, self.datamodule, "validate")
            if isinstance(trainer.logger, TensorBoardLogger):
                self._log(folder, measured)

    def _log(self, folder: Path, measured: Measured) -> None:
        """Log the fit to TensorBoard in the same way as ``dact tune``."""
        from dact.tuning import report
        from dact.tuning.recipe import as_written

        model, epochs = self.model, self.trainer.current_epoch
        written = as_written(model, getattr(self.datamodule, "batch_size", None), epochs)
        metrics = {name: value.item() for name, value in self.trainer.callback_metrics.items()}
        metrics |= report.metrics_of(measured, model.class_weights)
        report.log_fit(folder, report.parameters_of(model, written), metrics, folder.name)

    def _stopped(self, name: str, value: str) -> NoReturn:
        """End the process with the command that resumes the run."""
        more = [] if name == "run_tag" and self.config.run_tag else [f"--{name}", value]
        again = shlex.join(["dact", self.command, *self.words, *more])
        print(f"\ndact: stopped; resume with: {again}", file=sys.stderr)
        raise SystemExit(130)

    def tune(self) -> None:
        """Run the studies and the final fit with factories for model and data."""
        from dact.tuning import TuningEngine
        from dact.tuning.recipe import TRAINER_DEFAULTS

        config, plain = self.config, self.plain
        if config.monitor != "last" or config.ckpt_path is not None:
            raise UsageError("dact tune keeps the last epoch: leave monitor and ckpt_path out")
        if config.run_tag:
            run_folder(Path(config.tuner.log_dir), config.run_tag, "tune")
        sections: Any = Namespace(trainer=config.trainer, tuner=config.tuner)  # type: ignore[no-untyped-call]
        ready = self.parser.instantiate_classes(sections)
        given = vars(ready.trainer).items()
        trainer = {name: v for name, v in given if v is not None or name in TRAINER_DEFAULTS}
        options, build = vars(ready.tuner), build_data
        if config.fast:
            build = build_few_data
            trainer |= {"max_epochs": 1, "limit_train_batches": 1, "limit_val_batches": 1}
            options |= {"n_trials": 1, "warm_up_epochs": 1, "compare_defaults": False}
            options["promise"] = options["promise"] and Promise()  # will be an estimate
        engine = TuningEngine(
            plain["model"]["output_dimension"],
            model=partial(build_model, plain["model"]),
            data=partial(build, plain["data"]),
            trainer=trainer,
            seed=int(plain["seed_everything"] or 0),
            **options,
        )
        engine.worker_setup = quiet_studies
        quiet_studies()
        tag = config.run_tag or engine.run_tag
        try:
            engine.run_pipeline(tag)
        except KeyboardInterrupt:
            self._stopped("run_tag", tag)


def quiet_studies() -> None:
    """Hide Optuna's log lines, whose content the engine's table shows."""
    import optuna

    quiet()
    optuna.logging.set_verbosity(optuna.logging.CRITICAL)


def run_folder(root: str | Path, tag: str, command: str) -> Path:
    """Return the folder of a run; a path as tag, or a run of the other command, is an error."""
    if tag in (".", "..") or tag != Path(tag).name:
        raise ValueError(f"run_tag must be a name, got {tag!r}")
    folder = Path(root, tag)
    owner = "tune" if is_tuned(folder) else "fit"
    if owner != command and (owner == "tune" or (folder / "checkpoints").exists()):
        raise ValueError(f"{folder} belongs to dact {owner}: give another --run_tag")
    return folder


def balanced_weights(data: LightningDataModule, classes: int) -> list[float]:
    """Return n / (classes · n_c) for each class c, where n_c of the n training examples have it;
    for several labels (n - n_c) / n_c, where n counts the examples whose label c is known."""
    labels = torch.cat([batch["labels"].cpu() for batch in data.train_dataloader()])
    if labels.dim() == 2:
        present, absent = (labels == 1).sum(dim=0), (labels == 0).sum(dim=0)
        return [round(weight, 6) for weight in (absent / present.clamp_min(1)).tolist()]
    counts = torch.bincount(labels[labels != UNLABELLED], minlength=classes).double()
    if (counts == 0).any():
        raise ValueError(
            "class_weights: balanced needs training examples of every class, but there are "
            f"{counts.long().tolist()}"
        )
    return [round(weight, 6) for weight in (counts.sum() / (classes * counts)).tolist()]


def _listed(given: Any) -> list[Any]:
    """Return one object, several or None as a list."""
    return given if isinstance(given, list) else [] if given is None else [given]


def _has(given: list[Any], kind: type) -> bool:
    return any(isinstance(one, kind) for one in given)


def run(command: str, words: list[str]) -> None:
    """Run ``dact fit`` or ``dact tune``."""
    quiet()
    # A configuration may name classes in files next to it, or in the current folder.
    files = [Path(word) for flag, word in pairwise(words) if flag in ("-c", "--config")]
    sys.path += [str(folder.absolute()) for folder in (Path(), *(file.parent for file in files))]
    cli = TrainingCLI(command, words)
    signals.install()
    cli.fit() if command == "fit" else cli.tune()
