"""On a second device: nothing is made on the wrong one, and the host waits once per layer. (See
`pretend_device`.)"""

import pytest
import torch

from dact import functional
from tests.conftest import random_batch, tiny_model
from tests.pretend_device import DEVICE, SecondDevice, There, move
from tests.test_encoders import ALL, LAYERS, encoder_of

BATCH = random_batch(40, 24, vocab=100)


def on_second_device(batch):
    return {name: There(tensor) for name, tensor in batch.items()}


@pytest.mark.parametrize("name", sorted({*ALL} - {"albert-groups", "electra"}))  # as albert, bert
@torch.no_grad()
def test_early_exit_answers_there_as_on_the_cpu(name):
    model = tiny_model(encoder=encoder_of(name), step_tokens=240, halting_margin=0.1)
    here, full = model.early_exit(BATCH), model(BATCH)
    with SecondDevice():
        move(model)
        there = model.early_exit(on_second_device(BATCH))
        full_there = model(on_second_device(BATCH))
        assert there.exit_layer.device == DEVICE
        assert there.exit_layer.tolist() == here.exit_layer.tolist()
        torch.testing.assert_close(there.probabilities.cpu(), here.probabilities)
        assert full_there.exit_layer.tolist() == full.exit_layer.tolist()
    assert len(here.exit_layer.unique()) > 1


@torch.no_grad()
def test_the_host_waits_once_per_layer_however_many_groups_there_are():
    waits, batch = [], {name: tensor[:16] for name, tensor in BATCH.items()}
    for step_tokens in (24, 10_000):  # a group for each example, and one for all
        model = tiny_model(
            LAYERS, vocab=100, step_tokens=step_tokens, window_tokens=10_000, halting_margin=0.5
        )
        with SecondDevice() as device:
            move(model).early_exit(on_second_device(batch))
        waits.append(device.waits)
    # for the mask, for the lengths, and for who may leave each layer but the last
    assert waits == [2 + LAYERS - 1] * 2


@torch.no_grad()
def test_a_device_without_float64_leaves_the_halting_rule_to_the_cpu(monkeypatch):
    monkeypatch.setattr(functional, "WITHOUT_FLOAT64", {DEVICE.type})
    model = tiny_model(vocab=100, halting_margin=0.1)
    expected = model(BATCH).exit_layer.tolist()
    with SecondDevice() as device:
        move(model)
        assert model(on_second_device(BATCH)).exit_layer.tolist() == expected
        assert model.early_exit(on_second_device(BATCH)).exit_layer.tolist() == expected
    assert torch.float32 in device.dtypes
    assert torch.float64 not in device.dtypes


@torch.no_grad()
def test_the_pretended_device_minds_what_a_gpu_minds():
    with SecondDevice() as device:
        there = There(torch.ones(3))
        with pytest.raises(AssertionError, match="mixes devices"):
            there + torch.ones(3)
        assert device.waits == 0
        assert there.sum().item() == 3
        assert there.cpu().tolist() == [1, 1, 1]
        torch.tensor([1], device=DEVICE)
        assert device.waits == 3
