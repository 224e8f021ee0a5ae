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
        ("bow_tie", [64, 32, 32, 64]),
    ],
)
def test_widths_follow_the_strategy(strategy, widths):
    config = SubmodelConfig(num_layers=4, hidden_units=64, layer_strategy=strategy)
    assert config.hidden_widths() == widths
    linear = [module for module in config.build(10, 3) if isinstance(module, torch.nn.Linear)]
    assert [module.out_features for module in linear] == [*widths, 3]
    assert linear[0].in_features == 10


def test_an_odd_bow_tie_has_one_narrow_middle_and_widths_never_reach_zero():
    assert SubmodelConfig(
        num_layers=5, hidden_units=64, layer_strategy="bow_tie"
    ).hidden_widths() == [
        64,
        32,
        16,
        32,
        64,
    ]
    assert (
        min(
            SubmodelConfig(num_layers=8, hidden_units=4, layer_strategy="pyramidal").hidden_widths()
        )
        == 1
    )
    assert SubmodelConfig(num_layers=0).hidden_widths() == []


@pytest.mark.parametrize("normalization", ["none", "batch", "layer"])
@pytest.mark.parametrize("activation", ["relu", "leaky_relu", "gelu", "tanh"])
def test_every_architecture_trains(normalization, activation):
    config = SubmodelConfig(
        num_layers=2,
        hidden_units=8,
        normalization=normalization,
        activation=activation,
        dropout=0.5,
    )
    model = config.build(6, 3)
    model(torch.randn(4, 6)).sum().backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


def test_batch_normalization_takes_a_batch_of_one_and_keeps_its_statistics():
    model = SubmodelConfig(normalization="batch").build(6, 3).train()
    model(torch.randn(16, 6))
    before = model[1].running_mean.clone()
    assert torch.isfinite(model(torch.randn(1, 6))).all()
    assert torch.equal(model[1].running_mean, before)
    model(torch.randn(2, 6))
    assert not torch.equal(model[1].running_mean, before)


@pytest.mark.parametrize("layers", [1, 2, 3, 6, 12, 24])
@pytest.mark.parametrize("share", [False, True])
def test_the_confidence_starts_undecided_whatever_the_depth(layers, share):
    confidence = Submodels(
        SubmodelConfig(dropout=0), num_layers=layers, hidden_size=8, output_size=1, share=share
    )
    start_undecided(confidence)
    h = confidence(100 * torch.randn(5, layers, 8)).squeeze(-1).sigmoid()
    p = h.cumprod(dim=1)
    if layers > 1:
        torch.testing.assert_close(p[:, layers - 2], torch.full((5,), 0.5))


def test_layers_have_submodels_of_their_own_unless_shared():
    own = Submodels(SubmodelConfig(), num_layers=3, hidden_size=8, output_size=2)
    shared = Submodels(SubmodelConfig(), num_layers=3, hidden_size=8, output_size=2, share=True)
    assert len({id(own.of_layer(n)) for n in (1, 2, 3)}) == 3
    assert len({id(shared.of_layer(n)) for n in (1, 2, 3)}) == 1
    assert own(torch.randn(4, 3, 8)).shape == shared(torch.randn(4, 3, 8)).shape == (4, 3, 2)


@pytest.mark.parametrize("normalization", ["none", "batch", "layer"])
@pytest.mark.parametrize("activation", ["relu", "leaky_relu", "gelu", "tanh"])
@pytest.mark.parametrize("depth", [0, 1, 3])
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
    expected = torch.stack([alone.of_layer(n)(states[:, n - 1]) for n in range(1, 5)], dim=1)
    (direction * expected).sum().backward()
    got = submodels(states)
    (direction * got).sum().backward()
    torch.testing.assert_close(got, expected)
    for (name, ours), theirs in zip(submodels.named_parameters(), alone.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad, msg=name)


def test_each_layer_draws_dropout_masks_of_its_own():
    submodels = Submodels(SubmodelConfig(dropout=0.5), num_layers=3, hidden_size=6, output_size=2)
    submodels.load_state_dict(
        {name: submodels.state_dict()["0" + name[1:]] for name in submodels.state_dict()}
    )
    answers = submodels(torch.ones(4, 3, 6))
    assert len({tuple(answer.tolist()) for answer in answers.flatten(0, 1)}) == 12
    assert (
        len(
            {
                tuple(answer.tolist())
                for answer in submodels.eval()(torch.ones(4, 3, 6)).flatten(0, 1)
            }
        )
        == 1
    )


@pytest.mark.parametrize("hooked", [lambda submodel: submodel, lambda submodel: submodel[0]])
def test_hooks_of_a_layer_are_called_in_training(hooked):
    submodels = Submodels(SubmodelConfig(dropout=0.0), num_layers=2, hidden_size=6, output_size=2)
    seen = []
    hooked(submodels[0]).register_forward_hook(lambda module, inputs, output: seen.append(output))
    submodels(torch.randn(4, 2, 6))
    assert len(seen) == 1
    hooked(submodels[1]).register_full_backward_hook(
        lambda module, inputs, outputs: seen.append(outputs[0])
    )
    submodels(torch.randn(4, 2, 6)).sum().backward()
    assert len(seen) == 3


def test_a_layer_that_was_changed_learns_as_changed():
    submodels = Submodels(SubmodelConfig(dropout=0.0), num_layers=2, hidden_size=6, output_size=2)
    states = torch.randn(4, 2, 6)
    submodels[1][1] = torch.nn.Tanh()
    torch.testing.assert_close(submodels(states)[:, 1], submodels[1](states[:, 1]))
    submodels[1] = torch.nn.Linear(6, 2)
    torch.testing.assert_close(submodels(states)[:, 1], submodels[1](states[:, 1]))


def test_layers_without_biases_learn():
    submodels = Submodels(SubmodelConfig(num_layers=0), num_layers=2, hidden_size=6, output_size=2)
    for submodel in submodels:
        submodel[0] = torch.nn.Linear(6, 2, bias=False)
    states = torch.randn(4, 2, 6)
    torch.testing.assert_close(submodels(states)[:, 1], submodels[1](states[:, 1]))


def test_a_parametrized_layer_learns_by_its_parametrization():
    submodels = Submodels(SubmodelConfig(dropout=0.0), num_layers=2, hidden_size=6, output_size=2)
    torch.nn.utils.parametrizations.spectral_norm(submodels[1][0])
    states = torch.randn(4, 2, 6)
    torch.testing.assert_close(
        submodels(states)[:, 1], submodels.of_layer(2)(states[:, 1]), rtol=0.1, atol=0.1
    )
    submodels[1][0].parametrizations.weight.original.data.mul_(100)
    assert submodels(states).abs().max() < 10


@pytest.mark.parametrize(
    ("arguments", "kind", "message"),
    [
        ({"num_layers": -1}, ValueError, "num_layers must be in 0 … 1000, got -1"),
        ({"num_layers": 1.5}, TypeError, "num_layers must be an integer, got 1.5"),
        ({"hidden_units": 0}, ValueError, "hidden_units must be 1 or more, got 0"),
        ({"hidden_units": True}, TypeError, "got True"),
        ({"dropout": 1.0}, ValueError, r"dropout must be in \[0, 1\), got 1.0"),
        ({"normalization": "group"}, ValueError, "'none', 'batch', 'layer', got 'group'"),
        ({"activation": "swish"}, ValueError, "got 'swish'"),
        ({"layer_strategy": "cone"}, ValueError, "got 'cone'"),
    ],
)
def test_wrong_architectures_are_refused(arguments, kind, message):
    with pytest.raises(kind, match=message):
        SubmodelConfig(**arguments)
