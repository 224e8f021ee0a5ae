"""The command line: LightningCLI with dact's model, callbacks and errors."""

from __future__ import annotations

import os
import sys
from typing import Any

from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Callback, LightningDataModule, LightningModule, Trainer
from lightning.pytorch.callbacks import Checkpoint, ModelCheckpoint, ProgressBar, RichProgressBar
from lightning.pytorch.cli import ArgsType, LightningArgumentParser, LightningCLI, SaveConfigCallback
from typing_extensions import override

from dact.callbacks import ExitPlots, PredictionWriter, SavePretrained
from dact.console import quiet
from dact.model import DACT

USAGE_ERRORS = (ValueError, TypeError, KeyError, OSError, RuntimeError, MisconfigurationException)


class SaveConfig(SaveConfigCallback):
    """Keep config.yaml beside what a fit logs; without a logger there is no folder for it."""

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if stage == "fit" and trainer.loggers:
            super().setup(trainer, pl_module, stage)


class DACTCLI(LightningCLI):
    """``dact fit | validate | test | predict``."""

    @override
    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        parser.add_argument("--tuner", type=dict[str, Any] | None, default=None, help="read by `dact tune` alone")

    @staticmethod
    @override
    def subcommands() -> dict[str, set[str]]:
        commands = LightningCLI.subcommands()
        return {**commands, "predict": commands["predict"] | {"return_predictions"}}

    @override
    def _prepare_subcommand_parser(self, klass: type, subcommand: str, **kwargs: Any) -> LightningArgumentParser:
        parser = super()._prepare_subcommand_parser(klass, subcommand, **kwargs)
        parser.set_defaults({"weights_only": True})  # a checkpoint from elsewhere must not run code
        if subcommand == "predict":
            parser.add_argument(
                "--output", type=str, default="predictions.csv", help="where to: .csv, .jsonl or .parquet"
            )
        return parser

    @override
    def _parse_ckpt_path(self) -> None:
        """The configuration says which model to build; the checkpoint gives its weights, which must fit."""

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
        return super()._instantiate_trainer(config, [*callbacks, *added])

    def predict(self, **arguments: Any) -> None:
        self.trainer.callbacks.append(PredictionWriter(self._get(self.config, "output")))  # type: ignore[attr-defined]
        self.trainer.predict(**arguments, return_predictions=False)


def _has(callbacks: list[Callback], kind: type) -> bool:
    return any(isinstance(callback, kind) for callback in callbacks)


def run(args: ArgsType = None) -> DACTCLI:
    """Run the command line, by default that of this process."""
    quiet()
    # jsonargparse's own usage line names a hundred options, which the groups below it explain anyway.
    usages = {name: {"usage": f"dact {name} --config FILE [--OPTION VALUE ...]"} for name in DACTCLI.subcommands()}
    return DACTCLI(
        DACT,
        LightningDataModule,
        subclass_mode_data=True,
        seed_everything_default=0,
        save_config_callback=SaveConfig,
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
        print(f"dact: error: {message}", file=sys.stderr)
        raise SystemExit(1) from None
