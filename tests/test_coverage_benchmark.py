"""The simulation of benchmarks/coverage.py, in small."""

import json
import sys

import pytest

from benchmarks import coverage


@pytest.mark.slow
def test_promises_are_kept_in_the_simulation_and_estimates_are_compared(tmp_path, monkeypatch):
    words = ["--texts", "5000", "--draws", "200", "--examples", "400", "60"]
    monkeypatch.setattr(
        sys, "argv", ["coverage.py", *words, "--results", str(tmp_path / "coverage.json")]
    )
    coverage.main()
    rows = json.loads((tmp_path / "coverage.json").read_text())["rows"]
    kept = {(row["set by"], row["on"]): row["kept"] for row in rows}
    assert kept["promise", "400 other"] >= 0.935
    assert kept["promise", "400 choosing"] >= 0.935
    assert {on for kind, on in kept if kind == "promise"} == {"400 other", "400 choosing"}, (
        "60 are too few"
    )
    assert {on for kind, on in kept if kind == "estimate"} == {
        "400 other",
        "400 choosing",
        "60 other",
        "60 choosing",
    }
