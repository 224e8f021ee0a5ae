"""The recipe of a run: factories, arguments of the Trainer, and settings that all fits share."""

from __future__ import annotations

import inspect
import json
import re
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass, replace
from typing import Annotated, Any, Literal

import torch
from lightning.pytorch import LightningDataModule, Trainer
from torch.nn.modules.dropout import _DropoutNd

from dact.calibration import Promise
from dact.checks import Range, check_arguments, check_count
from dact.confidence import PRICE
from dact.model import DACT
from dact.saving import plain_data
from dact.submodels import SubmodelConfig
from dact.tuning.run import digests_of
from dact.tuning.settings import Settings
from dact.tuning.trainer import make_trainer

EncoderTraining = Literal["finetune", "frozen"]
TRAINER_DEFAULTS = {"max_epochs": 4, "gradient_clip_val": 1.0}
CALIBRATION_SHARE = 0.5  # share of the validation examples that is set aside for a promise
FEWEST_ASIDE = 200  # with fewer examples, none are set aside for an estimate
NOT_COMPARED = ("max_time", "enable_progress_bar", "enable_model_summary", "log_every_n_steps")
OUTSIDE = ("trainer", "compare_defaults", "note")  # fields that the "tuner" section leaves out

# The recommended settings: what the studies start from, and what a run without trials fits. Each is
# measured in benchmarks/README.md.
DISTILLATION = 0.5  # share of the teacher in the targets
CONSISTENCY = 5.0  # weight of two passes' divergence in fits of the encoder after the studies
LAYERS_KEPT = 2 / 3  # share of the encoder's layers
HEAD_RATE_FACTOR, HEAD_RATE = 10, 1e-3  # submodels' rate: ten times the encoder's, at most 1e-3


def recommended(model: DACT, batch_size: int | None, epochs: int) -> Settings:
    """Return the recommended settings for a model of the factory.

    The submodels learn up to ten times as fast as the encoder, exits are detached, two thirds of
    the layers are kept, and a default λ is scaled to them. The rest is the factory's.
    """
    rate = model.learning_rate
    kept = min(model.num_layers, max(1, round(LAYERS_KEPT * model.encoder.num_layers)))
    changed: dict[str, Any] = {"detach_exits": model.exit_loss_weight > 0, "num_layers": kept}
    if model.lambda_reg == PRICE / model.num_layers:
        changed["lambda_reg"] = PRICE / kept
    if model.submodel_learning_rate is None:
        changed["submodel_learning_rate"] = max(rate, min(HEAD_RATE_FACTOR * rate, HEAD_RATE))
    return as_written(model, batch_size, epochs).updated(Settings(changed))


def as_written(model: DACT, batch_size: int | None, epochs: int) -> Settings:
    """Return the settings of the factories, without tuning."""
    names = ("learning_rate", "exit_loss_weight", "detach_exits", "weight_decay", "warmup_fraction")
    arguments = {name: getattr(model, name) for name in (*names, "num_layers", "lambda_reg")}
    arguments["submodel_learning_rate"] = model.submodel_learning_rate or model.learning_rate
    for name in ("classifier", "confidence"):
        arguments[name] = asdict(getattr(model, name).config)
    return Settings(arguments, batch_size, epochs)


