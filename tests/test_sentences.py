"""Sentences of plain English, negations among them, that no data set holds: what a person would try
first."""

import csv
import re
import runpy
import sys

import pytest

from tests.commands import ROOT

# What the README's first command leaves.
FITTED = ROOT / "lightning_logs" / "first" / "final" / "model"
ENOUGH = 24


def sentences_right(model, monkeypatch, capsys):
    """Return how many sentences the script finds right, and what it printed."""
    script = ROOT / "benchmarks" / "tuned.py"
    monkeypatch.setattr(sys, "argv", [str(script), "--sentences", str(model)])
    capsys.readouterr()
    runpy.run_path(str(script), run_name="__main__")
    printed = capsys.readouterr().out
    return int(re.search(r"^(\d+) of 30 sentences right$", printed, re.MULTILINE)[1]), printed


def test_there_are_thirty_different_sentences_with_negations_in_every_class():
    with (ROOT / "tests" / "data" / "sentences.tsv").open(newline="") as file:
        rows = list(csv.DictReader(file, delimiter="\t"))
    assert len({row["text"] for row in rows}) == len(rows) == 30
    for label in ("negative", "neutral", "positive"):
        own = [row["text"] for row in rows if row["label"] == label]
        assert len(own) == 10
        assert any(re.search(r"\b(not|never|nothing)\b", text) for text in own), label


@pytest.mark.slow
def test_the_script_counts_the_sentences_that_a_model_has_right(fitted, monkeypatch, capsys):
    model = FITTED if FITTED.is_dir() else fitted[1] / "model"
    right, printed = sentences_right(model, monkeypatch, capsys)
    assert printed.count(" instead of ") == 30 - right
    assert model != FITTED or right >= ENOUGH, printed
