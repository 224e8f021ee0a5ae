"""A program that uses dact as a library finds itself as it was: nothing of it is muted, seeded or
reset."""

import json
import os
import subprocess
import sys

import pytest

HEAD = """
import gc, json, logging, os, random, sys, warnings
import lightning.pytorch as pl
import numpy as np
import torch

def loggers():
    named = logging.root.manager.loggerDict
    found = {n: found for n, found in named.items() if isinstance(found, logging.Logger)}
    return {name: [log.level, log.disabled, log.propagate,
                   list(map(str, log.filters)), list(map(str, log.handlers))]
            for name, log in {"root": logging.root, **found}.items()}

def snapshot():
    return {
        "warning filters": list(map(str, warnings.filters)),
        "showwarning": str(warnings.showwarning),
        "loggers": loggers(),
        "logging.disable": logging.root.manager.disable,
        "torch threads": [torch.get_num_threads(), torch.get_num_interop_threads()],
        "gc": [gc.isenabled(), gc.get_freeze_count(), gc.get_threshold()],
        "environment": {name: os.environ.get(name) for name in sorted(os.environ)},
        "python's generator": str(random.getstate()),
        "numpy's generator": str(np.random.get_state()),
        "torch's generator": torch.get_rng_state().tolist(),
        "torch switches": [torch.is_grad_enabled(), str(torch.get_default_dtype()),
                           torch.are_deterministic_algorithms_enabled(),
                           torch.get_float32_matmul_precision(), torch.backends.cudnn.benchmark],
        "excepthook": str(sys.excepthook),
        "path": list(sys.path),
    }

def changed(before, after):
    found = {}
    for name, was in before.items():
        now = after[name]
        if name == "loggers":  # a library may add loggers of its own
            now = {key: now.get(key) for key in was}
        if was != now:
            found[name] = [[str(was)[:300], str(now)[:300]] if not isinstance(was, dict) else
                           {key: [was.get(key), now.get(key)]
                            for key in {*was, *now} if was.get(key) != now.get(key)}]
    return found
"""

IMPORTS = """
before = snapshot()
import dact, dact.data, dact.encoders, dact.tuning
from dact import DACT, TuningEngine, TextClassifier, calibrate
from dact.encoders import HuggingFaceEncoder
found["imports"] = changed(before, snapshot())
"""

MODEL = """
from functools import partial
from dact import DACT, TuningEngine
from dact.data import CompositionalSentiment
from dact.encoders import TransformerEncoder

def model(**overrides):
    return DACT(encoder=TransformerEncoder(42, 3, 8, 2), **{"learning_rate": 3e-3, **overrides})

data = partial(CompositionalSentiment, num_train=120, num_val=60, num_test=60)
quiet = {"accelerator": "cpu", "enable_progress_bar": False}
"""

FIT = """
trainer = pl.Trainer(max_epochs=1, logger=False, enable_checkpointing=False, **quiet)
built, loaded = model(), data()
before = snapshot()
trainer.fit(built, loaded)
trainer.validate(built, loaded)
after = snapshot()
# training draws from them
for name in ("python's generator", "numpy's generator", "torch's generator"):
    before[name] = after[name]
found["fit"] = changed(before, after)
"""

TUNE = """
space = {"batch_size": {"choices": [32, 64]}, "num_epochs": {"choices": [1, 2]}}
for mode in ("frozen", "finetune"):
    before = snapshot()
    engine = TuningEngine(model=model, data=data, n_trials=1, search_space=space,
                          log_dir=mode, warm_up_epochs=1, encoder_training=mode,
                          trainer={"max_epochs": 1, "deterministic": "warn", "benchmark": True,
                                   **quiet})
    engine.run_pipeline("run")
    found[mode] = changed(before, snapshot())
"""


@pytest.fixture(scope="module")
def changed(tmp_path_factory):
    """What a program finds changed, by the name of what it did."""
    code = IMPORTS + MODEL + FIT + TUNE
    program = f"{HEAD}\nfound = {{}}\n{code}\nprint('CHANGED' + json.dumps(found, default=str))"
    # A number of threads that changes must show, so all of them are used; but they need not spin
    # while they wait.
    env = {**os.environ, "OMP_WAIT_POLICY": "PASSIVE"}
    env.pop("OMP_NUM_THREADS", None)
    command, options = [sys.executable, "-c", program], {"capture_output": True, "text": True}
    folder = tmp_path_factory.mktemp("host")
    done = subprocess.run(command, cwd=folder, env=env, timeout=500, **options)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.rsplit("CHANGED", 1)[1])


@pytest.mark.slow
@pytest.mark.parametrize("what", ["imports", "fit", "frozen", "finetune"])
def test_dact_changes_nothing_of_its_host(changed, what):
    assert changed[what] == {}