@dataclass(frozen=True)
class Recipe:
    """The factories, the arguments of the Trainer, and the settings that all fits of a run share.

    The fields are options of `TuningEngine`, and two that are derived from them:

    Args:
        calibration_fraction: Share of the validation examples that is set aside for the promise;
            None for the data's own share.
        note: Line about the promise for the user, or an empty string.
    """

    output_dimension: int
    model: Callable[..., DACT]
    data: Callable[..., LightningDataModule]
    trainer: Mapping[str, Any]
    encoder_training: EncoderTraining
    final_training: EncoderTraining
    warm_up_epochs: Annotated[int, Range("[0, inf)")]
    distillation: Annotated[float, Range("[0, 1]", "it is a share of the targets")] | None
    consistency: Annotated[float, Range("[0, inf)")] | None
    halting_tolerance: Annotated[float, Range("[0, 1)")] | None
    promise: Promise | None
    seed: int
    compare_defaults: bool
    calibration_fraction: float | None = None
    note: str = ""

    def __post_init__(self) -> None:
        if isinstance(self.model, torch.nn.Module):
            raise TypeError("TuningEngine: model must be a function that makes one, for each trial")
        check_arguments(type(self), vars(self), "TuningEngine: ")
        if self.final_training == "frozen" and self.encoder_training != "frozen":
            raise ValueError(
                "TuningEngine: final_training='frozen' requires encoder_training='frozen'"
            )

    @property
    def epochs(self) -> int:
        """Number of epochs if no study chooses it."""
        return int(self.trainer["max_epochs"])

    # ------------------------------------------------------------------ models and data

    def make_model(self, **settings: Any) -> DACT:
        """Return a model of the factory; `settings` replace its arguments, as plain values."""
        model = self.model(**self.overrides(settings))
        if model.output_dimension != self.output_dimension:
            raise ValueError(
                f"TuningEngine has output_dimension={self.output_dimension}, but the model factory "
                f"makes models with {model.output_dimension} classes: give both the same"
            )
        return model

    def whole_model(self, **settings: Any) -> DACT:
        """Return a model of the factory that keeps all layers of the encoder."""
        model = self.make_model(**settings)
        if model.num_layers == model.encoder.num_layers:
            return model
        return self.make_model(**settings, num_layers=model.encoder.num_layers)

    def overrides(self, settings: Mapping[str, Any]) -> dict[str, Any]:
        """Return settings as arguments of `DACT`, with those that all models of the run share."""
        found = dict(settings)
        if self.halting_tolerance is not None:
            found.setdefault("halting_tolerance", self.halting_tolerance)
        for name in ("classifier", "confidence"):
            if isinstance(found.get(name), Mapping):
                found[name] = SubmodelConfig(**found[name])
        return found

    def make_data(self, **overrides: Any) -> LightningDataModule:
        """Return a datamodule of the factory, which sets `calibration_fraction` aside."""
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

    def finetuning(self, model: DACT) -> dict[str, Any]:
        """Return the arguments that fits of the encoder after the studies add to the factory's."""
        if self.consistency is not None:
            return {"consistency": self.consistency}
        parts = (part for part in model.encoder.modules() if isinstance(part, _DropoutNd))
        if model.consistency or not any(part.p > 0 and part.training for part in parts):
            return {}  # without dropout, both passes agree
        return {"consistency": CONSISTENCY}

    # ------------------------------------------------------------------ devices

    def for_worker(self, worker: int, gpus: int) -> Recipe:
        """Return the recipe of worker 0, 1, …; workers are spread over the GPUs, if several."""
        on_gpu = self.trainer.get("accelerator", "auto") in ("auto", "gpu", "cuda")
        if gpus < 2 or not on_gpu or self.trainer["devices"] not in (1, "1"):
            return self
        return replace(self, trainer={**self.trainer, "devices": [worker % gpus]})

    @property
    def device(self) -> torch.device:
        """The device of the Trainer, for computations outside a Trainer."""
        return make_trainer(self.trainer).strategy.root_device

    def precision(self) -> AbstractContextManager[Any]:
        """Return the context of the Trainer's precision, for computations outside a Trainer."""
        trainer = make_trainer(self.trainer)
        return trainer.precision_plugin.forward_context()

    # ------------------------------------------------------------------ what a run compares

    def configuration(self, model: DACT, data: Any) -> dict[str, Any]:
        """Return what the results of a run depend on, as plain data; see `Run.opened`."""
        trainer = {n: v for n, v in self.trainer.items() if n not in NOT_COMPARED and is_plain(v)}
        given = {**getattr(data, "hparams", {}), **vars(data)}
        own = {n: v for n, v in given.items() if not n.startswith("_") and is_plain(v)}
        tuner = {n: v for n, v in vars(self).items() if n not in OUTSIDE and is_plain(v)}
        tuner["promise"] = self.promise and asdict(self.promise)
        content = {
            "model": model.config(),
            "data": {"class": type(data).__qualname__, **own},
            "files": digests_of(getattr(data, "files", None) or {}),
            "trainer": trainer,
            "tuner": tuner,
        }
        return json.loads(json.dumps(plain_data(content), default=str))


def is_plain(value: Any) -> bool:
    """Return whether YAML and JSON can hold a value as it is, such as ``[0]`` for devices."""
    if isinstance(value, dict):
        return all(map(is_plain, [*value, *value.values()]))
    if isinstance(value, (list, tuple)):
        return all(map(is_plain, value))
    return value is None or isinstance(value, (str, int, float, bool))


def trainer_arguments(given: Mapping[str, Any] | None) -> dict[str, Any]:
    """Return checked arguments of a Trainer, with defaults for those that are not given."""
    trainer = {**TRAINER_DEFAULTS, **(given or {})}
    inspect.signature(Trainer).bind(**trainer)
    check_count("TuningEngine: max_epochs of the Trainer", trainer["max_epochs"])
    if trainer.get("devices") in ("auto", None):
        trainer["devices"] = 1
    # As in the Trainer, 1 and "1" are a number of devices, [1] and "1," the index of one.
    is_one = re.fullmatch(r"1|\[\d+\]|\d+,", str(trainer["devices"]))
    if not is_one or trainer.get("num_nodes", 1) != 1:
        raise ValueError(
            f"TuningEngine: a trial runs on one device, got devices={trainer['devices']!r}: give "
            "1, or a device by its number as [0], and run trials side by side with workers"
        )
    return trainer


# ---------------------------------------------------------------------- the promise


def resolve_promise(given: Recipe, model: DACT) -> Recipe:
    """Return the recipe with a promise that model and data can keep.

    The default promise becomes an estimate if too few examples can be set aside for it. Any other
    promise that lacks examples raises a ``ValueError``.
    """
    promise, is_default = given.promise, given.promise == Promise()
    if promise is None:
        return given
    promise.check(model.exit_rule)
    recipe, aside = _setting_aside(given)
    needed = promise.examples_needed()
    if promise.confidence is not None and aside >= needed:
        return recipe
    # Unless they are too few, examples that no study sees serve an estimate better than the rest.
    if aside < FEWEST_ASIDE and promise.max_layers is None:
        recipe = given
    if promise.confidence is None:
        return recipe
    why = f"the promise takes {needed} examples that no study sees, and there are {aside}"
    if not is_default:
        raise ValueError(
            f"TuningEngine: {why}: give more validation examples or a calibration_file, promise "
            "less, or ask for an estimate (confidence: null)"
        )
    note = f"the margin will be set by an estimate, without a guarantee: {why}"
    return replace(recipe, promise=replace(promise, confidence=None), note=note)


def _setting_aside(given: Recipe) -> tuple[Recipe, int]:
    """Return the recipe with examples set aside, if the data supports it, and their number."""
    recipe, data = given, given.data()
    own_file = (getattr(data, "files", None) or {}).get("calibration")
    if getattr(data, "calibration_fraction", None) == 0 and own_file is None:
        recipe = replace(given, calibration_fraction=CALIBRATION_SHARE)
    try:
        data = recipe.data_for("validate")
        loader = getattr(data, "calibration_dataloader", lambda: None)()
    except ValueError:  # too few examples to split; the fits report any other error
        loader = None
    if loader is None:
        return given, 0
    return recipe, len(loader.dataset)
