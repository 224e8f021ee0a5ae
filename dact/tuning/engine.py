"""TuningEngine: three studies and a final fit."""

from __future__ import annotations

import dataclasses
import multiprocessing
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime
from functools import cached_property, partial
from itertools import islice
from pathlib import Path
from typing import Any, Literal

import optuna
import torch
import yaml
from lightning.pytorch import LightningDataModule
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import TensorBoardLogger
from optuna.pruners import BasePruner
from optuna.samplers import BaseSampler, TPESampler
from optuna.study import Study
from optuna.trial import BaseTrial, FrozenTrial, Trial
from safetensors.torch import load_file, save_file

from dact import plots
from dact.console import quiet
from dact.functional import check_choice, check_tolerance
from dact.model import DACT
from dact.submodels import SubmodelConfig
from dact.tuning import pictures, report, studies, tensorboard
from dact.tuning.display import Display
from dact.tuning.estimate import BATCHES, measure_pace, random_states
from dact.tuning.features import FeaturesData, compute_features, fingerprint_data, fingerprint_encoder
from dact.tuning.objective import (
    EXIT_HISTOGRAM,
    History,
    TrialSetting,
    fit,
    make_trainer,
    recorded_cause,
    run_trial,
    seed_trial,
)
from dact.tuning.selection import LambdaSelection, Point, select_lambda
from dact.tuning.space import build_spaces, describe
from dact.tuning.strategies import CurveSampler, LagPruner, SameLengthPruner

EncoderTraining = Literal["finetune", "frozen"]
STAGES = ("submodels", "training", "lambda_reg")
DIRECTIONS: dict[str, list[Literal["minimize", "maximize"]]] = {
    "submodels": ["minimize"],
    "training": ["minimize"],
    "lambda_reg": ["minimize", "minimize"],
}
SUBMODEL_FIELDS = [field.name for field in dataclasses.fields(SubmodelConfig)]
HOPELESS = 5  # after so many failed trials and no finished one, a study ends


def default_model(output_dimension: int, **overrides: Any) -> DACT:
    """The small built-in encoder for the embedded data, as in configs/quickstart.yaml."""
    from dact.encoders import TransformerEncoder

    encoder = TransformerEncoder(vocab_size=42, num_layers=6, hidden_size=32, num_heads=2, slopes=(2.0, 2.0))
    return DACT(encoder=encoder, output_dimension=output_dimension, **{"learning_rate": 2e-3, **overrides})


def default_data(**overrides: Any) -> LightningDataModule:
    """The embedded data, as in configs/quickstart.yaml."""
    from dact.data import CompositionalSentiment

    return CompositionalSentiment(**{"max_depth": 3, **overrides})


