"""The dial: its bounds, what it promises, and where it is stored."""

import json
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import hypothesis.strategies as st
import lightning.pytorch as pl
import pytest
import torch
from hypothesis import given

from dact import DACT, TextClassifier, TuningEngine, calibrate, functional
from dact.calibration import (
    SETTINGS,
    LayerAnswers,
    Promise,
    binomial_upper_bound,
    choose_setting,
    mean_upper_bound,
    store_in_checkpoint,
)
from dact.data import CompositionalSentiment
from dact.encoders import TransformerEncoder
from tests import references
from tests.conftest import random_batch, tiny_model


@given(examples=st.integers(1, 60), share=st.floats(0, 1), confidence=st.sampled_from([0.5, 0.9, 0.95, 0.99]))
def test_the_binomial_bound_is_that_of_its_definition(examples, share, confidence):
    faults = round(share * examples)
    expected = references.binomial_upper_bound(faults, examples, confidence)
    assert binomial_upper_bound(faults, examples, confidence) == pytest.approx(expected, abs=1e-9)


def test_the_mean_bound_holds_as_often_as_it_says():
    generator = torch.Generator().manual_seed(0)
    weights = torch.tensor([0.4, 0.1, 0.1, 0.1, 0.05, 0.25])
    mean = (weights * torch.arange(1, 7)).sum().item()
    draws = torch.multinomial(weights.expand(500, 6), 400, replacement=True, generator=generator) + 1
    bounds = [mean_upper_bound(row, 6, 0.9) for row in draws]
    assert sum(bound < mean for bound in bounds) <= 50
    assert max(bounds) < 4.5


def synthetic(examples, generator, layers=5, classes=3):
    """Examples of which early layers are often wrong while they are not sure yet."""
    target = torch.randint(classes, (examples,), generator=generator)
    hard = torch.rand(examples, 1, 1, generator=generator) * 3
    evidence = torch.randn(examples, layers, classes, generator=generator) * hard
    rise = torch.linspace(0.5, 4, layers).view(1, layers, 1)
    y = (evidence + rise * torch.nn.functional.one_hot(target, classes).unsqueeze(1)).softmax(dim=2)
    h = (1.2 - y.amax(dim=2)).clamp(0, 1)
    a, p = functional.accumulate(y, h)
    return LayerAnswers(a, p, y, target, None)


def exits_at(answers, found):
    return functional.exit_layers(
        answers.a, answers.p, "exact", found.halting_tolerance, y=answers.y, margin=found.halting_margin
    )


@pytest.mark.parametrize("dial", ["halting_tolerance", "halting_margin"])
@pytest.mark.parametrize("promised", [{"max_accuracy_loss": 0.02}, {"min_agreement": 0.96}])
def test_a_promise_is_kept_as_often_as_it_says(promised, dial):
    promise = Promise(**promised, confidence=0.9, dial=dial)
    generator = torch.Generator().manual_seed(0)
    population = synthetic(100_000, generator)
    full = population.a[:, -1].argmax(1)
    broken, moved = 0, 0
    for _ in range(400):
        rows = torch.randint(len(full), (600,), generator=generator)
        sample = LayerAnswers(
            *(part[rows] for part in (population.a, population.p, population.y, population.target)), None
        )
        found = choose_setting(sample, promise)
        moved += (found.halting_tolerance, found.halting_margin) != (0.0, 1.0)
        exits = exits_at(population, found)
        early = functional.answer_at(population.a, exits).argmax(1)
        if promise.min_agreement is None:
            lost = (full == population.target).double().mean() - (early == population.target).double().mean()
            broken += lost.item() > promise.max_accuracy_loss
        else:
            broken += (early == full).double().mean().item() < promise.min_agreement
    assert broken <= 58, "a tenth of 400, and three standard deviations"
    assert moved > 360, "the dial moves"


