import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings

from dact import functional
from tests import references

RULES = ("exact", "paper")


@st.composite
def layer_outputs(draw, max_batch=6):
    """y [batch, layers, classes] and h [batch, layers], from flat to saturated, near-ties
    included."""
    batch, layers = draw(st.integers(1, max_batch)), draw(st.integers(1, 24))
    classes = draw(st.integers(2, 20))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    sharpness = draw(st.sampled_from([1e-6, 0.1, 1.0, 10.0, 1000.0]))
    y = (sharpness * torch.randn(batch, layers, classes, generator=generator)).softmax(-1)
    shift = draw(st.sampled_from([-30.0, -6.0, -2.0, 0.0, 3.0, 30.0]))
    spread = draw(st.sampled_from([0.1, 1.0, 20.0]))
    h = (spread * torch.randn(batch, layers, generator=generator) + shift).sigmoid()
    if draw(st.booleans()):  # a near-tie of the first two classes
        y[..., :2] = y[..., :2].amax(-1, keepdim=True)
        y = y / y.sum(-1, keepdim=True)
    return y, h


@given(layer_outputs())
def test_accumulate_equals_its_naive_twin(outputs):
    y, h = outputs
    a, p = functional.accumulate(y.double(), h.double())
    for row in range(len(y)):
        both = references.accumulate(y[row].double().tolist(), h[row].double().tolist())
        for found, expected in zip((a[row], p[row]), both, strict=True):
            torch.testing.assert_close(found, torch.tensor(expected, dtype=torch.double))


@given(layer_outputs(), st.sampled_from(RULES), st.sampled_from([0.0, 0.05, 0.3, 0.9]))
def test_exit_layers_equal_their_naive_twin_away_from_the_edge(outputs, rule, tolerance):
    a, p = functional.accumulate(*outputs)
    exits = functional.exit_layers(a, p, rule, tolerance)
    layers = p.shape[1]
    for row in range(len(a)):
        margins = [
            references.margin(a[row, n].tolist(), p[row, n].item(), layers - 1 - n, rule)
            for n in range(layers - 1)
        ]
        if any(abs(float(margin) + tolerance) < 1e-4 for margin in margins):
            continue  # within the slack the rule waits; the properties below cover that edge
        expected = references.exit_layer(a[row].tolist(), p[row].tolist(), rule, tolerance)
        assert exits[row] == expected


@settings(max_examples=200)
@given(
    layer_outputs(),
    layer_outputs(),
    st.sampled_from(RULES),
    st.sampled_from([0.0, 0.01, 0.2, 0.7]),
    st.booleans(),
)
def test_whatever_follows_the_class_stays_within_the_tolerance(
    outputs, others, rule, tolerance, adversarial
):
    """After the exit, replace what the remaining layers say: by random outputs, or by the worst
    case."""
    y, h = outputs
    a, p = functional.accumulate(y, h)
    exits = functional.exit_layers(a, p, rule, tolerance)
    other_y, other_h = others
    for row, n in enumerate(exits.tolist()):
        continued_y, continued_h = y[row].clone(), h[row].clone()
        answer = a[row, n - 1]
        for k in range(n, y.shape[1]):
            if adversarial:
                runner_up = answer.topk(2).indices[1]
                continued_y[k] = torch.nn.functional.one_hot(runner_up, y.shape[2]).float()
                continued_h[k] = 1.0
                continue
            at = k % len(other_y), k % other_y.shape[1]
            continued_h[k] = other_h[at]
            pick = other_y[at][: y.shape[2]]
            if len(pick) == y.shape[2]:
                continued_y[k] = pick / pick.sum().clamp_min(1e-30)
        final = functional.accumulate(continued_y[None], continued_h[None])[0][0, -1]
        chosen = answer.argmax()
        if tolerance == 0:
            assert final.argmax() == chosen
        assert final.max() - final[chosen] <= tolerance + 1e-6


@given(layer_outputs(), st.sampled_from([0.0, 0.1, 0.5]))
def test_exact_never_exits_later_than_paper(outputs, tolerance):
    a, p = functional.accumulate(*outputs)
    exact = functional.exit_layers(a, p, "exact", tolerance)
    assert (exact <= functional.exit_layers(a, p, "paper", tolerance)).all()
    assert (functional.exit_layers(a, p, "never", tolerance) == p.shape[1]).all()


@given(layer_outputs(), st.sampled_from(RULES), st.floats(0, 0.99), st.floats(0, 0.99))
def test_fewer_layers_never_come_from_a_smaller_tolerance(outputs, rule, one, other):
    a, p = functional.accumulate(*outputs)
    low, high = sorted((one, other))
    fewer = functional.exit_layers(a, p, rule, high)
    assert (fewer <= functional.exit_layers(a, p, rule, low)).all()


