"""What a tuning run survives: kills, stops, full disks, lost storages. Real processes, real
files."""

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
from optuna.trial import TrialState

from dact import DACT, TextClassifier
from dact.files import read_json
from dact.tuning.retries import RETRY_OF, is_counted, is_interrupted
from dact.tuning.stages import STAGES as ALL_STAGES
from tests import warm
from tests.commands import environment
from tests.conftest import free_port
from tests.killed import POINTS

STAGES = [stage.name for stage in ALL_STAGES]
KILLS = 30

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


def start(folder, *options, plan=None, tag="run"):
    """Start ``dact tune`` in `folder`, with a fault in it if there is a plan."""
    words = ["tune", "--config", "tune.yaml", "--run_tag", tag, *options]
    if plan is None:
        return warm.start("dact", words, cwd=folder, env=environment(), merged=True)
    return warm.start(
        "tests.killed", [json.dumps(plan), *words], cwd=folder, env=environment(), merged=True
    )


def finish(process, seconds=300):
    output, _ = process.communicate(timeout=seconds)
    return process.returncode, output


def tune(folder, *options, **more):
    """Run ``dact tune`` to its end; what it printed."""
    code, output = finish(start(folder, *options, **more))
    assert code == 0, output
    return output


def wait_for(condition, process=None, seconds=120):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        assert process is None or process.poll() is None, process.communicate()[0]
        time.sleep(0.01)


def trials_of(folder, stage, tag="run", storage=None):
    storage = storage or f"sqlite:///{folder / 'lightning_logs' / tag / 'studies.db'}"
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    try:
        return optuna.load_study(study_name=f"{tag}/{stage}", storage=storage).trials
    except KeyError:
        return []


def check_whole(folder, totals, tag="run", storage=None, extra=0):
    """Every trial is there exactly once, nothing is left running, and the final model is whole.

    `extra`: by how many trials a study may exceed its total, which is the number of processes less
    one."""
    for stage, total in zip(STAGES, totals, strict=True):
        trials = trials_of(folder, stage, tag, storage)
        assert [trial.number for trial in trials] == list(range(len(trials)))
        left = [trial for trial in trials if not trial.state.is_finished()]
        if extra:
            # Processes that begin the last trials at once may leave no room for a retry, which
            # stays in the queue.
            left = [
                trial
                for trial in left
                if trial.state != TrialState.WAITING or RETRY_OF not in trial.user_attrs
            ]
        assert not [(stage, trial.number, trial.state.name) for trial in left]
        assert total <= sum(map(is_counted, trials)) <= total + extra
        again = [trial.user_attrs[RETRY_OF] for trial in trials if RETRY_OF in trial.user_attrs]
        assert len(set(again)) == len(again)
        assert all(is_interrupted(trials[number]) for number in again)
        for trial in trials:
            if is_interrupted(trial):
                continue  # it may not have drawn all of its parameters
            # One whose process died for the last time may not have drawn what it was queued with.
            params = {**trial.system_attrs.get("fixed_params", {}), **trial.params}
            before = trial
            while RETRY_OF in before.user_attrs:
                before = trials[before.user_attrs[RETRY_OF]]
                assert before.params.items() <= params.items(), "it runs again with its parameters"
    run = folder / "lightning_logs" / tag
    for name in ("classifier_config", "confidence_config", "external_config", "lambda_reg"):
        assert yaml.safe_load((run / f"{name}.yaml").read_text())
    metrics = read_json(run / "final" / "metrics.json")
    epochs = read_json(run / "final" / "made_of.json")["fit"]["settings"].get("num_epochs", 1)
    assert [record["epoch"] for record in metrics["history"]] == list(range(epochs))
    DACT.load_from_checkpoint(run / "final" / "checkpoints" / "best.ckpt")
    assert not (run / "final" / "checkpoints" / "last.ckpt").exists(), (
        "of use only to a fit that is not done"
    )
    assert (
        len(TextClassifier.from_pretrained(run / "final" / "model")(["the screen is great ."])) == 1
    )
    assert not [path for path in run.rglob("*") if path.name.endswith((".partial", ".old"))]
    return metrics


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
        if trial.state.is_finished()
    }


