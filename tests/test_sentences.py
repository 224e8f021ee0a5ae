"""Sentences of plain English, negations among them, that no data set holds: what a person would try
first."""

import csv
import re
import subprocess
import sys

import pytest

from tests.commands import ROOT, environment

SENTENCES = ROOT / "tests" / "data" / "sentences.tsv"
FITTED = (
    ROOT / "lightning_logs" / "first" / "final" / "model"
)  # what the README's first command leaves
ENOUGH = 24


def sentences_right(model, cwd):
    """Return how many sentences the script finds right, and what it printed."""
    command = [sys.executable, str(ROOT / "benchmarks" / "tuned.py"), "--sentences", str(model)]
    done = subprocess.run(
        command,
        cwd=cwd,
        env=environment(PYTHONPATH=str(ROOT)),
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return int(
        re.search(r"^(\d+) of 30 sentences right$", done.stdout, re.MULTILINE).group(1)
    ), done.stdout


def test_there_are_thirty_different_sentences_with_negations_in_every_class():
    with SENTENCES.open(newline="") as file:
        rows = list(csv.DictReader(file, delimiter="\t"))
    assert len({row["text"] for row in rows}) == len(rows) == 30
    for label in ("negative", "neutral", "positive"):
        own = [row["text"] for row in rows if row["label"] == label]
        assert len(own) == 10
        assert any(re.search(r"\b(not|never|nothing)\b", text) for text in own), label


@pytest.mark.slow
def test_the_script_counts_the_sentences_that_a_model_has_right(fitted, tmp_path):
    right, printed = sentences_right(fitted[1] / "model", tmp_path)
    assert printed.count(" instead of ") == 30 - right


@pytest.mark.slow
@pytest.mark.skipif(
    not FITTED.is_dir(),
    reason="no fitted quickstart: dact tune --config configs/quickstart.yaml --run_tag first",
)
def test_the_quickstarts_model_reads_the_sentences_of_a_person(tmp_path):
    right, printed = sentences_right(FITTED, tmp_path)
    assert right >= ENOUGH, printed
