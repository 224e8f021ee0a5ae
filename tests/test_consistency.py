"""Two passes of one batch must agree: the divergence, the loss of a step, and where the engine asks
for it."""

from itertools import pairwise

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
    pairs = zip(
        p.double().softmax(-1).flatten(0, 1).tolist(),
        q.double().softmax(-1).flatten(0, 1).tolist(),
        strict=True,
    )
    expected = [references.symmetric_divergence(*pair) for pair in pairs]
    assert divergence(p, q).item() == pytest.approx(
        sum(expected) / len(expected), rel=1e-4, abs=1e-5
    )
    assert divergence(p, q) == divergence(q, p)
    assert divergence(p, p) == 0


def noisy_model(**settings):
    config = SubmodelConfig(dropout=0.3)
    encoder = TransformerEncoder(50, 3, 8, 2, dropout=0.2)
    return DACT(
        encoder=encoder, classifier=config, confidence=config, lambda_warmup=0.0, **settings
    )


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
    torch.testing.assert_close(found.task_loss, sum(one.task_loss for one in passes) / 2)
    torch.testing.assert_close(found.ponder_cost, sum(one.ponder_cost for one in passes) / 2)
    torch.testing.assert_close(
        found.exit_loss, sum(one.exit_loss for one in passes) / 2 + 2.0 * apart
    )
    torch.testing.assert_close(found.loss, sum(one.loss for one in passes) / 2 + 0.4 * 2.0 * apart)


def test_dropout_changes_the_answers_of_a_model_less_that_has_learned_to_agree():
    batch, apart = random_batch(32), {}
    for weight in (0.0, 5.0):
        torch.manual_seed(0)
        model = noisy_model(consistency=weight).train()
        optimizer = torch.optim.Adam(model.parameters(), 3e-3)
        for _ in range(300):
            optimizer.zero_grad()
            model.loss(batch).loss.backward()
            optimizer.step()
        answers = [model(batch).layer_probabilities.log() for _ in range(20)]
        apart[weight] = sum(divergence(*pair).item() for pair in pairwise(answers))
    assert apart[5.0] < apart[0.0] / 2


def test_only_training_of_the_encoder_takes_two_passes():
    model = noisy_model(consistency=2.0)
    batch, rows = {**random_batch(12), "scale": torch.tensor(2.0), "ids": ["a"] * 12}, []
    model.classifier.register_forward_hook(lambda _, given, __: rows.append(len(given[0])))
    states = {"labels": batch["labels"], "states": model.encoder(batch).detach()}
    for mode, given_batch, expected in ((False, batch, 12), (True, states, 12), (True, batch, 24)):
        rows.clear()
        model.train(mode).loss(given_batch)
        assert rows == [expected]


@pytest.mark.parametrize("size", [1, 3, 12])
def test_without_dropout_the_second_pass_changes_nothing(size):
    config, encoder = SubmodelConfig(dropout=0.0), TransformerEncoder(50, 3, 8, 2, dropout=0.0)
    settings = {"consistency": 2.0, "distillation": 0.5, "class_weights": [0.5, 1.0, 2.0]}
    model = DACT(encoder=encoder, classifier=config, confidence=config, **settings)
    batch = random_batch(size)
    batch = {**batch, "teacher": torch.rand(size, 3).softmax(1), "labels": batch["labels"].clone()}
    batch["labels"][-1] = -100
    once, both = (model.train(mode).loss(batch, 0.1).loss for mode in (False, True))
    torch.testing.assert_close(both, once)


def test_batch_normalization_never_takes_two_passes_of_one_example_for_two():
    config = SubmodelConfig(normalization="batch", dropout=0.3)
    encoder = TransformerEncoder(50, 3, 8, 2, dropout=0.2)
    model = DACT(encoder=encoder, classifier=config, confidence=config, consistency=2.0)
    norms = [part for part in model.classifier.modules() if hasattr(part, "running_var")]
    before = [norm.running_var.clone() for norm in norms]
    model.train().loss(random_batch(1))
    assert norms and all(map(torch.equal, before, (norm.running_var for norm in norms)))
    model.loss(random_batch(2))
    assert not any(map(torch.equal, before, (norm.running_var for norm in norms)))


def test_the_baseline_is_plain_fine_tuning():
    assert noisy_model(consistency=2.0).at_full_depth().consistency == 0


@pytest.mark.slow
@pytest.mark.parametrize(
    ("dropout", "asked", "expected"), [(0.1, None, 5.0), (0.0, None, 0.0), (0.1, 0.0, 0.0)]
)
def test_the_fits_after_the_studies_ask_for_it(tmp_path, dropout, asked, expected):
    seen = set()

    def model(**settings):
        encoder = TransformerEncoder(42, 3, 8, 2, dropout=dropout)
        seen.add(settings.get("consistency", 0.0))
        return DACT(**{"learning_rate": 3e-3, **settings, "encoder": encoder})

    engine(tmp_path, model=model, consistency=asked, n_trials=1).run_pipeline("run")
    assert DACT.from_pretrained(tmp_path / "run/final/model").consistency == expected
    assert DACT.from_pretrained(tmp_path / "run/whole_encoder/model").consistency == 0
    assert seen == {0.0, expected}, "trials take one pass"
