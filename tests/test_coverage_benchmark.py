"""The simulation of benchmarks/coverage.py, in small."""

import json
import sys

import pytest

from benchmarks import coverage


@pytest.mark.slow
def test_promises_and_estimates_are_simulated(tmp_path, monkeypatch):
    words = ["--texts", "2000", "--draws", "20", "--examples", "400", "60"]
    monkeypatch.setattr(
        sys, "argv", ["coverage.py", *words, "--results", str(tmp_path / "coverage.json")]
    )
    coverage.main()
    rows = json.loads((tmp_path / "coverage.json").read_text())["rows"]
    kept = {(row["set by"], row["on"]): row["kept"] for row in rows}
    assert kept["promise", "400 other"] >= 0.8
    assert {on for kind, on in kept if kind == "promise"} == {"400 other", "400 choosing"}, (
        "60 are too few"
    )
    assert "60 choosing" in {on for kind, on in kept if kind == "estimate"}
