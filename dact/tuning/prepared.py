"""The shared inputs of a run's fits: the baseline and, in frozen mode, an encoder and its states,
each made once."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from dataclasses import dataclass, fields
from functools import cached_property
from pathlib import Path
from typing import Any

from lightning.pytorch import LightningDataModule
from torch import Tensor
from torch.utils.data import DataLoader

from dact.files import read_tensors, write_tensors
from dact.model import DACT
from dact.tuning.baseline import Baseline, fit_baseline
from dact.tuning.digests import digest, encoder_digest, pretrained_digest, tensor_digest
from dact.tuning.features import Features, FeaturesData, compute_features
from dact.tuning.fitting import MIN_STEPS, checkpoints_of, enough_epochs, resumable_fit, seeded
from dact.tuning.progress import Progress
from dact.tuning.recipe import DISTILLATION, Recipe
from dact.tuning.run import Run
from dact.tuning.space import Spaces
from dact.tuning.stages import SUBMODELS, Stage
from dact.tuning.survey import Surveyed

WARM_UP_STEPS = (
    90  # optimizer steps in which the encoder of frozen mode learns enough, also from few texts
)
ENCODER = "encoder.safetensors"  # weights of frozen mode's encoder, next to its states


@dataclass(frozen=True)
class Prepared:
    """The shared inputs of all fits of a run. It is small to send to another process, which reads
    the files on demand.

    Args:
        recipe: Recipe of the run.
        identity: Settings that all trials have in common; see `Recipe.identity`.
        spaces: Dimension of each parameter, by stage.
        initial: Settings of trials until a study has chosen others.
        submodels: Parameters of the submodels that trials do not replace; see `Surveyed`.
        class_names: Names of the classes, if the data has them.
        baseline: Baseline of the run.
        teacher: File with a teacher's probabilities of the training examples, or None.
        own_teacher: As in `Surveyed`.
        learning: Arguments of all models that set their distillation, if it is not that of the
            factory.
        finetuning: Arguments of fits of the encoder after the studies; see `Recipe.finetuning`.
        states: Folder with the states of frozen mode, or None.
        batch_size: Number of examples per training batch of frozen mode if no trial chooses it.
    """

    recipe: Recipe
    identity: dict[str, Any]
    spaces: Spaces
    initial: Mapping[str, Any]
    submodels: Mapping[str, Any]
    class_names: list[str] | None
    baseline: Baseline
    teacher: Path | None
    own_teacher: bool
    learning: dict[str, Any]
    finetuning: dict[str, Any]
    states: Path | None
    batch_size: int

    def __getstate__(self) -> dict[str, Any]:
        return {field.name: getattr(self, field.name) for field in fields(self)}

    def build(
        self, settings: Mapping[str, Any], *, seed: int | None = None, unfreeze: bool = False
    ) -> tuple[DACT, LightningDataModule]:
        """Return a new model and a new datamodule.

        Args:
            settings: Arguments of both as plain values; see `Winners.settings`.
            seed: Seed for the order of states in frozen mode; that of the recipe if left out.
            unfreeze: Whether the encoder is trained even in frozen mode, starting from the
                teacher's weights.
        """
        chosen = dict(settings)
        size = {"batch_size": chosen.pop("batch_size")} if "batch_size" in chosen else {}
        if self.states is not None and not unfreeze:
            train, val = self._features
            seed = self.recipe.seed if seed is None else seed
            data = FeaturesData(train, val, **{"batch_size": self.batch_size, **size}, seed=seed)
            return self._on_states(chosen), data
        model = self.recipe.make_model(**self.learning, **chosen)
        model.encoder.load_state_dict(self.baseline.encoder())
        return model, self.make_data(**size)

    def winners(self, stage: Stage, params: Mapping[str, Any]) -> dict[str, Any]:
        """Return what the parameters of a trial stand for; see `Stage.parse`."""
        return stage.parse({**self.submodels, **params} if stage == SUBMODELS else params)

    def make_data(self, **overrides: Any) -> LightningDataModule:
        """Return a new datamodule. If there is a teacher, its training batches carry the teacher's
        probabilities."""
        data = self.recipe.make_data(**overrides)
        if getattr(data, "teacher", None) is not None:
            # it has answered, or is not asked for
            data.teacher = None  # type: ignore[attr-defined]
        if self.teacher is not None:
            data.teacher_probabilities = self._probabilities  # type: ignore[attr-defined]
        return data

    def _on_states(self, chosen: dict[str, Any]) -> DACT:
        """Return a model with new submodels on the frozen encoder."""
        if type(self._base) is DACT:  # without building another encoder
            overrides = {
                "encoder": self._base.encoder,
                **self.recipe.overrides({**self.learning, **chosen}),
            }
            return DACT.from_config(self._base.config(), **overrides)
        # A class of the user's may have more arguments than a configuration knows.
        model = self.recipe.make_model(**self.learning, **chosen)
        model.encoder, model.class_names = self._base.encoder, self._base.class_names
        return model

    @cached_property
    def _base(self) -> DACT:
        assert self.states is not None
        with seeded(self.recipe.seed):
            model = self.recipe.make_model(**self.learning)
        if self.recipe.warm_up_epochs:
            model.encoder.load_state_dict(read_tensors(self.states / ENCODER)[0])
        model.encoder.eval().requires_grad_(False)
        model.class_names = model.class_names or self.class_names
        return model

    @cached_property
    def _probabilities(self) -> Tensor:
        assert self.teacher is not None
        return read_tensors(self.teacher)[0]["probabilities"]

    @cached_property
    def _features(self) -> tuple[Features, Features]:
        assert self.states is not None
        return Features(self.states / "train"), Features(self.states / "val")


def prepare(run: Run, surveyed: Surveyed, progress: Progress) -> Prepared:
    """Make the shared inputs of all fits, or reuse those of an earlier call. Only one process at a
    time does it.

    Args:
        run: The run.
        surveyed: Result of the survey; its model and data must not be used afterwards.
        progress: Console of the run.

    Raises:
        NonFiniteLoss: If the loss of the baseline or of frozen mode's encoder is not finite.
        ValueError: If a file of an earlier call is corrupted, or the data cannot carry a teacher's
            probabilities.
    """
    recipe, data = surveyed.recipe, surveyed.data
    distillation, finetuning = surveyed.model.distillation, recipe.finetuning(surveyed.model)
    states, batch_size = None, 0
    with run.locked(lambda: progress.stage("waiting for another process, which prepares the run")):
        # Settings that do not change the baseline.
        later = (
            "promise",
            "halting_tolerance",
            "distillation",
            "teacher",
            "encoder_training",
            "warm_up_epochs",
        )
        inputs = {name: value for name, value in surveyed.identity.items() if name not in later}
        origin = digest({**inputs, "steps": MIN_STEPS})
        baseline = fit_baseline(
            recipe, run.folder / "baseline", surveyed.model, data, origin, progress
        )
        teacher = _teach(run.folder / "teacher", surveyed, baseline)
        share = (
            distillation if recipe.distillation is None else recipe.distillation
        ) or DISTILLATION
        share = share if surveyed.own_teacher or teacher is not None else 0.0
        learning = {"distillation": share} if share != distillation else {}
        if recipe.encoder_training == "frozen":
            states = run.folder / "features"
            batch_size = _freeze(states, surveyed, learning, progress)
    return Prepared(
        recipe=recipe,
        identity=surveyed.identity,
        spaces=surveyed.spaces,
        initial=surveyed.initial,
        submodels=surveyed.submodels,
        class_names=getattr(data, "class_names", None),
        baseline=baseline,
        teacher=teacher,
        own_teacher=surveyed.own_teacher,
        learning=learning,
        finetuning=finetuning,
        states=states,
        batch_size=batch_size,
    )


def _teach(folder: Path, surveyed: Surveyed, baseline: Baseline) -> Path | None:
    """Return the file with the probabilities of the teacher: that of the baseline, or one that the
    data names."""
    data: Any = surveyed.data
    asked_for = surveyed.recipe.distillation
    if asked_for == 0 or surveyed.own_teacher:
        return None
    if surveyed.teacher is None:
        probabilities = baseline.probabilities()
        if probabilities is None or not hasattr(data, "teacher_probabilities"):
            if asked_for is None:
                return None  # such data cannot carry a teacher's probabilities
            raise ValueError(
                f"TuningEngine: distillation needs 'row' and 'teacher' in training batches, but {type(data).__name__} "
                "does not give them: derive it from dact.data.base.TextDataModule"
            )
        data.teacher_probabilities = probabilities
        return baseline.answers
    path = folder / "probabilities.safetensors"
    origin = f"{surveyed.identity['data']}/{pretrained_digest(surveyed.teacher)}"
    if path.is_file() and read_tensors(path)[1].get("origin") == origin:
        data.teacher_probabilities = read_tensors(path)[0]["probabilities"]
    else:
        data.teacher = surveyed.teacher
        data.train_dataloader()  # which runs the teacher
        write_tensors(path, {"probabilities": data.teacher_probabilities}, {"origin": origin})
    return path


# ---------------------------------------------------------------------- frozen mode


def _freeze(
    folder: Path, surveyed: Surveyed, learning: Mapping[str, Any], progress: Progress
) -> int:
    """Write the states of frozen mode and its encoder's weights, and return the batch size of the
    data.

    The submodels learn on texts that the encoder has learned from, as in the final fit. Both take
    few steps: states of texts that are known by heart say little about new ones. (Parted texts, a
    share for each, foretell the final fit worse, since there are fewer of them;
    benchmarks/heads.py.)"""
    recipe, data = surveyed.recipe, surveyed.data
    own = surveyed.identity.get("own_teacher")
    taught_by = own or tensor_digest(getattr(data, "teacher_probabilities", None))
    with seeded(recipe.seed):
        recommended = {
            name: surveyed.initial[name] for name in ("submodel_learning_rate", "detach_exits")
        }
        layers = (
            surveyed.model.encoder.num_layers
        )  # all of them, since trials choose how many they keep
        model = recipe.make_model(**{**learning, **recommended, "num_layers": layers})
    train, val = data.train_dataloader(), data.val_dataloader()
    batch_size: int = next(iter(train))["labels"].shape[0]
    if recipe.warm_up_epochs:
        inputs = [
            encoder_digest(model.encoder),
            surveyed.identity["data"],
            recipe.warm_up_epochs,
            recipe.seed,
        ]
        _warm_up(
            folder, recipe, model, data, f"{digest(inputs)}/{taught_by}/{WARM_UP_STEPS}", progress
        )
    model.encoder.eval().requires_grad_(False)
    origin = f"{encoder_digest(model.encoder)}/{surveyed.identity['data']}/{taught_by}"
    model.to(recipe.device)
    in_order = DataLoader(train.dataset, batch_size=batch_size, collate_fn=train.collate_fn)
    compute_features(model.encoder, in_order, folder / "train", origin)
    compute_features(model.encoder, val, folder / "val", origin)
    return batch_size


def _warm_up(
    folder: Path,
    recipe: Recipe,
    model: DACT,
    data: LightningDataModule,
    origin: str,
    progress: Progress,
) -> None:
    """Warm up the model's encoder, or load the weights that an earlier call wrote."""
    encoder = folder / ENCODER
    if not encoder.is_file() or read_tensors(encoder)[1].get("origin") != origin:
        model.lambda_reg = 0.0  # layers are free, since only the encoder of this fit is kept
        checkpoints = checkpoints_of(folder, origin)
        epochs = enough_epochs(recipe.trainer, data, recipe.warm_up_epochs, WARM_UP_STEPS)
        what = "encoder of the studies"
        with seeded(recipe.seed), progress.fit(what, epochs) as bar:
            resumable_fit(recipe.trainer, model, data, checkpoints, bar, what=what, epochs=epochs)
        write_tensors(encoder, model.encoder.state_dict(), {"origin": origin})
        shutil.rmtree(checkpoints)
    # Read back even here, so that a resumed run has the same states whatever the precision of the
    # Trainer.
    model.encoder.float().load_state_dict(read_tensors(encoder)[0])
