"""The simulation of benchmarks/coverage.py, in small."""

import json
import subprocess
import sys

import pytest

from tests.commands import ROOT, environment


@pytest.mark.slow
def test_promises_are_kept_in_the_simulation_and_estimates_are_compared(tmp_path):
    command = [sys.executable, str(ROOT / "benchmarks" / "coverage.py"), "--texts", "5000", "--draws", "200"]
    done = subprocess.run(
        [*command, "--examples", "400", "60", "--results", str(tmp_path / "coverage.json")],
        env=environment(PYTHONPATH=str(ROOT)),
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    rows = json.loads((tmp_path / "coverage.json").read_text())["rows"]
    kept = {(row["set by"], row["on"]): row["kept"] for row in rows}
    assert kept["promise", "400 other"] >= 0.935
    assert kept["promise", "400 choosing"] >= 0.935
    assert {on for kind, on in kept if kind == "promise"} == {"400 other", "400 choosing"}, "60 are too few"
    assert {on for kind, on in kept if kind == "estimate"} == {"400 other", "400 choosing", "60 other", "60 choosing"}
