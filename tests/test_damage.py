"""Files that were damaged or come from elsewhere: a clear error that names them, never code, never
a wrong result."""

import pickletools
import sqlite3
import zipfile
from pathlib import Path

import pytest
import torch

from dact import DACT
from dact.tuning.run import Run
from tests.conftest import tiny_model
from tests.test_tuning import engine


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """The folder of a whole run."""
    folder = tmp_path_factory.mktemp("damage")
    engine(folder, encoder_training="frozen", warm_up_epochs=1).run_pipeline("run")
    return folder / "run"


class Evil:
    def __reduce__(self):
        return (Path.touch, (Path("/tmp/dact_was_here"),))


@pytest.mark.parametrize("place", ["hyper_parameters", "state_dict", "callbacks"])
def test_a_checkpoint_cannot_run_code(tmp_path, place):
    Path("/tmp/dact_was_here").unlink(missing_ok=True)
    path = tmp_path / "evil.ckpt"
    torch.save({"hyper_parameters": tiny_model().config(), "state_dict": {}, place: Evil()}, path)
    with pytest.raises(ValueError, match=r"evil\.ckpt cannot be read"):
        DACT.load_from_checkpoint(path)
    assert not Path("/tmp/dact_was_here").exists()


def is_pickle(content):
    try:
        operations = [operation.name for operation, _, _ in pickletools.genops(content)]
    except Exception:
        return False
    return operations[-1:] == ["STOP"] and len(operations) > 2


def test_a_run_leaves_no_pickle_but_checkpoints_that_hold_data_alone(run):
    assert is_pickle(__import__("pickle").dumps({"a": [1]})), "the scan finds pickles"
    scanned = 0
    for path in run.rglob("*"):
        if not path.is_file():
            continue
        scanned += 1
        if path.suffix == ".ckpt":
            torch.load(path, weights_only=True)
            continue
        assert not is_pickle(path.read_bytes()), path
        assert not zipfile.is_zipfile(path), path
    connection = sqlite3.connect(run / "studies.db")
    for (table,) in connection.execute(
        "SELECT name FROM sqlite_master WHERE type = 'table'"
    ).fetchall():
        for row in connection.execute(f"SELECT * FROM {table}"):
            assert not any(isinstance(value, bytes) for value in row), f"{table} holds bytes"
    assert scanned > 20


# ------------------------------------------------------------------ for long


@pytest.mark.slow
def test_many_trials_leave_nothing_behind(tmp_path):
    """Memory, open files, threads and processes stay, and each trial takes some kilobytes on
    disk."""
    import psutil

    process, readings = psutil.Process(), {}

    def usage():
        return {
            "memory": process.memory_info().rss / 2**20,
            "files": process.num_fds(),
            "threads": process.num_threads(),
            "processes": len(process.children(recursive=True)),
        }

    def watch(study, trial):
        if trial.number in (12, 31):
            readings[trial.number] = usage()

    engine(
        tmp_path, encoder_training="frozen", warm_up_epochs=0, n_trials=32, callbacks=[watch]
    ).joint_tune_study("run")
    early, late = readings[12], readings[31]
    assert late["memory"] - early["memory"] < 19
    assert late["files"] <= early["files"] + 5
    assert late["threads"] <= early["threads"] + 2
    assert late["processes"] == early["processes"]
    size = sum(path.stat().st_size for path in (tmp_path / "run").rglob("*") if path.is_file())
    assert size < 32 * 100_000


@pytest.mark.parametrize(
    "tag", ["..", "../x", "/tmp/x", "a/b", "a\\b", ".hidden", "", "a\0b", "a\nb", "~", "x/../../y"]
)
def test_a_run_tag_never_leaves_the_log_folder(tmp_path, tag):
    with pytest.raises(ValueError, match="run_tag must be a name"):
        Run(tag, tmp_path / "logs")
    if tag:
        with pytest.raises(ValueError, match="run_tag must be a name"):
            engine(tmp_path / "logs").joint_tune_study(tag)
    assert not (tmp_path / "logs").exists() or not list((tmp_path / "logs").iterdir())