@pytest.mark.parametrize("dial", ["halting_tolerance", "halting_margin"])
def test_more_allowance_never_means_more_layers(dial):
    answers = synthetic(2000, torch.Generator().manual_seed(1))
    layers = [
        choose_setting(answers, Promise(max_accuracy_loss=loss, dial=dial)).mean_exit_layer
        for loss in (0.0, 0.005, 0.01, 0.05, 0.2)
    ]
    assert layers == sorted(layers, reverse=True)
    assert layers[-1] < layers[0]
    careful = choose_setting(answers, Promise(max_accuracy_loss=0.0, dial=dial))
    assert (careful.halting_tolerance, careful.halting_margin) == (0.0, 1.0)
    assert choose_setting(answers, Promise(min_agreement=1.0, dial=dial)).agreement == 1.0


@pytest.mark.parametrize(("dial", "last"), [("halting_tolerance", 0.99), ("halting_margin", 0.0)])
def test_a_budget_of_layers_is_kept_or_refused_with_the_nearest(dial, last):
    answers = synthetic(5000, torch.Generator().manual_seed(2))

    def bound_at(setting):
        found = SimpleNamespace(**{"halting_tolerance": 0.0, "halting_margin": 1.0, dial: setting})
        return mean_upper_bound(exits_at(answers, found), 5, 0.95)

    careful = SETTINGS[dial]
    budget = (bound_at(careful[0]) + bound_at(last)) / 2
    found = choose_setting(answers, Promise(max_layers=budget, dial=dial))
    assert found.mean_exit_layer <= found.bound <= budget
    assert bound_at(careful[careful.index(getattr(found, dial)) - 1]) > budget, "no more careful setting would do"
    with pytest.raises(ValueError, match=rf"the fewest that can are \d\.\d+ of 5, at {dial} {last:g}") as caught:
        choose_setting(answers, Promise(max_layers=1.0, dial=dial))
    with pytest.raises(ValueError, match="max_layers=9 promises nothing: the model has"):
        choose_setting(answers, Promise(max_layers=9, dial=dial))
    nearest = float(str(caught.value).split("the fewest that can are ")[1].split()[0])
    assert getattr(choose_setting(answers, Promise(max_layers=nearest + 0.01, dial=dial)), dial) == last


@pytest.mark.parametrize(
    ("promise", "message"),
    [
        ({}, "got none of them"),
        ({"max_layers": 2, "min_agreement": 0.9}, "got min_agreement and max_layers"),
        ({"max_accuracy_loss": 2}, r"in \[0, 1\], got 2: 0.005 is half a point"),
        ({"min_agreement": -0.1}, r"min_agreement is a share, in \[0, 1\], got -0.1"),
        ({"max_layers": 0.5}, "max_layers must be 1 or more, got 0.5"),
        ({"max_layers": 2, "confidence": 1.0}, r"in \(0, 1\), got 1.0"),
        ({"max_layers": 2, "dial": "h"}, "dial must be one of 'halting_tolerance', 'halting_margin', got 'h'"),
    ],
)
def test_wrong_promises_are_refused(promise, message):
    with pytest.raises(ValueError, match=message):
        calibrate(tiny_model(), [random_batch()], **promise)


def test_a_model_that_never_halts_has_no_dial():
    with pytest.raises(ValueError, match="halting='never' has no dial"):
        calibrate(tiny_model(halting="never"), [random_batch()], max_layers=2)


def test_a_promise_begins_at_full_depth():
    for dial, other in (("halting_tolerance", {"halting_margin": 0.5}), ("halting_margin", {"halting_tolerance": 0.5})):
        (name,) = other
        with pytest.raises(ValueError, match=rf"{dial} is calibrated from full depth on, but the model has {name}=0.5"):
            calibrate(tiny_model(**other), [random_batch()], min_agreement=0.9, dial=dial)
        assert calibrate(tiny_model(**other), [random_batch(2000)], max_layers=3.9, dial=dial).mean_exit_layer < 3.9


