"""``dact tune``: the sections of a configuration become factories for the engine."""

from __future__ import annotations

import sys
import threading
import warnings
from pathlib import Path
from typing import Any

import yaml
from jsonargparse import Namespace
from lightning.pytorch.cli import LightningArgumentParser

from dact.cli.quiet import quiet
from dact.cli.request import Request
from dact.cli.runs import check_tag
from dact.factories import DataFactory, ModelFactory


def add_tuner_arguments(parser: LightningArgumentParser) -> None:
    """Add the options of the engine to a parser, except those that have sections of their own, and
    its defaults."""
    from dact.tuning import TuningEngine
    from dact.tuning.recipe import TRAINER_DEFAULTS

    elsewhere: set[int | str] = {
        "output_dimension",
        "model",
        "data",
        "trainer",
        "seed",
        "callbacks",
    }
    parser.add_class_arguments(
        TuningEngine, "tuner", skip=elsewhere, sub_configs=True, instantiate=False
    )
    parser.set_defaults({f"trainer.{name}": value for name, value in TRAINER_DEFAULTS.items()})


def tune(
    parser: LightningArgumentParser, config: Namespace, trainer_class: type, request: Request
) -> None:
    """Run the pipeline on the sections of a configuration; `request` is for the message that says
    how to resume."""
    from dact.tuning import TuningEngine
    from dact.tuning.recipe import TRAINER_DEFAULTS
    from dact.tuning.storage import describe_storage, root_cause, stopped_by

    if config.data is None:
        raise ValueError("dact tune needs a data: section; configs/quickstart.yaml shows one")
    ignored = [name for name in ("optimizer", "lr_scheduler") if config.get(name) is not None]
    ignored += ["monitor"] if config.monitor not in (None, "last") else []
    if ignored:
        raise ValueError(
            f"dact tune does not read {', '.join(ignored)}: it trains with the model's own optimizer and schedule, and "
            "keeps the last epoch. Leave this out, or override configure_optimizers in a class of your own"
        )
    if config.ckpt_path is not None:
        raise ValueError(
            "dact tune does not begin with a checkpoint: leave ckpt_path out, or give model.encoder a folder"
        )
    if config.run_tag:
        check_tag(Path(config.tuner.log_dir), config.run_tag, "tune")
    plain = yaml.safe_load(parser.dump(config, skip_none=False))
    # Only these two sections are built here, with a parser of their own.
    builder = LightningArgumentParser(exit_on_error=False)
    builder.add_lightning_class_args(trainer_class, "trainer")  # type: ignore[arg-type]
    add_tuner_arguments(builder)
    ready = builder.instantiate_classes(
        builder.parse_object({"trainer": plain["trainer"], "tuner": plain["tuner"]})
    )
    trainer = {
        name: value
        for name, value in vars(ready.trainer).items()
        if value is not None or name in TRAINER_DEFAULTS
    }
    engine = TuningEngine(
        plain["model"]["output_dimension"],
        model=ModelFactory(plain["model"]),
        data=DataFactory(plain["data"]),
        trainer=trainer,
        seed=int(plain["seed_everything"] or 0),
        **vars(ready.tuner),
    )
    engine.worker_setup = _quiet_studies
    _quiet_studies()
    tag = config.run_tag or engine.run_tag
    try:
        engine.run_pipeline(tag)
    except KeyboardInterrupt:
        raise SystemExit(stopped_by_user(resume_with=request.again("run_tag", tag))) from None
    except Exception as error:
        cause = stopped_by(error)
        if cause is None:
            raise
        where = f"{engine.log_dir / tag}"
        if not isinstance(cause, OSError) and isinstance(engine.storage, str):
            where += f", storage {describe_storage(engine.storage, engine.log_dir / tag)}"
        # The message of a storage that cannot be opened already names its address.
        reason = (
            str(cause) if isinstance(cause, ConnectionError) and str(cause) else root_cause(cause)
        )
        raise RuntimeError(
            f"{where}: {reason.rstrip('.')}. Finished work is kept: fix this and run the same command again"
        ) from error


def stopped_by_user(text: str = "", resume_with: str = "") -> int:
    """Print that a command was stopped, and return its exit status."""
    print(
        f"\ndact: stopped{f' {text}' if text else f'; resume with: {resume_with}'}", file=sys.stderr
    )
    return 130


def _quiet_studies() -> None:
    """Keep Optuna's lines off the console, where the table shows the same."""
    import optuna

    quiet()
    optuna.logging.set_verbosity(optuna.logging.CRITICAL)
    show = threading.excepthook

    def hook(arguments: threading.ExceptHookArgs) -> None:
        """Show no error of a disk or a storage: the main thread meets the same error and reports
        it."""
        module = arguments.exc_type.__module__.partition(".")[0]
        if not issubclass(arguments.exc_type, OSError) and module not in ("optuna", "sqlalchemy"):
            show(arguments)

    threading.excepthook = hook
    said: set[str] = set()
    warn = warnings.showwarning

    def once(message: Warning | str, *arguments: Any, **options: Any) -> None:
        """Show each warning once: every fit forgets what others have shown."""
        if str(message) not in said:
            said.add(str(message))
            warn(message, *arguments, **options)

    warnings.showwarning = once
