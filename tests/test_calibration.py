"""The dial: its bounds, what it promises, and where it is stored."""

import json
import re
import sys
from functools import cache, partial
from itertools import product
from pathlib import Path
from unittest.mock import patch

import hypothesis.strategies as st
import lightning.pytorch as pl
import pytest
import torch
from hypothesis import assume, given, settings
from sklearn.metrics import f1_score

from dact import DACT, TextClassifier, TuningEngine, calibrate, functional
from dact.calibration import (
    SETTINGS,
    LayerAnswers,
    Measured,
    Promise,
    choose_setting,
    describe,
    settle,
)
from dact.calibration.answers import exits_by_setting
from dact.calibration.bounds import (
    binomial_upper_bound,
    difference_p_value,
    difference_upper_bound,
    mean_upper_bound,
)
from dact.data import CompositionalSentiment
from dact.encoders import TransformerEncoder
from dact.functional import Halting
from dact.saving import store_in_checkpoint
from tests import references
from tests.conftest import random_batch, tiny_model


@given(
    examples=st.integers(1, 60),
    share=st.floats(0, 1),
    confidence=st.sampled_from([0.5, 0.95, 0.99]),
)
def test_the_binomial_bound_is_that_of_its_definition(examples, share, confidence):
    faults = round(share * examples)
    expected = references.binomial_upper_bound(faults, examples, confidence)
    assert binomial_upper_bound(faults, examples, confidence) == pytest.approx(expected, abs=1e-9)


def test_the_mean_bound_holds_as_often_as_it_says():
    weights = torch.tensor([0.4, 0.1, 0.1, 0.1, 0.05, 0.25])
    mean = (weights * torch.arange(1, 7)).sum().item()
    draws = torch.multinomial(weights.expand(500, 6), 400, replacement=True)
    bounds = [mean_upper_bound(row + 1, 6, 0.9) for row in draws]
    assert sum(bound < mean for bound in bounds) <= 50
    assert max(bounds) < 4.5


@pytest.mark.parametrize(
    ("lost", "gained", "error"), [(0.3, 0.2, 0.05), (0.1, 0.0, 0.2), (0.02, 0.01, 0.05)]
)
def test_the_test_of_a_paired_difference_is_wrong_as_seldom_as_it_says(lost, gained, error):
    """Exactly: summed over all outcomes of 30 examples."""
    wrong = sum(
        references.outcome_probability(i, j, 30, lost, gained)
        for i in range(31)
        for j in range(31 - i)
        if difference_p_value(i, j, 30, lost - gained, error) <= error
    )
    assert wrong <= error


def test_the_test_of_a_paired_difference_spends_most_of_its_error():
    """Summed over all outcomes of 360 examples, for many shares of discordant ones: wrong in at
    most 5 %, not far less."""
    difference, refuted = 0.01, []
    for lost, gained in product(range(12), range(24)):
        if difference_p_value(lost, gained, 360, difference, 0.05) <= 0.05:
            refuted.append((lost, gained))
    wrong = []
    for discordant in (0.01, 0.012, 0.015, 0.02, 0.03):
        rates = (discordant + difference) / 2, (discordant - difference) / 2
        wrong.append(sum(references.outcome_probability(i, j, 360, *rates) for i, j in refuted))
    assert 0.025 < max(wrong) <= 0.05


@given(
    lost=st.integers(0, 30),
    gained=st.integers(0, 30),
    more=st.integers(0, 600),
    difference=st.floats(0.001, 0.2),
)
@settings(max_examples=25)
def test_the_bound_on_a_paired_difference_is_where_its_test_turns(lost, gained, more, difference):
    examples = lost + gained + more + 1
    bound = difference_upper_bound(lost, gained, examples, 0.95)
    assume(abs(difference - bound) > 1e-5)
    assert (difference_p_value(lost, gained, examples, difference, 1 - 0.95) <= 1 - 0.95) == (
        difference > bound
    )


def synthetic(examples, generator, layers=5, classes=3, quality=4.0, target=None):
    """Examples of which early layers are often wrong while they are not sure yet."""
    if target is None:
        target = torch.randint(classes, (examples,), generator=generator)
    hard = torch.rand(examples, 1, 1, generator=generator) * 3
    evidence = torch.randn(examples, layers, classes, generator=generator) * hard
    rise = torch.linspace(0.5, quality, layers).view(1, layers, 1)
    y = (evidence + rise * torch.nn.functional.one_hot(target, classes).unsqueeze(1)).softmax(dim=2)
    h = (1.2 - y.amax(dim=2)).clamp(0, 1)
    return LayerAnswers(*functional.accumulate(y, h), y, target)


