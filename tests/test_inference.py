"""The scheduler: full groups of similar length, bounded memory, and the answers of `forward`."""

import itertools
from unittest import mock

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings

from dact import DACT, functional, inference
from tests.conftest import random_batch, scatter_exits, tiny_model
from tests.test_encoders import ALL, encoder_of

# Closer to the halting rule's limit than this, float32 may leave a layer earlier or later.
CLOSE = 1e-4


def distances(model, batch):
    """How far each example's halting decisions stay from their limit, over all layers; [batch]."""
    full = model(batch)
    a, p = functional.accumulate(full.layer_probabilities, full.h)
    layers = a.shape[1]
    top = a.double().topk(2, dim=2).values
    remaining = torch.arange(layers - 1, -1, -1)
    lead = (1 - p.double()) ** remaining * (1 + top[..., 0] - top[..., 1]) - 1
    said = full.layer_probabilities.topk(2, dim=2).values
    clear = said[..., 0] - said[..., 1] - model.halting_margin
    distance = torch.minimum((lead + model.halting_tolerance).abs(), clear.abs())
    distance[:, -1] = 1.0  # the last layer decides nothing
    return full, distance.amin(dim=1)


def left_padded(batch):
    """The same examples with their padding on the left."""
    turned, mask = dict(batch), batch["attention_mask"]
    for name in ("input_ids", "attention_mask"):
        pairs = zip(batch[name], (mask == 0).sum(1).tolist(), strict=True)
        turned[name] = torch.stack([torch.roll(row, padding) for row, padding in pairs])
    return turned


@pytest.mark.slow
@settings(max_examples=60)
@given(
    layers=st.integers(1, 6),
    batch=st.integers(1, 60),
    classes=st.integers(2, 5),
    length=st.integers(1, 20),
    step=st.integers(1, 200),
    window=st.integers(1, 2000),
    bias=st.sampled_from([-20.0, 0.0, 0.0, 20.0]),
    tolerance=st.sampled_from([0.0, 0.0, 0.3]),
    lead=st.sampled_from([1.0, 1.0, 0.6, 0.2]),
    few_shapes=st.booleans(),
    seed=st.integers(0, 1000),
)
@torch.no_grad()
def test_answers_do_not_depend_on_steps_windows_or_order(
    layers, batch, classes, length, step, window, bias, tolerance, lead, few_shapes, seed
):
    torch.manual_seed(seed)
    model = tiny_model(
        layers=layers, output_dimension=classes, halting_tolerance=tolerance, halting_margin=lead
    )
    model.classifier[-1].weight.mul_(10)  # so that what an untrained model says lies apart
    model.step_tokens, model.window_tokens = step, window
    # All leave at layer 1 (h near 0), none leaves early (h near 1), or some do.
    model.confidence[-1].bias.fill_(bias)
    data = random_batch(batch, length, seed=seed)
    full, distance = distances(model, data)
    order = torch.randperm(batch)
    # but in float32, to compare
    with mock.patch.object(inference, "_prepares_shapes", return_value=few_shapes):
        early = model.early_exit({name: tensor[order] for name, tensor in data.items()})
    clear = distance[order] > CLOSE
    assert torch.equal(early.exit_layer[clear], full.exit_layer[order][clear])
    if bias < 0:
        assert (early.exit_layer[clear] == 1).all()
    if bias > 0 and tolerance == 0 and lead == 1:
        assert (early.exit_layer == layers).all()
    if tolerance == 0 and lead == 1:
        classes = full.probabilities.argmax(1)[order]
        assert torch.equal(early.probabilities.argmax(1)[clear], classes[clear])
    a, _ = functional.accumulate(full.layer_probabilities, full.h)
    expected = functional.answer_at(a, full.exit_layer)[order]
    torch.testing.assert_close(early.probabilities[clear], expected[clear], atol=1e-4, rtol=1e-3)


@pytest.mark.parametrize("few_shapes", [False, True])
@pytest.mark.parametrize("name", ALL)
@torch.no_grad()
def test_regrouping_serves_every_family(name, few_shapes, monkeypatch):
    monkeypatch.setattr(inference, "_prepares_shapes", lambda *_: few_shapes)
    model = scatter_exits(DACT(encoder=encoder_of(name), confidence_reads="state").eval())
    data = random_batch(40, 14, vocab=100)
    full, distance = distances(model, data)
    model.step_tokens, model.window_tokens = 60, 300
    early, recorded = model.early_exit(data), model.full_depth(data)
    for field in ("layer_probabilities", "h", "p"):
        one, other = getattr(recorded, field), getattr(full, field)
        torch.testing.assert_close(one, other, atol=1e-4, rtol=1e-3)
    clear = distance > CLOSE
    assert clear.sum() > 20
    assert torch.equal(early.exit_layer[clear], full.exit_layer[clear])
    assert len(set(full.exit_layer.tolist())) > 1, "examples of this test leave at different layers"


@pytest.mark.parametrize("name", ["built-in", "roberta", "mpnet", "modernbert"])
@torch.no_grad()
def test_left_padding_is_as_good_as_right_where_positions_are_counted_from_the_first_token(name):
    model, data = tiny_model(encoder=encoder_of(name)), random_batch(30, 14)
    # MPNet's padding id is fixed.
    data["input_ids"][data["attention_mask"] == 0] = int(name == "mpnet")
    model.step_tokens = 40
    right, left = model.early_exit(data), model.early_exit(left_padded(data))
    assert torch.equal(left.exit_layer, right.exit_layer)
    torch.testing.assert_close(left.probabilities, right.probabilities, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("name", ["bert", "electra", "distilbert", "albert", "deberta-v2"])
def test_left_padding_is_refused_where_positions_are_counted_from_the_first_column(name):
    model, data = tiny_model(encoder=encoder_of(name)), random_batch(30, 14)
    for call in (model, model.early_exit):
        call(data)
        with pytest.raises(ValueError, match="padded on the left.*pad on the right"):
            call(left_padded(data))


@pytest.mark.parametrize(("step", "window"), [(1, 1), (24, 100), (100, 10_000)])
@torch.no_grad()
def test_steps_and_windows_keep_their_bounds_and_stay_full(step, window):
    model, data = tiny_model(layers=4), random_batch(100, 12)
    model.step_tokens, model.window_tokens = step, window
    embedded, entered = [], []
    embed = model.encoder.embed
    model.encoder.embed = lambda batch: embedded.append(batch["input_ids"].shape) or embed(batch)
    for number, module in enumerate(model.encoder.layers, 1):
        module.register_forward_hook(
            lambda m, inputs, output, number=number: entered.append((number, inputs[0].shape))
        )
    exits = model.early_exit(data).exit_layer
    assert all(shape[0] == 1 or shape[0] * shape[1] <= step for _, shape in entered)
    assert all(rows == 1 or rows * length <= step for rows, length in embedded)
    held, last = 0, None
    for number, shape in entered:  # what goes through layer 1 between two windows is held together
        held = shape[0] * shape[1] + (held if number == last == 1 else 0)
        last = number
        if number == 1:
            assert held <= window or shape[0] == 1
    for layer in range(1, 5):
        shapes = [shape for number, shape in entered if number == layer]
        assert sum(shape[0] for shape in shapes) == int((exits >= layer).sum())
    if window == 10_000:  # one window: no two neighbours that one step would hold
        deepest = [shape for number, shape in entered if number == 3]
        for one, other in itertools.pairwise(deepest):
            assert (one[0] + other[0]) * max(one[1], other[1]) > step
