"""The parts of benchmarks/frontier that a wrong number could come from."""

import pytest
import torch

from benchmarks.frontier import data, rules, training
from benchmarks.frontier.methods import Method
from dact import functional
from dact.data import vader
from dact.data.examples import Examples
from dact.data.tokenizers import word_tokenizer
from dact.functional import UNLABELLED


def answers(texts=200, layers=4):
    generator = torch.Generator().manual_seed(0)
    y = (2 * torch.randn(texts, layers, 3, generator=generator)).softmax(dim=-1)
    return y, torch.rand(texts, layers, generator=generator)


@pytest.mark.parametrize("margin", [0.2, 0.95])
def test_the_rules_leave_where_the_package_leaves(margin):
    y, h = answers()
    a, p = functional.accumulate(y, h)
    by_margin = functional.exit_layers(a, p, y=y, margin=margin)
    assert torch.equal(rules.by_margin(y, h).exits(margin), by_margin)
    by_tolerance = functional.exit_layers(a, p, tolerance=1 - margin)
    assert torch.equal(rules.by_tolerance(y, h).exits(margin), by_tolerance)


@pytest.mark.parametrize("budget", [1.0, 2.5, 4.0])
def test_the_margin_for_a_budget_is_the_largest_within_it(budget):
    policy = rules.by_lead(*answers())
    margin = policy.margin_for(budget)
    assert policy.exits(margin).double().mean() <= budget
    next_up = policy.score[policy.score > margin]
    if budget < 4:
        assert policy.exits(next_up.min().item()).double().mean() > budget


def test_texts_without_a_class_come_on_top_of_the_labelled_ones(tmp_path, monkeypatch):
    made = Examples([f"text {row}" for row in range(160)], labels=[row % 3 for row in range(160)])
    whole = {
        corpus: made.take(range(40 * place, 40 * place + 40))
        for place, corpus in enumerate(vader.CORPORA)
    }
    monkeypatch.setattr(vader, "fetch", lambda archive: None)
    monkeypatch.setattr(vader, "read_archive", lambda archive: whole)
    both = {"tokenizer": word_tokenizer(["text"]), "root": str(tmp_path), "num_train": 30}
    plain = vader.VaderSentiment(**both, split=1)
    more = data.WithUnlabelled(num_unlabelled=20, **both, split=1)
    train = more.examples("train")
    assert train.take(range(30)) == plain.examples("train")
    assert train.labels[30:] == [UNLABELLED] * 20
    assert len({*train.texts, *more.examples("val").texts, *more.examples("test").texts}) == 50 + 40


def test_a_multi_exit_runs_in_the_package_as_its_rule_says():
    setting = data.Setting("generated-200", split=0)
    model = training.make_model(setting, Method("multi", 3)).eval()
    batch = next(iter(data.make_data(setting).val_dataloader()))
    with torch.no_grad():
        output = model.full_depth(batch)
    leads = rules.lead(output.layer_probabilities)
    model.halting_margin = leads[:, 0].median().item()
    early = model.early_exit(batch)
    expected = rules.by_lead(output.layer_probabilities, output.h).exits(model.halting_margin)
    assert torch.equal(early.exit_layer, expected)
    assert 1 < expected.double().mean() < 3
    torch.testing.assert_close(
        early.probabilities, functional.answer_at(output.layer_probabilities, expected)
    )