@pytest.mark.parametrize("dial", ["halting_tolerance", "halting_margin"])
def test_the_setting_is_stored_with_the_model(tmp_path, dial):
    model = tiny_model()
    before = getattr(model, dial)
    found = calibrate(model, [random_batch(800)], min_agreement=0.8, dial=dial)
    assert before != getattr(found, dial) == getattr(model, dial)
    model.save_pretrained(tmp_path / "model")
    again = DACT.from_pretrained(tmp_path / "model")
    assert getattr(again, dial) == getattr(found, dial)
    assert again.calibration["promise"]["min_agreement"] == 0.8
    other = DACT.from_pretrained(tmp_path / "model", **{dial: before})
    assert (getattr(other, dial), other.calibration) == (before, None)
    torch.save({"hyper_parameters": tiny_model().config(), "state_dict": model.state_dict()}, tmp_path / "x.ckpt")
    store_in_checkpoint(tmp_path / "x.ckpt", model)
    assert getattr(DACT.load_from_checkpoint(tmp_path / "x.ckpt"), dial) == getattr(found, dial)


def test_calibrating_twice_still_counts_where_the_configuration_says_nothing():
    model = tiny_model()
    for agreement in (0.8, 0.7):
        found = calibrate(model, [random_batch(800)], min_agreement=agreement)
    built = tiny_model()
    built.on_load_checkpoint({"state_dict": model.state_dict(), "hyper_parameters": model.config()})
    assert built.halting_tolerance == found.halting_tolerance
    own = tiny_model(halting_tolerance=0.01)
    own.on_load_checkpoint({"state_dict": model.state_dict(), "hyper_parameters": model.config()})
    assert own.halting_tolerance == 0.01, "what the user gave counts"


def test_a_promise_ends_where_training_goes_on():
    model, batch = small_model(), [random_batch(300, vocab=42)]
    calibrate(model, batch, min_agreement=0.5)
    assert model.calibration is not None
    trainer = pl.Trainer(max_epochs=1, accelerator="cpu", logger=False, enable_checkpointing=False)
    trainer.fit(model, torch.utils.data.DataLoader(batch, batch_size=None))
    assert (model.halting_tolerance, model.calibration) == (0.0, None)


@pytest.mark.parametrize(
    ("batches", "message"),
    [
        ([], "at least two labelled examples are needed, got 0"),
        ([random_batch(1)], "at least two labelled examples are needed, got 1"),
        ([{"input_ids": torch.ones(2, 2, dtype=torch.long)}], r"need 'labels' \[batch\], got the keys \['input_ids'\]"),
    ],
)
def test_too_little_to_calibrate_on_is_a_clear_error(batches, message):
    with pytest.raises(ValueError, match=message):
        calibrate(tiny_model(), batches, max_layers=3)


small_data = partial(CompositionalSentiment, num_train=300, num_val=400, num_test=60, max_depth=2)


def small_model(**overrides):
    return DACT(encoder=TransformerEncoder(42, 3, 16, 2), **{"learning_rate": 3e-3, **overrides})


@pytest.mark.parametrize("mode", ["finetune", "frozen"])
def test_the_engine_calibrates_on_examples_that_no_study_saw(tmp_path, mode):
    engine = TuningEngine(
        model=small_model,
        data=small_data,
        trainer={"max_epochs": 1, "accelerator": "cpu"},
        n_trials=1,
        encoder_training=mode,
        warm_up_epochs=1,
        promise=Promise(min_agreement=0.9),
        compare_defaults=False,
        search_space={"num_epochs": {"choices": [1]}},
        log_dir=tmp_path,
    )
    engine.display.console.quiet = True
    data = engine.make_data()
    data.setup("fit")
    seen, kept = (set(data.splits[name].texts) for name in ("val", "calibration"))
    assert len(data.splits["val"]) == len(data.splits["calibration"]) == 200
    assert sorted(data.splits["val"].texts + data.splits["calibration"].texts) == sorted(whole_validation().texts)
    assert seen
    assert kept
    metrics_path, model_path = engine.run_pipeline("run")
    metrics = json.loads(Path(metrics_path).read_text())
    assert sum(metrics["validation"]["exit_histogram"]) == 200
    found = metrics["calibration"]
    assert found["examples"] == 200
    assert found["bound"] >= 0.9
    assert DACT.load_from_checkpoint(model_path).halting_tolerance == found["halting_tolerance"]
    classifier = TextClassifier.from_pretrained(tmp_path / "run" / "final" / "model")
    assert classifier.model.halting_tolerance == found["halting_tolerance"] == metrics["halting_tolerance"]