@cache
def truth(population, halting, baseline=None):
    """What a halting rule gives on the whole population."""
    measured = Measured(population, population.exit_layers(halting))
    reference = measured.full if baseline is None else baseline
    return -measured.difference(reference == population.target)[0], measured.agreement


@pytest.mark.slow
@pytest.mark.parametrize(
    ("promised", "dial"),
    [
        ({"max_accuracy_loss": 0.02}, "halting_tolerance"),
        ({"max_accuracy_loss": 0.02}, "halting_margin"),
        ({"min_agreement": 0.96}, "halting_margin"),
    ],
)
def test_a_promise_is_kept_as_often_as_it_says(promised, dial):
    promise = Promise(**promised, confidence=0.9, dial=dial)
    generator = torch.Generator().manual_seed(0)
    population = synthetic(40_000, generator)
    broken, moved = 0, 0
    for _ in range(300):
        rows = torch.randint(len(population.target), (600,), generator=generator)
        found = choose_setting(population.take(rows), promise)
        moved += (found.halting_tolerance, found.halting_margin) != (0.0, 1.0)
        loss, agreement = truth(population, found.exit_rule)
        if promise.min_agreement is None:
            broken += loss > promise.max_accuracy_loss
        else:
            broken += agreement < promise.min_agreement
    assert broken <= 45, "a tenth of 300, and three standard deviations"
    assert moved > 270, "the dial moves"


@pytest.mark.parametrize("dial", ["halting_tolerance", "halting_margin"])
def test_more_allowance_never_means_more_layers(dial):
    answers = synthetic(2000, torch.Generator().manual_seed(1))
    found = [
        choose_setting(answers, Promise(max_accuracy_loss=loss, dial=dial))
        for loss in (0.0, 0.01, 0.05, 0.2)
    ]
    layers = [one.mean_exit_layer for one in found]
    assert layers == sorted(layers, reverse=True) and layers[-1] < layers[0]
    careful = found[0]
    assert (careful.halting_tolerance, careful.halting_margin) == (0.0, 1.0)
    assert (careful.bound, careful.agreement) == (0, 1)
    says = describe(vars(careful), 5)
    assert "each example gets the answer of all 5 layers, by proof" in says
    assert "without a guarantee" not in describe({**vars(careful), "estimate": True}, 5)
    assert choose_setting(answers, Promise(min_agreement=1.0, dial=dial)).agreement == 1.0


@pytest.mark.parametrize(("dial", "last"), [("halting_tolerance", 0.99), ("halting_margin", 0.0)])
def test_a_budget_of_layers_is_kept_or_refused_with_the_nearest(dial, last):
    answers = synthetic(5000, torch.Generator().manual_seed(2))

    def bound_at(setting):
        return mean_upper_bound(answers.exit_layers(Halting().with_dial(dial, setting)), 5, 0.95)

    careful = SETTINGS[dial]
    budget = (bound_at(careful[0]) + bound_at(last)) / 2
    found = choose_setting(answers, Promise(max_layers=budget, dial=dial))
    assert found.mean_exit_layer <= found.bound <= budget
    before = careful[careful.index(getattr(found, dial)) - 1]
    assert bound_at(before) > budget, "no more careful setting would do"
    with pytest.raises(ValueError, match=rf"max_layers=1 .* {dial} {last:g} .* can be") as caught:
        choose_setting(answers, Promise(max_layers=1.0, dial=dial))
    nearest = float(re.search(r"and ([\d.]+) can be promised", str(caught.value))[1])
    assert getattr(choose_setting(answers, Promise(max_layers=nearest, dial=dial)), dial) == last


