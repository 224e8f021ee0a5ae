"""The recipe of a run: the factories, the arguments of the Trainer, and the settings that all fits
share."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass, replace
from difflib import get_close_matches
from typing import Any, Literal

import torch
from lightning.pytorch import LightningDataModule, Trainer
from torch.nn.modules.dropout import _DropoutNd

from dact.calibration import DEFAULT_PROMISE as DEFAULT_PROMISE
from dact.calibration import Promise
from dact.checks import check_choice, check_count, check_range, check_type
from dact.functional import Halting
from dact.model import DACT
from dact.submodels import SubmodelConfig
from dact.tuning.digests import encoder_digest, pretrained_digest
from dact.tuning.fitting import as_list, head_epochs, make_trainer

EncoderTraining = Literal["finetune", "frozen"]
TRAINER_DEFAULTS = {"max_epochs": 4, "gradient_clip_val": 1.0}
DISTILLATION = 0.5  # share of the teacher in the targets
CONSISTENCY = 5.0  # weight of two passes' agreement in fits of the encoder after the studies
# arguments of the Trainer that must be equal for the values of trials to be comparable
COMPARED = (
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
    """The factories, the arguments of the Trainer, and the settings that all fits of a run share.

    Args:
        output_dimension: Number of classes.
        model: Factory of models.
        data: Factory of datamodules.
        trainer: Arguments of the Trainer, from `trainer_arguments`.
        encoder_training: ``"finetune"`` or ``"frozen"``.
        final_training: ``"finetune"`` or ``"frozen"``.
        warm_up_epochs: Number of epochs of the encoder's warm-up in frozen mode.
        distillation: Share of a teacher's probabilities in the training targets, in [0, 1]; None
            for that of the model factory, or for half if the factory has none and the data can
            carry them.
        consistency: Weight of the agreement of two passes in fits of the encoder after the studies,
            0 or more; None for that of the model factory, or for `CONSISTENCY` if the factory has
            none and its encoder has dropout.
        halting_tolerance: Tolerance of all models, or None for that of the factory.
        promise: Promise that early exit of the final model must keep, or None.
        calibration_fraction: Share of the validation examples that is set aside for the promise;
            None for that of the data.
        seed: Seed for data order, initialisation and samplers.
        compare_defaults: Whether to fit and measure the untuned defaults of the factories as well.
        note: Text about the promise for the user, or an empty string.

    Raises:
        TypeError, ValueError: If an argument is not as described.
    """

    output_dimension: int
    model: Callable[..., DACT]
    data: Callable[..., LightningDataModule]
    trainer: Mapping[str, Any]
    encoder_training: EncoderTraining
    final_training: EncoderTraining
    warm_up_epochs: int
    distillation: float | None
    consistency: float | None
    halting_tolerance: float | None
    promise: Promise | None
    seed: int
    compare_defaults: bool
    calibration_fraction: float | None = None
    note: str = ""

    def __post_init__(self) -> None:
        for name, factory in (("model", self.model), ("data", self.data)):
            ready = isinstance(
                factory, (torch.nn.Module, LightningDataModule)
            )  # a module can be called as well
            if ready or not callable(factory):
                raise TypeError(
                    f"TuningEngine: {name} must be a function that makes one, got {type(factory).__name__}: every "
                    "trial needs an instance of its own"
                )
        if self.promise is not None:
            check_type(
                "TuningEngine: promise",
                self.promise,
                Promise,
                "Promise(max_accuracy_loss=0.01), or None",
            )
        check_choice("TuningEngine: encoder_training", self.encoder_training, EncoderTraining)
        check_choice("TuningEngine: final_training", self.final_training, EncoderTraining)
        if self.final_training == "frozen" and self.encoder_training != "frozen":
            raise ValueError(
                "TuningEngine: final_training='frozen' goes with encoder_training='frozen'"
            )
        check_count("TuningEngine: warm_up_epochs", self.warm_up_epochs, least=0)
        if self.distillation is not None:
            check_range(
                "TuningEngine: distillation",
                self.distillation,
                "[0, 1]",
                "it is a share of the targets",
            )
        if self.consistency is not None:
            check_range("TuningEngine: consistency", self.consistency, "[0, inf)")
            if self.final_training == "frozen":
                raise ValueError(
                    "TuningEngine: consistency goes with final_training='finetune', which trains encoders"
                )
        if self.halting_tolerance is not None:
            Halting(tolerance=self.halting_tolerance)  # checks its range
            if self.promise is not None and self.promise.dial == "halting_tolerance":
                raise ValueError(
                    "TuningEngine: a promise chooses the halting_tolerance; give one of the two"
                )
        check_count("TuningEngine: seed", self.seed, least=0)

    def finetunings(self, *, first_trial: bool) -> int:
        """Return the largest number of fits after the studies that train the encoder; one becomes
        the final model.

        Args:
            first_trial: Whether the first trial has other settings than the defaults.
        """
        candidates = 2 if self.encoder_training == "frozen" else 3
        return self.compare_defaults + (
            0 if self.final_training == "frozen" else candidates + first_trial
        )

    def consistency_of(self, model: DACT) -> float:
        """Return the consistency of fits of the encoder after the studies.

        Args:
            model: Model of the factory.
        """
        if self.consistency is not None:
            return self.consistency
        dropouts = (
            part
            for part in model.encoder.modules()
            if isinstance(part, _DropoutNd) and part.training
        )
        has_dropout = any(part.p > 0 for part in dropouts)
        return model.consistency or CONSISTENCY * has_dropout  # without dropout, both passes agree

    def finetuning(self, model: DACT) -> dict[str, Any]:
        """Return the arguments of fits of the encoder after the studies that are not those of the
        factory.

        Args:
            model: Model of the factory.
        """
        weight = self.consistency_of(model)
        return (
            {"consistency": weight}
            if self.final_training == "finetune" and weight != model.consistency
            else {}
        )

    @property
    def epochs(self) -> int:
        """Number of epochs if no study chooses it."""
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

    def whole(self, model: DACT) -> DACT:
        """Return `model` if it uses all layers of its encoder, and otherwise a model of the factory
        that does."""
        layers = model.encoder.num_layers
        return model if model.num_layers == layers else self.make_model(num_layers=layers)

    def overrides(self, settings: Mapping[str, Any]) -> dict[str, Any]:
        """Return `settings` as arguments of a model, together with those that all models of the run
        have."""
        overrides: dict[str, Any] = {}
        if self.halting_tolerance is not None:
            overrides["halting_tolerance"] = self.halting_tolerance
        overrides |= settings
        for name in ("classifier", "confidence"):
            if isinstance(overrides.get(name), Mapping):
                overrides[name] = SubmodelConfig(**overrides[name])
        return overrides

    def untuned(self, own_teacher: bool) -> tuple[DACT, LightningDataModule]:
        """Return model and data of the factories as they are; without a teacher if only one of them
        asks for it.

        Args:
            own_teacher: Whether the training batches carry a teacher's probabilities by themselves.
        """
        model, data = self.model(), self.make_data()
        if not own_teacher and not (
            model.needs_teacher and getattr(data, "teacher", None) is not None
        ):
            model.distillation = 0.0
            if hasattr(data, "teacher"):
                data.teacher = None
        return model, data

    def make_data(self, **overrides: Any) -> LightningDataModule:
        """Return a datamodule of the factory, which sets `calibration_fraction` of its examples
        aside."""
        data = self.data(**overrides)
        if self.calibration_fraction is not None:
            data.calibration_fraction = self.calibration_fraction  # type: ignore[attr-defined]
        return data

    def data_for(self, *stages: str, **overrides: Any) -> LightningDataModule:
        """Return a datamodule of the factory that is set up for these stages."""
        data = self.make_data(**overrides)
        data.prepare_data()
        for stage in stages:
            data.setup(stage)
        return data

    def for_worker(self, worker: int, gpus: int) -> Recipe:
        """Return the recipe of one worker process: on a machine with several GPUs, the workers use
        them in turn.

        Args:
            worker: Number of the worker, from 0.
            gpus: Number of GPUs of this machine.
        """
        accelerator, devices = self.trainer.get("accelerator", "auto"), self.trainer["devices"]
        free = accelerator in ("auto", "gpu", "cuda") and devices in (1, "1")
        return (
            replace(self, trainer={**self.trainer, "devices": [worker % gpus]})
            if free and gpus > 1
            else self
        )

    @property
    def device(self) -> torch.device:
        """The device of the Trainer, for computations outside a Trainer."""
        return make_trainer(self.trainer, enable_checkpointing=False).strategy.root_device

    def precision(self) -> AbstractContextManager[Any]:
        """Return the context of the Trainer's precision, for computations outside a Trainer."""
        return make_trainer(
            self.trainer, enable_checkpointing=False
        ).precision_plugin.forward_context()

    def identity(
        self, model: DACT, data: str, batch_size: Any, teacher: str | None
    ) -> dict[str, Any]:
        """Return what all trials of a run have in common, as plain data. Only trials of equal
        identity are comparable.

        Args:
            model: Untrained model of the factory.
            data: Digest of the training and validation examples.
            batch_size: Number of examples per batch in the data of the factory; None if the data
                does not say it.
            teacher: Teacher that the data names, or None.
        """
        identity: dict[str, Any] = {
            "promise": None if self.promise is None else asdict(self.promise),
            # which keeps examples from the studies
            "calibration_fraction": self.calibration_fraction,
            "model": model.config(),
            "encoder's weights": encoder_digest(model.encoder),
            "data": data,
            "trainer": {name: self.trainer[name] for name in COMPARED if name in self.trainer},
            "encoder_training": self.encoder_training,
            "distillation": self.distillation,
            "halting_tolerance": self.halting_tolerance,
            "max_epochs": self.epochs,
            "batch_size": batch_size,
            "seed": self.seed,
        }
        if callbacks := as_list(self.trainer.get("callbacks")):
            identity["callbacks"] = {
                type(callback).__qualname__: _plain_attributes(callback) for callback in callbacks
            }
        if teacher is not None:
            identity["teacher"] = pretrained_digest(teacher)
        if self.encoder_training == "frozen":
            identity |= {
                "warm_up_epochs": self.warm_up_epochs,
                "head_epochs": head_epochs(self.epochs),
            }
        return identity