def whole_validation():
    data = small_data()
    data.setup("fit")
    return data.splits["val"]


def test_a_promise_needs_data_that_can_keep_examples_back(tmp_path):
    engine = TuningEngine(data=pl.LightningDataModule, promise=Promise(max_layers=2), log_dir=tmp_path)
    with pytest.raises(ValueError, match="LightningDataModule has no calibration_dataloader"):
        engine.make_data()
    with pytest.raises(ValueError, match="give one of the two"):
        TuningEngine(promise=Promise(max_layers=2), halting_tolerance=0.1)
    engine = TuningEngine(
        promise=Promise(min_agreement=0.9, dial="halting_margin"),
        halting_tolerance=0.2,
        log_dir=tmp_path,
        trainer={"accelerator": "cpu"},
    )
    with pytest.raises(ValueError, match="from full depth on, but the model has halting_tolerance=0.2: set it to 0"):
        engine._check_data()


def test_another_dial_ends_the_promise_of_the_first():
    model, batch = tiny_model(), [random_batch(800)]
    calibrate(model, batch, min_agreement=0.8)
    assert model.halting_tolerance > 0
    calibrate(model, batch, min_agreement=0.8, dial="halting_margin")
    assert model.halting_tolerance == 0
    assert model.halting_margin < 1
    model.end_calibration()
    assert (model.halting_tolerance, model.halting_margin, model.calibration) == (0.0, 1.0, None)
    calibrate(model, batch, min_agreement=0.8, dial="halting_margin")
    model.halting_margin = 0.123
    model.end_calibration()
    assert model.halting_margin == 0.123, "what the user gave counts"


def test_a_promise_that_does_not_hold_is_said():
    model = tiny_model()
    calibrate(model, [random_batch(800)], min_agreement=0.8, dial="halting_margin")
    checkpoint = {"state_dict": model.state_dict(), "hyper_parameters": model.config()}
    same = tiny_model()
    same.on_load_checkpoint(checkpoint)
    assert same.halting_margin == model.halting_margin
    with pytest.warns(
        UserWarning, match=r"was calibrated for halting exact, .* but this configuration has .* halting_tolerance 0.3,"
    ):
        tiny_model(halting_tolerance=0.3).on_load_checkpoint(checkpoint)


def test_a_promise_holds_for_the_rule_that_it_was_made_for(tmp_path):
    model, batch = tiny_model(layers=6), random_batch(300)
    calibrate(model, [batch], min_agreement=0.9)
    assert model.halting_tolerance > 0
    model.save_pretrained(tmp_path)
    assert DACT.from_pretrained(tmp_path).calibration is not None
    other = DACT.from_pretrained(tmp_path, halting_margin=0.3)
    assert (other.calibration, other.halting_tolerance) == (None, 0.0)
    own = DACT.from_pretrained(tmp_path, halting="paper", halting_tolerance=model.halting_tolerance)
    assert (own.calibration, own.halting_tolerance) == (None, model.halting_tolerance)


def test_the_engine_refuses_a_promise_of_nothing_before_its_first_trial(tmp_path):
    engine = TuningEngine(promise=Promise(max_layers=6), log_dir=tmp_path, trainer={"accelerator": "cpu"})
    with pytest.raises(ValueError, match="max_layers=6 promises nothing: the model has 6 layers"):
        engine._check_data()
