"""The benchmark that waits for a GPU: its script runs from end to end on a CPU."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
SCRIPT = ROOT / "benchmarks" / "gpu.sh"
ENVIRONMENT = {
    **os.environ,
    "PYTHON": sys.executable,
    "OMP_NUM_THREADS": "1",
    "CUDA_VISIBLE_DEVICES": "",
}


def run(*arguments):
    return subprocess.run([SCRIPT, *arguments], capture_output=True, text=True, env=ENVIRONMENT)


@pytest.mark.slow
def test_every_part_of_the_gpu_benchmark_runs_on_a_cpu(tmp_path):
    result = run("--dry", "--output", str(tmp_path / "gpu.json"))
    assert result.returncode == 0, result.stdout + result.stderr
    found = json.loads((tmp_path / "gpu.json").read_text())
    assert [found[part]["status"] for part in ("tests", "shapes", "trials")] == [0, 0, 0]
    (shapes,) = found["shapes"]["results"].values()
    assert {key.rsplit(", ", 1)[1] for key in shapes} == {"256 tokens a step", "512 tokens a step"}
    assert all(value["speed-up"] > 0 for value in shapes.values())
    assert set(found["trials"]["results"]) == {"2 workers"}


def test_wheels_that_would_not_travel_are_refused(tmp_path):
    with (tmp_path / "large.whl").open("wb") as file:
        for _ in range(65):
            file.write(os.urandom(2**20))
    result = run("--wheels", str(tmp_path), "--dry")
    assert result.returncode == 1
    assert "at most 64 are allowed" in result.stderr
