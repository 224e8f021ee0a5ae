"""Several labels per text: the rule and its proof, losses, metrics, and a model of them."""

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings
from torchmetrics.functional.classification import (
    multilabel_exact_match,
    multilabel_f1_score,
    multilabel_hamming_distance,
)

from dact import functional
from dact.functional import Halting
from dact.metrics import count_classes, macro_f1
from dact.tasks import MULTICLASS, MULTILABEL, Multilabel
from tests import references


@st.composite
def label_outputs(draw, batch=4):
    """y [batch, layers, labels], h [batch, layers], from flat to saturated, and thresholds."""
    layers, labels = draw(st.integers(1, 12)), draw(st.integers(1, 6))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    sharpness = draw(st.sampled_from([1e-6, 0.1, 1.0, 10.0, 100.0]))
    y = (sharpness * torch.randn(batch, layers, labels, generator=generator)).sigmoid()
    shift = draw(st.sampled_from([-6.0, -2.0, 0.0, 3.0, 30.0]))
    h = (torch.randn(batch, layers, generator=generator) + shift).sigmoid()
    thresholds = (0.02 + 0.96 * torch.rand(labels, generator=generator)).tolist()
    return y, h, draw(st.sampled_from([None, tuple(thresholds)]))


@given(label_outputs(), st.sampled_from(["exact", "paper"]), st.sampled_from([0.0, 0.1, 0.5]))
def test_labels_leave_where_their_naive_twin_does(outputs, rule, tolerance):
    y, h, thresholds = outputs
    a, p = functional.accumulate(y, h)
    exits = Halting(rule, tolerance).exit_layers(a, p, y, Multilabel(thresholds))
    limits, layers = thresholds or [0.5] * y.shape[2], p.shape[1]
    for row in range(len(a)):
        pairs = list(zip(a[row].tolist(), p[row].tolist(), strict=True))
        margins = [
            float(references.label_margin(*pair, layers - n, limits, rule))
            for n, pair in enumerate(pairs[:-1], 1)
        ]
        if any(abs(margin + tolerance) < 1e-4 for margin in margins):
            continue  # within the slack the rule waits
        early = [n for n, margin in enumerate(margins, 1) if margin > -tolerance]
        assert exits[row] == (early or [layers])[0]


@settings(max_examples=200)
@given(label_outputs(), st.sampled_from(["exact", "paper"]), st.sampled_from([0.0, 0.2]))
def test_no_label_of_a_set_changes_beyond_the_tolerance(outputs, rule, tolerance):
    y, h, thresholds = outputs
    task, (a, p) = Multilabel(thresholds), functional.accumulate(y, h)
    exits = Halting(rule, tolerance).exit_layers(a, p, y, task)
    returned = task.decide(functional.answer_at(a, exits))
    final, limits = a[:, -1].double(), torch.tensor(thresholds or [0.5] * y.shape[2]).double()
    behind = torch.where(returned, limits - final, final - limits)
    assert behind.max() <= tolerance + 1e-6
    if tolerance == 0:
        assert task.same(returned, task.decide(a[:, -1])).all()


@given(label_outputs(), st.integers(0, 10), st.booleans())
def test_the_bounds_of_labels_hold_for_every_continuation(outputs, d, towards):
    """All remaining layers say one thing with full confidence: the farthest that a label can go."""
    y, h, thresholds = outputs
    task, (a, p) = Multilabel(thresholds), functional.accumulate(y, h)
    a_n, p_n = a[:, 0], p[:, 0]
    halts = functional.can_halt(a_n, p_n, d, task=task, num_layers=d + 1)
    final, share = a_n.double(), p_n.double().unsqueeze(-1)
    for _ in range(d):
        final = share * float(towards) + (1 - share) * final
    same = task.same(task.decide(a_n), task.decide(final.float()))
    assert same[halts].all()


@given(label_outputs())
def test_the_margin_counts_the_label_that_is_nearest_to_its_threshold(outputs):
    y, _, thresholds = outputs
    leads = Multilabel(thresholds).lead(y)
    assert ((leads >= 0) & (leads <= 1)).all()
    for row in range(len(y)):
        expected = references.label_lead(y[row, 0].tolist(), thresholds or [0.5] * y.shape[2])
        assert leads[row, 0].item() == pytest.approx(expected, abs=1e-5)