@pytest.mark.parametrize(
    ("promise", "error", "message"),
    [
        ({"max_layers": 2, "min_agreement": 0.9}, ValueError, "min_agreement and max_layers"),
        ({"max_accuracy_loss": 1}, ValueError, "max_accuracy_loss .* got 1: 0.01 is one point"),
        ({"min_agreement": "0.5"}, TypeError, "min_agreement must be a number, got '0.5'"),
        ({"max_layers": 2, "dial": "h"}, ValueError, "dial .* 'halting_margin', got 'h'"),
    ],
)
def test_wrong_promises_are_refused(promise, error, message):
    with pytest.raises(error, match=message):
        calibrate(tiny_model(), [random_batch()], **promise)


def test_a_promise_begins_at_all_layers():
    dials = ["halting_tolerance", "halting_margin"]
    for dial, other in (dials, dials[::-1]):
        model = tiny_model(**{other: 0.5})
        with pytest.raises(ValueError, match=f"{dial} is .* all layers.* has {other}=0.5"):
            calibrate(model, [random_batch()], min_agreement=0.9, dial=dial)
        found = calibrate(model, [random_batch(2000)], max_layers=3.9, dial=dial)
        assert found.mean_exit_layer < 3.9


@pytest.mark.parametrize("dial", ["halting_tolerance", "halting_margin"])
def test_the_setting_is_stored_with_the_model(tmp_path, dial):
    model, path = tiny_model(), tmp_path / "x.ckpt"
    before = getattr(model, dial)
    found = getattr(calibrate(model, [random_batch(800)], min_agreement=0.8, dial=dial), dial)
    assert before != found == getattr(model, dial)
    model.save_pretrained(tmp_path / "model")
    again = DACT.from_pretrained(tmp_path / "model")
    assert getattr(again, dial) == found
    assert again.calibration["promise"]["min_agreement"] == 0.8
    content = {"hyper_parameters": tiny_model().config(), "state_dict": model.state_dict()}
    torch.save(content, path)
    store_in_checkpoint(path, model)
    assert getattr(DACT.load_from_checkpoint(path), dial) == found
    with pytest.raises(ValueError, match="cannot be promised"):
        calibrate(again, [random_batch(800)], max_layers=1.0001, dial=dial)
    assert (again.calibration, getattr(again, dial)) == (model.calibration, found), "as before"


def test_a_fit_clears_promise_and_temperatures():
    model, batch = small_model(), [random_batch(300, vocab=42)]
    calibrate(model, batch, min_agreement=0.5)
    model.temperatures = [1.0, 2.0, 3.0]
    trainer = pl.Trainer(max_epochs=1, accelerator="cpu", logger=False, enable_checkpointing=False)
    trainer.fit(model, torch.utils.data.DataLoader(batch, batch_size=None))
    assert (model.calibration, model.temperatures) == (None, None)


def test_a_promise_ends_with_the_weights_that_it_was_made_for(tmp_path):
    model, other = tiny_model(share_submodels=True), tiny_model(share_submodels=True)
    found = calibrate(model, [random_batch(300)], min_agreement=0.5)
    model.save_pretrained(tmp_path)
    assert DACT.from_pretrained(tmp_path).halting_margin == found.halting_margin < 1
    fewer = DACT.from_pretrained(tmp_path, num_layers=2)
    assert fewer.calibration is None, "its full depth is another one"
    model.on_load_checkpoint({"state_dict": other.state_dict(), "dact": other.config()})
    assert model.calibration is None


@given(
    rule=st.sampled_from(["exact", "paper"]),
    seed=st.integers(0, 1000),
    layers=st.integers(1, 6),
    classes=st.integers(2, 5),
    other=st.sampled_from([0.0, 0.4]),
)
@settings(max_examples=40)
def test_all_settings_at_once_leave_where_each_alone_does(rule, seed, layers, classes, other):
    answers = synthetic(60, torch.Generator().manual_seed(seed), layers, classes, quality=30.0)
    for dial, neutral in (
        ("halting_margin", Halting(rule, tolerance=other)),
        ("halting_tolerance", Halting(rule, margin=1 - other)),
    ):
        exits = exits_by_setting(answers, neutral, dial)
        for setting in SETTINGS[dial][::5]:
            expected = answers.exit_layers(neutral.with_dial(dial, setting))
            assert torch.equal(exits(setting), expected)


