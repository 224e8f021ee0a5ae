"""Scores: their calibration error, and temperatures that help or stay 1."""

import lightning.pytorch as pl
import pytest
import torch

from dact import DACT, calibrate, functional
from dact.calibration import LayerAnswers
from dact.calibration.temperature import expected_calibration_error, fit_temperatures, temper
from tests.conftest import random_batch, tiny_model


def answers_of(scale, examples=4000, seed=0):
    """Examples whose probabilities are right, sharpened by `scale` in each of the layers."""
    torch.manual_seed(seed)
    logits = 1.5 * torch.randn(examples, 1, 4)
    target = torch.distributions.Categorical(logits=logits[:, 0]).sample()
    a = (logits * torch.tensor(scale).view(1, -1, 1)).softmax(dim=2)
    return LayerAnswers(a, torch.zeros(a.shape[:2]), a, target)


def test_the_calibration_error_is_that_of_its_definition():
    scores, correct, expected = torch.rand(500), torch.rand(500) < 0.7, 0.0
    for bin in range(10):
        inside = (scores > bin / 10) & (scores <= (bin + 1) / 10)
        gap = correct[inside].float().mean() - scores[inside].mean()
        expected += inside.float().mean().item() * abs(gap.item())
    assert expected_calibration_error(scores, correct, bins=10) == pytest.approx(expected, abs=1e-5)
    assert expected_calibration_error(torch.ones(10), torch.ones(10, dtype=torch.bool)) == 0


def test_temperatures_are_found_and_make_scores_mean_what_they_say():
    exits, scale = torch.arange(4000) % 3 + 1, [3.0, 1.0, 0.5]
    temperatures = fit_temperatures(answers_of(scale), exits)
    assert temperatures == pytest.approx(scale, rel=0.15)
    fresh = answers_of(scale, seed=1)
    given = functional.answer_at(fresh.a, exits)
    better = temper(given, exits, temperatures)
    correct = given.argmax(1) == fresh.target
    before, after = (expected_calibration_error(p.amax(1), correct) for p in (given, better))
    assert after < 0.03 < before
    torch.testing.assert_close(better.sum(1), torch.ones(4000))
    assert torch.equal(better.argmax(1), given.argmax(1))


def test_few_examples_move_a_temperature_little():
    rare = torch.full((300,), 2)
    rare[:9] = 1
    few, many, none = fit_temperatures(answers_of([5.0, 5.0, 1.0], 300), rare)
    assert 1 < few < 2 < many, "nine examples say little"
    assert none == pytest.approx(1, abs=1e-4), "no example leaves there"


def test_temperatures_bear_probabilities_of_0_and_1():
    p = torch.tensor([[1.0, 0.0, 0.0], [0.0, 0.5, 0.5]])
    found = temper(p, torch.tensor([1, 2]), [4.0, 0.25])
    assert torch.isfinite(found).all()
    torch.testing.assert_close(found.sum(1), torch.ones(2))


def test_temperatures_come_with_the_margin_and_are_stored_with_the_model(tmp_path):
    model, batch = tiny_model(), random_batch(600)
    calibrate(model, [batch], min_agreement=0.9)
    assert model.temperatures is None
    model.temperatures = [7.0] * 4
    calibrate(model, [batch], min_agreement=0.8)
    assert len(model.temperatures) == 4 and model.temperatures != [7.0] * 4
    model.save_pretrained(tmp_path / "model")
    trainer = pl.Trainer(accelerator="cpu", logger=False, enable_progress_bar=False)
    trainer.strategy.connect(model)
    trainer.save_checkpoint(tmp_path / "x.ckpt")
    loaded = DACT.from_pretrained(tmp_path / "model")
    for other in (loaded, DACT.load_from_checkpoint(tmp_path / "x.ckpt").eval()):
        assert other.temperatures == model.temperatures
        assert torch.equal(other.early_exit(batch).exit_layer, model.early_exit(batch).exit_layer)
    turned = DACT.from_pretrained(tmp_path / "model", halting_margin=0.5)
    assert turned.temperatures == model.temperatures
