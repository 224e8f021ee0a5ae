"""TuningEngine: three studies and a final fit."""

from __future__ import annotations

import contextlib
import dataclasses
import pickle
import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from datetime import datetime
from functools import cached_property, partial
from pathlib import Path
from typing import Any, Literal

import optuna
import torch
import yaml
from filelock import BaseFileLock, Timeout
from lightning.pytorch import LightningDataModule
from optuna.exceptions import StorageInternalError
from optuna.pruners import BasePruner
from optuna.samplers import BaseSampler, TPESampler
from optuna.study import Study
from optuna.trial import BaseTrial, FrozenTrial, Trial
from sqlalchemy.exc import SQLAlchemyError

from dact.calibration import Promise
from dact.console import quiet
from dact.files import replacing_folder, write_text
from dact.functional import check_choice, check_tolerance
from dact.model import DACT, check_classes
from dact.submodels import SubmodelConfig
from dact.tuning import pictures, studies, tensorboard
from dact.tuning.display import Display
from dact.tuning.environment import explained
from dact.tuning.estimate import expected_seconds
from dact.tuning.factories import default_data, default_model
from dact.tuning.features import FeaturesData, fingerprint_data, fingerprint_encoder, fingerprint_pretrained
from dact.tuning.final import fit_winners
from dact.tuning.frozen import FrozenEncoder, freeze
from dact.tuning.objective import (
    EXIT_HISTOGRAM,
    TrialSetting,
    make_trainer,
    recorded_cause,
    run_trial,
    seed_trial,
    trial_folder,
)
from dact.tuning.selection import LambdaSelection, Point, select_lambda
from dact.tuning.space import build_spaces, describe
from dact.tuning.stopping import check_stop
from dact.tuning.strategies import CurveSampler, LagPruner, SameLengthPruner
from dact.tuning.teacher import Teacher, teach
from dact.tuning.workers import run_side_by_side

EncoderTraining = Literal["finetune", "frozen"]
STAGES = ("submodels", "training", "lambda_reg")
DIRECTIONS: dict[str, list[Literal["minimize", "maximize"]]] = {
    "submodels": ["minimize"],
    "training": ["minimize"],
    "lambda_reg": ["minimize", "minimize"],
}
COMPARED = (  # arguments of the Trainer under which values compare only with their like
    "precision",
    "accumulate_grad_batches",
    "gradient_clip_val",
    "gradient_clip_algorithm",
    "limit_train_batches",
    "limit_val_batches",
    "max_steps",
    "overfit_batches",
)
CALIBRATION_SHARE = 0.5  # of the validation examples, kept from the studies where a promise is to be kept
SUBMODEL_FIELDS = [field.name for field in dataclasses.fields(SubmodelConfig)]