def _plain_attributes(callback: Any) -> dict[str, Any]:
    """Return what a callback was made with, as far as it is plain data."""
    return {name: value for name, value in vars(callback).items() if is_plain(value)}


def is_plain(value: Any) -> bool:
    """Return whether YAML and JSON can hold a value as it is, such as ``[0]`` for devices."""
    if isinstance(value, dict):
        return all(map(is_plain, [*value, *value.values()]))
    return (
        all(map(is_plain, value))
        if isinstance(value, list)
        else isinstance(value, (str, int, float, bool))
    )


def trainer_arguments(given: Mapping[str, Any] | None) -> dict[str, Any]:
    """Return the arguments of a Trainer, with dact's defaults where the user gives none.

    Raises:
        TypeError, ValueError: If the user's arguments ask for more than one device, no epoch, or
            fast_dev_run, the Trainer has no such argument, or a callback cannot be copied.
    """
    if given is not None and not isinstance(given, Mapping):
        raise TypeError(
            f"TuningEngine: trainer must be a dict of the Trainer's arguments, got {type(given).__name__}: every trial "
            "has a Trainer of its own"
        )
    trainer = {**TRAINER_DEFAULTS, **(given or {})}
    check_count("TuningEngine: max_epochs of the Trainer", trainer["max_epochs"])
    if trainer.get("fast_dev_run"):
        raise ValueError(
            "TuningEngine: fast_dev_run writes no checkpoints, which a run needs. For a short run give n_trials=1, "
            "max_epochs=1 and limit_train_batches"
        )
    if unknown := sorted(
        given.keys() - inspect.signature(Trainer).parameters.keys() if given else ()
    ):
        meant = get_close_matches(unknown[0], inspect.signature(Trainer).parameters, n=1)
        hint = f". Did you mean {meant[0]}?" if meant else ""
        raise TypeError(f"TuningEngine: the Trainer takes no {', '.join(unknown)}{hint}")
    for callback in as_list(trainer.get("callbacks")):
        try:
            copy.deepcopy(callback)
        except Exception as error:
            raise TypeError(
                f"TuningEngine: every fit gets a copy of each callback, but copy.deepcopy fails on "
                f"{type(callback).__name__} ({error}): make what cannot be copied in the callback's setup"
            ) from error
    return {**trainer, "devices": _one_device(trainer)}


def _one_device(trainer: Mapping[str, Any]) -> Any:
    devices = trainer.get("devices", "auto")
    if devices in ("auto", None):
        devices = 1
    # As for the Trainer: 1 and "1" count devices, [1] and "1," name one.
    named = [part for part in str(devices).strip("[](),").split(",") if part.strip()]
    one = str(devices) == "1" or (
        len(named) == 1 and (isinstance(devices, (list, tuple)) or "," in str(devices))
    )
    if not one or trainer.get("num_nodes", 1) != 1:
        raise ValueError(
            f"TuningEngine: a trial runs on one device of one node, got devices={devices!r} and "
            f"num_nodes={trainer.get('num_nodes', 1)}: give devices=1, or one device by its number as [0], and run "
            "several trials side by side with workers"
        )
    return devices
