"""The dact command with a fault planted in it, or watched: ``python -m tests.killed PLAN COMMAND
…``.

PLAN is JSON: ``point`` and ``count`` say at which event, and at the how-manieth of its kind, the
process kills itself; ``log`` names a file that gets a line for each epoch of training, with the
folder that the fit logs to, the epoch, and how many epochs are planned; ``peak`` asks for a last
line with the most memory that the process held, in MiB; ``grace`` is after how many seconds without
a heartbeat a trial counts as dead."""

import json
import os
import resource
import signal
import sys
from functools import partial
from pathlib import Path

import optuna
import sqlalchemy
from optuna import Study
from optuna.study import _optimize
from sqlalchemy.engine import Engine

from dact import DACT
from dact.__main__ import main

POINTS = ("replace", "fsync", "commit", "train", "validate", "ask", "tell")


class Fault:
    """Counts events and kills the process at one of them, without any last words."""

    def __init__(self, count):
        self.left = count

    def __call__(self, *_):
        self.left -= 1
        if self.left == 0:
            os.kill(os.getpid(), signal.SIGKILL)


def around(owner, name, before=None, after=None):
    original = getattr(owner, name)

    def wrapped(*arguments, **options):
        if before:
            before(*arguments)
        result = original(*arguments, **options)
        if after:
            after(*arguments)
        return result

    setattr(owner, name, wrapped)


def plant(point, count):
    fault = Fault(count)
    if point in ("replace", "fsync"):
        around(os, point, fault, fault)
    elif point == "commit":
        sqlalchemy.event.listen(Engine, "commit", fault)
    elif point == "ask":
        around(Study, "ask", None, fault)
    elif point == "tell":
        around(_optimize, "_tell_with_warning", fault, fault)
    else:
        around(DACT, "training_step" if point == "train" else "validation_step", fault)


def keep_log(file):
    def note(model, *_):
        with Path(file).open("a") as log:
            trainer = model.trainer
            log.write(f"{trainer.log_dir} {trainer.current_epoch} {trainer.max_epochs}\n")

    around(DACT, "on_train_epoch_start", note)


def shorten(storage, *_, grace):
    storage.heartbeat_interval, storage.grace_period = 1, grace


def run(plan, *words):
    sys.argv = ["dact", *words]
    plan = json.loads(plan)
    if "point" in plan:
        plant(plan["point"], plan["count"])
    if "grace" in plan:
        around(optuna.storages.RDBStorage, "__init__", None, partial(shorten, grace=plan["grace"]))
    if "log" in plan:
        keep_log(plan["log"])
    main()
    if plan.get("peak"):
        print("PEAK", resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024)


if __name__ == "__main__":
    run(*sys.argv[1:])
