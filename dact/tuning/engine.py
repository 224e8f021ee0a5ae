"""TuningEngine: three studies and a final fit."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from datetime import datetime
from functools import cached_property, partial
from pathlib import Path
from typing import Annotated, Any

import optuna
from lightning.pytorch import LightningDataModule
from optuna.pruners import BasePruner
from optuna.samplers import BaseSampler
from optuna.study import Study
from optuna.trial import BaseTrial, FrozenTrial

from dact.agreement import check_classes
from dact.calibration import Promise
from dact.checks import Range, check_arguments
from dact.data.base import TextDataModule
from dact.factories import default_data, default_model
from dact.model import DACT
from dact.tuning import report, studies
from dact.tuning.confirmation import confirm
from dact.tuning.final import final_fit
from dact.tuning.plan import make_plan
from dact.tuning.prepared import Prepared, prepare
from dact.tuning.progress import Progress
from dact.tuning.recipe import EncoderTraining, Recipe, resolve_promise, trainer_arguments
from dact.tuning.run import Run
from dact.tuning.search import CurveSampler, LagPruner, SameLengthPruner, SeededSampler
from dact.tuning.selection import MAX_LOSS_INCREASE, LambdaSelection, check_rule, select_lambda
from dact.tuning.settings import Settings
from dact.tuning.space import build_spaces
from dact.tuning.stages import LAMBDA_REG, STAGES, SUBMODELS, TRAINING, Stage, trials_per_stage
from dact.tuning.trainer import Deadline, isolated, seeded
from dact.tuning.trial import Objective


class TuningEngine:
    """Tune a DACT classifier in three Optuna studies, then fit it.

    A run first fine-tunes the whole encoder with one head. It is the teacher, and results are
    compared with it. Three studies follow, which start from the recommended settings:

    1. ``submodels``: the architectures of classifier and confidence.
    2. ``training``: batch size, learning rates, epochs, the weight of the exit loss, detached exits
       (not in frozen mode), and how many layers are kept.
    3. ``lambda_reg``: λ, with two objectives, the task loss and the layers used.

    The tuned settings are used only if a re-fit shows that they save layers, or gain accuracy, by
    more than its standard error. The final fit, its promise and its measurements come last.

    All objectives are measured on one validation split, at the epoch of the lowest val_loss. All
    files are written to ``log_dir/run_tag``, and calling a method again resumes the run. If an
    earlier study finds a new winner, later studies start over.

    Args:
        output_dimension: Number of classes.
        time_out: Minutes for the three studies together, or None for no bound. The final fit is
            never cut short. The attribute `time_out` is in seconds.
        model: Factory of models, ``model(**overrides) -> DACT``, called once per trial with the
            trial's choices.
        data: Factory of datamodules, ``data(**overrides) -> LightningDataModule``, called in the
            same way with overrides such as ``batch_size``; all must hold the same examples.
        trainer: Arguments of the Trainer; ``max_epochs`` (default 4) applies where no study chooses
            the number. A trial runs on one device, with its own copy of every callback. dact
            provides loggers, checkpoints and progress bars.
        n_trials: Total number of trials of each study, one number or one per study. With 0, the
            recommended settings are fitted without a study.
        search_space: Changes to the default ranges, by parameter; see
            `dact.tuning.space.build_spaces`.
        encoder_training: ``"finetune"`` trains everything in every trial; ``"frozen"`` computes the
            states of all layers once and trains the submodels on them.
        warm_up_epochs: With ``"frozen"``: number of epochs in which the encoder is fine-tuned with
            all exits before its states are computed; 0 uses the encoder as it is.
        final_training: ``"finetune"`` trains everything in the final fit, from the whole encoder's
            weights; ``"frozen"`` keeps the encoder of frozen mode.
        lambda_selection: Rule that chooses λ; see `dact.tuning.selection.select_lambda`. Defaults
            to ``"promise"`` if the promise is about accuracy, else to ``"one_standard_error"``.
        max_loss_increase: For ``"max_loss_increase"``: share by which the loss may exceed the best.
        max_layers: For ``"max_layers"``: budget of layers, 1 or more.
        workers: Number of processes that run trials of one study in parallel, spread over the GPUs
            of the machine.
        storage: An Optuna storage or its address; an sqlite file if left out. Machines that run
            the same tag with the same server share the trials.
        sampler: Sampler of the first two studies; TPE if left out.
        pruner: Pruner of the first two studies, which sees only trials of the same planned length.
        callbacks: Optuna callbacks ``(study, trial)``, called after each trial.
        halting_tolerance: Tolerance of the tuned model, in [0, 1); the factory's if left out.
        promise: Promise that early exit of the tuned model must keep; by default at most one point
            of accuracy below the same model without early exit, with 95 % confidence. Its dial is
            calibrated on examples that no study sees, by default half of the validation examples.
            If these are too few for the default promise, an estimate sets the dial. With None, the
            dials stay as given; by default, the class is then provably that of all layers.
        distillation: Share of a teacher's probabilities in the training targets of all trials, in
            [0, 1]. Defaults to the factory's value, or 0.5 if it has none and the data supports a
            teacher. The teacher is the whole encoder, unless the data names another.
        consistency: Weight of the divergence between two passes (see `DACT`) in fits of the encoder
            after the studies, 0 or more. Defaults to the factory's value, or 5 if it has none and
            its encoder has dropout.
        compare_defaults: Whether to also fit and measure the factories' settings without tuning.
        log_dir: Folder of all runs.
        seed: Seed for data order, initialisation and samplers.

    Attributes:
        classifier_config: Winner of the current run, or None, as are `confidence_config`,
            `external_config` and `lambda_reg`.
        progress: Console of the run.
        worker_setup: Function that each worker process calls first, or None.

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
        time_out: Annotated[float, Range("(0, inf]", "it is in minutes")] | None = None,
        *,
        model: Callable[..., DACT] | None = None,
        data: Callable[..., LightningDataModule] | None = None,
        trainer: Mapping[str, Any] | None = None,
        n_trials: int | Sequence[int] = 20,
        search_space: Mapping[str, Any] | None = None,
        encoder_training: EncoderTraining = "finetune",
        warm_up_epochs: int = 3,
        final_training: EncoderTraining = "finetune",
        lambda_selection: LambdaSelection | None = None,
        max_loss_increase: Annotated[float, Range("[0, inf)")] = MAX_LOSS_INCREASE,
        max_layers: Annotated[float, Range("[1, inf)")] | None = None,
        workers: Annotated[int, Range("[1, inf)")] = 1,
        storage: str | optuna.storages.BaseStorage | None = None,
        sampler: BaseSampler | None = None,
        pruner: BasePruner | None = None,
        callbacks: Sequence[Callable[[Study, FrozenTrial], None]] = (),
        halting_tolerance: float | None = None,
        promise: Promise | None = Promise(),
        distillation: float | None = None,
        consistency: float | None = None,
        compare_defaults: bool = True,
        log_dir: str | Path = "lightning_logs",
        seed: int = 0,
    ) -> None:
        check_arguments(TuningEngine.__init__, locals(), "TuningEngine: ")
        self.recipe = Recipe(
            output_dimension=output_dimension,
            model=model or partial(default_model, output_dimension),
            data=data or partial(default_data, seed=seed),
            trainer=trainer_arguments(trainer),
            encoder_training=encoder_training,
            final_training=final_training,
            warm_up_epochs=warm_up_epochs,
            distillation=distillation,
            consistency=consistency,
            halting_tolerance=halting_tolerance,
            promise=promise,
            seed=seed,
            compare_defaults=compare_defaults,
        )
        check_rule(lambda_selection, max_layers)
        frozen, final_frozen = encoder_training == "frozen", final_training == "frozen"
        self.time_out = None if time_out is None else time_out * 60
        self.n_trials = trials_per_stage(n_trials)
        self.search_space = dict(search_space or {})
        self.spaces = build_spaces(search_space, frozen=frozen, final_frozen=final_frozen)
        self.select = partial(
            select_lambda,
            rule=lambda_selection,
            max_loss_increase=max_loss_increase,
            max_layers=max_layers,
            allowed=None if promise is None else promise.max_accuracy_loss,
            from_best=frozen,
        )
        self.workers = workers
        self.storage = storage
        self.sampler = sampler or SeededSampler(seed)
        self.pruner = pruner or LagPruner()
        self.callbacks = list(callbacks)
        self.log_dir = Path(log_dir)
        self.progress = Progress()
        self.worker_setup: Callable[[], None] | None = None
        self._prepared: Prepared | None = None

    @cached_property
    def run_tag(self) -> str:
        """The default tag of runs: a time stamp, taken once per engine, unless it is set."""
        return datetime.now().strftime("%Y-%m-%d_%H-%M-%S")

    # ------------------------------------------------------------------ the methods

    @isolated()
    def run_pipeline(self, run_tag: str = "") -> tuple[str, str]:
        """Run the three studies and the final fit.

        Args:
            run_tag: Name of the run; `run_tag` of the engine if empty.

        Returns:
            The paths of metrics.json and of the checkpoint.
        """
        with self._run(run_tag, measured=True) as prepared:
            end = Deadline(self.time_out)
            for stage, stages_left in zip(STAGES, (3, 2, 1), strict=True):
                if self.n_trials[stage.name]:
                    self._tune(stage, prepared, Deadline(end.left / stages_left))
            return self._finish(prepared)

    @isolated()
    def joint_tune_study(self, run_tag: str = "") -> tuple[dict[str, Any], dict[str, Any]]:
        """Run the study of the submodels' architectures, and save its winner.

        Returns:
            classifier_config and confidence_config, which ``SubmodelConfig(**config)`` accepts.
        """
        found = self._tune_one(SUBMODELS, run_tag)
        return found["classifier_config"], found["confidence_config"]

    @isolated()
    def train_tune_study(self, run_tag: str = "") -> dict[str, Any]:
        """Run the study of the training parameters, and save its winner.

        Returns:
            external_config: arguments of the model and the data by name, and num_epochs.
        """
        return self._tune_one(TRAINING, run_tag)["external_config"]

    @isolated()
    def lambda_reg_study(self, run_tag: str = "") -> float:
        """Run the study of λ, which has two objectives, save its winner and return it."""
        return self._tune_one(LAMBDA_REG, run_tag)["lambda_reg"]

    @isolated()
    def submodel_objective(self, trial: BaseTrial) -> float:
        """Train with the submodels that `trial` suggests; return the lowest validation loss."""
        return float(self._objective(SUBMODELS, trial))

    @isolated()
    def train_tune_objective(self, trial: BaseTrial) -> float:
        """Train with the parameters that `trial` suggests; return the lowest validation loss."""
        return float(self._objective(TRAINING, trial))

    @isolated()
    def lambda_objective(self, trial: BaseTrial) -> tuple[float, float]:
        """Train with the λ that `trial` suggests; return avg_task_loss and avg_exit_layer."""
        loss, layers = self._objective(LAMBDA_REG, trial)
        return loss, layers

    @isolated()
    def final_train(self, run_tag: str = "") -> tuple[str, str]:
        """Re-fit the recommended and the tuned settings, do the final fit, and measure its model.

        Returns:
            The paths of metrics.json and of the checkpoint.

        Raises:
            RuntimeError: If a study has no winner yet; the message lists what is missing.
        """
        with self._run(run_tag, measured=True, tuned=any(self.n_trials.values())) as prepared:
            return self._finish(prepared)

    # ------------------------------------------------------------------ the steps of a run

    @contextlib.contextmanager
    def _run(self, run_tag: str, measured: bool = False, tuned: bool = False) -> Iterator[Prepared]:
        """Open a run, and compute the shared inputs of its fits that are missing.

        `measured` is whether a final model will be measured, which requires a test split; `tuned`
        whether the run must have the winners of all studies.
        """
        run = Run(run_tag or self.run_tag, self.log_dir)
        with seeded(self.recipe.seed):
            model = self.recipe.make_model()
        recipe = resolve_promise(self.recipe, model)
        data: Any = recipe.make_data()
        configuration = recipe.configuration(model, data)
        configuration["tuner"]["search_space"] = {n: str(v) for n, v in self.search_space.items()}
        # Before the run is opened: its manifest would keep a configuration with faulty data.
        data.prepare_data()
        data.setup("fit")
        if measured:
            data.setup("test")
        check_classes(getattr(data, "class_names", None), recipe.output_dimension)
        with run.opened(configuration):
            vars(self).update(run.winners())
            missing = [name for name, one in run.winners().items() if one is None]
            if tuned and missing:
                raise RuntimeError(
                    f"final_train of {run.tag!r}: not tuned yet: {', '.join(missing)}. "
                    "Run joint_tune_study, train_tune_study and lambda_reg_study first"
                )
            if measured and recipe.promise is not None:
                for line in filter(None, (recipe.note, recipe.promise.shortage(data))):
                    self.progress.note(line)
            if isinstance(data, TextDataModule):
                self.progress.note(data.describe_classes())
            plan = make_plan(recipe, self.spaces, self.search_space, model, data)
            self._prepared = prepare(recipe, run, plan, model, data, self.progress)
            yield self._prepared

    def _tune_one(self, stage: Stage, run_tag: str) -> dict[str, Any]:
        """Run one study, which may use all of `time_out`, and return the run's winners by name."""
        with self._run(run_tag) as prepared:
            self._tune(stage, prepared, Deadline(self.time_out))
            return prepared.run.winners()

    def _tune(self, stage: Stage, prepared: Prepared, deadline: Deadline) -> None:
        """Run the missing trials of a study, and save its winner."""
        run, n_trials = prepared.run, self.n_trials[stage.name]
        limits, done = [n_trials, self.time_out], run.result(stage.name)
        if done is not None and done["limits"] == limits:
            return
        before = Settings.of_winners(run.winners(before=stage))
        study = studies.open_study(run, stage, self.storage, before)
        studies.queue_first(study, prepared.plan.first_trials[stage.name], n_trials)
        job = studies.StudyJob(
            objective=Objective(stage, prepared, before, deadline),
            n_trials=n_trials,
            storage=self.storage,
            sampler=CurveSampler() if stage is LAMBDA_REG else copy.deepcopy(self.sampler),
            pruner=None if stage.early_exit else SameLengthPruner(self.pruner),
            callbacks=self.callbacks,
            setup=self.worker_setup,
        )
        with self.progress.study(stage.name, study, n_trials, deadline):
            studies.run_study(job, study, self.workers, self.progress.refresh)

        trials = studies.completed(study)
        chosen = stage.pick(trials, self.select)
        run.save(stage, prepared.plan.winners(stage, chosen.params), limits)
        vars(self).update(run.winners())
        pictures = run.folder / stage.name / "study"
        report.draw_study(pictures, study, len(trials), chosen)

    def _objective(self, stage: Stage, trial: BaseTrial) -> Any:
        """Return the value of a custom study's trial, in the current run of this engine."""
        if self._prepared is None:
            with self._run("") as self._prepared:
                pass
        study = getattr(trial, "study", None)  # a FixedTrial has none
        folder = Path("own", study.study_name.replace("/", "_") if study else "")
        before = Settings.of_winners(self._prepared.run.winners(before=stage))
        return Objective(stage, self._prepared, before, Deadline(), str(folder))(trial)

    def _finish(self, prepared: Prepared) -> tuple[str, str]:
        """Choose the settings, do the final fit, and return the paths of metrics and checkpoint."""
        run, tuned = prepared.run, Settings.of_winners(prepared.run.winners())
        verdict = run.step("confirmation", confirm, prepared, tuned, self.progress)
        chosen = Settings.of(verdict["settings"])
        paths = run.step("final", final_fit, prepared, chosen, verdict["text"], self.progress)
        report.show_summary(self.progress, run.final)
        return paths["metrics"], paths["checkpoint"]
