"""The benchmark that waits for a GPU: its script runs from end to end on a CPU."""

import json
import subprocess
import sys

import pytest

from tests.commands import ROOT, environment


@pytest.mark.slow
def test_every_part_of_the_gpu_benchmark_runs_on_a_cpu(tmp_path):
    command = [ROOT / "benchmarks" / "gpu.sh", "--dry", "--output", tmp_path / "gpu.json"]
    without = environment(PYTHON=sys.executable, CUDA_VISIBLE_DEVICES="")
    result = subprocess.run(command, capture_output=True, text=True, env=without)
    assert result.returncode == 0, result.stdout + result.stderr
    found = json.loads((tmp_path / "gpu.json").read_text())
    assert [found[part]["status"] for part in ("tests", "shapes", "trials")] == [0, 0, 0]
    (shapes,) = found["shapes"]["results"].values()
    assert {key.rsplit(", ", 1)[1] for key in shapes} == {"256 tokens a step", "512 tokens a step"}
    assert all(value["speed-up"] > 0 for value in shapes.values())
    assert set(found["trials"]["results"]) == {"2 workers"}
