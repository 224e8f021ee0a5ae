"""What a tuning run survives: kills, stops, and machines that share a server. Real processes."""

import contextlib
import json
import os
import random
import shutil
import signal
import subprocess
import tempfile
import time
from pathlib import Path

import optuna
import psutil
import pytest
import yaml

from dact import DACT, TextClassifier
from dact.files import read_json
from dact.tuning.stages import STAGES as ALL_STAGES
from dact.tuning.trial import CAUSE
from tests import warm
from tests.commands import environment
from tests.conftest import free_port
from tests.killed import POINTS

STAGES = [stage.name for stage in ALL_STAGES]
# Each way of POINTS once, and two more; DACT_KILLS=30 makes thirty in all.
KILLS = int(os.environ.get("DACT_KILLS", len(POINTS) + 2))

CONFIG = """
seed_everything: 0
trainer: {max_epochs: 1, accelerator: cpu}
model:
  encoder:
    class_path: dact.encoders.TransformerEncoder
    init_args: {vocab_size: 42, num_layers: 3, hidden_size: 8, num_heads: 2}
  output_dimension: 3
  learning_rate: 3.0e-3
data:
  class_path: dact.data.CompositionalSentiment
  init_args: {num_train: 120, num_val: 60, num_test: 60, max_depth: 3}
tuner:
  encoder_training: frozen
  warm_up_epochs: 2
  n_trials: 3
  search_space:
    batch_size: {choices: [32, 64]}
    num_epochs: {choices: [1, 2]}
"""
# What a test does not look at: the comparison with default settings, and fits of more than an
# epoch.
SHORT = ["--tuner.compare_defaults", "false", "--tuner.search_space.num_epochs", "{choices: [1]}"]


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "tune.yaml").write_text(CONFIG)
    return tmp_path


def start(folder, *options, plan=None):
    """Start ``dact tune`` in `folder`, with a fault in it if there is a plan."""
    words = ["tune", "--config", "tune.yaml", "--run_tag", "run", *options]
    module = "dact"
    if plan is not None:
        module, words = "tests.killed", [json.dumps(plan), *words]
    return warm.start(module, words, cwd=folder, env=environment(), merged=True)


def finish(process, seconds=300):
    output, _ = process.communicate(timeout=seconds)
    return process.returncode, output


def tune(folder, *options, **more):
    """Run ``dact tune`` to its end; what it printed."""
    code, output = finish(start(folder, *options, **more))
    assert code == 0, output
    return output


def wait_for(condition, process=None, seconds=120):
    """What `condition` returns as soon as that is something, while the process runs."""
    end = time.monotonic() + seconds
    while not (found := condition()):
        assert time.monotonic() < end, "waited in vain"
        assert process is None or process.poll() is None, process.communicate()[0]
        time.sleep(0.01)
    return found


def trials_of(folder, stage, storage=None):
    storage = storage or f"sqlite:///{folder / 'lightning_logs' / 'run' / 'studies.db'}"
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    try:
        return optuna.load_study(study_name=f"run/{stage}", storage=storage).trials
    except KeyError:
        return []


def check_whole(folder, totals, storage=None, extra=0):
    """Every trial is there exactly once, nothing is left running, and the final model is whole.

    `extra`: by how many trials a study may exceed its total: the number of processes less one."""
    for stage, total in zip(STAGES, totals, strict=True):
        trials = trials_of(folder, stage, storage)
        assert [trial.number for trial in trials] == list(range(len(trials)))
        assert not [one for one in trials if not one.state.is_finished()], (stage, trials)
        counted = [one for one in trials if one.state.name != "FAIL" or CAUSE in one.user_attrs]
        assert total <= len(counted) <= total + extra, stage
        for trial in trials:
            for number in trial.system_attrs.get("retry_history", []):
                before = trials[number]
                assert before.state.name == "FAIL"
                assert before.params.items() <= trial.params.items(), "it runs with its parameters"
    run = folder / "lightning_logs" / "run"
    for name in ("classifier_config", "confidence_config", "external_config", "lambda_reg"):
        assert yaml.safe_load((run / f"{name}.yaml").read_text())
    metrics = read_json(run / "final" / "metrics.json")
    chosen = read_json(run / "run.json")["steps"]["confirmation"]["settings"]
    epochs = list(range(chosen.get("num_epochs", 1)))
    assert [record["epoch"] for record in metrics["history"]] == epochs
    DACT.load_from_checkpoint(run / "final" / "checkpoints" / "best.ckpt")
    assert not (run / "final" / "checkpoints" / "last.ckpt").exists()
    classifier = TextClassifier.from_pretrained(run / "final" / "model")
    assert len(classifier(["the screen is great ."])) == 1


