"""The shared inputs of a run's fits: the whole encoder's answers and, in frozen mode, states."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from dataclasses import dataclass, fields
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import LightningDataModule
from torch import Tensor

from dact.files import read_tensors, write_tensors
from dact.model import DACT
from dact.saving import WEIGHTS_NAME
from dact.tuning import report
from dact.tuning.baseline import ANSWERS, TEACHER, fit_baseline
from dact.tuning.features import Features, FeaturesData, compute_features
from dact.tuning.plan import Plan
from dact.tuning.progress import Progress
from dact.tuning.recipe import DISTILLATION, Recipe
from dact.tuning.run import Run
from dact.tuning.settings import Settings
from dact.tuning.trainer import enough_epochs, resumable_fit, seeded

WARM_UP_STEPS = 90  # optimizer steps that suffice for the encoder of frozen mode
ENCODER = "encoder.safetensors"  # weights of frozen mode's encoder, next to its states


@dataclass(frozen=True)
class Prepared:
    """The shared inputs of all fits of a run.

    Pickles are small, since another process reads the files on demand.

    Args:
        teacher: File with a teacher's probabilities of the training examples, or None.
        learning: The argument `distillation` of all models, if it differs from the factory's.
        finetuning: Model arguments for fits after the studies; see `Recipe.finetuning`.
    """

    recipe: Recipe
    run: Run
    plan: Plan
    class_names: list[str] | None
    teacher: Path | None
    learning: dict[str, Any]
    finetuning: dict[str, Any]

    def __getstate__(self) -> dict[str, Any]:
        return {field.name: getattr(self, field.name) for field in fields(self)}

    @property
    def baseline(self) -> Path:
        return self.run.folder / "whole_encoder"

    @property
    def is_frozen(self) -> bool:
        """Whether trials train the submodels alone, on states of a frozen encoder."""
        return self.recipe.encoder_training == "frozen"

    @property
    def states(self) -> Path:
        return self.run.folder / "features"

    def right(self, target: Tensor) -> Tensor:
        """Return which validation examples the whole encoder classifies correctly, bool
        ``[examples]``.

        `target` holds their labels in order, ``[examples, …]``; the last ones may be missing.
        """
        answers, size = read_tensors(self.baseline / ANSWERS)[0], len(target)
        if not torch.equal(answers["targets"][:size], target):
            raise ValueError("validation examples must keep their order: do not shuffle them")
        return answers["right"][:size]

    def log(
        self, folder: Path, settings: Settings, metrics: Mapping[str, float], succeeded: bool = True
    ) -> None:
        """Log the fit in `folder`, of a trial or after the studies, to TensorBoard."""
        parameters = {**self.plan.parameters, **settings.flat()}
        name = str(folder.relative_to(self.run.log_dir))
        report.log_fit(folder, parameters, metrics, name, succeeded)

    def whole_encoder(self) -> DACT:
        """Return the fine-tuned whole encoder, on the Trainer's device."""
        model = self.recipe.whole_model().at_full_depth()
        model.load_state_dict(read_tensors(self.baseline / "model" / WEIGHTS_NAME)[0])
        return model.eval().to(self.recipe.device)

    def build(
        self, settings: Settings, seed: int, *, unfreeze: bool = False
    ) -> tuple[DACT, LightningDataModule]:
        """Return a new model and a new datamodule.

        In frozen mode, the data holds precomputed states in an order set by `seed`, unless
        `unfreeze` lets the encoder train too.
        """
        if self.is_frozen and not unfreeze:
            size = settings.batch_size or self.run.result("features")["batch_size"]
            states = FeaturesData(*self._features, batch_size=size, seed=seed)
            return self._on_states(settings.model), states
        model = self.recipe.make_model(**{**self.learning, **settings.model})
        model.encoder.load_state_dict(read_tensors(self.baseline / TEACHER)[0])
        chosen = {} if settings.batch_size is None else {"batch_size": settings.batch_size}
        data: Any = self.recipe.make_data(**chosen)
        data.teacher = None  # its answers are stored already, or not needed
        if self.teacher is not None:
            data.teacher_probabilities = self._probabilities
        return model, data

    def _on_states(self, chosen: Mapping[str, Any]) -> DACT:
        """Return a model with new submodels on the frozen encoder."""
        overrides = self.recipe.overrides({**self.learning, **chosen})
        if type(self._base) is DACT:  # without building another encoder
            return DACT.from_config(self._base.config(), encoder=self._base.encoder, **overrides)
        model = self.recipe.model(**overrides)
        model.encoder, model.class_names = self._base.encoder, self._base.class_names
        return model

    @cached_property
    def _base(self) -> DACT:
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
    def _features(self) -> tuple[Features, Features, Features | None]:
        apart = self.states / "confidence"
        train, val = Features(self.states / "train"), Features(self.states / "val")
        return train, val, Features(apart) if apart.is_dir() else None


