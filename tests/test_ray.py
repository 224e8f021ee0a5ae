"""The Ray example: many files, several workers, and one that dies."""

import os
import signal
import subprocess
import sys
import tempfile
import time

import pandas as pd
import psutil
import pytest

from dact import TextClassifier
from dact.data.tokenizers import word_tokenizer
from tests.commands import ROOT, environment
from tests.conftest import tiny_model

pytest.importorskip("ray")

FILES, ROWS = 24, 400
# A cluster that nobody else can reach, then the script as a person starts it.
START = """
import runpy, sys, ray
ray.init(num_cpus=3, include_dashboard=False, object_store_memory=100 * 2**20, _node_ip_address="127.0.0.1",
         _temp_dir=sys.argv.pop(1))
runpy.run_path(sys.argv.pop(1), run_name="__main__")
"""


@pytest.mark.slow
def test_every_row_is_classified_once_though_a_worker_dies(tmp_path):
    words = ["good", "bad", "film", "very", "not", "the"]
    classifier = TextClassifier(tiny_model(vocab=20, class_names=["minus", "none", "plus"]), word_tokenizer(words))
    classifier.save_pretrained(tmp_path / "model")
    texts = [" ".join(words[(row + step) % 6] for step in range(row % 9 + 1)) for row in range(FILES * ROWS)]
    (tmp_path / "texts").mkdir()
    for file in range(FILES):
        rows = range(file * ROWS, (file + 1) * ROWS)
        table = pd.DataFrame({"id": rows, "text": [texts[row] for row in rows]})
        table.to_parquet(tmp_path / "texts" / f"{file:03}.parquet")
    with tempfile.TemporaryDirectory(prefix="ray") as ray_folder:  # a short path: sockets lie in it
        words = ["--model", tmp_path / "model", "--input", tmp_path / "texts", "--output", tmp_path / "answers"]
        command = [sys.executable, "-c", START, ray_folder, ROOT / "examples" / "ray_predict.py", *words]
        with (tmp_path / "log.txt").open("w") as log:
            script = subprocess.Popen(
                [*map(str, command), "--workers", "2"], env=environment(RAY_USAGE_STATS_ENABLED="0"), cwd=tmp_path,
                stdout=log, stderr=log,
            )  # fmt: skip
            try:
                killed, done = kill_a_worker(script, tmp_path / "answers")
                status = script.wait(300)
            finally:
                script.kill()
    assert status == 0, (tmp_path / "log.txt").read_text()[-3000:]
    answers = pd.read_parquet(tmp_path / "answers")
    assert killed
    assert 0 < done < FILES, "it was killed in between"
    assert sorted(answers["id"]) == list(range(FILES * ROWS))
    expected = classifier([texts[row] for row in answers["id"]])
    assert answers["label"].tolist() == [prediction.label for prediction in expected]
    assert answers["exit_layer"].tolist() == [prediction.exit_layer for prediction in expected]


def kill_a_worker(script, folder):
    """Kill one of the two workers when the first answers are there; return its id and how many files were."""
    deadline = time.monotonic() + 240
    while time.monotonic() < deadline and script.poll() is None:
        done = len(list(folder.glob("*.parquet"))) if folder.is_dir() else 0
        workers = [process for process in psutil.Process(script.pid).children(recursive=True) if is_worker(process)]
        if done and len(workers) == 2:
            os.kill(workers[0].pid, signal.SIGKILL)
            return workers[0].pid, done
        time.sleep(0.02)
    return None, None


def is_worker(process):
    try:
        return "Classify" in " ".join(process.cmdline())
    except psutil.Error:  # it has just ended
        return False
