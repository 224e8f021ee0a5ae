"""TuningEngine: three studies and a final fit."""

from __future__ import annotations

import contextlib
import dataclasses
import shutil
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import optuna
from lightning.pytorch import LightningDataModule
from optuna.pruners import BasePruner
from optuna.samplers import BaseSampler
from optuna.study import Study
from optuna.trial import BaseTrial, FrozenTrial

from dact.calibration import Promise
from dact.checks import check_range
from dact.data.base import TextDataModule
from dact.factories import default_data, default_model
from dact.files import read_json, remove_partial, write_json
from dact.model import DACT
from dact.tuning import studies
from dact.tuning.confirmation import FIRST_TRIAL, Candidate, confirm
from dact.tuning.digests import digest
from dact.tuning.final import FinalFit
from dact.tuning.fitting import Deadline, isolated
from dact.tuning.outcome import MEASURE, Outcome
from dact.tuning.pictures import draw_study
from dact.tuning.prepared import Prepared, prepare
from dact.tuning.progress import Progress
from dact.tuning.recipe import DEFAULT_PROMISE, EncoderTraining, Recipe, trainer_arguments
from dact.tuning.retries import unwatched
from dact.tuning.run import WINNERS, Run, Winners
from dact.tuning.search import CurveSampler, LagPruner, SameLengthPruner, SeededSampler
from dact.tuning.selection import MAX_LOSS_INCREASE, LambdaSelection, check_rule, select_lambda
from dact.tuning.space import build_spaces
from dact.tuning.stages import LAMBDA_REG, STAGES, SUBMODELS, TRAINING, Stage, trials_per_stage
from dact.tuning.summary import show_summary
from dact.tuning.survey import Surveyed, survey
from dact.tuning.trial import Objective
from dact.tuning.workers import StudyJob, check_workers, run_study

# tuned candidates that the confirmation fits on frozen states, each as often as a trial of the last
# study
ON_STATES = 2
MEASURING = 1  # epochs of the baseline in whose time the final model is measured, about
TWO_PASSES = 1.5  # times the duration of a step of one pass, about