class TuningEngine:
    """Tune a DACT classifier in three Optuna studies, then fit it.

    1. ``submodels``: the architectures of classifier and confidence.
    2. ``training``: batch size, learning rate, epochs, weight decay, warm-up and the weight of the exit loss.
    3. ``lambda_reg``: λ, with two objectives, the task loss and the layers used.

    All objectives are read on one validation split, at the epoch of the lowest val_loss. Everything lies in
    ``log_dir/run_tag``; the same call again goes on where the last one stopped. If an earlier study then has another
    winner, trials of later studies that began under the old one stay on disk, but count no more.

    Args:
        output_dimension: Number of classes.
        time_out: Minutes for the three studies together, None for no bound; the final fit is never cut.
        model: Called once per trial with what the trial chose: ``model(**overrides) -> DACT``.
        data: Likewise, with overrides such as ``batch_size``: ``data(**overrides) -> LightningDataModule``.
        trainer: Arguments of the Trainer; ``max_epochs`` (4) counts where the study does not choose it. A trial runs on
            one device. dact has its own logger, checkpoints and progress in place of those given here.
        n_trials: Trials of each study in all, one number or one per study.
        search_space: Changes of the default ranges, by parameter; see `dact.tuning.space.build_spaces`.
        encoder_training: ``"finetune"`` trains everything in every trial; ``"frozen"`` computes the states of all
            layers once and trains the submodels on them.
        warm_up_epochs: With ``"frozen"``: epochs of a fit of the encoder with all exits before; 0 takes it as it is.
        lambda_selection: How λ is chosen from the third study; see `dact.tuning.selection.select_lambda`.
        max_loss_increase: For ``"max_loss_increase"``: the share by which the loss may exceed the best.
        max_layers: For ``"max_layers"``: the budget of layers.
        workers: Processes that run trials of one study side by side.
        storage: An address of an Optuna storage, or one; an sqlite file if left out.
        sampler: Of the first two studies; TPE if left out.
        pruner: Of the first two studies; it sees only trials of the same planned length.
        halting_tolerance: Of the tuned model, in [0, 1); as the model factory gives it if left out.
        promise: What early exit of the tuned model must keep, and with which confidence: then its dial is calibrated on
            examples that no study sees, half of the validation examples; see `dact.calibrate`.
        distillation: Share of a teacher's probabilities in the training targets of all trials, in [0, 1]. The teacher is
            the model of the factory, fine-tuned at full depth once per run, and trials start from its encoder; unless the
            data has a teacher of its own.
        compare_defaults: Whether the end also fits and measures what the factories make by default.
        log_dir: Where runs are kept.
        seed: Of everything.

    Raises:
        TypeError, ValueError: If an argument is not as described.

    Example:
        >>> engine = TuningEngine(output_dimension=3, time_out=5, n_trials=2)
        >>> engine.time_out
        300
    """

    classifier_config: dict[str, Any] | None = None
    confidence_config: dict[str, Any] | None = None
    external_config: dict[str, Any] | None = None
    lambda_reg: float | None = None

    def __init__(
        self,
        output_dimension: int = 3,
        time_out: int | None = None,
        *,
        model: Callable[..., DACT] | None = None,
        data: Callable[..., LightningDataModule] | None = None,
        trainer: Mapping[str, Any] | None = None,
        n_trials: int | Sequence[int] = 20,
        search_space: Mapping[str, Any] | None = None,
        encoder_training: EncoderTraining = "finetune",
        warm_up_epochs: int = 3,
        lambda_selection: LambdaSelection = "max_loss_increase",
        max_loss_increase: float = 0.02,
        max_layers: float | None = None,
        workers: int = 1,
        storage: str | optuna.storages.BaseStorage | None = None,
        sampler: BaseSampler | None = None,
        pruner: BasePruner | None = None,
        halting_tolerance: float | None = None,
        promise: Promise | None = None,
        distillation: float = 0.0,
        compare_defaults: bool = True,
        log_dir: str | Path = "lightning_logs",
        seed: int = 0,
    ) -> None:
        if time_out is not None and not time_out > 0:
            raise ValueError(f"TuningEngine: time_out is in minutes and must be above 0, got {time_out}")
        trials = [n_trials] * 3 if isinstance(n_trials, int) else list(n_trials)
        if len(trials) != 3 or any(isinstance(n, bool) or not isinstance(n, int) or n < 1 for n in trials):
            raise ValueError(f"TuningEngine: n_trials must be one or three integers of 1 or more, got {n_trials!r}")
        for name, value, least in (("workers", workers, 1), ("warm_up_epochs", warm_up_epochs, 0)):
            if value < least:
                raise ValueError(f"TuningEngine: {name} must be {least} or more, got {value}")
        check_choice("TuningEngine: encoder_training", encoder_training, EncoderTraining)
        check_choice("TuningEngine: lambda_selection", lambda_selection, LambdaSelection)
        if halting_tolerance is not None:
            check_tolerance(halting_tolerance)
        if promise is not None and promise.dial == "halting_tolerance" and halting_tolerance is not None:
            raise ValueError("TuningEngine: a promise chooses the halting_tolerance; give one of the two")
        if not 0 <= distillation <= 1:
            raise ValueError(f"TuningEngine: distillation is a share of the targets, in [0, 1], got {distillation}")
        if workers > 1 and isinstance(storage, optuna.storages.InMemoryStorage):
            raise ValueError(
                "TuningEngine: workers cannot share a storage in memory; leave storage out for an sqlite file"
            )
        if lambda_selection == "max_layers" and max_layers is None:
            raise ValueError("TuningEngine: lambda_selection='max_layers' needs max_layers, the budget of layers")
        for name, factory in (("model", model), ("data", data)):
            ready = isinstance(factory, (torch.nn.Module, LightningDataModule))  # a module can be called, too
            if factory is not None and (ready or not callable(factory)):
                raise TypeError(
                    f"TuningEngine: {name} must be a function that makes one, got {type(factory).__name__}: every trial "
                    "needs an instance of its own"
                )
        if workers > 1:
            _check_picklable(model=model, data=data)
        self.output_dimension = output_dimension
        self.time_out = None if time_out is None else time_out * 60
        self.model = model or partial(default_model, output_dimension)
        self.data = data or default_data
        self.trainer = {"max_epochs": 4, "gradient_clip_val": 1.0, **(trainer or {})}
        self.trainer["devices"] = _one_device(self.trainer)
        self.n_trials = dict(zip(STAGES, trials, strict=True))
        self.spaces = build_spaces(search_space)
        self.encoder_training = encoder_training
        self.warm_up_epochs = warm_up_epochs
        self.lambda_selection = lambda_selection
        self.max_loss_increase = max_loss_increase
        self.max_layers = max_layers
        self.workers = workers
        self.storage = storage
        self.sampler = sampler
        self.pruner = pruner
        self.halting_tolerance = halting_tolerance
        self.promise = promise
        self.distillation = distillation
        self.compare_defaults = compare_defaults
        self.log_dir = Path(log_dir)
        self.seed = seed
        self.display = Display()
        self.worker = False  # whether this is the copy of an engine in a worker process
        self._tag: str | None = None  # of the study that is under way
        self._deadline: float | None = None
        self._sampler_is_fresh = True
        self._shares: Iterator[tuple[float, int]] = iter(())

    @cached_property
    def run_tag(self) -> str:
        """The tag of runs that name none: a time stamp drawn once per engine."""
        return datetime.now().strftime("%Y-%m-%d_%H-%M-%S")

    # ------------------------------------------------------------------ the pipeline

    @explained
    def run_pipeline(self, run_tag: str = "") -> tuple[str, str]:
        """Run the three studies and the final fit.

        Args:
            run_tag: A name for this run; `run_tag` of the engine if empty.

        Returns:
            The paths of metrics.json and of the checkpoint.
        """
        with self._shared_time(run_tag):
            self.joint_tune_study(run_tag)
            self.train_tune_study(run_tag)
            self.lambda_reg_study(run_tag)
            return self.final_train(run_tag)

    @contextlib.contextmanager
    def _shared_time(self, run_tag: str) -> Iterator[None]:
        """Share time_out among the studies inside: what one leaves over is for those after it."""
        self._begin(run_tag)
        if self._announce():
            self._prepare()  # or it would take from the time of the later studies
        end = None if self.time_out is None else time.monotonic() + self.time_out
        self._shares = iter([] if end is None else [(end, 3), (end, 2), (end, 1)])
        try:
            yield
        finally:
            self._shares = iter(())

    def _seconds(self) -> float | None:
        """The time of the study that is about to start: a share of the pipeline's, or all of it for one called alone."""
        end, remaining = next(self._shares, (None, 1))
        return self.time_out if end is None else max(0.0, end - time.monotonic()) / remaining

    def _announce(self) -> bool:
        """Say how long the run will take, before it starts; whether there are trials to run."""
        left = {stage: self.n_trials[stage] - len(studies.finished(self._open(stage))) for stage in STAGES}
        if not any(count > 0 for count in left.values()):
            return False
        self._check_data()
        self.display.announce(left, expected_seconds(self, left), self.time_out)
        return True

    def _prepare(self) -> None:
        """Make what all trials share."""
        if self._is_taught:
            _ = self._teacher
        if self.encoder_training == "frozen":
            _ = self._frozen

    @explained
    def joint_tune_study(self, run_tag: str = "") -> tuple[dict[str, Any], dict[str, Any]]:
        """Study the architectures of the submodels and save the best.

        Returns:
            classifier_config and confidence_config, which ``SubmodelConfig(**config)`` accepts.
        """
        study = self._run_study("submodels", run_tag)
        self.classifier_config, self.confidence_config = _submodel_configs(studies.best(study).params)
        configs = {"classifier_config": self.classifier_config, "confidence_config": self.confidence_config}
        self._conclude("submodels", study, configs)
        return self.classifier_config, self.confidence_config

    @explained
    def train_tune_study(self, run_tag: str = "") -> dict[str, Any]:
        """Study the training parameters and save the best.

        Returns:
            external_config: arguments of the model and the data by name, and num_epochs.
        """
        study = self._run_study("training", run_tag)
        self.external_config = dict(studies.best(study).params)
        self._conclude("training", study, {"external_config": self.external_config})
        return self.external_config

    @explained
    def lambda_reg_study(self, run_tag: str = "") -> float:
        """Study λ with two objectives and save the winner, also as `lambda_reg` of the engine."""
        study = self._run_study("lambda_reg", run_tag)
        trials = studies.completed(study)
        points = [Point(trial.params["lambda_reg"], *trial.values) for trial in trials]
        chosen = select_lambda(
            points, self.lambda_selection, max_loss_increase=self.max_loss_increase, max_layers=self.max_layers
        )
        self.lambda_reg = chosen.lambda_reg
        exits = [(trial.params["lambda_reg"], trial.user_attrs[EXIT_HISTOGRAM]) for trial in trials]
        more = {
            "Pareto front": partial(pictures.pareto_picture, points, chosen),
            "exit histogram": partial(pictures.exits_picture, exits, self.lambda_reg),
        }
        self._conclude("lambda_reg", study, {"lambda_reg": {"lambda_reg": self.lambda_reg}}, more)
        return self.lambda_reg

    # ------------------------------------------------------------------ objectives

    def submodel_objective(self, trial: BaseTrial) -> float:
        """Train with the submodels that `trial` suggests; the validation loss at its best epoch."""
        chosen = {name: dimension.suggest(trial, name) for name, dimension in self.spaces["submodels"].items()}
        classifier, confidence = _submodel_configs(chosen)
        return self._train(trial, "submodels", {"classifier": classifier, "confidence": confidence})["val_loss"]

    def train_tune_objective(self, trial: BaseTrial) -> float:
        """Train with the training parameters that `trial` suggests; the validation loss at its best epoch."""
        chosen = {name: dimension.suggest(trial, name) for name, dimension in self.spaces["training"].items()}
        return self._train(trial, "training", chosen)["val_loss"]

    def lambda_objective(self, trial: BaseTrial) -> tuple[float, float]:
        """Train with the λ that `trial` suggests; (avg_task_loss, avg_exit_layer) under early exit."""
        chosen = {name: dimension.suggest(trial, name) for name, dimension in self.spaces["lambda_reg"].items()}
        best = self._train(trial, "lambda_reg", chosen)
        return best["val_task_loss"], best["val_exit_layer"]

    def _train(self, trial: BaseTrial, stage: str, chosen: Mapping[str, Any]) -> dict[str, float]:
        self._read_winners()
        with recorded_cause(trial):
            return self._train_chosen(trial, stage, chosen)

    def _train_chosen(self, trial: BaseTrial, stage: str, chosen: Mapping[str, Any]) -> dict[str, float]:
        before = self._chosen_before(stage)
        trial.set_user_attr(studies.UNDER, studies.digest(before))
        settings = {**before, **chosen}
        epochs = settings.pop("num_epochs", self.trainer["max_epochs"])
        folder = self.run_folder / stage
        setting = TrialSetting(stage, folder, self.trainer, self.seed, self._deadline)
        seed_trial(self.seed)
        model, data = self.build(settings)
        self.display.trial_started(trial, chosen)
        return run_trial(trial, setting, model, data, epochs=epochs, prune=len(DIRECTIONS[stage]) == 1)

    def _chosen_before(self, stage: str) -> dict[str, Any]:
        """What earlier stages have chosen, as far as they ran."""
        settings: dict[str, Any] = {}
        if stage != "submodels" and self.classifier_config is not None:
            settings |= {"classifier": self.classifier_config, "confidence": self.confidence_config}
        if stage in ("lambda_reg", "final") and self.external_config is not None:
            settings |= self.external_config
        if stage == "final":
            settings["lambda_reg"] = self.lambda_reg
        return settings

    def build(self, settings: Mapping[str, Any]) -> tuple[DACT, LightningDataModule]:
        """A model and a datamodule of their own for `settings`, which hold plain values."""
        overrides = dict(settings)
        size = {"batch_size": overrides.pop("batch_size")} if "batch_size" in overrides else {}
        if self.halting_tolerance is not None:
            overrides["halting_tolerance"] = self.halting_tolerance
        for name in ("classifier", "confidence"):
            if name in overrides:
                overrides[name] = SubmodelConfig(**overrides[name])
        if self.encoder_training == "finetune":
            return self.start(self.make_model(**overrides)), self.make_data(**size)
        if "learning_rate" in overrides:  # it is that of the submodels: nothing else learns
            overrides = {"submodel_learning_rate": None, **overrides}
        frozen = self._frozen
        if type(frozen.base) is DACT:  # no encoder is built for nothing
            model = DACT.from_config(frozen.base.config(), **{"encoder": frozen.base.encoder, **overrides})
        else:  # a class of the user's, which may have more arguments than a configuration knows
            model = self.make_model(**overrides)
            model.encoder, model.class_names = frozen.base.encoder, frozen.base.class_names
        size = {"batch_size": frozen.batch_size, **size}
        return model, FeaturesData(frozen.train, frozen.val, seed=self.seed, **size)

    def make_data(self, **overrides: Any) -> LightningDataModule:
        """A datamodule for a fit; with distillation, its training batches carry what the teacher says."""
        data = self.plain_data(**overrides)
        if self._is_taught:
            data.teacher_probabilities = self._teacher.probabilities  # type: ignore[attr-defined]
        return data

    def start(self, model: DACT) -> DACT:
        """Let a model start from the encoder of the run's own teacher, where there is one."""
        if self.distillation and self._teacher.encoder is not None:
            model.encoder.load_state_dict(self._teacher.encoder)
        return model

    def plain_data(self, **overrides: Any) -> LightningDataModule:
        """A datamodule of the factory, without a teacher; with a promise, one that keeps examples for calibration from
        the studies."""
        data = self.data(**overrides)
        if getattr(data, "teacher", None) is not None:
            data.teacher = None  # type: ignore[attr-defined]
        if self.promise is not None:
            if not hasattr(data, "calibration_dataloader"):
                raise ValueError(
                    f"TuningEngine: a promise needs examples that no study sees, but {type(data).__name__} has no "
                    "calibration_dataloader: give it one that returns labelled batches"
                )
            if getattr(data, "calibration_fraction", None) == 0.0:
                data.calibration_fraction = CALIBRATION_SHARE  # type: ignore[attr-defined]
        return data

    @property
    def _is_taught(self) -> bool:
        """Whether training batches carry what a teacher says."""
        return self.distillation > 0 or self._named_teacher is not None

    @cached_property
    def _named_teacher(self) -> str | None:
        """The teacher that the data names, if it does."""
        named: str | None = getattr(self.data(), "teacher", None)
        return named

    @cached_property
    def _teacher(self) -> Teacher:
        """The teacher of this run; see `dact.tuning.teacher`."""
        data = self.plain_data()
        if not hasattr(data, "teacher_probabilities"):
            raise ValueError(
                f"TuningEngine: distillation needs 'teacher' in training batches, but {type(data).__name__} has no "
                "teacher_probabilities: let it be a dact.data.text.TextDataModule"
            )
        with self._alone("teacher", "it trains the teacher"):
            return teach(self, self.run_folder / "teacher", self._named_teacher)

    def make_model(self, **overrides: Any) -> DACT:
        """A model of the factory, checked to have the classes of this engine."""
        if self.distillation:
            overrides = {"distillation": self.distillation, **overrides}
        model = self.model(**overrides)
        if model.output_dimension != self.output_dimension:
            raise ValueError(
                f"TuningEngine has output_dimension={self.output_dimension}, but the model factory makes models with "
                f"output_dimension={model.output_dimension}: give both the same"
            )
        return model

    # ------------------------------------------------------------------ the run

    @cached_property
    def _frozen(self) -> FrozenEncoder:
        """What all trials of frozen mode share; see `dact.tuning.frozen`."""
        with self._alone("features", "it computes the states of all layers"):
            return freeze(self, self.run_folder / "features")

    @cached_property
    def device(self) -> torch.device:
        """The device of the Trainer, for what runs outside of one."""
        return make_trainer(self.trainer, enable_checkpointing=False).strategy.root_device

    @cached_property
    def _model_fingerprint(self) -> str | None:
        """A digest of the configuration and the encoder's weights of the factory's model; None where it makes none: the
        trials will say why."""
        seed_trial(self.seed)
        try:
            model = self.model()
        except Exception:
            return None
        return studies.digest([model.config(), fingerprint_encoder(model.encoder)])

    @cached_property
    def data_fingerprint(self) -> str:
        """A digest of the training and validation data."""
        data = self.plain_data()
        data.prepare_data()
        data.setup("fit")
        return fingerprint_data(data.train_dataloader()) + fingerprint_data(data.val_dataloader())

    def _check_data(self) -> None:
        """Whether the data can do all that the run will ask of it: who finds out at its end has lost hours."""
        sizes = self.spaces["training"]["batch_size"].choices or [self.spaces["training"]["batch_size"].low]
        data = self.plain_data(batch_size=sizes[0])
        data.prepare_data()
        data.setup("test")
        data.test_dataloader()
        check_classes(getattr(data, "class_names", None), self.output_dimension)
        if self.promise is not None:
            model = self.make_model()
            if self.halting_tolerance is not None:
                model.halting_tolerance = self.halting_tolerance
            self.promise.check_model(model)

    # ------------------------------------------------------------------ studies

    def _begin(self, run_tag: str) -> str:
        """Turn to a run: what another run under this engine has chosen is not carried over."""
        quiet()
        check_stop()
        tag = studies.check_run_tag(run_tag or self.run_tag)
        if self._tag not in (None, tag):
            self.classifier_config = self.confidence_config = self.external_config = self.lambda_reg = None
            for made_once in ("_frozen", "_teacher"):
                self.__dict__.pop(made_once, None)
        self._tag = tag
        return tag

    @contextlib.contextmanager
    def _alone(self, name: str, what: str) -> Iterator[None]:
        """Hold a lock of the run: no other process, here or on another host, is in the same block."""
        lock = self._lock(name)
        try:
            lock.acquire(timeout=0)
        except Timeout:
            with self.display.stage(f"waiting for another process: {what}"):
                lock.acquire()
        try:
            yield
        finally:
            lock.release()

    def _run_study(self, stage: str, run_tag: str) -> studies.ComparableStudy:
        """Run what is left of a study."""
        self._begin(run_tag)
        seconds = self._seconds()
        study = self._open(stage)
        if study.left_out:
            self.display.note(f"study {stage}: {study.left_out} trials began under other winners and count no more")
        if len(studies.finished(study)) < self.n_trials[stage]:
            shutil.rmtree(self._pictures(stage), ignore_errors=True)  # of fewer trials
            self._prepare()  # before the clock of the study runs
            end = None if seconds is None else time.monotonic() + seconds
            with self.display.study(stage, study, self.n_trials[stage], end), studies.quiet_optuna():
                try:
                    if self.workers == 1:
                        self.share(stage, study, end)
                    else:
                        run_side_by_side(self, stage, study, end)
                finally:
                    # Whoever was stopped between two steps of a trial leaves none that says it is running.
                    with self._lock(stage), contextlib.suppress(SQLAlchemyError, StorageInternalError):
                        studies.end_orphans(study)
        studies.completed(study)
        return study

    @explained
    def work(self, stage: str, end: float | None) -> None:
        """What a worker does: open the study, and run trials until all are done."""
        study = self._open(stage)
        with studies.quiet_optuna():
            self.share(stage, study, end)

    def share(self, stage: str, study: Study, end: float | None) -> None:
        """Run trials of a study in this process until all are done, beside others that do the same."""
        self._deadline = end
        objectives: dict[str, Callable[[Trial], Any]] = {
            "submodels": self.submodel_objective,
            "training": self.train_tune_objective,
            "lambda_reg": self.lambda_objective,
        }
        try:
            studies.run_trials(
                study,
                objectives[stage],
                self.n_trials[stage],
                self._lock(stage),
                sampler=partial(self._make_sampler, stage),
                end=end,
                idle=self.display.refresh,
                ended=self.display.trial_ended,
                orphaned=partial(self._close_session, stage),
            )
        finally:
            self._deadline = None

    def _lock(self, name: str) -> BaseFileLock:
        return studies.run_lock(self.run_folder, name)

    def _close_session(self, stage: str, trial: FrozenTrial) -> None:
        """Say in TensorBoard that a trial whose process died is no more running."""
        folder = self.run_folder / stage / trial_folder(trial.number)
        if folder.is_dir():
            with tensorboard.writer(folder) as writer:
                tensorboard.log_outcome(writer, {}, succeeded=False)

    def _open(self, stage: str) -> studies.ComparableStudy:
        assert self._tag is not None
        self._read_winners()
        setting: dict[str, Any] = {
            "search space": describe(self.spaces[stage]),
            "promise": self.promise is not None,  # which keeps examples from the studies
            "data": self.data_fingerprint,
            "trainer": {name: self.trainer[name] for name in COMPARED if name in self.trainer},
            "encoder_training": self.encoder_training,
            "distillation": self.distillation,
            "halting_tolerance": self.halting_tolerance,
            "max_epochs": self.trainer["max_epochs"],
            "seed": self.seed,
        }
        if self._model_fingerprint is not None:
            setting["model"] = self._model_fingerprint
        if self._named_teacher is not None:
            setting["teacher"] = fingerprint_pretrained(self._named_teacher)
        if self.encoder_training == "frozen":
            setting["warm_up_epochs"] = self.warm_up_epochs
        plan = studies.StudyPlan(
            f"{self._tag}/{stage}",
            DIRECTIONS[stage],
            setting,
            known=[f"{self._tag}/{name}" for name in STAGES],
            under=studies.digest(self._chosen_before(stage)),
        )
        with self._alone("studies", "it opens the studies"), studies.quiet_optuna():
            storage = studies.open_storage(self.storage, self.run_folder)
            return studies.open_study(
                plan, storage, self.describe_storage(), SameLengthPruner(self.pruner or LagPruner())
            )

    def _make_sampler(self, stage: str, counted: int) -> BaseSampler:
        if stage == "lambda_reg":
            return CurveSampler()
        if self.sampler is None:
            # Drawn from how many trials count before: a study that goes on proposes what it would have proposed.
            return TPESampler(seed=self.seed + counted, n_startup_trials=5)
        if self._sampler_is_fresh and (counted or self.worker):
            self.sampler.reseed_rng()  # a seeded one would propose the points of another process again
        self._sampler_is_fresh = False
        return self.sampler

    def __getstate__(self) -> dict[str, Any]:
        """For workers: all but the display and what each process makes anew."""
        left_out = ("display", "_frozen", "_teacher", "_deadline", "_shares")
        return {name: value for name, value in self.__dict__.items() if name not in left_out}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state, display=Display(silent=True), _deadline=None, _shares=iter(()), worker=True)

    # ------------------------------------------------------------------ the final fit

    @explained
    def final_train(self, run_tag: str = "") -> tuple[str, str]:
        """Fit with all winners, keep the best epoch, and measure it.

        Returns:
            The paths of metrics.json and of the checkpoint, which `DACT.load_from_checkpoint` reads.

        Raises:
            RuntimeError: If a study has no winner yet; the message lists which.
        """
        tag = self._begin(run_tag)
        self._read_winners()
        untuned = [
            f"{name} ({study})"
            for name, study in (
                ("classifier_config", "joint_tune_study"),
                ("confidence_config", "joint_tune_study"),
                ("external_config", "train_tune_study"),
                ("lambda_reg", "lambda_reg_study"),
            )
            if getattr(self, name) is None
        ]
        if untuned:
            raise RuntimeError(f"final_train of {tag!r}: not tuned yet: {', '.join(untuned)}. Run these studies first")
        with self._alone("final", "it does the final fit"):
            return fit_winners(self, self.run_folder / "final", self._chosen_before("final"))

    # ------------------------------------------------------------------ on disk

    @property
    def run_folder(self) -> Path:
        """Where the run that is under way lies."""
        return self.log_dir / (self._tag or self.run_tag)

    def describe_storage(self) -> str:
        """Where its studies lie, for messages."""
        return studies.describe_storage(self.storage, self.run_folder)

    def _read_winners(self) -> None:
        """Take the winners of earlier studies from disk where this engine has none."""
        for name in ("classifier_config", "confidence_config", "external_config", "lambda_reg"):
            path = self.run_folder / f"{name}.yaml"
            if getattr(self, name) is None and path.is_file():
                content = yaml.safe_load(path.read_text())
                setattr(self, name, content["lambda_reg"] if name == "lambda_reg" else content)

    def _conclude(
        self,
        stage: str,
        study: Study,
        configs: Mapping[str, Mapping[str, Any]],
        more: Mapping[str, Callable[[], Any]] | None = None,
    ) -> None:
        """Save what a study chose and draw its pictures, for TensorBoard and as files."""
        assert self._tag is not None
        with self._alone(stage, "it draws a study"):
            for name, config in configs.items():
                path, content = self.run_folder / f"{name}.yaml", yaml.safe_dump(dict(config), sort_keys=False)
                if path.is_file() and path.read_text() != content:
                    shutil.rmtree(self._pictures(stage), ignore_errors=True)  # of another choice
                write_text(path, content)
            if self._pictures(stage).is_dir():
                return
            with studies.quiet_optuna():
                figures = pictures.study_pictures(study, len(studies.completed(study)))
            figures |= {name: draw() for name, draw in (more or {}).items()}
            with replacing_folder(self._pictures(stage)) as folder:
                with tensorboard.writer(folder) as writer:
                    dimensions = {name: found for space in self.spaces.values() for name, found in space.items()}
                    tensorboard.log_experiment(writer, dimensions)
                    for name, figure in figures.items():
                        writer.add_figure(name, figure, close=False)
                for name, figure in figures.items():
                    figure.savefig(folder / f"{name.replace(' ', '_')}.png")

    def _pictures(self, stage: str) -> Path:
        return self.run_folder / stage / "study"


