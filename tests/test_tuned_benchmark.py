"""The peers that benchmarks/tuned.py sets next to a tuned model, and how it pools what it finds."""

import importlib.util
import json
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch

from dact.calibration.answers import layer_answers
from tests.commands import ROOT, dact
from tests.conftest import random_batch, tiny_model


@pytest.fixture(scope="module")
def tuned():
    spec = importlib.util.spec_from_file_location("tuned", ROOT / "benchmarks" / "tuned.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules["tuned"] = module  # where dataclasses look for the types of their fields
    spec.loader.exec_module(module)
    yield module
    del sys.modules["tuned"]


@pytest.mark.parametrize("margin", [0.05, 0.6, 1.0])
def test_the_multi_exit_leaves_where_the_lead_of_a_layers_answer_exceeds_the_margin(tuned, margin):
    dact = tiny_model()
    peer = tuned.MultiExit.from_config(dact.config(), encoder=dact.encoder)
    peer.load_state_dict(dact.state_dict())
    peer.at_full_depth().halting = "exact"
    peer.halting_margin = margin
    batch = random_batch(200)
    y = peer.eval().full_depth(batch).layer_probabilities
    first, second = y.topk(2, dim=-1).values.unbind(-1)
    sure = first - second > margin
    sure[:, -1] = True
    exits = sure.int().argmax(1) + 1
    found = peer.early_exit(batch)
    assert torch.equal(found.exit_layer, exits)
    torch.testing.assert_close(found.probabilities, y[torch.arange(200), exits - 1])
    assert peer.loss(batch).loss == peer.loss(batch).exit_loss


def test_an_encoder_that_was_cut_learns_on_its_last_layer_alone(tuned):
    dact, batch = tiny_model(consistency=2.0), random_batch()
    peer = tuned.OneExit.from_config(dact.config(), encoder=dact.encoder).at_full_depth()
    logits = peer._submodels(batch)[0]
    assert logits.shape[1] == 1
    found = peer.eval().loss(batch)
    last = peer.full_depth(batch).layer_probabilities[:, -1]
    expected = torch.nn.functional.nll_loss(last.log(), batch["labels"])
    torch.testing.assert_close(found.loss, expected)


def test_pooled_differences_have_the_larger_error_of_texts_and_runs(tuned):
    assert tuned.points([(0.01, 0.03), (0.03, 0.04)]) == "+2.00 ± 2.50"
    assert tuned.points([(0.01, 0.003), (0.03, 0.004)]) == "+2.00 ± 1.00"
    assert tuned.points([(0.01, 0.003)]) == "+1.00 ± 0.30"


def test_the_margin_is_turned_to_as_many_layers(tuned):
    model = tiny_model()
    answers = layer_answers(model, [random_batch(200)])
    deepest = answers.exit_layers(model.exit_rule).double().mean().item()
    _, layers = tuned.turned(model, answers, answers, 2.0)
    assert 1 <= layers <= 2 < deepest
    assert tuned.turned(model, answers, answers, 100.0)[1] == deepest


@pytest.mark.slow
def test_a_run_of_the_command_is_measured_next_to_its_peers_at_one_promise(
    tuned, tmp_path, monkeypatch, capsys
):
    def run_command(command, **_):
        assert command[:3] == [sys.executable, "-m", "dact"]
        return dact(*command[3:], cwd=tmp_path)

    # The script as a process of its own is in test_sentences.py.
    monkeypatch.setattr(tuned, "subprocess", SimpleNamespace(run=run_command, PIPE=subprocess.PIPE))
    smaller = ["--model.encoder.num_layers", "3", "--model.encoder.hidden_size", "16"]
    smaller += ["--data.num_train", "100", "--tuner.search_space.num_epochs.choices", "[1]"]
    smaller += ["--tuner.n_trials", "0"]
    monkeypatch.setattr(tuned, "ROUNDS", 1)
    monkeypatch.setitem(tuned.DATA_SETS, "tiny", [*tuned.DATA_SETS["tiny"], *smaller])
    words = ["tiny", "--results", str(tmp_path / "results"), "--log_dir", str(tmp_path)]
    monkeypatch.setattr(sys, "argv", ["tuned.py", *words])
    tuned.main()
    printed = capsys.readouterr().out
    run = json.loads((tmp_path / "results" / "tiny-0.json").read_text())
    metrics = json.loads((tmp_path / "tiny-0" / "final" / "metrics.json").read_text())
    models, layers = run["models"], metrics["validation"]["mean_exit_layer"]
    assert list(models) == ["baseline", "defaults", "tuned", "encoder", "multi-exit"]
    assert run["promise"] == metrics["calibration"]["promise"]
    for name, entry in (("baseline", metrics["baseline"]["test"]), ("tuned", metrics["test"])):
        assert models[name]["accuracy"] == pytest.approx(entry["accuracy"])
    assert models["tuned"]["mean_exit_layer"] == pytest.approx(metrics["test"]["mean_exit_layer"])
    assert models["encoder"]["layers"] - 1 < layers <= models["encoder"]["layers"]
    assert models["multi-exit"]["layers"] == metrics["layers"]
    assert "| tiny (0) | whole encoder |" in printed


def test_the_documented_table_is_that_of_the_stored_results(tuned):
    runs = [json.loads(path.read_text()) for path in sorted(tuned.RESULTS.glob("*.json"))]
    page = (ROOT / "benchmarks" / "README.md").read_text()
    assert f"<!-- table -->\n{tuned.table(runs)}\n<!-- /table -->" in page
