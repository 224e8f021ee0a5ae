"""The confidence that reads answers: what it sees, what it learns from, and what that moves."""

import math

import pytest
import torch
from lightning.pytorch import Trainer

from dact import DACT, SubmodelConfig, functional
from dact import confidence as confidences
from dact.confidence import AnswerConfidence, best_temperature, fit_confidence
from dact.data import CompositionalSentiment
from dact.encoders import TransformerEncoder
from tests.conftest import random_batch, tiny_model


def answers(examples=400, layers=5, classes=3, sure=2.0):
    """Labels, and log-probabilities of layers of which later ones are more often right."""
    generator = torch.Generator().manual_seed(0)
    target = torch.randint(classes, (examples,), generator=generator)
    noise = torch.randn(examples, layers, classes, generator=generator)
    signal = torch.nn.functional.one_hot(target, classes).unsqueeze(1)
    strength = torch.linspace(0.5, 2.5, layers)[:, None]
    logits = sure * (strength * signal + noise)
    return logits.log_softmax(dim=-1), functional.soft_targets(target, classes)


def test_it_reads_two_numbers_of_the_answer_and_the_depth():
    confidence = AnswerConfidence(SubmodelConfig(), num_layers=4).eval()
    y = torch.tensor([[0.7, 0.2, 0.1]])
    entropy = -sum(v * math.log(v) for v in y[0].tolist()) / math.log(3)
    line = confidences.OFFSET + confidences.LEAD * 0.5 + confidences.ENTROPY * entropy
    assert confidence.answer(2, y).item() == pytest.approx(line, abs=1e-5)  # it starts as the line
    torch.nn.init.normal_(confidence.last.weight)
    every = confidence(y.repeat(4, 1).unsqueeze(0)).flatten()
    assert len(set(every.tolist())) == 4, "the depth counts"
    alone = [confidence.answer(n, y).item() for n in range(1, 5)]
    assert every.tolist() == pytest.approx(alone, abs=1e-5)


@torch.no_grad()
def test_early_exit_answers_as_forward_does(tmp_path):
    model, batch = tiny_model(layers=6, confidence_reads="answer"), random_batch(40)
    model.classifier[-1].weight.mul_(10)
    model.exit_temperatures.copy_(torch.linspace(0.5, 1.5, 6))
    torch.nn.init.constant_(model.confidence.last.bias, -6.0)
    output, early = model(batch), model.early_exit(batch)
    assert torch.equal(early.exit_layer, output.exit_layer) and early.exit_layer.min() < 6
    assert torch.equal(early.probabilities.argmax(1), output.probabilities.argmax(1))
    model.save_pretrained(tmp_path)
    again = DACT.from_pretrained(tmp_path)(batch)
    assert torch.equal(again.probabilities, output.probabilities)


def test_temperatures_find_how_much_too_sure_each_layer_is():
    log_y, target = answers(examples=4000, sure=1.0)
    labels, loss = target.argmax(dim=1), torch.nn.functional.cross_entropy

    def best(logits):
        return best_temperature(lambda t: loss(logits / t, labels, reduction="none"))

    for n, factor in ((0, 0.5), (2, 2.0), (4, 4.0)):
        found = best(factor * log_y[:, n]) / best(log_y[:, n])
        assert found == pytest.approx(factor, rel=0.05)


def test_a_higher_price_lets_more_leave_by_proof_and_the_generator_stays():
    log_y, target = answers()
    y, shares = log_y.softmax(dim=-1), []
    confidence = AnswerConfidence(SubmodelConfig(), num_layers=5).eval()
    state = torch.get_rng_state()
    for lambda_reg in (0.001, 0.1):
        fit_confidence(confidence, y, target, lambda_reg)
        with torch.no_grad():
            a, p = functional.accumulate(y, confidence(y).squeeze(-1).sigmoid())
        exits = functional.Halting().exit_layers(a, p, y)
        shares.append((exits < 5).double().mean().item())
    assert torch.equal(torch.get_rng_state(), state)
    assert shares[0] < shares[1]
    assert not any(parameter.requires_grad for parameter in confidence.parameters())


def model_of(**arguments):
    torch.manual_seed(0)
    given = {"detach_exits": True, "exit_loss_weight": 1.0, "learning_rate": 3e-3, **arguments}
    return DACT(TransformerEncoder(42, 3, 16, 2, dropout=0.1), **given)


def fit(model, data, **options):
    torch.manual_seed(0)
    quiet = dict.fromkeys(
        ["logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"], False
    )
    Trainer(max_epochs=2, accelerator="cpu", gradient_clip_val=1.0, **quiet, **options).fit(
        model, datamodule=data
    )


def test_encoder_and_classifiers_learn_alike_whatever_the_price():
    data = CompositionalSentiment(num_train=200, num_val=40, num_test=5)
    one, other = model_of(), model_of(lambda_reg=0.3)
    for model in (one, other):
        fit(model, data)
    for part in ("encoder", "classifier"):
        weights = (getattr(model, part).state_dict().values() for model in (one, other))
        assert all(map(torch.equal, *weights)), part
    assert not torch.equal(one.confidence.last.weight, other.confidence.last.weight)


def test_texts_that_are_set_apart_are_in_no_other_part_and_carry_a_label():
    data = CompositionalSentiment(num_train=400, num_val=40, num_test=5, confidence_fraction=0.2)
    data.setup("fit")
    apart, train = data.splits["confidence"], data.splits["train"]
    assert len(apart) + len(train) == 400 and 50 < len(apart) < 110
    assert not {*apart.text_keys()} & {*train.text_keys()}
    (batch, *_) = data.confidence_dataloader()
    assert {"input_ids", "labels"} <= batch.keys()


@pytest.mark.parametrize(("fraction", "limit_val_batches"), [(0.2, 0), (0.0, 1.0)])
def test_a_fit_teaches_it_with_and_without_texts_set_apart(fraction, limit_val_batches, caplog):
    sizes = {"num_train": 200, "num_val": 40, "num_test": 5}
    model = model_of()
    with caplog.at_level("INFO"):
        data = CompositionalSentiment(**sizes, confidence_fraction=fraction)
        fit(model, data, limit_val_batches=limit_val_batches)
    assert ("no texts are set apart" in caplog.text) == (fraction == 0)
    assert (data.confidence_dataloader() is None) == (fraction == 0)
    assert model.confidence.last.weight.abs().sum() > 0
    assert (model.exit_temperatures != 1).all()


def test_a_loop_of_ones_own_teaches_it_by_hand():
    model = model_of()
    batch = {**random_batch(30, vocab=40), "labels": torch.arange(30) % 3}
    model.teach_confidence([batch])
    assert model.confidence.last.weight.abs().sum() > 0
    unlabelled = {**batch, "labels": torch.full((30,), functional.UNLABELLED)}
    with pytest.raises(ValueError, match="label"):
        model.teach_confidence([unlabelled])
    with pytest.raises(ValueError, match="confidence_reads='answer', got 'state'"):
        model_of(confidence_reads="state").teach_confidence([batch])


def test_earlier_models_read_states(tmp_path):
    model, batch = tiny_model(confidence_reads="state"), random_batch(10)
    config = model.config()
    del config["confidence_reads"]
    torch.save({"state_dict": model.state_dict(), "dact": config}, tmp_path / "old.ckpt")
    old = DACT.load_from_checkpoint(tmp_path / "old.ckpt").eval()
    assert old.confidence_reads == "state"
    assert torch.equal(old(batch).probabilities, model(batch).probabilities)


def test_lambda_is_in_units_of_the_layers():
    assert model_of().lambda_reg == pytest.approx(0.04 / 3)