def prepare(
    recipe: Recipe, run: Run, plan: Plan, model: DACT, data: Any, progress: Progress
) -> Prepared:
    """Return the shared inputs of all fits; compute those that earlier calls have not.

    `data` must be set up for a fit, and must not be used afterwards.
    """
    named, data.teacher = getattr(data, "teacher", None), None  # it runs once, below
    run.step("baseline", fit_baseline, recipe, run.folder / "whole_encoder", data, progress)
    share = recipe.distillation
    if share is None:
        share = model.distillation or DISTILLATION
    teacher: Path | None = None
    if "teacher" not in next(iter(data.train_dataloader())):
        teacher = _teach(run, recipe, data, named) if share else None
        share = share if teacher else 0.0
    prepared = Prepared(
        recipe=recipe,
        run=run,
        plan=plan,
        class_names=getattr(data, "class_names", None),
        teacher=teacher,
        learning={"distillation": share} if share != model.distillation else {},
        finetuning=recipe.finetuning(model) if recipe.final_training == "finetune" else {},
    )
    if prepared.is_frozen:
        run.step("features", _freeze, prepared, data, progress)
    return prepared


def _teach(run: Run, recipe: Recipe, data: Any, named: str | None) -> Path | None:
    """Give `data` the answers of the teacher that it names, or else of the whole encoder, and
    return their file; None if the data cannot carry them."""
    path = run.folder / "whole_encoder" / ANSWERS
    if named is not None:
        path = run.folder / "teacher" / "probabilities.safetensors"
        if not path.is_file():
            data.teacher = named
            data.train_dataloader()  # which runs the teacher
            write_tensors(path, {"probabilities": data.teacher_probabilities})
            data.teacher = None
    data.teacher_probabilities = read_tensors(path)[0].get("probabilities")
    if data.teacher_probabilities is not None:
        return path
    if recipe.distillation is not None:
        raise ValueError(
            "TuningEngine: distillation needs 'row' and 'teacher' in training batches, but "
            f"{type(data).__name__} lacks them: derive it from dact.data.base.TextDataModule"
        )
    return None


def _freeze(prepared: Prepared, data: Any, progress: Progress) -> dict[str, Any]:
    """Write the states of frozen mode and its encoder's weights, and return the batch size.

    The submodels learn from texts that the encoder was trained on, as in the final fit. The encoder
    is trained only briefly: the states of memorised texts say little about new ones.
    """
    recipe, folder = prepared.recipe, prepared.states
    start = {n: v for n, v in prepared.plan.recommended.model.items() if n != "num_layers"}
    with seeded(recipe.seed):
        # All layers, since trials choose how many they keep.
        model = recipe.whole_model(**prepared.learning, **start)
    if recipe.warm_up_epochs:
        epochs = enough_epochs(recipe.trainer, data, recipe.warm_up_epochs, WARM_UP_STEPS)
        model.lambda_reg = 0.0  # layers are free, since only the encoder of this fit is kept
        what = "encoder of the studies", epochs, recipe.warm_up_epochs
        with seeded(recipe.seed), progress.fit(*what) as bar:
            checkpoints = folder / "fit" / "checkpoints"
            resumable_fit(recipe.trainer, model, data, checkpoints, bar, epochs=epochs)
        write_tensors(folder / ENCODER, model.encoder.float().state_dict())
    model.encoder.eval().requires_grad_(False)
    model.to(recipe.device)
    for name in ("train", "val", "confidence"):
        loader = getattr(data, f"{name}_dataloader", lambda: None)()
        if loader is not None:
            compute_features(model.encoder, loader, folder / name)
    shutil.rmtree(folder / "fit", ignore_errors=True)
    return {"batch_size": next(iter(data.train_dataloader()))["labels"].shape[0]}
