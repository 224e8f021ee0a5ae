"""The parts of benchmarks/frontier that a wrong number could come from."""

import pytest
import torch

from benchmarks.frontier import data, records, rules, training
from benchmarks.frontier.learners import Learner
from benchmarks.frontier.methods import Method
from dact import DACT, functional
from dact.data import vader
from dact.data.examples import Examples
from dact.data.tokenizers import word_tokenizer
from dact.encoders import TransformerEncoder
from dact.functional import UNLABELLED


def answers(texts=200, layers=4, seed=0):
    generator = torch.Generator().manual_seed(seed)
    y = (2 * torch.randn(texts, layers, 3, generator=generator)).softmax(dim=-1)
    h = torch.rand(texts, layers, generator=generator)
    return y, h, torch.randint(0, 3, (texts,), generator=generator)


@pytest.mark.parametrize("margin", [0.2, 0.6, 0.95])
def test_the_rules_leave_where_the_package_leaves(margin):
    y, h, _ = answers()
    a, p = functional.accumulate(y, h)
    assert torch.equal(
        rules.by_margin(y, h).exits(margin), functional.exit_layers(a, p, y=y, margin=margin)
    )
    assert torch.equal(
        rules.by_tolerance(y, h).exits(margin), functional.exit_layers(a, p, tolerance=1 - margin)
    )


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
        assert torch.allclose(
            policy.answers.sum(dim=-1), torch.ones(policy.answers.shape[:2]), atol=1e-4
        )
        assert policy.proven[:, -1].all()
        assert policy.exits(1e9).max() <= y.shape[1]


def test_texts_without_a_class_come_on_top_of_the_labelled_ones(tmp_path, monkeypatch):
    made = Examples([f"text {row}" for row in range(160)], labels=[row % 3 for row in range(160)])
    whole = {
        corpus: made.take(range(40 * place, 40 * place + 40))
        for place, corpus in enumerate(vader.CORPORA)
    }
    monkeypatch.setattr(vader, "read_archive", lambda archive: whole)
    of_both = {
        "tokenizer": word_tokenizer(["text"]),
        "root": str(tmp_path),
        "num_train": 30,
        "split": 1,
    }
    plain, more = vader.VaderSentiment(**of_both), data.WithUnlabelled(num_unlabelled=20, **of_both)
    train = more.examples("train")
    assert train.take(range(30)) == plain.examples("train")
    assert train.labels[30:] == [UNLABELLED] * 20
    assert len({*train.texts, *more.examples("val").texts, *more.examples("test").texts}) == 50 + 40


def taught_batch():
    return {
        "input_ids": torch.randint(3, 20, (5, 7)),
        "attention_mask": torch.ones(5, 7, dtype=torch.int64),
        "labels": torch.tensor([0, 1, 2, 1, UNLABELLED]),
        "teacher": torch.rand(5, 3).softmax(dim=-1),
    }


def make_learner(name):
    encoder = TransformerEncoder(20, num_layers=2, hidden_size=8, num_heads=2)
    return Learner(
        method=Method.parse(name), mask_token=3, encoder=encoder, distillation=0.5
    ).eval()


def test_a_plain_learner_learns_as_the_package_does():
    model, batch = make_learner("dact-2"), taught_batch()
    torch.testing.assert_close(vars(model.loss(batch, 0.02)), vars(DACT.loss(model, batch, 0.02)))


def test_a_live_teacher_answers_to_the_text_that_its_learner_sees():
    model, batch, teacher = make_learner("multi-2-live"), taught_batch(), make_learner("dact-2")
    batch["input_ids"] = batch["input_ids"].repeat(8, 10)
    batch["attention_mask"] = batch["attention_mask"].repeat(8, 10)
    model.learn_from(teacher)
    view = model._masked_view(batch)
    changed = view["input_ids"] != batch["input_ids"]
    assert (view["input_ids"][changed] == 3).all()
    assert not changed[:, 0].any()
    assert 0.05 < changed.double().mean() < 0.15
    torch.testing.assert_close(view["teacher"], teacher(view).probabilities)


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
    torch.testing.assert_close(
        early.probabilities, functional.answer_at(output.layer_probabilities, expected)
    )