def _check_picklable(**factories: Any) -> None:
    for name, factory in factories.items():
        try:
            pickle.dumps(factory)
        except Exception as error:
            raise TypeError(
                f"TuningEngine: with several workers, {name} must be a function that other processes can import, such as one "
                f"at the top of a module or a functools.partial of it: {error}"
            ) from None


def _one_device(trainer: Mapping[str, Any]) -> Any:
    """The ``devices`` of a Trainer, of which there is one."""
    devices = trainer.get("devices", "auto")
    if devices in ("auto", None):
        devices = 1
    # As for the Trainer: 1 and "1" count devices, [1] and "1," name one.
    named = [part for part in str(devices).strip("[](),").split(",") if part.strip()]
    one = str(devices) == "1" or (len(named) == 1 and (isinstance(devices, (list, tuple)) or "," in str(devices)))
    if not one or trainer.get("num_nodes", 1) != 1:
        raise ValueError(
            f"TuningEngine: a trial runs on one device of one node, got devices={devices!r} and "
            f"num_nodes={trainer.get('num_nodes', 1)}: give devices=1, or the number of one as [0], and run several trials "
            "side by side with workers"
        )
    return devices


def _submodel_configs(chosen: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """``{"classifier_dropout": …, "confidence_dropout": …}`` as one config per submodel."""

    def config(prefix: str) -> dict[str, Any]:
        return {name: chosen[f"{prefix}_{name}"] for name in SUBMODEL_FIELDS if f"{prefix}_{name}" in chosen}

    return config("classifier"), config("confidence")
