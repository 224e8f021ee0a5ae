"""DACT as a library: in another project, with its streams, subclasses, loops and datamodules."""

from pathlib import Path

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
from lightning.pytorch.loggers import TensorBoardLogger
from torch.utils.data import DataLoader, IterableDataset
from torch.utils.tensorboard import SummaryWriter

from dact import DACT, functional, plots
from dact.callbacks import ExitPlots, SavePretrained
from dact.encoders import TransformerEncoder
from dact.files import read_json, read_tensors, write_json
from tests.conftest import random_batch, tiny_model


def trainer(folder, **arguments):
    options = {"max_epochs": 1, "accelerator": "cpu", "logger": False, "enable_progress_bar": False}
    return pl.Trainer(
        default_root_dir=folder, enable_model_summary=False, **{**options, **arguments}
    )


def batches(number, **arguments):
    return DataLoader(
        [random_batch(seed=seed, **arguments) for seed in range(number)], batch_size=None
    )


class Stream(IterableDataset):
    """Examples whose number nobody knows."""

    def __iter__(self):
        yield from (random_batch(seed=seed) for seed in range(6))


def test_a_stream_of_unknown_length_trains_at_constant_rates_and_the_final_lambda(tmp_path):
    model, seen = tiny_model(learning_rate=1e-2), []
    model.on_train_batch_end = lambda *args: seen.append(
        (model.warm_lambda(), model.optimizers().param_groups[0]["lr"])
    )
    before = model.encoder.tokens.weight.clone()
    trainer(tmp_path, max_epochs=2, enable_checkpointing=False).fit(
        model, DataLoader(Stream(), batch_size=None)
    )
    assert seen == [(model.lambda_reg, 1e-2)] * 12
    assert not torch.equal(model.encoder.tokens.weight, before)


class LastToken(TransformerEncoder):
    """An encoder that pools in a way of its own."""

    def pool(self, layer, hidden, mask):
        return self.norm(hidden)[:, -1]


def test_a_subclass_of_an_encoder_is_never_rebuilt_as_its_base(tmp_path):
    model = DACT(encoder=LastToken(50, 2, 8, 2))
    fit = trainer(tmp_path, callbacks=[SavePretrained()], enable_checkpointing=True)
    fit.fit(model, batches(4), batches(1))
    folder, checkpoint = (
        Path(fit.checkpoint_callback.dirpath).parent / "model",
        fit.checkpoint_callback.best_model_path,
    )
    for load in (DACT.from_pretrained, lambda _: DACT.load_from_checkpoint(checkpoint)):
        with pytest.raises(ValueError, match="encoder"):
            load(folder)
    batch = random_batch(seed=9)
    loaded = DACT.from_pretrained(folder, encoder=LastToken(50, 2, 8, 2)).eval()
    torch.testing.assert_close(loaded(batch).probabilities, model.eval()(batch).probabilities)


def test_layers_that_were_replaced_are_saved_as_they_are(tmp_path):
    model = tiny_model(layers=2)
    model.encoder.layers[0].adapter = torch.nn.Linear(2, 2)  # as adapters do
    fit = trainer(tmp_path, callbacks=[SavePretrained()], enable_checkpointing=True)
    fit.fit(model, batches(2), batches(1))
    saved = read_tensors(
        Path(fit.checkpoint_callback.dirpath).parent / "model" / "model.safetensors"
    )[0]
    assert torch.equal(
        saved["encoder.layers.0.adapter.weight"], model.encoder.layers[0].adapter.weight
    )


def test_a_fit_that_measures_something_else_draws_no_exits(tmp_path):
    logger = TensorBoardLogger(tmp_path)
    trainer(tmp_path, logger=logger, callbacks=[ExitPlots()]).fit(
        with_head(), batches(2), batches(1)
    )


def test_depths_are_drawn_for_the_examples_of_the_first_loader(tmp_path, monkeypatch):
    drawn = []
    monkeypatch.setattr(
        plots, "depth_against_exit", lambda depths, exits, layers: drawn.append((depths, exits))
    )
    monkeypatch.setattr(SummaryWriter, "add_figure", lambda *arguments, **options: None)
    first, second = ([random_batch(size) | {"depth": torch.full((size,), size)}] for size in (3, 5))
    fit = trainer(tmp_path, logger=TensorBoardLogger(tmp_path), callbacks=[ExitPlots()])
    fit.fit(
        tiny_model(layers=2),
        batches(2),
        [DataLoader(part, batch_size=None) for part in (first, second)],
    )
    assert [[len(part) for part in pair] for pair in drawn] == [[3, 3]]


