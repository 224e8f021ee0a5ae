"""DACT as a library: in another project, with its streams, subclasses, loops and datamodules."""

from pathlib import Path

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.loggers import TensorBoardLogger
from torch.utils.data import DataLoader, IterableDataset

from dact import DACT
from dact.callbacks import ExitPlots, SavePretrained
from dact.encoders import TransformerEncoder
from dact.files import read_json, write_json
from tests.conftest import random_batch, tiny_model


def trainer(folder, **arguments):
    options = {"max_epochs": 1, "accelerator": "cpu", "logger": False, "enable_progress_bar": False}
    return pl.Trainer(
        default_root_dir=folder, enable_model_summary=False, **{**options, **arguments}
    )


def batches(number):
    return DataLoader([random_batch(seed=seed) for seed in range(number)], batch_size=None)


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
    trainer(tmp_path, max_epochs=2).fit(model, DataLoader(Stream(), batch_size=None))
    assert seen == [(model.lambda_reg, 1e-2)] * 12
    assert not torch.equal(model.encoder.tokens.weight, before)


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
    options = {"logger": TensorBoardLogger(tmp_path), "callbacks": [ExitPlots(), SavePretrained()]}
    fit = trainer(tmp_path, max_epochs=2, accumulate_grad_batches=2, **options)
    fit.fit(model, batches(8), batches(1))
    assert not torch.equal(model.extra.weight, before)
    saved = WithHead.from_pretrained(Path(fit.log_dir) / "model")
    assert torch.equal(saved.extra.weight, model.extra.weight)
    assert model.seen == [(step, min(1.0, step / 4)) for step in range(8) for _ in (1, 2)]
    assert not [name for name in fit.callback_metrics if "layer_accuracy" in name]
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
    fit = trainer(tmp_path)
    fit.fit(tiny_model(layers=2), NamedData(root=tmp_path))
    message = r"holds an object of pathlib\S*Path, and only plain data.*datamodule is a likely"
    with pytest.raises(ValueError, match=message):
        DACT.load_from_checkpoint(fit.checkpoint_callback.best_model_path)


def test_a_folder_of_a_later_version_says_so(tmp_path):
    tiny_model().save_pretrained(tmp_path)
    config = read_json(tmp_path / "config.json") | {"format": "dact/9"}
    write_json(tmp_path / "config.json", config)
    with pytest.raises(ValueError, match=r"has the format dact/9.*install a later one"):
        DACT.from_pretrained(tmp_path)