# ------------------------------------------------------------------ kills


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_thirty_kills_lose_nothing(folder):
    generator = random.Random(0)
    database = folder / "lightning_logs" / "run" / "studies.db"
    ways = [*POINTS, "time", "worker"]
    generator.shuffle(ways)
    kills, total, seen = 0, 3, set()
    while kills < KILLS:
        how = ways[kills % len(ways)]  # until it has killed: each way kills as often as any other
        options = ["--tuner.n_trials", total, "--tuner.workers", 2 if how == "worker" else 1]
        plan = None
        if how in POINTS:
            # A run of one more trial per study has few of some events; one that reaches its end
            # makes the next longer.
            plan = {
                "point": how,
                "count": generator.randint(1, 3 if how in ("replace", "ask", "tell") else 15),
            }
        process = start(folder, *options, plan=plan)
        if how == "time":
            time.sleep(generator.uniform(0, 4))
            process.kill()
        elif how == "worker":
            # One worker dies and is replaced; then its parent dies, and no worker lives on.
            parent = psutil.Process(process.pid)

            def running(process=process):
                return process.poll() is None

            def workers(parent=parent):
                servers = [
                    child
                    for child in parent.children()
                    if "forkserver" in " ".join(child.cmdline())
                ]
                return [worker for server in servers for worker in server.children()]

            try:
                wait_for(
                    lambda workers=workers, running=running: len(workers()) == 2 or not running()
                )
                time.sleep(generator.uniform(0, 1))  # with more, most runs have ended
                children = workers()
                generator.choice(children).kill()
                time.sleep(generator.uniform(0, 1))
                children += workers()
                process.kill()
                psutil.wait_procs(
                    children, timeout=60
                )  # one that has just been started still imports
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
def test_a_killed_fit_of_a_candidate_for_the_final_model_resumes_with_its_epoch(folder):
    log = folder / "epochs.log"
    options = [
        "--tuner.n_trials",
        1,
        "--trainer.max_epochs",
        8,
        "--tuner.search_space.num_epochs",
        "{choices: [8]}",
    ]
    options += ["--tuner.encoder_training", "finetune", "--tuner.compare_defaults", "false"]
    plan = {"log": str(log)}
    process = start(folder, *options, plan=plan)
    final = folder / "lightning_logs" / "run" / "final"

    def epochs():
        lines = log.read_text().splitlines() if log.exists() else []
        return [
            int(line.split()[1])
            for line in lines
            if line.split()[0].endswith("/default_settings/fit")
        ]

    wait_for(lambda: len(epochs()) >= 4, process)
    process.kill()
    process.wait()
    before = epochs()
    assert not (final / "metrics.json").exists()
    tune(folder, *options, plan=plan)
    after = epochs()[len(before) :]
    assert after[0] in (before[-1], before[-1] + 1)
    assert after[0] >= 3
    assert after[-1] == 7
    check_whole(folder, [1] * 3)


@pytest.mark.slow
def test_a_killed_warm_up_resumes_with_its_epoch(folder):
    log = folder / "epochs.log"
    options, plan = ["--tuner.n_trials", 1, "--tuner.warm_up_epochs", 10], {"log": str(log)}
    process = start(folder, *options, plan=plan)

    def epochs():
        lines = [line.split() for line in log.read_text().splitlines()] if log.exists() else []
        return [
            int(epoch) for _, epoch, planned in lines if planned == "70"
        ]  # of one step, seven times as many as are asked for

    wait_for(lambda: len(epochs()) >= 4, process)
    process.kill()
    process.wait()
    before = epochs()
    process = start(folder, *options, plan=plan)
    # What comes after the warm-up is not looked at here.
    wait_for((folder / "lightning_logs" / "run" / "features" / "val").exists, process)
    process.kill()
    process.wait()
    after = epochs()[len(before) :]
    assert after[0] in (before[-1], before[-1] + 1)
    assert after[-1] == 69