@pytest.mark.parametrize(
    ("promise", "needed"), [({"max_accuracy_loss": 0.005}, 600), ({"min_agreement": 0.99}, 299)]
)
def test_a_promise_says_how_many_examples_it_takes(promise, needed):
    assert Promise(**promise).examples_needed() == needed
    said = rf"takes {needed} examples or more, .* got {needed - 1}: give more, .*estimate"
    with pytest.raises(ValueError, match=said):
        choose_setting(synthetic(needed - 1, torch.Generator()), Promise(**promise))
    target = torch.zeros(needed, dtype=torch.long)
    y = torch.tensor([0.9, 0.1]).repeat(needed, 3, 1)
    sure = LayerAnswers(*functional.accumulate(y, torch.ones(needed, 3)), y, target)
    # Where no example is lost, so many are enough.
    assert choose_setting(sure, Promise(**promise)).mean_exit_layer == 1
    estimate = Promise(**promise, confidence=None)
    assert choose_setting(sure, estimate).mean_exit_layer == 1
    few = choose_setting(sure.take(torch.arange(50)), estimate)
    assert few.estimate and few.halting_margin == 1, "50 without a fault are no evidence"


# A loss of 0.02 is that of accuracies from 280 examples on.
@pytest.mark.parametrize("examples", [250, 400])
def test_an_estimate_keeps_one_standard_error_to_spare(examples):
    answers = synthetic(examples, torch.Generator().manual_seed(3))
    promise = Promise(max_accuracy_loss=0.02, confidence=None)
    found = choose_setting(answers, promise)
    assert found.estimate
    assert found.promise["confidence"] is None

    def loss(margin):
        exits = answers.exit_layers(Halting(margin=margin))
        early = functional.answer_at(answers.a, exits).argmax(1)
        full = answers.a[:, -1].argmax(1)
        lost = (full == answers.target).double() - (early == answers.target).double()
        # Luck with a few gains would hide what is lost.
        lost = lost.clip(min=0) if examples < 280 else lost
        one_more_of_each = torch.cat([lost, torch.tensor([1.0, -1.0])])
        return lost.mean().item() + one_more_of_each.std().item() / (examples + 2) ** 0.5

    margins = SETTINGS["halting_margin"]
    assert found.bound == pytest.approx(loss(found.halting_margin))
    assert found.bound <= 0.02 < loss(margins[margins.index(found.halting_margin) + 1])
    guaranteed = choose_setting(answers, Promise(max_accuracy_loss=0.02))
    assert found.mean_exit_layer < guaranteed.mean_exit_layer
    assert "is an estimate for max_accuracy_loss=0.02" in describe(vars(found), 5)
    agreed = choose_setting(answers, Promise(min_agreement=0.9, confidence=None))
    assert 0.9 <= agreed.bound < agreed.agreement
    layers = choose_setting(answers, Promise(max_layers=3.0, confidence=None))
    assert layers.mean_exit_layer < layers.bound <= 3


def test_a_promise_can_be_made_against_a_baseline():
    generator = torch.Generator().manual_seed(5)
    answers = synthetic(3000, generator)
    changed = torch.rand(3000, generator=generator) < 0.04
    baseline = torch.where(changed, answers.target, answers.classes[:, -1])  # the better reference
    found = choose_setting(answers, Promise(max_accuracy_loss=0.05), baseline=baseline)
    own = choose_setting(answers, Promise(max_accuracy_loss=0.05))
    accuracy = (baseline == answers.target).double().mean().item()
    assert found.baseline_accuracy == accuracy > found.full_depth_accuracy
    assert found.baseline_accuracy - found.accuracy < found.bound <= 0.05
    assert found.mean_exit_layer > own.mean_exit_layer
    assert "points of accuracy below the whole encoder" in describe(vars(found), 5)
    lost = Promise(max_accuracy_loss=accuracy - found.full_depth_accuracy + 0.001)
    with pytest.raises(ValueError, match="at halting_margin 1 it is .* Promise that, give more"):
        choose_setting(answers, lost, baseline=baseline)
    with pytest.raises(ValueError, match="one class per example, 3000 in all"):
        choose_setting(answers, lost, baseline=baseline[:2])
    with pytest.raises(ValueError, match="a baseline goes with max_accuracy_loss"):
        choose_setting(answers, Promise(max_layers=2), baseline=baseline)