def test_one_label_is_two_classes():
    """The sigmoid of x is the softmax of x and 0: losses and answers are the same."""
    generator = torch.Generator().manual_seed(0)
    x = 3 * torch.randn(20, 5, 1, generator=generator, dtype=torch.double)
    labels = torch.arange(20) % 2
    pairs = torch.cat([x, torch.zeros_like(x)], dim=-1)
    y, two = MULTILABEL.answers(x), MULTICLASS.answers(pairs)
    torch.testing.assert_close(y, two[..., :1])
    target = MULTILABEL.targets(labels.unsqueeze(1), 1)
    assert torch.equal(target, MULTICLASS.targets(1 - labels, 2))
    loss = functional.exit_loss(x, target, task=MULTILABEL).item()
    assert loss == pytest.approx(functional.exit_loss(pairs, 1 - labels).item())
    apart = functional.divergence(x, x.roll(1, 0), MULTILABEL).item()
    assert apart == pytest.approx(functional.divergence(pairs, pairs.roll(1, 0)).item())
    torch.testing.assert_close(MULTILABEL.hardest(y), two.sort(descending=True).values)
    torch.testing.assert_close(MULTILABEL.lead(y), MULTICLASS.lead(two))


def test_the_loss_leaves_unknown_labels_out_and_is_finite_where_answers_saturate():
    logits = torch.tensor([[2.0, -1.0], [0.5, 3.0], [1.0, 1.0]], requires_grad=True)
    labels, weights = torch.tensor([[1, 0], [0, -100], [-100, -100]]), torch.tensor([2.0, 3.0])
    target = MULTILABEL.targets(labels, 2)
    likelihoods = MULTILABEL.likelihoods(logits)
    loss = functional.task_loss(likelihoods, target, MULTILABEL.weights(weights))
    rows = logits.sigmoid().tolist()
    expected = references.label_loss(rows, labels.tolist(), weights.tolist())
    assert loss.item() == pytest.approx(expected, rel=1e-5)
    # as sure as float32 can be, and wrong: there is still a gradient
    wrong = torch.tensor([[40.0]], requires_grad=True)
    functional.task_loss(MULTILABEL.likelihoods(wrong), torch.tensor([[0.0, 1.0]])).backward()
    assert wrong.grad.item() == pytest.approx(1)


def test_a_teacher_labels_what_is_unknown():
    teacher = torch.tensor([[0.25, 0.5], [0.75, 1.0]])
    target = MULTILABEL.targets(torch.tensor([[1, 0], [-100, 1]]), 2, teacher, share=0.5)
    present = torch.tensor([[0.625, 0.25], [0.75, 1.0]])
    torch.testing.assert_close(target, torch.cat([present, 1 - present], dim=1))


@pytest.mark.parametrize(
    ("task", "labels", "said"),
    [
        (MULTILABEL, [0, 1, 2], "multiclass"),
        (MULTILABEL, [[0, 1, 2]], "0 or 1"),
        (MULTICLASS, [[0, 1, 1]], "multilabel"),
    ],
)
def test_labels_of_the_other_task_are_an_error_of_one_line(task, labels, said):
    with pytest.raises(ValueError, match=said) as error:
        task.targets(torch.tensor(labels), 3)
    assert "\n" not in str(error.value)


def test_metrics_of_sets_are_those_of_torchmetrics():
    generator = torch.Generator().manual_seed(1)
    a, labels = torch.rand(200, 4, generator=generator), torch.arange(800).view(200, 4) % 3 // 2
    decided = MULTILABEL.decide(a)
    counts = count_classes(MULTILABEL, decided, labels, 4)
    scores = MULTILABEL.set_scores(counts, 200)
    for average, found in (("macro", macro_f1(counts)), ("micro", scores["micro_f1"])):
        expected = multilabel_f1_score(a, labels, 4, average=average)
        assert found.item() == pytest.approx(expected.item())
    expected = multilabel_hamming_distance(a, labels, 4).item()
    assert scores["hamming_loss"].item() == pytest.approx(expected)
    right = MULTILABEL.same(decided, labels).float().mean().item()
    assert right == pytest.approx(multilabel_exact_match(a, labels, 4).item())