# ------------------------------------------------------------------ stops


@pytest.mark.slow
@pytest.mark.parametrize(
    ("workers", "stops"),
    [
        (
            1,
            [
                ("SIGINT", "submodels/trial_0002"),
                ("SIGTERM", "training/trial_0001"),
                ("SIGINT", "lambda_reg/trial_0001"),
                ("SIGTERM", "confirmation/default_settings/fit/checkpoints"),
            ],
        ),
        (2, [("SIGINT", "submodels/trial_0001"), ("SIGTERM", "training/trial_0001")]),
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


# ------------------------------------------------------------------ disks


@pytest.fixture
def small_disk(folder):
    """A folder whose lightning_logs is a file system of its own, of 24 MB."""
    disk = folder / "lightning_logs"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=24m", "tmpfs", str(disk)]
    if subprocess.run(mount, capture_output=True, check=False).returncode:
        assert not os.environ.get("CI"), "CI must be able to mount a file system"
        pytest.skip("needs the right to mount a file system")
    yield folder
    while os.path.ismount(disk):
        subprocess.run(["umount", "-l", str(disk)], check=True)


def fill(disk):
    """Write to a file system until it is full; gives the file that fills it."""
    filler = disk / "filler"
    with filler.open("wb", buffering=0) as file, contextlib.suppress(OSError):
        while True:
            file.write(b"0" * 4096)
    return filler


def stopped_by(folder, moment, fault, *options):
    """Start a run, bring `fault` about once `moment` exists, and give the line with which the
    command ended."""
    process = start(folder, *options)
    wait_for((folder / "lightning_logs" / "run" / moment).exists, process)
    fault()
    code, output = finish(process, 120)
    assert code == 1, output
    assert "Traceback" not in output, output
    line = output.strip().splitlines()[-1]
    assert "Finished work is kept: fix this and run the same command again" in line, output
    return line


@pytest.mark.slow
def test_a_full_disk_and_a_read_only_folder_are_one_clear_error_each_and_the_run_resumes(
    small_disk,
):
    disk = small_disk / "lightning_logs"

    def run_out_of_space(moment):
        line = stopped_by(small_disk, moment, lambda: fill(disk), *SHORT)
        assert "lightning_logs/run" in line
        assert "No space left" in line or "full" in line
        (disk / "filler").unlink()

    def make_read_only():
        # Made elsewhere and then laid over the disk: where the run may write, "mount point is busy"
        # can be the answer.
        aside = small_disk / "read_only"
        aside.mkdir()
        subprocess.run(["mount", "--bind", disk, aside], check=True)
        subprocess.run(["mount", "-o", "remount,bind,ro", aside], check=True)
        subprocess.run(["mount", "--bind", aside, disk], check=True)
        subprocess.run(["umount", aside], check=True)

    run_out_of_space("submodels/trial_0001")
    line = stopped_by(small_disk, "training/trial_0001", make_read_only, *SHORT)
    assert "lightning_logs/run" in line
    code, output = finish(start(small_disk, *SHORT))
    assert code == 1
    assert "Traceback" not in output
    assert "lightning_logs/run" in output.strip().splitlines()[-1]
    subprocess.run(["umount", "-l", disk], check=True)
    run_out_of_space("lambda_reg/trial_0000")
    run_out_of_space("confirmation/default_settings/fit/checkpoints")
    tune(small_disk, *SHORT)
    check_whole(small_disk, [3] * 3)


# ------------------------------------------------------------------ several machines


def find_postgres(program):
    found = shutil.which(program) or next(
        map(str, Path("/usr/lib/postgresql").glob(f"*/bin/{program}")), None
    )
    if found is None:
        assert not os.environ.get("CI"), "CI must have PostgreSQL"
        pytest.skip("needs PostgreSQL")
    return found


class Postgres:
    """A PostgreSQL server with a data folder and a port of its own."""

    def __init__(self, home):
        self.data, self.port = home / "data", free_port()
        self.user = (
            {"user": "postgres", "group": "postgres", "extra_groups": []}
            if os.geteuid() == 0
            else {}
        )
        if self.user:
            shutil.chown(home, "postgres", "postgres")
        self.run("initdb", "-D", self.data, "-A", "trust", "-U", "postgres", "--no-sync")
        self.address = f"postgresql://postgres:secret@127.0.0.1:{self.port}/postgres"

    def run(self, program, *arguments):
        command = [find_postgres(program), *map(str, arguments)]
        subprocess.run(
            command,
            check=True,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.STDOUT,
            cwd="/",
            **self.user,
        )

    def start(self):
        settings = f"-p {self.port} -h 127.0.0.1 -k {self.data} -F"
        self.run("pg_ctl", "-D", self.data, "-o", settings, "-l", self.data / "log", "-w", "start")

    def stop(self):
        self.run("pg_ctl", "-D", self.data, "-m", "immediate", "-w", "stop")


@pytest.fixture
def postgres():
    find_postgres("initdb")
    with tempfile.TemporaryDirectory(dir="/tmp") as home:  # where another user may look
        server = Postgres(Path(home))
        server.start()
        try:
            yield server
        finally:
            with contextlib.suppress(subprocess.CalledProcessError):
                server.stop()


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_lost_storage_is_one_clear_error_and_four_processes_resume_the_run(folder, postgres):
    log = folder / "epochs.log"
    options = ["--tuner.storage", postgres.address, "--tuner.n_trials", 8]
    line = stopped_by(folder, "submodels/trial_0001", postgres.stop, *options)
    assert f"127.0.0.1:{postgres.port}" in line
    assert "secret" not in line
    code, output = finish(start(folder, *options))
    assert code == 1
    assert "cannot be opened" in output.strip().splitlines()[-1]
    assert "Traceback" not in output
    postgres.start()

    def owners():
        trials = [
            trial
            for stage in STAGES
            for trial in trials_of(folder, stage, storage=postgres.address)
        ]
        return {tuple(trial.user_attrs["owner"]) for trial in trials if "owner" in trial.user_attrs}

    alone = owners()
    plan = {"log": str(log)}
    processes = [start(folder, *options, plan=plan) for _ in range(4)]
    run = folder / "lightning_logs" / "run"

    def kill_who_began_last(stage, moment):
        """Once there is this trial, kill the process that has begun the newest one."""
        wait_for((run / stage / moment).exists)
        trials = trials_of(folder, stage, storage=postgres.address)
        begun = [
            trial.user_attrs["owner"][1]
            for trial in reversed(trials)
            if "owner" in trial.user_attrs
        ]
        victim = next(process for pid in begun for process in processes if process.pid == pid)
        victim.kill()
        processes.remove(victim)

    kill_who_began_last("submodels", "trial_0005")
    kill_who_began_last("training", "trial_0003")
    outputs = [finish(process, 600) for process in processes]
    assert [code for code, _ in outputs] == [0, 0], outputs
    metrics = check_whole(folder, [8] * 3, storage=postgres.address, extra=3)
    assert len(owners() - alone) >= 3
    lines = [line for line in log.read_text().splitlines() if line.split()[0].endswith("/fit")]
    assert len(lines) == len(set(lines)) >= len(metrics["history"]), (
        "exactly one fitted each candidate"
    )
    # And where the one that makes the final model is killed, the command makes it when it is
    # started again.
    shutil.rmtree(run / "final")
    log.unlink()
    process = start(folder, *options, plan=plan)
    wait_for(
        lambda: log.exists() and log.read_text().partition(" ")[0].endswith("run/final"), process
    )
    process.kill()
    process.wait()
    assert not (run / "final" / "metrics.json").exists()
    tune(folder, *options)
    check_whole(folder, [8] * 3, storage=postgres.address, extra=3)