class WithHead(DACT):
    """A model with a head and a training step of its own, and a validation that measures
    nothing."""

    def __init__(self, **arguments):
        super().__init__(**arguments)
        self.extra = torch.nn.Linear(16, 1)
        self.seen = []

    def training_step(self, batch, batch_idx):
        found = self.loss(batch)
        self.seen.append((self.trainer.global_step, round(self.warm_lambda() / self.lambda_reg, 3)))
        return found.loss + self.extra(self.encoder.first_states(batch, 1)[:, 0]).square().mean()

    def validation_step(self, batch, batch_idx):
        self.log("own", 1.0)


def with_head():
    return WithHead(encoder=TransformerEncoder(50, 2, 16, 2), lambda_warmup=0.5, learning_rate=1e-2)


def test_what_a_subclass_adds_is_trained_under_the_lambda_of_the_optimizer_steps(tmp_path, recwarn):
    model = with_head()
    before = model.extra.weight.clone()
    fit = trainer(tmp_path, max_epochs=2, accumulate_grad_batches=2, enable_checkpointing=True)
    fit.fit(model, batches(8), batches(1))
    assert not torch.equal(model.extra.weight, before)
    assert model.seen == [(step, min(1.0, step / 4)) for step in range(8) for _ in (1, 2)]
    assert not [name for name in fit.callback_metrics if "layer_accuracy" in name], (
        "of no measurement"
    )
    assert not [warning for warning in recwarn if "update" in str(warning.message)]
    resumed = with_head()
    path = fit.checkpoint_callback.best_model_path
    trainer(tmp_path, max_epochs=4).fit(resumed, batches(8), ckpt_path=path, weights_only=True)
    assert [step for step, _ in resumed.seen] == [*range(8, 24)]
    assert resumed.seen[0][1] == 0.5, "it goes on where it was: the warm-up has 16 steps now"


class NamedData(pl.LightningDataModule):
    """A datamodule whose hyperparameters have the names of DACT's."""

    def __init__(self, class_names=("a", "b", "c"), encoder="bert", root=None):
        super().__init__()
        self.save_hyperparameters()
        self.class_names = class_names

    def train_dataloader(self):
        return batches(2)


def test_a_datamodule_may_have_hyperparameters_of_the_same_name(tmp_path):
    model = tiny_model(layers=2)
    trainer(tmp_path, logger=True).fit(model, NamedData())
    assert "class_names" not in model.hparams_initial
    assert model.hparams_initial["lambda_reg"] == model.lambda_reg


def test_a_checkpoint_that_holds_more_than_data_says_what_and_where(tmp_path):
    fit = trainer(tmp_path, enable_checkpointing=True)
    fit.fit(tiny_model(layers=2), NamedData(root=tmp_path))
    message = r"holds an object of pathlib\S*Path, and only plain data can be read.*datamodule is a likely place"
    with pytest.raises(ValueError, match=message):
        DACT.load_from_checkpoint(fit.checkpoint_callback.best_model_path)


def test_what_remains_may_be_an_integer_of_numpy():
    a, p = torch.tensor([[0.9, 0.1]]), torch.tensor([0.01])
    assert (
        functional.can_halt(a, p, np.int64(2)).item() is functional.can_halt(a, p, 2).item() is True
    )
    assert functional.can_halt(a, torch.tensor([1.0]), np.int64(0)).item() is True


def test_a_model_that_cannot_be_saved_leaves_the_folder_as_it_was(tmp_path):
    good = tiny_model()
    good.save_pretrained(tmp_path / "model")
    other = tiny_model()
    other.class_names = [object(), object(), object()]
    with pytest.raises(TypeError):
        other.save_pretrained(tmp_path / "model")
    batch = random_batch()
    again = DACT.from_pretrained(tmp_path / "model")
    torch.testing.assert_close(again(batch).probabilities, good.eval()(batch).probabilities)


def test_a_folder_of_a_later_version_says_so(tmp_path):
    tiny_model().save_pretrained(tmp_path)
    config = read_json(tmp_path / "config.json") | {"format": "dact/9"}
    write_json(tmp_path / "config.json", config)
    with pytest.raises(ValueError, match=r"has the format dact/9.*install a later one"):
        DACT.from_pretrained(tmp_path)