class TuningEngine:
    """Tune a DACT classifier in three Optuna studies, then fit it.

    1. ``submodels``: the architectures of classifier and confidence.
    2. ``training``: batch size, learning rate, epochs, weight decay, warm-up and the weight of the exit loss.
    3. ``lambda_reg``: λ, with two objectives, the task loss and the layers used.

    All objectives are read on one validation split, at the epoch of the lowest val_loss. Everything lies in
    ``log_dir/run_tag``; the same call again goes on where the last one stopped.

    Args:
        output_dimension: Number of classes.
        time_out: Minutes for the three studies together, None for no bound; the final fit is never cut.
        model: Called once per trial with what the trial chose: ``model(**overrides) -> DACT``.
        data: Likewise, with overrides such as ``batch_size``: ``data(**overrides) -> LightningDataModule``.
        trainer: Arguments of the Trainer; ``max_epochs`` (4) counts where the study does not choose it.
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
        if lambda_selection == "max_layers" and max_layers is None:
            raise ValueError("TuningEngine: lambda_selection='max_layers' needs max_layers, the budget of layers")
        for name, factory in (("model", model), ("data", data)):
            ready = isinstance(factory, (torch.nn.Module, LightningDataModule))  # a module can be called, too
            if factory is not None and (ready or not callable(factory)):
                raise TypeError(
                    f"TuningEngine: {name} must be a function that makes one, got {type(factory).__name__}: every trial "
                    "needs an instance of its own"
                )
        self.output_dimension = output_dimension
        self.time_out = None if time_out is None else time_out * 60
        self.model = model or partial(default_model, output_dimension)
        self.data = data or default_data
        self.trainer = {"max_epochs": 4, "gradient_clip_val": 1.0, **(trainer or {})}
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
        self.compare_defaults = compare_defaults
        self.log_dir = Path(log_dir)
        self.seed = seed
        self.display = Display()
        self._tag: str | None = None  # of the study that is under way
        self._deadline: float | None = None

    @cached_property
    def run_tag(self) -> str:
        """The tag of runs that name none: a time stamp drawn once per engine."""
        return datetime.now().strftime("%Y-%m-%d_%H-%M-%S")

    # ------------------------------------------------------------------ the pipeline

    def run_pipeline(self, run_tag: str = "") -> tuple[str, str]:
        """Run the three studies and the final fit.

        Args:
            run_tag: A name for this run; `run_tag` of the engine if empty.

        Returns:
            The paths of metrics.json and of the checkpoint.
        """
        self._begin(run_tag)
        self._announce()
        end = None if self.time_out is None else time.monotonic() + self.time_out
        for remaining, study in zip((3, 2, 1), self._studies(), strict=True):
            # What one study leaves over is for those after it.
            share = None if end is None else max(0.0, end - time.monotonic()) / remaining
            study(run_tag, share)
        return self.final_train(run_tag)

    def _announce(self) -> None:
        """Say how long the run will take, before it starts."""
        left = {stage: self.n_trials[stage] - len(studies.finished(self._open(stage))) for stage in STAGES}
        if any(count > 0 for count in left.values()):
            self.display.announce(left, self._expected_seconds(left), self.time_out)

    def _expected_seconds(self, left: Mapping[str, int]) -> float:
        """From a few timed batches; pruning is left out, and so is what the final evaluation takes."""
        seed_trial(self.seed)
        data = self.data()
        data.prepare_data()
        data.setup("fit")
        loaders = data.train_dataloader(), data.val_dataloader()
        examples = [len(loader.dataset) for loader in loaders]
        epochs = {stage: float(self.trainer["max_epochs"]) for stage in STAGES}
        epochs["training"] = epochs["lambda_reg"] = self.spaces["training"]["num_epochs"].mean
        model = self._checked(self.model())
        pace = measure_pace(self.trainer, model, *loaders)
        seconds = 0.0
        if self.encoder_training == "frozen":
            if not (self._folder(self._tag or self.run_tag) / "features" / "val.safetensors").is_file():
                passes = pace.validation * sum(examples)
                seconds += self.warm_up_epochs * pace.epoch(*examples) + passes
            states = [[random_states(model.encoder, batch) for batch in islice(loader, BATCHES)] for loader in loaders]
            pace = measure_pace(self.trainer, self._checked(self.model()), *states)
        trials = sum(max(0, count) * epochs[stage] for stage, count in left.items())
        fits = epochs["training"] + self.compare_defaults * epochs["submodels"]
        return seconds + (trials / self.workers + fits) * pace.epoch(*examples)

    def _studies(self) -> tuple[Callable[[str, float | None], Any], ...]:
        return self._joint_tune_study, self._train_tune_study, self._lambda_reg_study

    def joint_tune_study(self, run_tag: str = "") -> tuple[dict[str, Any], dict[str, Any]]:
        """Study the architectures of the submodels and save the best.

        Returns:
            classifier_config and confidence_config, which ``SubmodelConfig(**config)`` accepts.
        """
        return self._joint_tune_study(run_tag, self.time_out)

    def train_tune_study(self, run_tag: str = "") -> dict[str, Any]:
        """Study the training parameters and save the best.

        Returns:
            external_config: arguments of the model and the data by name, and num_epochs.
        """
        return self._train_tune_study(run_tag, self.time_out)

    def lambda_reg_study(self, run_tag: str = "") -> float:
        """Study λ with two objectives and save the winner, also as `lambda_reg` of the engine."""
        return self._lambda_reg_study(run_tag, self.time_out)

    def _joint_tune_study(self, run_tag: str, seconds: float | None) -> tuple[dict[str, Any], dict[str, Any]]:
        study = self._run_study("submodels", self.submodel_objective, run_tag, seconds)
        self.classifier_config, self.confidence_config = _submodel_configs(study.best_trial.params)
        self._save("classifier_config", self.classifier_config)
        self._save("confidence_config", self.confidence_config)
        self._draw("submodels", study, {})
        return self.classifier_config, self.confidence_config

    def _train_tune_study(self, run_tag: str, seconds: float | None) -> dict[str, Any]:
        study = self._run_study("training", self.train_tune_objective, run_tag, seconds)
        self.external_config = dict(study.best_trial.params)
        self._save("external_config", self.external_config)
        self._draw("training", study, {})
        return self.external_config

    def _lambda_reg_study(self, run_tag: str, seconds: float | None) -> float:
        study = self._run_study("lambda_reg", self.lambda_objective, run_tag, seconds)
        points = [Point(t.params["lambda_reg"], *t.values) for t in studies.completed(study)]
        chosen = select_lambda(
            points, self.lambda_selection, max_loss_increase=self.max_loss_increase, max_layers=self.max_layers
        )
        self.lambda_reg = chosen.lambda_reg
        self._save("lambda_reg", {"lambda_reg": self.lambda_reg})
        exits = [(t.params["lambda_reg"], t.user_attrs[EXIT_HISTOGRAM]) for t in studies.completed(study)]
        more = {
            "Pareto front": pictures.pareto_picture(points, chosen),
            "exit histogram": pictures.exits_picture(exits, self.lambda_reg),
        }
        self._draw("lambda_reg", study, more)
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
        self._read_winners(self._tag or self.run_tag)
        with recorded_cause(trial):
            return self._train_chosen(trial, stage, chosen)

    def _train_chosen(self, trial: BaseTrial, stage: str, chosen: Mapping[str, Any]) -> dict[str, float]:
        settings = {**self._chosen_before(stage), **chosen}
        epochs = settings.pop("num_epochs", self.trainer["max_epochs"])
        folder = self._folder(self._tag or self.run_tag) / stage
        setting = TrialSetting(stage, folder, self.trainer, self.seed, self._deadline)
        seed_trial(self.seed)
        model, data = self._build(settings)
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

    def _build(self, settings: Mapping[str, Any]) -> tuple[DACT, LightningDataModule]:
        """A model and a datamodule of their own for `settings`, which hold plain values."""
        overrides = dict(settings)
        size = {"batch_size": overrides.pop("batch_size")} if "batch_size" in overrides else {}
        if self.halting_tolerance is not None:
            overrides["halting_tolerance"] = self.halting_tolerance
        for name in ("classifier", "confidence"):
            if name in overrides:
                overrides[name] = SubmodelConfig(**overrides[name])
        if self.encoder_training == "finetune":
            return self._checked(self.model(**overrides)), self.data(**size)
        base, folder, batch_size = self._frozen
        model = type(base).from_config(base.config(), **{"encoder": base.encoder, **overrides})
        return model, FeaturesData(folder, seed=self.seed, **{"batch_size": batch_size, **size})

    def _checked(self, model: DACT) -> DACT:
        if model.output_dimension != self.output_dimension:
            raise ValueError(
                f"TuningEngine has output_dimension={self.output_dimension}, but the model factory makes models with "
                f"output_dimension={model.output_dimension}: give both the same"
            )
        return model

    # ------------------------------------------------------------------ frozen mode

    @cached_property
    def _frozen(self) -> tuple[DACT, Path, int]:
        """The model whose warmed-up encoder all trials share, never to be trained again, where its states lie, and the
        batch size of the data where no trial chooses one."""
        folder = self._folder(self._tag or self.run_tag) / "features"
        seed_trial(self.seed)
        model, data = self._checked(self.model(lambda_reg=0.0)), self.data()
        data.prepare_data()
        data.setup("fit")
        origin = f"{fingerprint_encoder(model.encoder)}/{self._data_fingerprint}/{self.warm_up_epochs}/{self.seed}"
        self._warm_up(model, data, folder / "encoder.safetensors", origin)
        model.encoder.eval().requires_grad_(False)
        if self._uses_cuda:
            model.cuda()
        made_of = f"{fingerprint_encoder(model.encoder)}/{self._data_fingerprint}"
        for split, loader in (("train", data.train_dataloader()), ("val", data.val_dataloader())):
            compute_features(model.encoder, loader, folder / f"{split}.safetensors", made_of)
        # λ and the rest are as the factory gives them: only the encoder was to be warmed up without a price.
        base = self.model()
        base.encoder = model.encoder
        return base, folder, next(iter(data.train_dataloader()))["labels"].shape[0]

    def _warm_up(self, model: DACT, data: LightningDataModule, path: Path, origin: str) -> None:
        """Fit the encoder with all exits, or read the weights of an earlier warm-up of the same origin."""
        if not self.warm_up_epochs:
            return
        if path.is_file():
            weights = load_file(path)
            if weights.pop("origin").numpy().tobytes().decode() == origin:
                model.encoder.load_state_dict(weights)
                return
        with self.display.fit(f"warm-up of the encoder, {self.warm_up_epochs} epochs") as progress:
            trainer = make_trainer(
                self.trainer, max_epochs=self.warm_up_epochs, enable_checkpointing=False, callbacks=[progress]
            )
            fit(trainer, model, data)
        weights = {name: tensor.detach().cpu().clone() for name, tensor in model.encoder.state_dict().items()}
        weights["origin"] = torch.frombuffer(bytearray(origin.encode()), dtype=torch.uint8)
        path.parent.mkdir(parents=True, exist_ok=True)
        save_file(weights, path)

    @cached_property
    def _data_fingerprint(self) -> str:
        data = self.data()
        data.prepare_data()
        data.setup("fit")
        return fingerprint_data(data.train_dataloader()) + fingerprint_data(data.val_dataloader())

    # ------------------------------------------------------------------ studies

    def _begin(self, run_tag: str) -> str:
        """Turn to a run: what another run under this engine has chosen is not carried over."""
        quiet()
        tag = studies.check_run_tag(run_tag or self.run_tag)
        if self._tag not in (None, tag):
            self.classifier_config = self.confidence_config = self.external_config = self.lambda_reg = None
            self.__dict__.pop("_frozen", None)
        self._tag = tag
        return tag

    def _run_study(self, stage: str, objective: Callable[[Trial], Any], run_tag: str, seconds: float | None) -> Study:
        """Run what is left of a study, within `seconds`, and draw its pictures."""
        self._begin(run_tag)
        study = self._open(stage)
        left = self.n_trials[stage] - len(studies.finished(study))
        if left > 0:
            if self.encoder_training == "frozen":
                _ = self._frozen  # computed before the clock of the study runs
            self._deadline = None if seconds is None else time.monotonic() + seconds
            with self.display.study(stage, study, self.n_trials[stage], self._deadline), _quiet_optuna():
                if self.workers == 1:
                    self._optimize(stage, study, left)
                else:
                    self._optimize_side_by_side(stage, study, left)
            self._deadline = None
        studies.completed(study)
        return study

    def _open(self, stage: str) -> Study:
        assert self._tag is not None
        storage = studies.open_storage(self.storage, self._folder(self._tag))
        setting = {
            "search space": describe(self.spaces[stage]),
            "data": self._data_fingerprint,
            "encoder_training": self.encoder_training,
        }
        with _quiet_optuna():
            study = studies.open_study(
                f"{self._tag}/{stage}", storage, DIRECTIONS[stage], TPESampler(), self._make_pruner(), setting
            )
            study.sampler = self._make_sampler(stage, len(study.get_trials(deepcopy=False)))
        return study

    def _make_sampler(self, stage: str, trials: int) -> BaseSampler:
        if stage == "lambda_reg":
            return CurveSampler()
        # A seed of its own for what follows: the same one again would propose the same points again.
        return self.sampler or TPESampler(seed=self.seed + trials, n_startup_trials=5)

    def _make_pruner(self) -> BasePruner:
        return SameLengthPruner(self.pruner or LagPruner())

    def _optimize(self, stage: str, study: Study, trials: int) -> None:
        objectives: dict[str, Callable[[Trial], Any]] = {
            "submodels": self.submodel_objective,
            "training": self.train_tune_objective,
            "lambda_reg": self.lambda_objective,
        }
        seconds = None if self._deadline is None else max(0.0, self._deadline - time.monotonic())
        study.optimize(
            objectives[stage],
            n_trials=trials,
            timeout=seconds,
            catch=(Exception,),
            callbacks=[_stop_if_hopeless, self.display.trial_ended],
        )

    def _optimize_side_by_side(self, stage: str, study: Study, trials: int) -> None:
        """Share the trials among processes; a common counter keeps their sum."""
        context = multiprocessing.get_context("spawn")
        budget = context.Value("i", trials)
        seconds = None if self._deadline is None else self._deadline - time.monotonic()
        threads = max(1, torch.get_num_threads() // self.workers)
        processes = [
            context.Process(target=_work, args=(self, stage, budget, seconds, threads, rank))
            for rank in range(self.workers)
        ]
        for process in processes:
            process.start()
        try:
            while any(process.is_alive() for process in processes):
                time.sleep(0.5)
                self.display.refresh()
        except KeyboardInterrupt:
            for process in processes:
                process.join(10)
            raise
        finally:
            for process in processes:
                if process.is_alive():
                    process.terminate()
                process.join()

    def __getstate__(self) -> dict[str, Any]:
        """For workers: all but the display and what each process makes anew."""
        left_out = ("display", "_frozen", "_deadline")
        return {name: value for name, value in self.__dict__.items() if name not in left_out}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state, display=Display(silent=True), _deadline=None)

    # ------------------------------------------------------------------ the final fit

    def final_train(self, run_tag: str = "") -> tuple[str, str]:
        """Fit with all winners, keep the best epoch, and measure it.

        Returns:
            The paths of metrics.json and of the checkpoint, which `DACT.load_from_checkpoint` reads.

        Raises:
            RuntimeError: If a study has no winner yet; the message lists which.
        """
        tag = self._begin(run_tag)
        self._read_winners(tag)
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
        folder = self._folder(tag) / "final"
        metrics_path, model_path = folder / "metrics.json", folder / "checkpoints" / "best.ckpt"
        winners = self._chosen_before("final")
        config = yaml.safe_dump({**winners, "halting_tolerance": self.halting_tolerance}, sort_keys=False)
        same = (folder / "config.yaml").is_file() and (folder / "config.yaml").read_text() == config
        if not (same and metrics_path.is_file() and model_path.is_file()):
            report.write_text(folder / "config.yaml", config)
            settings = {name: value for name, value in winners.items() if name != "num_epochs"}
            history = self._final_fit(folder, settings, winners["num_epochs"], resume=same)
            self._measure(folder, history)
        self.display.summary(self, folder)
        return str(metrics_path), str(model_path)

    def _final_fit(self, folder: Path, settings: Mapping[str, Any], epochs: int, resume: bool) -> History:
        """Fit with `settings` and keep the best epoch and the last."""
        seed_trial(self.seed)
        model, data = self._build(settings)
        model.class_names = model.class_names or getattr(self.data(), "class_names", None)
        checkpoint = ModelCheckpoint(
            folder / "checkpoints", "best", monitor="val_loss", save_last=True, enable_version_counter=False
        )
        history = History()
        logger = TensorBoardLogger(folder.parent, name="", version=folder.name, default_hp_metric=False)
        last = folder / "checkpoints" / "last.ckpt"
        with self.display.fit(f"{folder.name} fit, {epochs} epochs") as progress:
            trainer = make_trainer(
                self.trainer,
                max_epochs=epochs,
                logger=logger,
                callbacks=[history, progress, checkpoint],
                enable_checkpointing=True,
            )
            last_path = str(last) if resume and last.is_file() else None
            fit(trainer, model, data, ckpt_path=last_path, final=folder.name == "final")
        return history

    def _measure(self, folder: Path, history: History) -> None:
        """metrics.json, pictures and the model/ folder. The test split is looked at here, once."""
        data = self._measured_data()
        model = self._fitted(folder)
        with self.display.stage("measuring the final model"):
            validation = report.evaluate(model, data.val_dataloader())
            test = report.evaluate(model, data.test_dataloader())
        metrics = {
            "validation": validation.entry,
            "test": test.entry,
            "tolerance_curve": validation.curve,
            "history": history.epochs,
            "lambda_reg": self.lambda_reg,
            "halting_tolerance": model.halting_tolerance,
            "layers": model.encoder.num_layers,
        }
        model.cpu().save_pretrained(folder / "model")
        tokenizer = getattr(data, "tokenizer", None)
        if tokenizer is not None:
            tokenizer.save_pretrained(str(folder / "model"))
        logger = TensorBoardLogger(folder.parent, name="", version="final", default_hp_metric=False)
        figures = {
            "tolerance": pictures.tolerance_picture(validation.curve, model.encoder.num_layers),
            "exit histogram": pictures.exit_picture(test.entry),
        }
        if test.depths is not None:
            layers = model.encoder.num_layers
            figures["depth against exit layer"] = plots.depth_against_exit(test.depths, test.exit_layers, layers)
        for name, figure in figures.items():
            figure.savefig(folder / f"{name.replace(' ', '_')}.png")
            logger.experiment.add_figure(name, figure)
        logger.finalize("success")
        if self.compare_defaults:
            self._measure_defaults(folder / "defaults", data)
        report.write_json(folder / "metrics.json", metrics)

    def _measure_defaults(self, folder: Path, data: LightningDataModule) -> None:
        """Fit and measure what the factories make by themselves, the same way: what tuning has to beat."""
        if (folder / "metrics.json").is_file():
            return
        self._final_fit(folder, {}, self.trainer["max_epochs"], resume=False)
        model = self._fitted(folder)
        loaders = {"validation": data.val_dataloader(), "test": data.test_dataloader()}
        entries = {name: report.evaluate(model, loader, timed=False).entry for name, loader in loaders.items()}
        report.write_json(folder / "metrics.json", entries)
        shutil.rmtree(folder / "checkpoints")

    def _measured_data(self) -> LightningDataModule:
        size = {name: value for name, value in (self.external_config or {}).items() if name == "batch_size"}
        data = self.data(**size)
        for stage in ("fit", "test"):
            data.setup(stage)
        return data

    def _fitted(self, folder: Path) -> DACT:
        """The model of the best epoch, on the device that it should use."""
        encoder = self.model().encoder
        own = encoder if encoder.config() is None else None  # one of the user's, which no checkpoint can rebuild
        model = DACT.load_from_checkpoint(folder / "checkpoints" / "best.ckpt", encoder=own).eval()
        return model.cuda() if self._uses_cuda else model

    @property
    def _uses_cuda(self) -> bool:
        return torch.cuda.is_available() and self.trainer.get("accelerator", "auto") != "cpu"

    # ------------------------------------------------------------------ on disk

    def _folder(self, tag: str) -> Path:
        return self.log_dir / tag

    def _save(self, name: str, config: Mapping[str, Any]) -> None:
        assert self._tag is not None
        report.write_text(self._folder(self._tag) / f"{name}.yaml", yaml.safe_dump(dict(config), sort_keys=False))

    def _read_winners(self, tag: str) -> None:
        """Take the winners of earlier studies from disk where this engine has none."""
        for name in ("classifier_config", "confidence_config", "external_config", "lambda_reg"):
            path = self._folder(tag) / f"{name}.yaml"
            if getattr(self, name) is None and path.is_file():
                content = yaml.safe_load(path.read_text())
                setattr(self, name, content["lambda_reg"] if name == "lambda_reg" else content)

    def _draw(self, stage: str, study: Study, more: Mapping[str, Any]) -> None:
        """The pictures of a study, for TensorBoard and as files."""
        assert self._tag is not None
        with _quiet_optuna():
            figures = {**pictures.study_pictures(study, len(studies.completed(study))), **more}
        logger = TensorBoardLogger(self._folder(self._tag) / stage, "", "study", default_hp_metric=False)
        tensorboard.log_experiment(logger, {name: d for space in self.spaces.values() for name, d in space.items()})
        for name, figure in figures.items():
            logger.experiment.add_figure(name, figure, close=False)
            figure.savefig(Path(logger.log_dir) / f"{name.replace(' ', '_')}.png")
        logger.finalize("success")


def _submodel_configs(chosen: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """``{"classifier_dropout": …, "confidence_dropout": …}`` as one config per submodel."""

    def config(prefix: str) -> dict[str, Any]:
        return {name: chosen[f"{prefix}_{name}"] for name in SUBMODEL_FIELDS if f"{prefix}_{name}" in chosen}

    return config("classifier"), config("confidence")


def _stop_if_hopeless(study: Study, trial: FrozenTrial) -> None:
    """End a study whose first trials all failed: the rest would, too."""
    done = studies.finished(study)
    if len(done) >= HOPELESS and all(t.state == optuna.trial.TrialState.FAIL for t in done):
        study.stop()


def _work(engine: TuningEngine, stage: str, budget: Any, seconds: float | None, threads: int, rank: int) -> None:
    """One worker process: take trials from the common budget until it is empty."""
    quiet()
    torch.set_num_threads(threads)
    end = None if seconds is None else time.monotonic() + seconds
    with _quiet_optuna():
        study = optuna.load_study(
            study_name=f"{engine._tag}/{stage}",
            storage=studies.open_storage(engine.storage, engine._folder(engine._tag or "")),
            pruner=engine._make_pruner(),
        )
        study.sampler = engine._make_sampler(stage, len(study.get_trials(deepcopy=False)) + 1000 * rank)
        while end is None or time.monotonic() < end:
            with budget.get_lock():
                if budget.value <= 0:
                    return
                budget.value -= 1
            engine._deadline = end
            engine._optimize(stage, study, 1)


class _quiet_optuna:  # noqa: N801 - reads as a statement
    """Keep Optuna's log lines off the console: the table shows what they say."""

    def __enter__(self) -> None:
        self.level = optuna.logging.get_verbosity()
        optuna.logging.set_verbosity(optuna.logging.CRITICAL)

    def __exit__(self, *_: object) -> None:
        optuna.logging.set_verbosity(self.level)
