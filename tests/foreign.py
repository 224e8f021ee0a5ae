"""Somebody else's project: a datamodule of their own, and a subclass of DACT with arguments of its
own."""

import lightning.pytorch as pl
from lightning.pytorch.cli import LightningCLI
from torch.utils.data import DataLoader

from dact import DACT
from dact.encoders import LayeredEncoder
from tests.conftest import random_batch


class MyData(pl.LightningDataModule):
    def train_dataloader(self):
        return DataLoader([random_batch(8, seed=seed) for seed in range(4)], batch_size=None)

    val_dataloader = test_dataloader = predict_dataloader = train_dataloader


class MyDACT(DACT):
    def __init__(self, encoder: LayeredEncoder, focus: float = 1.0, **kwargs):
        super().__init__(encoder, **kwargs)
        self.save_hyperparameters(ignore=["encoder"])
        self.focus = focus


if __name__ == "__main__":
    LightningCLI(MyDACT, MyData, save_config_kwargs={"overwrite": True})