def test_the_bounds_are_those_of_the_worst_case():
    """The exact rule is tight: the worst continuation reaches its bound."""
    a_n, p_n, d = [0.7, 0.2, 0.1], 0.15, 3
    final = references.worst_continuation(a_n, p_n, d)
    assert final[0] - final[1] == pytest.approx(float(references.margin(a_n, p_n, d, "exact")))


def test_a_tie_does_not_halt():
    a, p = torch.full((1, 3), 1 / 3), torch.zeros(1)
    assert not functional.can_halt(a, p, 1)
    assert functional.can_halt(a, p, 0)
    assert functional.can_halt(a, p, 1, tolerance=0.01)


@given(layer_outputs(), st.sampled_from(["p", "h"]))
def test_ponder_cost_equals_its_naive_twin(outputs, kind):
    y, h = outputs
    _, p = functional.accumulate(y, h)
    expected = references.ponder_cost(p.tolist(), h.tolist(), kind)
    assert functional.ponder_cost(p, h, kind).item() == pytest.approx(expected, rel=1e-4, abs=1e-6)


@given(layer_outputs(), st.booleans())
def test_task_loss_equals_its_naive_twin(outputs, weighted):
    y = outputs[0][:, 0].double().clamp_min(1e-20)
    target = torch.arange(len(y)) % y.shape[1]
    weights = torch.rand(y.shape[1], dtype=torch.double) if weighted else None
    expected = references.task_loss(
        y.tolist(), target.tolist(), weights.tolist() if weighted else None
    )
    assert functional.task_loss(y, target, weights).item() == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize("logit", [-200.0, 0.0, 200.0])
@pytest.mark.parametrize("spread", [0.0, 200.0])
@pytest.mark.parametrize("precision", [torch.float32, torch.float16])
def test_gradients_are_finite_at_saturation(logit, spread, precision):
    """h -> 0, h -> 1 and y -> one-hot, right or wrong, in float32 whatever the precision of the
    states."""
    logits = spread * torch.tensor([[[1.0, 0.0, -1.0]] * 4, [[-1.0, 0.0, 1.0]] * 4])
    logits.requires_grad_()
    confidence = torch.full((2, 4), logit, requires_grad=True)
    y = functional.at_least_float32(logits.to(precision)).softmax(-1)
    h = functional.at_least_float32(confidence.to(precision)).sigmoid()
    a, p = functional.accumulate(y, h)
    loss = functional.task_loss(a[:, -1], torch.tensor([0, 0])) + functional.ponder_cost(p, h)
    assert loss.dtype == torch.float32
    loss.backward()
    for found in (loss, logits.grad, confidence.grad):
        assert torch.isfinite(found).all()


Y, H = torch.full((2, 3, 4), 0.25), torch.full((2, 3), 0.5)
A, P = functional.accumulate(Y, H)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: functional.can_halt(A[:, 0], P[:, 0], 1, "soon"), "'never', got 'soon'"),
        (lambda: functional.exit_layers(A, P, tolerance=-0.1), "got -0.1"),
        (lambda: functional.exit_layers(A, P, margin=0.5), "a margin of 0.5 needs y"),
        (lambda: functional.ponder_cost(P, H, "x"), "got 'x'"),
    ],
)
def test_wrong_input_is_refused_with_what_came(call, message):
    with pytest.raises(ValueError, match=message):
        call()


@given(
    layers=st.integers(1, 5),
    classes=st.integers(2, 5),
    margin=st.sampled_from([0.0, 0.2, 0.5, 0.9, 1.0]),
    rule=st.sampled_from(["exact", "paper", "never"]),
    seed=st.integers(0, 1000),
    scale=st.sampled_from([0.0, 1.0, 50.0]),
)
def test_a_clear_lead_lets_examples_leave_sooner(layers, classes, margin, rule, seed, scale):
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(20, layers, classes, generator=generator, dtype=torch.float64) * scale
    y = logits.softmax(dim=2)
    h = torch.rand(20, layers, generator=generator, dtype=torch.float64)
    a, p = functional.accumulate(y, h)
    clear = [[references.is_clear(layer, margin) for layer in example] for example in y.tolist()]
    assert functional.is_clear(y, margin).tolist() == clear
    without = functional.exit_layers(a, p, rule)
    first = [row.index(True) + 1 if True in row and rule != "never" else layers for row in clear]
    expected = torch.minimum(without, torch.tensor(first))
    assert torch.equal(functional.exit_layers(a, p, rule, y=y, margin=margin), expected)


@given(layer_outputs())
def test_answers_are_probabilities_and_p_never_increases(outputs):
    a, p = functional.accumulate(*outputs)
    assert (a >= 0).all()
    torch.testing.assert_close(a.sum(-1), torch.ones(a.shape[:2]), atol=1e-5, rtol=0)
    assert (p[:, 1:] <= p[:, :-1]).all()
    assert ((p >= 0) & (p <= 1)).all()
