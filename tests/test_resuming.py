"""Fits that resume: in the middle of an epoch, with an average of weights, or after a deadline."""

import re

import pytest
import torch
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint

from dact import DACT
from dact.callbacks import AverageLastSteps
from dact.encoders import TransformerEncoder
from dact.files import read_checkpoint
from dact.submodels import SubmodelConfig
from dact.tuning.trainer import Deadline, resumable_fit, seeded
from tests.test_tuning import engine, small_data, study_of


class Stop(Callback):
    """Stop as a kill does, before a batch of an epoch."""

    def __init__(self, epoch, batch):
        self.at = epoch, batch

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if (trainer.current_epoch, batch_idx) == self.at:
            raise RuntimeError("killed")


class Ruin(Callback):
    """Ruin the model after its first epochs, of which the best one is then the best of all."""

    def __init__(self, sound=1):
        self.sound = sound

    def on_validation_start(self, trainer, pl_module):
        if trainer.current_epoch >= self.sound:
            *_, bias = pl_module.classifier.parameters()
            bias.data = torch.tensor([1000.0, 0.0, 0.0]).expand_as(bias).clone()


def plain_model():
    """A model without dropout, whose random state Lightning does not restore."""
    plain = SubmodelConfig(dropout=0.0)
    encoder = TransformerEncoder(42, 3, 8, 2, dropout=0.0)
    return DACT(encoder=encoder, classifier=plain, confidence=plain, learning_rate=3e-3)


def fitted(checkpoints, *callbacks, epochs=3, monitor="val_loss", average=False, **trainer):
    """The weights of the last epoch, and the numbers of val_loss."""
    with seeded(0):
        model, data = plain_model(), small_data(batch_size=16)
        arguments = {"accelerator": "cpu", **trainer}
        kept = {"monitor": monitor, "average": average}
        history = resumable_fit(
            arguments, model, data, checkpoints, *callbacks, epochs=epochs, **kept
        )
    return model.state_dict(), [epoch["val_loss"] for epoch in history.epochs]


def apart():
    data = small_data(batch_size=16)
    data.setup("fit")
    return data.confidence_dataloader()


def test_the_epoch_of_the_lowest_metric_is_kept_without_its_optimizer(tmp_path):
    _, losses = fitted(tmp_path, Ruin(2))
    kept = read_checkpoint(tmp_path / "best.ckpt")
    assert kept["epoch"] == losses.index(min(losses)) < 2
    assert "optimizer_states" not in kept


@pytest.mark.parametrize("trainer", [{}, {"check_val_every_n_epoch": 2}])
def test_without_a_metric_the_last_epoch_is_kept(tmp_path, trainer):
    """Also if it is not the best, the fit resumed, or nothing validated it."""
    with pytest.raises(RuntimeError, match="killed"):
        fitted(tmp_path, Stop(2, 0), monitor=None, **trainer)
    weights, _ = fitted(tmp_path, Ruin(), monitor=None, **trainer)
    kept = read_checkpoint(tmp_path / "best.ckpt")
    assert "optimizer_states" not in kept
    for name, tensor in weights.items():
        torch.testing.assert_close(kept["state_dict"][name], tensor, msg=name)


class Record(Callback):
    """The weights after each optimizer step, which the trained model has then."""

    def __init__(self):
        self.steps = {}

    def on_train_batch_end(self, trainer, pl_module, *arguments):
        weights = {name: value.double().clone() for name, value in pl_module.state_dict().items()}
        self.steps[trainer.global_step] = weights


@pytest.mark.slow
@pytest.mark.parametrize("stop", [Stop(5, 0), Stop(5, 3)], ids=["within", "at its end"])
def test_the_weights_of_the_last_steps_are_averaged_also_after_a_resumption(tmp_path, stop):
    seen = Record()
    with pytest.raises(RuntimeError, match="killed"):
        fitted(tmp_path, seen, stop, epochs=6, monitor=None, average=True)
    weights, losses = fitted(tmp_path, seen, epochs=6, monitor=None, average=True)
    steps = max(seen.steps)
    # The last fifth, rounded up.
    last = [seen.steps[step] for step in range(steps - steps // 5, steps + 1)]
    kept, resumable = (
        read_checkpoint(tmp_path / f"{name}.ckpt")["state_dict"] for name in ("best", "last")
    )
    fits = plain_model()
    fits.load_state_dict(
        {name: torch.stack([step[name] for step in last]).mean(0) for name in weights}
    )
    fits.teach_confidence(apart())
    for name, mean in fits.state_dict().items():
        for found in (weights[name], kept[name], resumable[name]):
            torch.testing.assert_close(found, mean, msg=name)
    assert any(not torch.equal(seen.steps[steps][name], tensor) for name, tensor in weights.items())
    if stop.at == (5, 0):
        _, plain = fitted(tmp_path / "plain", epochs=6, monitor=None)
        assert plain[:4] == losses[:4], "before, the weights are as they are"
        assert plain[4:] != losses[4:], "validation has the mean"


def test_a_trainer_tests_the_mean_after_its_fit(tmp_path):
    kept = ModelCheckpoint(tmp_path, "kept")
    callbacks = [AverageLastSteps(share=0.5), kept]
    trainer = Trainer(max_epochs=2, accelerator="cpu", logger=False, callbacks=callbacks)
    model, data = plain_model(), small_data(batch_size=16)
    trainer.fit(model, data)
    mean = {name: value.clone() for name, value in model.state_dict().items()}
    trainer.test(model, data, ckpt_path=tmp_path / "kept.ckpt", weights_only=True, verbose=False)
    assert all(torch.equal(value, mean[name]) for name, value in model.state_dict().items())


def test_a_share_of_the_steps_is_asked_for():
    with pytest.raises(ValueError, match=re.escape("share must be in (0, 1], got 0")):
        AverageLastSteps(share=0)


@pytest.mark.slow
def test_a_study_that_its_deadline_ended_is_not_reopened_by_the_same_command(tmp_path, monkeypatch):
    deadlines = []

    class Recorded(Deadline):
        def __init__(self, seconds=None):
            super().__init__(seconds)
            deadlines.append(self)

    def over(study, trial):
        deadlines[-1].end = 0.0

    monkeypatch.setattr("dact.tuning.engine.Deadline", Recorded)
    engine(tmp_path, time_out=60, callbacks=[over]).joint_tune_study("run")
    engine(tmp_path, time_out=60).joint_tune_study("run")
    assert len(study_of(tmp_path, "submodels").trials) == 1
    engine(tmp_path, time_out=90).joint_tune_study("run")
    assert len(study_of(tmp_path, "submodels").trials) == 3, "with more time it goes on"