class TuningEngine:
    """Tune a DACT classifier in three Optuna studies, then fit it.

    A run begins with the *baseline*: the encoder, fine-tuned at full depth. Its last epoch is the
    reference of every comparison, and its epoch of the lowest Brier score is the teacher, and the
    start of every fit that trains the encoder. Three studies follow. They begin with the defaults
    of the factories, the second one with recommended settings first:

    1. ``submodels``: the architectures of classifier and confidence. 2. ``training``: batch size,
    learning rates, epochs, the weight of the exit loss, detached exits (not in frozen
       mode), and how many layers are kept.
    3. ``lambda_reg``: λ, with two objectives, the task loss and the layers used.

    The *confirmation* fits the winners and the default settings again under fresh seeds; the
    defaults stay unless they are beaten. The final fit, its promise and its measurements come last.

    All objectives are measured on one validation split, at the epoch of the lowest val_loss. All
    files are written to ``log_dir/run_tag``. Calling a method again resumes the run. If an earlier
    study finds a new winner, later studies start over; their old trials are kept under another name
    and ignored.

    Args:
        output_dimension: Number of classes.
        time_out: Minutes for the three studies together, or None for no bound. The final fit is
            never cut short. The attribute of this name has seconds.
        model: Factory of models, ``model(**overrides) -> DACT``, called once per trial with what
            the trial chose.
        data: Factory of datamodules, ``data(**overrides) -> LightningDataModule``, called in the
            same way with overrides such as ``batch_size``; each fit calls it, and all must get the
            same examples.
        trainer: Arguments of the Trainer; ``max_epochs`` (4) is used where no study chooses the
            number. A trial runs on one device. dact uses its own logger, checkpoints and progress
            bars instead of those given here, and each fit gets a copy of every callback, so that
            what a callback collects must go to a file.
        n_trials: Total number of trials of each study, one number or one per study.
        search_space: Changes to the default ranges, by parameter; see
            `dact.tuning.space.build_spaces`.
        encoder_training: ``"finetune"`` trains everything in every trial; ``"frozen"`` computes the
            states of all layers once and trains the submodels on them, with detached exits unless
            `search_space` names ``detach_exits`` or the final model keeps that encoder.
        warm_up_epochs: With ``"frozen"``: number of epochs in which the encoder is fine-tuned with
            all exits before its states are computed; 0 uses the encoder as it is.
        final_training: ``"finetune"`` trains everything in the final fit, from the baseline's
            encoder; ``"frozen"`` keeps the encoder of frozen mode.
        lambda_selection: Rule that chooses λ from the third study; see
            `dact.tuning.selection.select_lambda`. By default ``"promise"`` if the promise is one of
            `max_accuracy_loss`, else ``"one_standard_error"``.
        max_loss_increase: For ``"max_loss_increase"``: share by which the loss may exceed the best,
            0 or more.
        max_layers: For ``"max_layers"``: budget of layers, 1 or more.
        workers: Number of processes that run trials of one study side by side; on a machine with
            several GPUs each uses one of its own.
        storage: Address of an Optuna storage, or a storage; an sqlite file if left out.
        sampler: Sampler of the first two studies; TPE if left out.
        pruner: Pruner of the first two studies. It sees only trials of the same planned length,
            unless it is Hyperband or Wilcoxon's.
        callbacks: Optuna callbacks ``(study, trial)``, called after each trial.
        halting_tolerance: Tolerance of the tuned model, in [0, 1); that of the model factory if
            left out.
        promise: Promise that early exit of the tuned model must keep; by default at most one point
            of accuracy below the model's own full depth, with 95 % confidence. Its dial is
            calibrated on half of the validation examples, which no study sees; see
            `dact.calibrate`. If these are too few for the default promise, an estimate sets the
            dial. With None, the class is provably that of full depth.
        distillation: Share of a teacher's probabilities in the training targets of all trials, in
            [0, 1]; by default that of the model factory or, if it has none and the data can carry
            them, half. The teacher is the baseline, unless the data has one of its own.
        consistency: Weight of the agreement of two passes (see `DACT`) in the fits of the encoder
            after the studies; by default that of the model factory or, if it has none and its
            encoder has dropout, 5. With 0, they take as little as half of the time and memory.
        compare_defaults: Whether to fit and measure the untuned defaults of the factories as well.
        log_dir: Folder of all runs.
        seed: Seed for data order, initialisation and samplers.

    Attributes:
        classifier_config, confidence_config, external_config, lambda_reg: Winners of the current
            run, or None.
        spaces: Dimension of each parameter, by stage.
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
        max_loss_increase: float = MAX_LOSS_INCREASE,
        max_layers: float | None = None,
        workers: int = 1,
        storage: str | optuna.storages.BaseStorage | None = None,
        sampler: BaseSampler | None = None,
        pruner: BasePruner | None = None,
        callbacks: Sequence[Callable[[Study, FrozenTrial], None]] = (),
        halting_tolerance: float | None = None,
        promise: Promise | None = DEFAULT_PROMISE,
        distillation: float | None = None,
        consistency: float | None = None,
        compare_defaults: bool = True,
        log_dir: str | Path = "lightning_logs",
        seed: int = 0,
    ) -> None:
        if time_out is not None:
            check_range("TuningEngine: time_out", time_out, "(0, inf]", "it is in minutes")
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
        studies.check_parts(storage, sampler, pruner, callbacks)
        self.callbacks = list(callbacks)
        sent = {
            "model": model,
            "data": data,
            "trainer": trainer,
            "sampler": sampler,
            "pruner": pruner,
        }
        check_workers(workers, storage, **sent, callbacks=self.callbacks)
        self.time_out = None if time_out is None else time_out * 60
        self.n_trials = trials_per_stage(n_trials)
        frozen = encoder_training == "frozen"
        self.spaces = build_spaces(
            search_space, frozen=frozen, final_frozen=final_training == "frozen"
        )
        self.bounded = frozenset(search_space or ())
        check_rule(lambda_selection, max_layers)
        self.select = partial(
            select_lambda,
            rule=lambda_selection,
            max_loss_increase=max_loss_increase,
            max_layers=max_layers,
        )
        self.workers = workers
        self.storage = storage
        self.sampler = sampler or SeededSampler(seed)
        self.pruner = pruner or LagPruner()
        self.log_dir = Path(log_dir)
        self.progress = Progress()
        self.worker_setup: Callable[[], None] | None = None
        self._run: Run | None = None
        self._prepared: Prepared | None = None
        self._concluded: dict[str, Study] = {}

    @cached_property
    def run_tag(self) -> str:
        """The tag of runs without a name, and of own studies: a time stamp, taken once per engine,
        unless it is set."""
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
        run = self._begin(run_tag)
        surveyed = self._survey(measured=True)
        opened = [self._open(stage, run, surveyed) for stage in STAGES]
        totals = zip(opened, self.n_trials.values(), strict=True)
        left = [
            studies.trials_left(study, n_trials, self.time_out, alone=False)
            for study, n_trials in totals
        ]
        if any(left):
            defaults, recommended = surveyed.untuned
            candidates = ON_STATES + (defaults != recommended)
            later = candidates if self.recipe.encoder_training == "frozen" else 0
            fits = self.recipe.finetunings(first_trial=defaults != recommended)
            step = TWO_PASSES if self.recipe.consistency_of(surveyed.model) > 0 else 1.0
            share = (
                surveyed.initial["num_layers"] / surveyed.model.encoder.num_layers
            )  # of the baseline's layers
            untuned = self.recipe.compare_defaults
            epochs = (untuned + (fits - untuned) * step * share) * surveyed.initial[
                "num_epochs"
            ] + MEASURING
            self.progress.announce(left, self.time_out, later, epochs)
        if isinstance(surveyed.data, TextDataModule) and (text := surveyed.data.describe_classes()):
            self.progress.note(text)
        prepared = self._prepare(run, surveyed)
        end = Deadline(self.time_out)
        for stage, study, stages_left in zip(STAGES, opened, (3, 2, 1), strict=True):
            self._tune(stage, run, prepared, study, Deadline(end.left / stages_left), end)
        return self._finish(run, prepared, surveyed)

    @isolated()
    def joint_tune_study(self, run_tag: str = "") -> tuple[dict[str, Any], dict[str, Any]]:
        """Run the study of the submodels' architectures, and save its winner.

        Returns:
            classifier_config and confidence_config, which ``SubmodelConfig(**config)`` accepts.
        """
        winners = self._tune_one(SUBMODELS, run_tag)
        assert winners.classifier_config is not None and winners.confidence_config is not None
        return winners.classifier_config, winners.confidence_config

    @isolated()
    def train_tune_study(self, run_tag: str = "") -> dict[str, Any]:
        """Run the study of the training parameters, and save its winner.

        Returns:
            external_config: arguments of the model and the data by name, and num_epochs.
        """
        winners = self._tune_one(TRAINING, run_tag)
        assert winners.external_config is not None
        return winners.external_config

    @isolated()
    def lambda_reg_study(self, run_tag: str = "") -> float:
        """Run the study of λ, which has two objectives, save its winner and return it."""
        winners = self._tune_one(LAMBDA_REG, run_tag)
        assert winners.lambda_reg is not None
        return winners.lambda_reg

    @isolated()
    def submodel_objective(self, trial: BaseTrial) -> float:
        """Train with the submodels that `trial` suggests; return the validation loss at its best
        epoch."""
        return float(self._objective(SUBMODELS, trial)(trial))

    @isolated()
    def train_tune_objective(self, trial: BaseTrial) -> float:
        """Train with the training parameters that `trial` suggests; return the validation loss at
        its best epoch."""
        return float(self._objective(TRAINING, trial)(trial))

    @isolated()
    def lambda_objective(self, trial: BaseTrial) -> tuple[float, float]:
        """Train with the λ that `trial` suggests; return avg_task_loss and avg_exit_layer under
        early exit."""
        loss, layers = self._objective(LAMBDA_REG, trial)(trial)
        return loss, layers

    @isolated()
    def final_train(self, run_tag: str = "") -> tuple[str, str]:
        """Confirm the winners, do the final fit, and measure its model.

        Returns:
            The paths of metrics.json and of the checkpoint, which `DACT.load_from_checkpoint`
            reads.

        Raises:
            RuntimeError: If a study has no winner yet; the message lists which.
        """
        run = self._begin(run_tag)
        if missing := self._winners.missing():
            raise RuntimeError(
                f"final_train of {run.tag!r}: not tuned yet: {', '.join(missing)}. Run these studies first"
            )
        surveyed = self._survey(measured=True)
        return self._finish(run, self._prepare(run, surveyed), surveyed)

    # ------------------------------------------------------------------ the steps of a run

    def _begin(self, run_tag: str) -> Run:
        """Make a run the current one of this engine, with the winners that are on disk, and return
        it."""
        run = Run(run_tag or self.run_tag, self.log_dir)
        if run != self._run:
            self._run, self._prepared = run, None
        self._take(run.winners())
        return run

    def _take(self, winners: Winners) -> Winners:
        """Set winners as attributes of the engine, and return them."""
        self._winners = winners
        for name in WINNERS:
            setattr(self, name, getattr(winners, name))
        return winners

    def _survey(self, stages: Sequence[Stage] = STAGES, *, measured: bool = False) -> Surveyed:
        surveyed = survey(self.recipe, self.spaces, self.bounded, stages=stages, measured=measured)
        if measured and surveyed.recipe.note:
            self.progress.note(surveyed.recipe.note)
        return surveyed

    def _prepare(self, run: Run, surveyed: Surveyed) -> Prepared:
        self._prepared = prepare(run, surveyed, self.progress)
        return self._prepared

    def _open(self, stage: Stage, run: Run, surveyed: Surveyed) -> Study:
        """Open a study and queue its first trials."""
        plain = {name: str(one) for name, one in surveyed.spaces[stage.name].items()}
        identity = {"search space": plain, **surveyed.identity}
        if stage is SUBMODELS and surveyed.submodels:
            identity["submodels"] = dict(surveyed.submodels)
        with run.locked(
            lambda: self.progress.stage("waiting for another process, which opens the studies")
        ):
            pruner = SameLengthPruner(self.pruner) if stage.prunes else None
            study = studies.open_study(run, stage, identity, self.storage, pruner)
            studies.start_with(
                study, surveyed.first_trials[stage.name][: self.n_trials[stage.name]]
            )
        self.progress.waits_for(stage.name, unwatched(study))
        return study

    def _tune_one(self, stage: Stage, run_tag: str) -> Winners:
        """Run one study, which may take the time of all three."""
        run = self._begin(run_tag)
        surveyed = self._survey([stage])
        study = self._open(stage, run, surveyed)
        return self._tune(stage, run, self._prepare(run, surveyed), study, Deadline(self.time_out))

    def _tune(
        self,
        stage: Stage,
        run: Run,
        prepared: Prepared,
        study: Study,
        deadline: Deadline,
        end: Deadline | None = None,
    ) -> Winners:
        """Run the remaining trials of a study, save its winner, and return the winners so far.

        `end` is the deadline of all studies, None if this one is called alone.
        """
        alone = end is None
        before = self._winners.before(stage)
        with run.locked():
            origin = digest([before.settings(), MEASURE] if stage.early_exit else before.settings())
            study, outdated = studies.archive_if_outdated(studies.reloaded(study), origin)
            if outdated:
                run.set_aside(stage)
        if outdated:
            why = "ran under other winners, or were measured otherwise, and are ignored"
            self.progress.note(f"study {stage.name}: {outdated} trials {why}")
        n_trials = self.n_trials[stage.name]
        if studies.trials_left(study, n_trials, self.time_out, alone):
            shutil.rmtree(run.pictures(stage), ignore_errors=True)  # they show fewer trials
            objective = Objective(stage, run, prepared, before, deadline)
            sampler = CurveSampler() if stage is LAMBDA_REG else self.sampler
            job = StudyJob(
                objective,
                n_trials,
                self.storage,
                sampler,
                study.pruner,
                self.callbacks,
                self.worker_setup,
            )
            later = (
                0
                if alone
                else sum(self.n_trials[other.name] for other in STAGES[STAGES.index(stage) + 1 :])
            )
            with self.progress.study(stage.name, study, n_trials, later, deadline, end or deadline):
                run_study(job, study, self.workers, self.progress.refresh)
            if deadline.left == 0:
                studies.end(study, n_trials, self.time_out, alone)
        elif len(studies.finished(study)) < n_trials:
            self.progress.note(
                f"study {stage.name}: it was ended before its n_trials; a larger n_trials continues it, or, after a "
                "deadline, a larger time_out"
            )
        return self._conclude(stage, run, prepared, study)

    def _conclude(self, stage: Stage, run: Run, prepared: Prepared, study: Study) -> Winners:
        """Pick the winner of a study, save it, draw the study's pictures, and return the winners so
        far."""
        trials = studies.completed(study)
        outcomes = [Outcome.read(run.trial_folder(stage, trial.number)) for trial in trials]
        promise = prepared.recipe.promise
        allowed = None if promise is None else promise.max_accuracy_loss
        frozen = prepared.recipe.encoder_training == "frozen"
        select = partial(self.select, allowed=allowed, from_best=frozen)
        chosen = stage.pick(trials, outcomes, select)
        others = [
            pair for pair in zip(trials, outcomes, strict=True) if pair[0].params != chosen.params
        ]
        second: dict[str, Any] = {}
        if stage is LAMBDA_REG and others:
            with contextlib.suppress(ValueError):  # none within max_layers
                second = stage.pick(
                    [trial for trial, _ in others], [one for _, one in others], select
                ).params
        with run.locked():
            remove_partial(
                run.pictures(stage).parent
            )  # of trials whose process died; none is running any more
            if stage is LAMBDA_REG:
                write_json(run.runner_up, second)
            if run.save(prepared.winners(stage, chosen.params)):
                shutil.rmtree(run.pictures(stage), ignore_errors=True)  # they show another winner
            if not run.pictures(stage).is_dir():
                draw_study(run.pictures(stage), study, trials, chosen, prepared.spaces)
        self._concluded[study.study_name] = study
        return self._take(run.winners())

    def _objective(self, stage: Stage, trial: BaseTrial) -> Objective:
        """Return the objective of a stage, for an Optuna study of the user's own."""
        studies.check_directions(stage, trial)
        run = self._run or self._begin("")
        if (prepared := self._prepared) is None:
            surveyed = self._survey([stage])
            studies.check_run(run, surveyed.identity, self.storage)
            prepared = self._prepare(run, surveyed)
        studies.check_own(trial, prepared.identity)
        return Objective(
            stage, run, prepared, self._winners.before(stage), Deadline(), studies.own_folder(trial)
        )

    def _finish(self, run: Run, prepared: Prepared, surveyed: Surveyed) -> tuple[str, str]:
        """Confirm the winners, do the final fit, and return the paths of metrics.json and of the
        checkpoint."""
        defaults, recommended = surveyed.untuned
        settings = {
            "default settings": defaults,
            FIRST_TRIAL: recommended,
            "tuned": self._winners.settings(),
        }
        if run.runner_up.is_file() and (second := read_json(run.runner_up)):
            settings["runner-up"] = dataclasses.replace(self._winners, **second).settings()
        candidates = [Candidate(name, chosen) for name, chosen in settings.items()]
        with run.locked(
            lambda: self.progress.stage("waiting for another process, which does the final fit")
        ):
            verdict = confirm(run, prepared, candidates, self.progress)
            paths = FinalFit(run, prepared, verdict, self.progress)()
            concluded = [
                study for name, study in self._concluded.items() if name.startswith(f"{run.tag}/")
            ]
            show_summary(self.progress.console, run.final, verdict.text, concluded)
            return paths
