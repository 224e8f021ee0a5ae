"""What every fit of a run is made of: the factories, the Trainer's arguments, and what they share."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch
from lightning.pytorch import LightningDataModule

from dact.calibration import Promise
from dact.model import DACT
from dact.submodels import SubmodelConfig
from dact.tuning.fingerprints import fingerprint_pretrained
from dact.tuning.training import as_list, make_trainer

CALIBRATION_SHARE = 0.5  # of the validation examples, kept from the studies where a promise is to be kept
COMPARED = (  # arguments of the Trainer under which the values of trials compare only with their like
    "precision",
    "accumulate_grad_batches",
    "gradient_clip_val",
    "gradient_clip_algorithm",
    "limit_train_batches",
    "limit_val_batches",
    "max_steps",
    "max_time",
    "overfit_batches",
    "val_check_interval",
    "check_val_every_n_epoch",
)


@dataclass(frozen=True)
class Recipe:
    """What every fit of a run is made of.

    Args:
        output_dimension: Number of classes.
        model: Factory of models.
        data: Factory of datamodules.
        trainer: Arguments of the Trainer.
        encoder_training: ``"finetune"`` or ``"frozen"``.
        warm_up_epochs: Number of epochs of the encoder's warm-up in frozen mode.
        distillation: Share of a teacher's probabilities in the training targets, in [0, 1].
        halting_tolerance: Tolerance of all models, or None for that of the factory.
        promise: What early exit of the final model must keep, or None.
        seed: Seed for data order, initialisation and samplers.
    """

    output_dimension: int
    model: Callable[..., DACT]
    data: Callable[..., LightningDataModule]
    trainer: Mapping[str, Any]
    encoder_training: str
    warm_up_epochs: int
    distillation: float
    halting_tolerance: float | None
    promise: Promise | None
    seed: int

    @property
    def epochs(self) -> int:
        """Number of epochs where no study chooses it."""
        return int(self.trainer["max_epochs"])

    def make_model(self, **settings: Any) -> DACT:
        """Return a model of the factory.

        Args:
            **settings: Arguments that replace those of the factory, as plain values.

        Raises:
            ValueError: If the factory makes models with another number of classes.
        """
        overrides = self.overrides(settings)
        model = self.model(**overrides)
        if model.output_dimension != self.output_dimension:
            raise ValueError(
                f"TuningEngine has output_dimension={self.output_dimension}, but the model factory makes models with "
                f"output_dimension={model.output_dimension}: give both the same"
            )
        return model

    def overrides(self, settings: Mapping[str, Any]) -> dict[str, Any]:
        """Return `settings` as arguments of a model, with what holds for all models of the run."""
        overrides: dict[str, Any] = {}
        if self.distillation:
            overrides["distillation"] = self.distillation
        if self.halting_tolerance is not None:
            overrides["halting_tolerance"] = self.halting_tolerance
        overrides |= settings
        for name in ("classifier", "confidence"):
            if isinstance(overrides.get(name), Mapping):
                overrides[name] = SubmodelConfig(**overrides[name])
        return overrides

    def make_data(self, **overrides: Any) -> LightningDataModule:
        """Return a datamodule of the factory; with a promise, one that sets examples aside for calibration.

        Raises:
            ValueError: If there is a promise, and the data cannot set examples aside.
        """
        data = self.data(**overrides)
        if self.promise is not None:
            if not hasattr(data, "calibration_dataloader"):
                raise ValueError(
                    f"TuningEngine: a promise needs examples that no study sees, but {type(data).__name__} has no "
                    "calibration_dataloader: give it one that returns labelled batches"
                )
            chosen = getattr(data, "calibration_file", None) or getattr(data, "calibration_fraction", None)
            if hasattr(data, "calibration_fraction") and not chosen:
                data.calibration_fraction = CALIBRATION_SHARE
        return data

    @property
    def device(self) -> torch.device:
        """The device of the Trainer, for what runs outside of one."""
        return make_trainer(self.trainer, enable_checkpointing=False).strategy.root_device

    def precision(self) -> AbstractContextManager[Any]:
        """Return the context of the Trainer's precision, for what runs outside of one."""
        return make_trainer(self.trainer, enable_checkpointing=False).precision_plugin.forward_context()

    def identity(self, model: str, data: str, teacher: str | None) -> dict[str, Any]:
        """Return what the trials of a run have in common, as plain data: values compare only where it is equal.

        Args:
            model: Digest of the factory's model.
            data: Digest of the training and validation examples.
            teacher: A teacher that the data names, or None.
        """
        identity: dict[str, Any] = {
            "promise": self.promise is not None,  # which keeps examples from the studies
            "model": model,
            "data": data,
            "trainer": {name: self.trainer[name] for name in COMPARED if name in self.trainer},
            "encoder_training": self.encoder_training,
            "distillation": self.distillation,
            "halting_tolerance": self.halting_tolerance,
            "max_epochs": self.epochs,
            "seed": self.seed,
        }
        callbacks = sorted(type(callback).__qualname__ for callback in as_list(self.trainer.get("callbacks")))
        if callbacks:
            identity["callbacks"] = callbacks
        if teacher is not None:
            identity["teacher"] = fingerprint_pretrained(teacher)
        if self.encoder_training == "frozen":
            identity["warm_up_epochs"] = self.warm_up_epochs
        return identity