def ended_trials(folder):
    """What all trials that ended have found, also those of studies that ran under earlier winners,
    in any order."""
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    storage = optuna.storages.RDBStorage(
        f"sqlite:///{folder / 'lightning_logs' / 'run' / 'studies.db'}"
    )
    return {
        json.dumps(
            [name.split("/")[1], trial.state.name, trial.params, trial.values], sort_keys=True
        )
        for name in optuna.get_all_study_names(storage)
        for trial in optuna.load_study(study_name=name, storage=storage).trials
        if trial.state.name in ("COMPLETE", "PRUNED")
    }


# ------------------------------------------------------------------ kills


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_kills_lose_nothing(folder):
    generator = random.Random(0)
    database = folder / "lightning_logs" / "run" / "studies.db"
    ways = [*POINTS, "time", "worker"]
    generator.shuffle(ways)
    kills, total, seen = 0, 3, set()
    while kills < KILLS:
        how = ways[kills % len(ways)]  # until it has killed: each way kills as often as any other
        total += how == "worker"  # with two trials to run there are two workers
        options = ["--tuner.n_trials", total, "--tuner.workers", 2 if how == "worker" else 1]
        plan = None
        if how in POINTS:
            # A run of one more trial per study has few of some events; one that reaches its end
            # makes the next longer.
            most = 3 if how in ("replace", "ask", "tell") else 15
            plan = {"point": how, "count": generator.randint(1, most)}
        process = start(folder, *options, plan=plan)
        if how == "time":
            time.sleep(generator.uniform(0, 4))
            process.kill()
        elif how == "worker":
            # One worker dies and is replaced; then its parent dies, and no worker lives on.
            parent = psutil.Process(process.pid)

            def workers(parent=parent):
                servers = [c for c in parent.children() if "forkserver" in " ".join(c.cmdline())]
                return [worker for server in servers for worker in server.children()]

            def ready(process=process, workers=workers):
                return process.poll() is not None or len(workers()) == 2

            try:
                wait_for(ready)
                time.sleep(generator.uniform(0, 1))  # with more, most runs have ended
                children = workers()
                generator.choice(children).kill()
                time.sleep(generator.uniform(0, 1))
                children += workers()
                process.kill()
                # One that has just been started still imports.
                psutil.wait_procs(children, timeout=60)
                assert not any(child.is_running() for child in children)
            except (psutil.Error, IndexError):
                pass  # it had finished before
        code, output = finish(process)
        assert code in (0, -signal.SIGKILL), output
        if code:
            kills += 1
        else:
            total += 1
        if database.exists() and database.stat().st_size:
            now = ended_trials(folder)
            assert seen <= now, "what had ended is as it was"
            seen = now
    tune(folder, "--tuner.n_trials", total)
    check_whole(folder, [total] * 3, extra=1)
    assert seen <= ended_trials(folder)


@pytest.mark.slow
def test_a_killed_warm_up_and_a_killed_final_fit_resume_with_their_epoch(folder):
    log, run = folder / "epochs.log", folder / "lightning_logs" / "run"
    options = ["--tuner.n_trials", 1, "--tuner.search_space.num_epochs", "{choices: [8]}"]
    options += ["--tuner.warm_up_epochs", 10, "--tuner.compare_defaults", "false"]

    def epochs(part, planned):
        """Those that a fit has begun; the warm-up has as many as make 90 steps."""
        lines = [line.split() for line in log.read_text().splitlines()] if log.exists() else []
        return [
            int(epoch)
            for where, epoch, whole in lines
            if int(whole) == planned and where.endswith(part)
        ]

    killed = {}
    for part, planned in (("", 23), ("/final", 8)):
        process = start(folder, *options, plan={"log": str(log)})
        wait_for(lambda: len(epochs(part, planned)) >= 4, process)  # noqa: B023 - called here
        process.kill()
        process.wait()
        killed[part] = epochs(part, planned)
    assert not (run / "final" / "metrics.json").exists()
    tune(folder, *options, plan={"log": str(log)})
    for part, planned in (("", 23), ("/final", 8)):
        before = killed[part]
        after = epochs(part, planned)[len(before) :]
        assert after[0] in (before[-1], before[-1] + 1)
        assert after[0] >= 3
        assert after[-1] == planned - 1
    check_whole(folder, [1] * 3)