def test_early_exit_is_measured_as_each_metric_is_defined():
    answers = synthetic(500, torch.Generator().manual_seed(0))
    exits = answers.exit_layers(Halting(margin=0.5))
    measured, target = Measured(answers, exits), answers.target
    early = functional.answer_at(answers.a, exits).argmax(1)
    full, right = answers.classes[:, -1], early == target
    assert measured.accuracy == right.double().mean().item()
    assert measured.agreement == (early == full).double().mean().item()
    assert measured.mean_exit_layer == exits.double().mean().item()
    assert measured.exit_histogram == torch.bincount(exits, minlength=6)[1:].tolist()
    assert measured.majority_share == early.bincount().max().item() / 500
    assert measured.macro_f1 == pytest.approx(f1_score(target, early, average="macro"))
    difference = right.double() - (full == target).double()
    expected = difference.mean().item(), difference.std().item() / 500**0.5
    assert measured.difference(full == target) == expected


class OwnData(pl.LightningDataModule):
    def val_dataloader(self):
        return [random_batch(400)]


class SetAsideData(OwnData):
    def calibration_dataloader(self):
        return [random_batch(400, seed=1)]


def test_examples_that_chose_the_checkpoint_are_named():
    for data, chose in ((OwnData(), True), (SetAsideData(), False), ([random_batch(400)], 0)):
        model = tiny_model().train()
        found = calibrate(model, data, min_agreement=0.9)
        assert ("these examples chose epoch" in describe(vars(found), 4)) == chose
        assert model.training, "the mode of the model stays as it is"


def small_model(**overrides):
    return DACT(encoder=TransformerEncoder(42, 3, 16, 2), **{"learning_rate": 3e-3, **overrides})


@pytest.mark.slow
def test_the_engine_calibrates_on_examples_that_are_set_aside(tmp_path):
    engine = TuningEngine(
        model=small_model,
        data=partial(CompositionalSentiment, num_train=100, num_val=400, num_test=60, max_depth=2),
        trainer={"max_epochs": 1, "accelerator": "cpu"},
        n_trials=0,
        promise=Promise(min_agreement=0.9),
        compare_defaults=False,
        search_space={"num_epochs": {"choices": [1]}},
        log_dir=tmp_path,
    )
    metrics_path, model_path = engine.run_pipeline("run")
    metrics = json.loads(Path(metrics_path).read_text())
    found = metrics["calibration"]
    assert (sum(metrics["validation"]["exit_histogram"]), found["examples"]) == (200, 200)
    assert found["bound"] >= 0.9
    classifier = TextClassifier.from_pretrained(tmp_path / "run" / "final" / "model")
    for model in (DACT.load_from_checkpoint(model_path), classifier.model):
        assert model.halting_margin == found["halting_margin"]


def test_a_promise_holds_for_the_rule_that_it_was_made_for(tmp_path):
    model = tiny_model()
    calibrate(model, [random_batch(800)], min_agreement=0.8)
    model.save_pretrained(tmp_path / "model")
    assert "with confidence 0.95" in (tmp_path / "model" / "README.md").read_text()
    for name, value in (("halting_margin", 0.0), ("halting_tolerance", 0.5), ("halting", "paper")):
        assert DACT.from_pretrained(tmp_path / "model", **{name: value}).calibration is None
        other = DACT.from_pretrained(tmp_path / "model")
        assert other.calibration == model.calibration
        setattr(other, name, value)
        assert other.calibration is None
    other.save_pretrained(tmp_path / "turned")
    assert "with confidence 0.95" not in (tmp_path / "turned" / "README.md").read_text()
    assert DACT.from_pretrained(tmp_path / "turned").calibration is None


def test_a_promise_ends_with_the_first_training_step():
    model = tiny_model()
    calibrate(model, [random_batch(800)], min_agreement=0.8)
    with torch.no_grad():
        model.loss(random_batch(4))
    assert model.calibration is not None
    model.loss(random_batch(4))
    assert model.calibration is None


def settled(model, answers):
    """Settle a model as if it had given these answers."""
    module = sys.modules[settle.__module__]
    with patch.object(module, "layer_answers", return_value=answers):
        return settle(model, [])


