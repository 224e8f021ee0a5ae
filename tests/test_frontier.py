"""The parts of benchmarks/frontier that a wrong number could come from."""

import pytest
import torch

from benchmarks.frontier import data, records, rules, training
from benchmarks.frontier.learners import Learner
from benchmarks.frontier.methods import Method
from dact import functional
from dact.data.text import Examples
from dact.encoders import TransformerEncoder


def answers(texts=200, layers=4, seed=0):
    generator = torch.Generator().manual_seed(seed)
    y = (2 * torch.randn(texts, layers, 3, generator=generator)).softmax(dim=-1)
    h = torch.rand(texts, layers, generator=generator)
    return y, h, torch.randint(0, 3, (texts,), generator=generator)


@pytest.mark.parametrize("margin", [0.2, 0.6, 0.95])
def test_the_rules_leave_where_the_package_leaves(margin):
    y, h, _ = answers()
    a, p = functional.accumulate(y, h)
    assert torch.equal(rules.by_margin(y, h).exits(margin), functional.exit_layers(a, p, y=y, margin=margin))
    assert torch.equal(rules.by_tolerance(y, h).exits(margin), functional.exit_layers(a, p, tolerance=1 - margin))


@pytest.mark.parametrize("budget", [1.0, 1.5, 2.5, 4.0])
def test_the_margin_for_a_budget_is_the_largest_within_it(budget):
    policy = rules.by_lead(*answers()[:2])
    margin = policy.margin_for(budget)
    assert policy.exits(margin).double().mean() <= budget
    next_up = policy.score[policy.score > margin]
    if budget < 4:
        assert policy.exits(next_up.min().item()).double().mean() > budget


@pytest.mark.parametrize("kind", ["dact", "multi"])
def test_what_is_fitted_leaves_the_proof_alone(kind):
    y, h, target = answers()
    for fit in rules.FITS[kind].values():
        policy = fit(y, h, target)(y, h)
        assert torch.allclose(policy.answers.sum(dim=-1), torch.ones(policy.answers.shape[:2]), atol=1e-4)
        assert policy.proven[:, -1].all()
        assert policy.exits(1e9).max() <= y.shape[1]


def test_all_copies_of_a_text_are_in_one_part(monkeypatch):
    monkeypatch.setattr(data, "SIZES", {"tweets": 60, "film": 60})
    texts = [f"text {row % 50}" if row % 2 else f"TEXT  {row % 50}" for row in range(120)]
    everything = Examples(texts, labels=[row % 3 for row in range(120)])
    parts = data.divide(everything, ("tweets", "film"), split=0)
    assert sorted(row for rows in parts.values() for row in rows) == list(range(120))
    seen = {name: {" ".join(texts[row].casefold().split()) for row in rows} for name, rows in parts.items()}
    assert not seen["train"] & (seen["val"] | seen["test"])
    assert not seen["val"] & seen["test"]
    alone = data.divide(everything, ("tweets",), split=0)
    assert all(set(alone[name]) <= set(parts[name]) for name in parts)


def test_a_plain_learner_learns_as_the_package_does(monkeypatch):
    torch.manual_seed(0)
    encoder = TransformerEncoder(20, num_layers=2, hidden_size=8, num_heads=2)
    model = Learner(method=Method("dact", 2), mask_token=3, encoder=encoder, distillation=0.5).eval()
    monkeypatch.setattr(model, "_warm_lambda", lambda: 0.02)
    monkeypatch.setattr(model, "log", lambda *arguments, **options: None)
    batch = {
        "input_ids": torch.randint(3, 20, (5, 7)),
        "attention_mask": torch.ones(5, 7, dtype=torch.int64),
        "labels": torch.tensor([0, 1, 2, 1, 0]),
        "teacher": torch.rand(5, 3).softmax(dim=-1),
    }
    torch.testing.assert_close(model.loss_of(batch), model._step(batch, "train")["loss"])


def test_the_record_keeps_which_texts_were_right():
    right = torch.rand(37) > 0.5
    assert records.unpack(records.pack(right), 37).tolist() == right.tolist()


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
    torch.testing.assert_close(early.probabilities, functional.answer_at(output.layer_probabilities, expected))
