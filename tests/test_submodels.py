import copy

import pytest
import torch

from dact.submodels import SubmodelConfig, Submodels, start_undecided


@pytest.mark.parametrize(
    ("strategy", "widths"),
    [
        ("constant", [64, 64, 64, 64]),
        ("pyramidal", [64, 32, 16, 8]),
        ("inverted_pyramidal", [8, 16, 32, 64]),
        ("bow_tie", [64, 32, 16, 32, 64]),
        ("bow_tie", [64, 32, 32, 64]),
    ],
)
def test_widths_follow_the_strategy(strategy, widths):
    config = SubmodelConfig(len(widths), hidden_units=64, layer_strategy=strategy)
    assert config.hidden_widths() == widths
    linear = [module for module in config.build(10, 3) if isinstance(module, torch.nn.Linear)]
    assert [module.out_features for module in linear] == [*widths, 3]
    assert linear[0].in_features == 10


def test_widths_never_reach_zero():
    narrow = SubmodelConfig(num_layers=8, hidden_units=4, layer_strategy="pyramidal")
    assert min(narrow.hidden_widths()) == 1
    assert SubmodelConfig(num_layers=0).hidden_widths() == []


def test_batch_normalization_takes_a_batch_of_one_and_keeps_its_statistics():
    model = Submodels(SubmodelConfig(normalization="batch"), 2, hidden_size=6, output_size=3)
    model(torch.randn(16, 2, 6))
    before = model[1].running_mean.clone()
    assert torch.isfinite(model(torch.randn(1, 2, 6))).all()
    assert torch.equal(model[1].running_mean, before)
    model(torch.randn(2, 2, 6))
    assert not torch.equal(model[1].running_mean, before)


@pytest.mark.parametrize(("layers", "share"), [(1, False), (2, True), (6, False), (24, True)])
def test_the_confidence_starts_undecided_whatever_the_depth(layers, share):
    confidence = Submodels(SubmodelConfig(dropout=0), layers, 8, 1, share=share)
    start_undecided(confidence)
    p = confidence(100 * torch.randn(5, layers, 8)).squeeze(-1).sigmoid().cumprod(dim=1)
    if layers > 1:
        torch.testing.assert_close(p[:, layers - 2], torch.full((5,), 0.5))


@pytest.mark.parametrize(
    ("normalization", "activation", "depth"),
    [("none", "relu", 0), ("batch", "leaky_relu", 1), ("layer", "gelu", 3), ("none", "tanh", 1)],
)
def test_in_training_all_layers_learn_as_if_each_were_called_alone(
    normalization, activation, depth
):
    config = SubmodelConfig(depth, 8, 0.0, normalization, activation, "inverted_pyramidal")
    submodels = Submodels(config, num_layers=4, hidden_size=6, output_size=3).double()
    with torch.no_grad():
        for parameter in submodels.parameters():
            parameter.normal_()  # also where all layers start alike
    alone = copy.deepcopy(submodels)
    states, direction = torch.randn(5, 4, 6).double(), torch.randn(5, 4, 3).double()
    expected = torch.stack([alone.answer(n, states[:, n - 1]) for n in range(1, 5)], dim=1)
    (direction * expected).sum().backward()
    got = submodels(states)
    (direction * got).sum().backward()
    torch.testing.assert_close(got, expected)
    for (name, ours), theirs in zip(submodels.named_parameters(), alone.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad, msg=name)


def test_each_layer_draws_dropout_masks_of_its_own():
    submodels = Submodels(SubmodelConfig(dropout=0.5), num_layers=3, hidden_size=6, output_size=2)
    for parameter in submodels.parameters():
        parameter.data.copy_(parameter[:1].detach().expand_as(parameter))
    for mode, different in ((True, 12), (False, 1)):
        answers = submodels.train(mode)(torch.ones(4, 3, 6)).flatten(0, 1)
        assert len({tuple(answer.tolist()) for answer in answers}) == different


@pytest.mark.parametrize(
    ("arguments", "kind", "message"),
    [
        ({"num_layers": -1}, ValueError, "num_layers must be 0 or more, got -1"),
        ({"num_layers": 1.5}, TypeError, "num_layers must be an integer, got 1.5"),
        ({"dropout": 1.0}, ValueError, r"dropout must be in \[0, 1\), got 1.0"),
        ({"normalization": "group"}, ValueError, "'none', 'batch', 'layer', got 'group'"),
    ],
)
def test_wrong_architectures_are_refused(arguments, kind, message):
    with pytest.raises(kind, match=message):
        SubmodelConfig(**arguments)