def test_few_examples_settle_the_margin_at_which_none_changes_its_class():
    answers, model = synthetic(50, torch.Generator().manual_seed(4)), tiny_model(layers=5)
    text, kept = settled(model, answers), 0.05 ** (1 / 50)
    assert "none of 50 gets another class" in text
    assert f"with 95% confidence at most {100 * (1 - kept):.2g} % of new ones" in text
    assert 0 <= kept - model.calibration["promise"]["min_agreement"] < 1e-4, "rounded down"
    assert model.calibration["agreement"] == 1
    assert model.halting_margin == model.calibration["halting_margin"] < 1
    margins = SETTINGS["halting_margin"]
    following = margins[margins.index(model.halting_margin) + 1]
    assert Measured(answers, answers.exit_layers(Halting(margin=following))).agreement < 1


def test_what_few_examples_settle_holds_as_often_as_it_says():
    generator = torch.Generator().manual_seed(7)
    population, model = synthetic(20_000, generator), tiny_model(layers=5)
    broken = 0
    for _ in range(200):
        rows = torch.randint(20_000, (50,), generator=generator)
        settled(model, population.take(rows))
        broken += truth(population, model.exit_rule)[1] < 0.05 ** (1 / 50)
    assert broken <= 19, "a twentieth of 200, and three standard deviations"


def test_enough_examples_settle_the_default_promise():
    model, same = tiny_model(), tiny_model()
    same.load_state_dict(model.state_dict())
    text = settle(model, SetAsideData())
    found = calibrate(same, SetAsideData(), max_accuracy_loss=0.01)
    assert text == describe(vars(found), 4)
    assert model.calibration == same.calibration


@pytest.mark.parametrize(
    ("changes", "data", "why"),
    [
        ({"halting": "never"}, [random_batch(400)], "halting='never' has no dial"),
        ({}, [random_batch(28)], "28 examples are set aside, and a guarantee takes 29"),
        ({"halting_tolerance": 0.2}, [random_batch(400)], "the model has halting_tolerance=0.2"),
        ({}, OwnData(), "no examples are set aside: set the data's calibration_fraction"),
    ],
)
def test_a_model_that_cannot_be_settled_stays_as_it_is(changes, data, why):
    model = tiny_model(**changes)
    before = model.exit_rule
    text = settle(model, data)
    assert text.startswith("halting_margin stays 1: ")
    assert why in text
    assert (model.exit_rule, model.calibration) == (before, None)


@pytest.mark.parametrize(
    ("promised", "reference", "margin", "by_estimate", "tolerance", "bound", "layers"),
    [
        ({"max_accuracy_loss": 0.03}, False, 0.67, 0.64, 0.23, 0.029605827, 2125),
        ({"max_accuracy_loss": 0.06}, True, 0.57, 0.55, 0.38, 0.059984182, 1928),
        ({"min_agreement": 0.95}, False, 0.58, 0.56, 0.35, 0.951276547, 1949),
        ({"max_layers": 2.5}, False, 0.67, 0.71, 0.4, 2.496773602, 2125),
    ],
)
def test_the_choice_on_known_answers_stays_what_it_was(
    promised, reference, margin, by_estimate, tolerance, bound, layers
):
    answers = synthetic(900, torch.Generator().manual_seed(8))
    better = torch.where(torch.arange(900) % 30 == 0, answers.target, answers.classes[:, -1])
    choose = partial(choose_setting, answers, baseline=better if reference else None)
    found = choose(Promise(**promised))
    assert (found.halting_margin, found.bound) == (margin, pytest.approx(bound, abs=1e-8))
    assert round(900 * found.mean_exit_layer) == layers
    assert choose(Promise(**promised, confidence=None)).halting_margin == by_estimate
    turned = choose(Promise(**promised, dial="halting_tolerance"))
    assert turned.halting_tolerance == tolerance


@pytest.mark.slow
def test_a_baseline_promise_is_kept_as_often_as_it_says():
    generator = torch.Generator().manual_seed(6)
    population = synthetic(20_000, generator)
    other = synthetic(20_000, generator, quality=4.2, target=population.target).classes[:, -1]
    promise = Promise(max_accuracy_loss=0.04, confidence=0.9)
    broken, given = 0, 0
    for _ in range(100):
        rows = torch.randint(20_000, (1000,), generator=generator)
        try:
            found = choose_setting(population.take(rows), promise, baseline=other[rows])
        except ValueError:
            continue  # none can be given
        given += 1
        broken += truth(population, found.exit_rule, other)[0] > 0.04
    assert broken <= 19, "a tenth of 100, and three standard deviations"
    assert given > 25
