"""The simulation of benchmarks/coverage.py, in small."""

import json
import sys

import pytest

from benchmarks import coverage


@pytest.mark.slow
def test_promises_are_kept_in_the_simulation_and_estimates_are_compared(tmp_path, monkeypatch):
    results = tmp_path / "coverage.json"
    words = ["--texts", "5000", "--draws", "100", "--examples", "400", "60"]
    monkeypatch.setattr(sys, "argv", ["coverage.py", *words, "--results", str(results)])
    coverage.main()
    rows = json.loads(results.read_text())["rows"]
    kept = {(row["set by"], row["on"]): row["kept"] for row in rows}
    both = {"400 other", "400 choosing"}
    assert {on for kind, on in kept if kind == "promise"} == both, "60 are too few"
    assert {on for kind, on in kept if kind == "estimate"} == both | {"60 other", "60 choosing"}
    assert all(kept["promise", on] >= 0.935 for on in both)
