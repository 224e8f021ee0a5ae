"""The Ray example: many files, several workers, and one that dies."""

import contextlib
import os
import signal
import subprocess
import sys
import tempfile

import pandas as pd
import psutil
import pytest

from dact import TextClassifier
from dact.data.tokenizers import word_tokenizer
from tests.commands import ROOT, environment
from tests.conftest import tiny_model
from tests.test_crashes import wait_for

pytest.importorskip("ray")

FILES, ROWS = 12, 50
# The second lets all of its servers listen on 127.0.0.1 alone, as on a Mac.
ALONE = {"RAY_USAGE_STATS_ENABLED": "0", "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0"}
# A cluster of this machine alone, in which a file takes a worker a second; then the script as a
# person starts it.
START = """
import runpy, sys, time, dact, ray

class Slow(dact.TextClassifier):
    def __init__(self, *arguments, **options):
        super().__init__(*arguments, **{**options, "batch_size": 50})

    def __call__(self, texts):
        time.sleep(1)
        return super().__call__(texts)

dact.TextClassifier = Slow
ray.init(num_cpus=3, include_dashboard=False, object_store_memory=100 * 2**20,
         _temp_dir=sys.argv.pop(1))
context = ray.data.DataContext.get_current()
# bytes, so that files are not taken together
context.target_min_block_size, context.target_max_block_size = 1, 2000
runpy.run_path(sys.argv.pop(1), run_name="__main__")
"""


@pytest.mark.slow
def test_every_row_is_classified_once_though_a_worker_dies(tmp_path):
    words = ["good", "bad", "film", "very", "not", "the"]
    classifier = TextClassifier(
        tiny_model(vocab=20, class_names=["minus", "none", "plus"]), word_tokenizer(words)
    )
    classifier.save_pretrained(tmp_path / "model")
    texts = [
        " ".join(words[(row + step) % 6] for step in range(row % 9 + 1))
        for row in range(FILES * ROWS)
    ]
    (tmp_path / "texts").mkdir()
    for file in range(FILES):
        rows = range(file * ROWS, (file + 1) * ROWS)
        table = pd.DataFrame({"id": rows, "text": [texts[row] for row in rows]})
        table.to_parquet(tmp_path / "texts" / f"{file:03}.parquet")
    with tempfile.TemporaryDirectory(prefix="ray") as ray_folder:  # a short path: sockets lie in it
        script_path = str(ROOT / "examples" / "ray_predict.py")
        options = ["--model", "model", "--input", "texts", "--output", "answers", "--workers", "2"]
        with (tmp_path / "log.txt").open("w") as log:
            script = subprocess.Popen(
                [sys.executable, "-c", START, ray_folder, script_path, *options],
                cwd=tmp_path,
                stdout=log,
                stderr=log,
                env=environment(**ALONE),
            )
            try:
                answers = tmp_path / "answers"
                wait_for(lambda: list(answers.glob("*.parquet")), script, 240)
                first = wait_for(lambda: len(found := workers(script)) == 2 and found, script, 240)
                os.kill(min(first), signal.SIGKILL)
                second = wait_for(lambda: workers(script) - first, script, 240)
                status = script.wait(300)
            finally:
                script.kill()
    assert status == 0, (tmp_path / "log.txt").read_text()[-3000:]
    answers = pd.read_parquet(answers)
    assert second, "another worker took its place"
    assert sorted(answers["id"]) == list(range(FILES * ROWS))
    expected = classifier([texts[row] for row in answers["id"]])
    assert answers["label"].tolist() == [prediction.label for prediction in expected]
    assert answers["exit_layer"].tolist() == [prediction.exit_layer for prediction in expected]


def workers(script):
    """Return the process ids of the workers that have the model."""
    found = set()
    for process in psutil.Process(script.pid).children(recursive=True):
        with contextlib.suppress(psutil.Error):  # it has just ended
            if "Classify" in " ".join(process.cmdline()):
                found.add(process.pid)
    return found