# ------------------------------------------------------------------ stops


@pytest.mark.slow
@pytest.mark.parametrize(
    ("workers", "stops"),
    [
        (
            1,
            [
                ("SIGINT", "submodels/trial_0002"),
                ("SIGTERM", "refit/recommended/fit/checkpoints"),
            ],
        ),
        (2, [("SIGINT", "training/trial_0001")]),
    ],
)
def test_a_stopped_command_ends_soon_and_resumes(folder, workers, stops):
    """Each start takes up what the stop before has left."""
    options = ["--tuner.workers", workers, *SHORT]
    for kind, moment in stops:
        process = start(folder, *options)
        wait_for((folder / "lightning_logs" / "run" / moment).exists, process)
        began = time.monotonic()
        process.send_signal(getattr(signal, kind))
        code, output = finish(process, 60)
        assert time.monotonic() - began < 10
        assert code == 130, output
        assert "resume with: dact tune --config tune.yaml" in output
        assert "Traceback" not in output
        for stage in STAGES:
            assert all(trial.state.name != "RUNNING" for trial in trials_of(folder, stage))
    tune(folder, *options)
    check_whole(folder, [3] * 3, extra=workers - 1)


# ------------------------------------------------------------------ several machines


@pytest.fixture
def postgres():
    """The address of a PostgreSQL server with a data folder and a port of its own."""
    found = shutil.which("initdb") or next(
        map(str, Path("/usr/lib/postgresql").glob("*/bin/initdb")), None
    )
    if found is None:
        assert not os.environ.get("CI"), "CI must have PostgreSQL"
        pytest.skip("needs PostgreSQL")
    options = {"cwd": "/", "stdout": subprocess.DEVNULL, "stderr": subprocess.STDOUT}
    with tempfile.TemporaryDirectory(dir="/tmp") as home:  # where another user may look
        if os.geteuid() == 0:
            options |= {"user": "postgres", "group": "postgres", "extra_groups": []}
            shutil.chown(home, "postgres", "postgres")
        data, port = Path(home, "data"), free_port()

        def run(program, *arguments):
            command = [Path(found).with_name(program), "-D", data, *arguments]
            subprocess.run(command, check=True, **options)

        run("initdb", "-A", "trust", "-U", "postgres", "--no-sync")
        settings = f"-p {port} -h 127.0.0.1 -k {data} -F"
        run("pg_ctl", "-o", settings, "-l", data / "log", "-w", "start")
        try:
            yield f"postgresql://postgres:secret@127.0.0.1:{port}/postgres"
        finally:
            with contextlib.suppress(subprocess.CalledProcessError):
                run("pg_ctl", "-m", "immediate", "-w", "stop")


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_two_machines_finish_the_studies_together_and_each_has_a_final_model(tmp_path, postgres):
    """Each has a folder of its own. One is killed in the middle, and the same command resumes."""
    options = ["--tuner.storage", postgres, "--tuner.n_trials", 4, *SHORT]
    plan = {"grace": 20}
    folders = [tmp_path / "one", tmp_path / "two"]
    for folder in folders:
        folder.mkdir()
        (folder / "tune.yaml").write_text(CONFIG)
    one, two = (start(folder, *options, plan=plan) for folder in folders)
    wait_for((folders[0] / "lightning_logs" / "run" / "training").exists, one)
    one.kill()
    one.wait()
    again = start(folders[0], *options, plan=plan)
    for process in (again, two):
        code, output = finish(process, 600)
        assert code == 0, output
    for folder in folders:
        check_whole(folder, [4] * 3, storage=postgres, extra=1)
