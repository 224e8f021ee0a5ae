"""Two passes of one batch must agree: the divergence, the loss of a step, and where the engine asks
for it."""

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given

from dact import DACT, SubmodelConfig
from dact.encoders import TransformerEncoder
from dact.functional import divergence
from tests import references
from tests.conftest import random_batch
from tests.test_confirmation import engine

numbers = st.floats(-20, 20, width=32)
logits = st.lists(
    st.lists(st.tuples(numbers, numbers, numbers), min_size=2, max_size=2), min_size=3, max_size=3
)


@given(logits, logits)
def test_the_divergence_is_that_of_its_formula(first, second):
    p, q = torch.tensor(first), torch.tensor(second)
    rows = (one.double().softmax(-1).flatten(0, 1).tolist() for one in (p, q))
    expected = [references.symmetric_divergence(*pair) for pair in zip(*rows, strict=True)]
    mean = sum(expected) / len(expected)
    assert divergence(p, q).item() == pytest.approx(mean, rel=1e-4, abs=1e-5)
    assert divergence(p, q) == divergence(q, p)
    assert divergence(p, p) == 0


def noisy_model(**settings):
    config, encoder = SubmodelConfig(dropout=0.3), TransformerEncoder(50, 3, 8, 2, dropout=0.2)
    submodels = {"classifier": config, "confidence": config}
    return DACT(encoder=encoder, **submodels, lambda_warmup=0.0, **settings)


@pytest.mark.parametrize("detached", [False, True])
def test_a_step_has_the_mean_loss_of_both_passes_and_what_they_differ_by(detached):
    batch = random_batch(12)
    settings = {"exit_loss_weight": 0.4, "lambda_reg": 0.1, "detach_exits": detached}
    twice, once = noisy_model(consistency=2.0, **settings).train(), noisy_model(**settings).train()
    once.load_state_dict(twice.state_dict())
    seen, submodels, passes = [], twice._submodels, []
    twice._submodels = lambda batch: seen.append(submodels(batch)) or seen[-1]
    found = twice.loss(batch)
    logits, y, h = (part.chunk(2) for part in seen[0])
    for both in zip(logits, y, h, strict=True):
        once._submodels = lambda _, both=both: both
        passes.append(once.loss(batch))
    apart = divergence(*logits)
    assert apart > 0.001
    more = {"task_loss": 0, "ponder_cost": 0, "exit_loss": 2.0 * apart, "loss": 0.4 * 2.0 * apart}
    for name, added in more.items():
        mean = sum(getattr(one, name) for one in passes) / 2
        torch.testing.assert_close(getattr(found, name), mean + added)


def test_only_training_of_the_encoder_takes_two_passes():
    model = noisy_model(consistency=2.0)
    batch, rows = {**random_batch(12), "scale": torch.tensor(2.0), "ids": ["a"] * 12}, []
    model.classifier.register_forward_hook(lambda _, given, __: rows.append(len(given[0])))
    states = {"labels": batch["labels"], "states": model.encoder(batch).detach()}
    for mode, given_batch, expected in ((False, batch, 12), (True, states, 12), (True, batch, 24)):
        rows.clear()
        model.train(mode).loss(given_batch)
        assert rows == [expected]


def test_without_dropout_the_second_pass_changes_nothing():
    config, encoder = SubmodelConfig(dropout=0.0), TransformerEncoder(50, 3, 8, 2, dropout=0.0)
    settings = {"consistency": 2.0, "distillation": 0.5, "class_weights": [0.5, 1.0, 2.0]}
    model = DACT(encoder=encoder, classifier=config, confidence=config, **settings)
    batch = {**random_batch(12), "teacher": torch.rand(12, 3).softmax(1)}
    batch["labels"][-1] = -100
    once, both = (model.train(mode).loss(batch, 0.1).loss for mode in (False, True))
    torch.testing.assert_close(both, once)


@pytest.mark.slow
def test_the_fits_after_the_studies_ask_for_it(tmp_path):
    seen = set()

    def model(**settings):
        seen.add(settings.get("consistency", 0.0))
        encoder = TransformerEncoder(42, 3, 8, 2, dropout=0.1)
        return DACT(encoder, **{"learning_rate": 3e-3, **settings})

    engine(tmp_path, model=model, n_trials=1).run_pipeline("run")
    assert DACT.from_pretrained(tmp_path / "run/final/model").consistency == 5
    assert DACT.from_pretrained(tmp_path / "run/whole_encoder/model").consistency == 0
    assert seen == {0.0, 5.0}, "trials take one pass"


@pytest.mark.parametrize(
    ("dropout", "asked", "given"),
    [(0.2, None, {"consistency": 5.0}), (0.0, None, {}), (0.2, 0.0, {"consistency": 0.0})],
)
def test_it_is_asked_for_where_there_is_dropout_unless_a_weight_is_given(
    tmp_path, dropout, asked, given
):
    recipe = engine(tmp_path, consistency=asked).recipe
    encoder = TransformerEncoder(50, 3, 8, 2, dropout=dropout)
    assert recipe.finetuning(DACT(encoder)) == given
