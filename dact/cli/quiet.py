"""Filters for messages of other libraries, for the command line. Library calls never use them."""

from __future__ import annotations

import logging
import re
import warnings

# Messages of Lightning and its neighbours that say nothing about this run or repeat at every start.
_MESSAGES = re.compile(
    r"GPU available|TPU available|HPU available|💡 Tip|Seed set to|`Trainer\.(fit|test|validate|predict)` stopped"
    r"|Restoring states from|Loaded model weights|Restored all states|`weights_only` was not set|Loading "
    r"`train_dataloader`"
    r"|You are using a CUDA device|LOCAL_RANK:|Using default `ModelCheckpoint`|Using bfloat16|Using 16bit|\(AMP\)"
    r"|distributed_backend=|All distributed processes registered|Initializing distributed|^-{20,}$"
    r"|Detected KeyboardInterrupt|Received SIGTERM"
)
_WARNINGS = (
    r".*does not have many workers.*",
    r".*number of training batches .* is smaller than the logging interval.*",
    r".*Checkpoint directory .* exists and is not empty.*",
    # to test a model, none is needed
    r".*callbacks used to create the checkpoint need to be provided.*",
    r".*is an instance of `nn\.Module` and is already saved.*",
    r".*It is recommended to use `self\.log\(.*sync_dist=True\)`.*",
    r".*Precision 16-mixed is not supported by the model summary.*",
    r".*configure_optimizers` will be overridden by.*",
    r".*module\(s\) in eval mode at the start of training.*",  # a frozen encoder is meant to be
    # no validation ran
    r".*`ModelCheckpoint\(monitor='val_(loss|task_loss|accuracy|macro_f1)'\)` could not find.*",
    r".*is an experimental feature.*",
    r".*is experimental \(supported from.*",
)


def _worth_reading(record: logging.LogRecord) -> bool:
    return not _MESSAGES.search(record.getMessage())


def quiet() -> None:
    """Silence exactly the messages above, and show other warnings without the line of code that
    raised them."""
    for name in (
        "lightning.pytorch",
        "lightning.fabric",
        "lightning",
        "",
    ):  # the last one is the root logger
        for handler in logging.getLogger(name).handlers:
            handler.addFilter(_worth_reading)
    for pattern in _WARNINGS:
        warnings.filterwarnings("ignore", message=pattern)
    warnings.formatwarning = lambda message, *_, **__: f"warning: {message}\n"  # type: ignore[assignment]
    warnings.filterwarnings("ignore", category=DeprecationWarning)
    warnings.filterwarnings("ignore", category=FutureWarning)
