"""TuningEngine: three studies and a final fit."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime
from functools import cached_property, partial, wraps
from pathlib import Path
from typing import Any, Literal, TypeVar, cast

import optuna
from lightning.pytorch import LightningDataModule
from lightning.pytorch.utilities.seed import isolate_rng
from optuna.pruners import BasePruner
from optuna.samplers import BaseSampler
from optuna.study import Study
from optuna.trial import BaseTrial, FrozenTrial

from dact.calibration import Promise
from dact.checks import check_choice, check_count, check_tolerance
from dact.factories import default_data, default_model
from dact.model import DACT
from dact.tuning import studies
from dact.tuning.confirmation import Candidate, confirm
from dact.tuning.deadline import Deadline
from dact.tuning.final import FinalFit
from dact.tuning.fingerprints import digest
from dact.tuning.outcome import Outcome
from dact.tuning.pictures import draw_study
from dact.tuning.progress import Progress
from dact.tuning.pruner import LagPruner, SameLengthPruner
from dact.tuning.recipe import DEFAULT_PROMISE, Recipe, check_factories, check_picklable, one_device
from dact.tuning.run import WINNERS, Run, Winners
from dact.tuning.sampler import CurveSampler, SeededSampler
from dact.tuning.selection import LambdaSelection, Point, select_lambda
from dact.tuning.shared import Shared, Survey, prepare, survey
from dact.tuning.space import Spaces, Starts, build_spaces, complete_spaces, describe
from dact.tuning.stages import LAMBDA_REG, STAGES, SUBMODELS, TRAINING, Stage
from dact.tuning.storage import describe_storage, open_storage
from dact.tuning.trial import Objective, trial_folder
from dact.tuning.workers import StudyJob, run_side_by_side

EncoderTraining = Literal["finetune", "frozen"]
Method = TypeVar("Method", bound=Callable[..., Any])


def _isolated(method: Method) -> Method:
    """Let a method leave the random generators of its caller as they were."""

    @wraps(method)
    def wrapped(*arguments: Any, **options: Any) -> Any:
        with isolate_rng():
            return method(*arguments, **options)

    return cast(Method, wrapped)


class TuningEngine:
    """Tune a DACT classifier in three Optuna studies, then fit it.

    First the *baseline*, the encoder fine-tuned at full depth: teacher and start of every trial, and what everything is
    compared with. Then the studies, each of which begins with settings that paid elsewhere and with the factories' own:

    1. ``submodels``: the architectures of classifier and confidence.
    2. ``training``: batch size, learning rates, epochs, the weight of the exit loss, and how many layers are kept.
    3. ``lambda_reg``: λ, with two objectives, the task loss and the layers used.

    Then the *confirmation*: the winners and the default settings are fitted again under fresh seeds, and the defaults
    stay unless they are beaten. Then the final fit, its promise and its measurements.

    All objectives are read on one validation split, at the epoch of the lowest val_loss. Everything is in
    ``log_dir/run_tag``. Calling a method again resumes the run. If an earlier study finds a new winner, later studies
    start over; their old trials are kept under another name and ignored.

    Args:
        output_dimension: Number of classes.
        time_out: Minutes for the three studies together, or None for no bound; the final fit is never cut.
        model: Factory that is called once per trial with what the trial chose: ``model(**overrides) -> DACT``.
        data: Likewise, with overrides such as ``batch_size``: ``data(**overrides) -> LightningDataModule``.
        trainer: Arguments of the Trainer; ``max_epochs`` (4) counts where no study chooses it. A trial runs on one
            device. dact has its own logger, checkpoints and progress instead of those given here.
        n_trials: Total number of trials of each study, one number or one per study.
        search_space: Changes of the default ranges, by parameter; see `dact.tuning.space.build_spaces`.
        encoder_training: ``"finetune"`` trains everything in every trial; ``"frozen"`` computes the states of all
            layers once and trains the submodels on them.
        warm_up_epochs: With ``"frozen"``: number of epochs of a fit with all exits of the encoder whose states are
            computed, on a part of the training examples; 0 takes the encoder as it is.
        final_training: ``"finetune"`` trains everything in the final fit, from the baseline's encoder; ``"frozen"``
            keeps the encoder of frozen mode.
        lambda_selection: Rule that chooses λ from the third study; see `dact.tuning.selection.select_lambda`. If left
            out, ``"promise"`` where there is one of `max_accuracy_loss`, else ``"one_standard_error"``.
        max_loss_increase: For ``"max_loss_increase"``: share by which the loss may exceed the best, 0 or more.
        max_layers: For ``"max_layers"``: budget of layers, 1 or more.
        workers: Number of processes that run trials of one study side by side; on a machine of several GPUs each takes
            one of its own.
        storage: Address of an Optuna storage, or a storage; an sqlite file if left out.
        sampler: Sampler of the first two studies; TPE if left out.
        pruner: Pruner of the first two studies; it sees only trials of the same planned length.
        callbacks: Optuna callbacks ``(study, trial)``, called after each trial.
        halting_tolerance: Tolerance of the tuned model, in [0, 1); that of the model factory if left out.
        promise: What early exit of the tuned model must keep, and with which confidence; by default at most one point
            of accuracy below the model's own full depth, with 95 % confidence. Its dial is calibrated on examples that
            no study sees, half of the validation examples; see `dact.calibrate`. Where these are too few for the
            default promise, the dial is set by an estimate. None: the class of full depth, by proof.
        distillation: Share of a teacher's probabilities in the training targets of all trials, in [0, 1]; half, where
            the data can carry them. The teacher is the baseline, unless the data has one of its own.
        compare_defaults: Whether to fit and measure what the factories make without tuning as well.
        log_dir: Folder of all runs.
        seed: Seed for data order, initialisation and samplers.

    Attributes:
        classifier_config, confidence_config, external_config, lambda_reg: Winners of the current run, or None.
        time_out: Seconds for the three studies together, or None.
        spaces: Dimension of each parameter, by stage.
        progress: What the console shows.
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
        time_out: int | None = None,
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
        max_loss_increase: float = 0.02,
        max_layers: float | None = None,
        workers: int = 1,
        storage: str | optuna.storages.BaseStorage | None = None,
        sampler: BaseSampler | None = None,
        pruner: BasePruner | None = None,
        callbacks: Sequence[Callable[[Study, FrozenTrial], None]] = (),
        halting_tolerance: float | None = None,
        promise: Promise | None = DEFAULT_PROMISE,
        distillation: float | None = None,
        compare_defaults: bool = True,
        log_dir: str | Path = "lightning_logs",
        seed: int = 0,
    ) -> None:
        if time_out is not None and not time_out > 0:
            raise ValueError(f"TuningEngine: time_out is in minutes and must be above 0, got {time_out}")
        trials = [n_trials] * 3 if isinstance(n_trials, int) else list(n_trials)
        if len(trials) != 3 or any(isinstance(n, bool) or not isinstance(n, int) or n < 1 for n in trials):
            raise ValueError(f"TuningEngine: n_trials must be one or three integers of 1 or more, got {n_trials!r}")
        for name, value, low in (
            ("workers", workers, 1),
            ("warm_up_epochs", warm_up_epochs, 0),
            ("max_loss_increase", max_loss_increase, 0),
            ("max_layers", max_layers, 1),
        ):
            if value is not None and not low <= value < float("inf"):
                raise ValueError(f"TuningEngine: {name} must be {low} or more, got {value}")
        check_choice("TuningEngine: encoder_training", encoder_training, EncoderTraining)
        check_choice("TuningEngine: final_training", final_training, EncoderTraining)
        if final_training == "frozen" and encoder_training != "frozen":
            raise ValueError("TuningEngine: final_training='frozen' goes with encoder_training='frozen'")
        if lambda_selection is not None:
            check_choice("TuningEngine: lambda_selection", lambda_selection, LambdaSelection)
        if lambda_selection == "max_layers" and max_layers is None:
            raise ValueError("TuningEngine: lambda_selection='max_layers' needs max_layers, the budget of layers")
        if halting_tolerance is not None:
            check_tolerance(halting_tolerance)
        if promise is not None and promise.dial == "halting_tolerance" and halting_tolerance is not None:
            raise ValueError("TuningEngine: a promise chooses the halting_tolerance; give one of the two")
        if distillation is not None and not 0 <= distillation <= 1:
            raise ValueError(f"TuningEngine: distillation is a share of the targets, in [0, 1], got {distillation}")
        check_count("TuningEngine: seed", seed, least=0)
        check_factories(workers, model=model, data=data)
        if workers > 1:
            check_picklable(callbacks=list(callbacks), sampler=sampler, pruner=pruner, trainer=dict(trainer or {}))
        if workers > 1 and isinstance(storage, optuna.storages.InMemoryStorage):
            raise ValueError(
                "TuningEngine: workers cannot share a storage in memory; leave storage out for an sqlite file"
            )
        trainer = {"max_epochs": 4, "gradient_clip_val": 1.0, **(trainer or {})}
        trainer["devices"] = one_device(trainer)
        self.recipe = Recipe(
            output_dimension=output_dimension,
            model=model or partial(default_model, output_dimension),
            data=data or partial(default_data, seed=seed),
            trainer=trainer,
            encoder_training=encoder_training,
            warm_up_epochs=warm_up_epochs,
            distillation=distillation,
            halting_tolerance=halting_tolerance,
            promise=promise,
            seed=seed,
        )
        self.time_out = None if time_out is None else time_out * 60
        self.n_trials = dict(zip((stage.name for stage in STAGES), trials, strict=True))
        self.spaces = build_spaces(search_space, frozen=encoder_training == "frozen")
        self.bounded = frozenset(search_space or ())
        self.final_training = final_training
        self.lambda_selection = lambda_selection
        self.max_loss_increase = max_loss_increase
        self.max_layers = max_layers
        self.workers = workers
        self.storage = storage
        self.sampler = sampler or SeededSampler(seed)
        self.pruner = SameLengthPruner(pruner or LagPruner())
        self.callbacks = list(callbacks)
        self.compare_defaults = compare_defaults
        self.log_dir = Path(log_dir)
        self.progress = Progress()
        self.worker_setup: Callable[[], None] | None = None
        self._current: Run | None = None
        self._shared: Shared | None = None

    @cached_property
    def run_tag(self) -> str:
        """The tag of runs that name none: a time stamp drawn once per engine."""
        return datetime.now().strftime("%Y-%m-%d_%H-%M-%S")

    # ------------------------------------------------------------------ the methods

    @_isolated
    def run_pipeline(self, run_tag: str = "") -> tuple[str, str]:
        """Run the three studies and the final fit.

        Args:
            run_tag: Name of the run; `run_tag` of the engine if empty.

        Returns:
            The paths of metrics.json and of the checkpoint.
        """
        run = self._begin(run_tag)
        found = survey(self.recipe, measured=True)
        spaces, starts = self._complete(found)
        opened = {stage.name: self._open(stage, run, found, spaces, starts) for stage in STAGES}
        left = [max(0, self.n_trials[name] - len(studies.finished(study))) for name, study in opened.items()]
        if any(left):
            self.progress.announce(left, self.time_out)
        self._shared = shared = prepare(run, found, self.progress)
        end = Deadline(self.time_out)
        for stage, stages_left in zip(STAGES, (3, 2, 1), strict=True):
            self._tune(stage, run, shared, spaces, opened[stage.name], end.share(stages_left))
        return self._finish(run, shared, found)

    @_isolated
    def joint_tune_study(self, run_tag: str = "") -> tuple[dict[str, Any], dict[str, Any]]:
        """Study the architectures of the submodels and save the best.

        Returns:
            classifier_config and confidence_config, which ``SubmodelConfig(**config)`` accepts.
        """
        winners = self._tune_one(SUBMODELS, run_tag)
        assert winners.classifier_config is not None
        assert winners.confidence_config is not None
        return winners.classifier_config, winners.confidence_config

    @_isolated
    def train_tune_study(self, run_tag: str = "") -> dict[str, Any]:
        """Study the training parameters and save the best.

        Returns:
            external_config: arguments of the model and the data by name, and num_epochs.
        """
        winners = self._tune_one(TRAINING, run_tag)
        assert winners.external_config is not None
        return winners.external_config

    @_isolated
    def lambda_reg_study(self, run_tag: str = "") -> float:
        """Study λ with two objectives, save the winner and return it."""
        winners = self._tune_one(LAMBDA_REG, run_tag)
        assert winners.lambda_reg is not None
        return winners.lambda_reg

    @_isolated
    def submodel_objective(self, trial: BaseTrial) -> float:
        """Train with the submodels that `trial` suggests; return the validation loss at its best epoch."""
        return float(self._objective(SUBMODELS)(trial))

    @_isolated
    def train_tune_objective(self, trial: BaseTrial) -> float:
        """Train with the training parameters that `trial` suggests; return the validation loss at its best epoch."""
        return float(self._objective(TRAINING)(trial))

    @_isolated
    def lambda_objective(self, trial: BaseTrial) -> tuple[float, float]:
        """Train with the λ that `trial` suggests; return avg_task_loss and avg_exit_layer under early exit."""
        loss, layers = self._objective(LAMBDA_REG)(trial)
        return loss, layers

    @_isolated
    def final_train(self, run_tag: str = "") -> tuple[str, str]:
        """Fit with all winners, keep the best epoch, and measure it.

        Returns:
            The paths of metrics.json and of the checkpoint, which `DACT.load_from_checkpoint` reads.

        Raises:
            RuntimeError: If a study has no winner yet; the message lists which.
        """
        run = self._begin(run_tag)
        self._check_tuned(run)
        found = survey(self.recipe, measured=True)
        self._shared = prepare(run, found, self.progress)
        return self._finish(run, self._shared, found)

    # ------------------------------------------------------------------ one study

    def _begin(self, run_tag: str) -> Run:
        """Turn to a run: what another run under this engine has chosen is not carried over."""
        run = Run(run_tag or self.run_tag, self.log_dir)
        if run != self._current:
            self._current, self._shared = run, None
        self._take(run.winners())
        return run

    def _take(self, winners: Winners) -> Winners:
        """Keep winners as attributes."""
        self._winners = winners
        for name in WINNERS:
            setattr(self, name, getattr(winners, name))
        return winners

    def _complete(self, found: Survey) -> tuple[Spaces, Starts]:
        return complete_spaces(self.spaces, found.layers, found.starts, self.bounded)

    def _open(self, stage: Stage, run: Run, found: Survey, spaces: Spaces, starts: Starts) -> Study:
        setting = {"search space": describe(spaces[stage.name]), **found.identity}
        with run.locked(lambda: self.progress.stage("waiting for another process, which opens the studies")):
            storage = open_storage(self.storage, run.folder)
            where = describe_storage(self.storage, run.folder)
            study = studies.open_study(run, stage, setting, storage, where, self.pruner if stage.prunes else None)
            studies.start_with(study, starts[stage.name][: self.n_trials[stage.name]])
            return study

    def _tune_one(self, stage: Stage, run_tag: str) -> Winners:
        run = self._begin(run_tag)
        found = survey(self.recipe)
        spaces, starts = self._complete(found)
        study = self._open(stage, run, found, spaces, starts)
        self._shared = prepare(run, found, self.progress)
        return self._tune(stage, run, self._shared, spaces, study, Deadline(self.time_out))

    def _tune(
        self, stage: Stage, run: Run, shared: Shared, spaces: Spaces, study: Study, deadline: Deadline
    ) -> Winners:
        """Run what is left of a study, and save what it chose."""
        before = self._winners.before(stage)
        with run.locked():
            study, outdated = studies.start_under(study, digest(before.settings()))
            if outdated:
                run.set_aside(stage)
        if outdated:
            self.progress.note(f"study {stage.name}: {outdated} trials ran under other winners and are ignored")
        n_trials = self.n_trials[stage.name]
        if len(studies.finished(study)) < n_trials:
            shutil.rmtree(run.pictures(stage), ignore_errors=True)  # of fewer trials
            objective = Objective(stage, run, shared, spaces[stage.name], before, deadline)
            sampler = CurveSampler() if stage is LAMBDA_REG else self.sampler
            job = StudyJob(
                objective, n_trials, self.storage, sampler, study.pruner, self.callbacks, setup=self.worker_setup
            )
            later = sum(self.n_trials[other.name] for other in STAGES[STAGES.index(stage) + 1 :])
            with self.progress.study(stage.name, study, n_trials, later, deadline):
                if self.workers == 1:
                    job.run(study, self.progress.refresh, self.progress.refresh)
                else:
                    run_side_by_side(job, study, self.workers, self.progress.refresh)
        return self._conclude(stage, run, shared, spaces, study)

    def _conclude(self, stage: Stage, run: Run, shared: Shared, spaces: Spaces, study: Study) -> Winners:
        """Choose the winner of a study, save it, and draw the study's pictures."""
        chosen = self._chosen_lambda(run, shared, study) if stage is LAMBDA_REG else studies.best(study)
        with run.locked():
            if run.save(stage.parse(chosen.params)):
                shutil.rmtree(run.pictures(stage), ignore_errors=True)  # of another choice
            if not run.pictures(stage).is_dir():
                draw_study(run.pictures(stage), study, studies.completed(study), chosen, spaces)
        return self._take(run.winners())

    def _chosen_lambda(self, run: Run, shared: Shared, study: Study) -> FrozenTrial:
        trials = studies.completed(study)
        points = []
        for trial in trials:
            seen = Outcome.read(run.folder / LAMBDA_REG.name / trial_folder(trial.number))
            losses, lost = (None, None) if seen is None else (tuple(seen.losses.tolist()), tuple(seen.lost.tolist()))
            loss, layers = trial.values
            points.append(Point(trial.params["lambda_reg"], loss, layers, losses, lost))
        promise = shared.recipe.promise
        allowed = None if promise is None else promise.max_accuracy_loss
        chosen = select_lambda(
            points,
            self.lambda_selection or ("one_standard_error" if allowed is None else "promise"),
            allowed=allowed,
            max_loss_increase=self.max_loss_increase,
            max_layers=self.max_layers,
        )
        return trials[points.index(chosen)]

    def _objective(self, stage: Stage) -> Objective:
        """Return the objective of a stage, for a study of the user's own."""
        run = self._current or self._begin("")
        if self._shared is None:
            self._shared = prepare(run, survey(self.recipe), self.progress)
        space = complete_spaces(self.spaces, self._shared.layers, {})[0][stage.name]
        return Objective(stage, run, self._shared, space, self._winners.before(stage), Deadline())

    # ------------------------------------------------------------------ the final fit

    def _check_tuned(self, run: Run) -> None:
        missing = self._winners.missing()
        if missing:
            raise RuntimeError(
                f"final_train of {run.tag!r}: not tuned yet: {', '.join(missing)}. Run these studies first"
            )

    def _finish(self, run: Run, shared: Shared, found: Survey) -> tuple[str, str]:
        """Confirm the winners, fit with what stays, and measure it."""
        self._check_tuned(run)
        if shared.recipe.note:
            self.progress.note(shared.recipe.note)
        _, starts = self._complete(found)
        first, own = starts[TRAINING.name]
        start = Winners(**SUBMODELS.parse(starts[SUBMODELS.name][0])).settings()
        start |= next(iter(starts[LAMBDA_REG.name]), {})
        candidates = [
            Candidate("default settings", {**start, **own}),
            Candidate("first trial", {**start, **first}),
            Candidate("tuned", self._winners.settings()),
        ]
        with run.locked(lambda: self.progress.stage("waiting for another process, which does the final fit")):
            verdict = confirm(run, shared, candidates, self.progress)
            keep_frozen = self.final_training == "frozen"
            return FinalFit(run, shared, verdict, keep_frozen, self.compare_defaults, self.progress)()
