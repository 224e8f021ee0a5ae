"""What the trials of a run share: the teacher, the warmed-up encoder and its states, each made once."""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, fields
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import LightningDataModule
from torch import Tensor

from dact import signals
from dact.agreement import check_classes
from dact.encoders.base import move
from dact.files import read_tensors, write_tensors
from dact.model import DACT
from dact.tuning.features import Features, FeaturesData, compute_features
from dact.tuning.fingerprints import (
    digest,
    fingerprint_data,
    fingerprint_encoder,
    fingerprint_pretrained,
    fingerprint_tensor,
)
from dact.tuning.progress import Progress
from dact.tuning.recipe import Recipe
from dact.tuning.run import Run
from dact.tuning.training import resumable_fit, seeded, without_collapse_warning


@dataclass(frozen=True)
class Survey:
    """A model and a datamodule of the factories, and what the trials of the run have in common.

    Args:
        model: Untrained model.
        data: Datamodule, set up for a fit.
        teacher: The teacher that the data names, or None.
        identity: See `Recipe.identity`.
    """

    model: DACT
    data: LightningDataModule
    teacher: str | None
    identity: dict[str, Any]


def survey(recipe: Recipe, *, measured: bool = False) -> Survey:
    """Build one model and one datamodule, and check that they can serve the run.

    Args:
        recipe: What fits of the run are made of.
        measured: Whether the run will measure a final model, which takes a test split.

    Raises:
        ValueError: If classes or promise do not fit the model.
    """
    with seeded(recipe.seed):
        model, data = recipe.make_model(), recipe.make_data()
    if measured:
        recipe.make_data(batch_size=1)  # what trials and measurements will ask for
    teacher = getattr(data, "teacher", None)
    if teacher is not None:
        data.teacher = None  # type: ignore[attr-defined]  # asked once, in `prepare`
    data.prepare_data()
    data.setup("fit")
    if measured:
        data.setup("test")
        data.test_dataloader()
    check_classes(getattr(data, "class_names", None), recipe.output_dimension)
    if recipe.promise is not None:
        recipe.promise.check_model(model)
    examples = fingerprint_data(data.train_dataloader()) + fingerprint_data(data.val_dataloader())
    made_by = digest([model.config(), fingerprint_encoder(model.encoder)])
    return Survey(model, data, teacher, recipe.identity(made_by, examples, teacher))


@dataclass(frozen=True)
class Shared:
    """What all trials of a run share. Small to send to another process, which reads the files when it needs them.

    Args:
        recipe: What fits of the run are made of.
        identity: See `Recipe.identity`.
        class_names: Names of the classes, where the data has them.
        teacher: File with the teacher's probabilities of the training examples, or None.
        encoder: File with the weights that encoders start from, or None for those of the factory.
        states: Folder with the states of frozen mode, or None.
        batch_size: Number of examples per training batch where no trial chooses it.
    """

    recipe: Recipe
    identity: dict[str, Any]
    class_names: list[str] | None
    teacher: Path | None
    encoder: Path | None
    states: Path | None
    batch_size: int

    def __getstate__(self) -> dict[str, Any]:
        return {field.name: getattr(self, field.name) for field in fields(self)}

    def build(self, settings: Mapping[str, Any]) -> tuple[DACT, LightningDataModule]:
        """Return a new model and a new datamodule.

        Args:
            settings: Arguments of both as plain values; see `Winners.settings`.
        """
        chosen = dict(settings)
        size = {"batch_size": chosen.pop("batch_size")} if "batch_size" in chosen else {}
        if self.states is not None:
            model = self._on_states(chosen)
            train, val = self._features
            return model, FeaturesData(train, val, **{"batch_size": self.batch_size, **size}, seed=self.recipe.seed)
        model = self.recipe.make_model(**chosen)
        if self.encoder is not None:
            model.encoder.load_state_dict(read_tensors(self.encoder)[0])
        return model, self.make_data(**size)

    def make_data(self, **overrides: Any) -> LightningDataModule:
        """Return a new datamodule, whose training batches carry the teacher's probabilities where there is one."""
        data = self.recipe.make_data(**overrides)
        if self.teacher is not None:
            data.teacher_probabilities = self._probabilities  # type: ignore[attr-defined]
        return data

    def _on_states(self, chosen: dict[str, Any]) -> DACT:
        """Return a model with new submodels on the frozen encoder."""
        if "learning_rate" in chosen:  # it is that of the submodels: nothing else learns
            chosen = {"submodel_learning_rate": None, **chosen}
        if type(self._base) is DACT:  # no encoder is built for nothing
            overrides = {"encoder": self._base.encoder, **self.recipe.overrides(chosen)}
            return DACT.from_config(self._base.config(), **overrides)
        # A class of the user's may have more arguments than a configuration knows.
        model = self.recipe.make_model(**chosen)
        model.encoder, model.class_names = self._base.encoder, self._base.class_names
        return model

    @cached_property
    def _base(self) -> DACT:
        with seeded(self.recipe.seed):
            model = self.recipe.make_model()
        if self.encoder is not None:
            model.encoder.load_state_dict(read_tensors(self.encoder)[0])
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


def prepare(recipe: Recipe, run: Run, found: Survey, progress: Progress) -> Shared:
    """Train and compute what all trials share, or take what an earlier call left. One process does it at a time.

    Args:
        recipe: What fits of the run are made of.
        run: The run.
        found: The survey of the recipe; its model and data are used up.
        progress: What the console shows.

    Raises:
        ValueError: If a file that an earlier call left is corrupted, or the data cannot carry a teacher's probabilities.
    """
    taught = recipe.distillation > 0 or found.teacher is not None
    if taught and not hasattr(found.data, "teacher_probabilities"):
        raise ValueError(
            f"TuningEngine: distillation needs 'teacher' in training batches, but {type(found.data).__name__} has no "
            "teacher_probabilities: let it be a dact.data.base.TextDataModule"
        )
    teacher: Path | None = None
    encoder: Path | None = None
    states: Path | None = None
    batch_size = 0
    with run.alone(lambda: progress.stage("waiting for another process, which prepares the run")):
        if taught:
            teacher, encoder = _teach(recipe, run.folder / "teacher", found, progress)
        if recipe.encoder_training == "frozen":
            states = run.folder / "features"
            encoder = _freeze(recipe, states, found, encoder, progress)
            batch_size = int(next(iter(found.data.train_dataloader()))["labels"].shape[0])
    names = getattr(found.data, "class_names", None)
    return Shared(recipe, found.identity, names, teacher, encoder, states, batch_size)


# ---------------------------------------------------------------------- the teacher


def _teach(recipe: Recipe, folder: Path, found: Survey, progress: Progress) -> tuple[Path, Path | None]:
    """Return files with a teacher's probabilities and its encoder; the latter is None for one that the data names."""
    data: Any = found.data
    said, kept = folder / "probabilities.safetensors", None if found.teacher else folder / "encoder.safetensors"
    trained = f"{fingerprint_encoder(found.model.encoder)}/{recipe.epochs}/{recipe.seed}"
    made_by = trained if found.teacher is None else fingerprint_pretrained(found.teacher)
    origin = f"{found.identity['data']}/{made_by}"
    if all(_origin(path) == origin for path in (said, kept) if path is not None):
        data.teacher_probabilities = read_tensors(said)[0]["probabilities"]
        return said, kept
    if kept is None:
        data.teacher = found.teacher
        data.train_dataloader()  # which asks the teacher
    else:
        with seeded(recipe.seed):
            model = recipe.make_model().at_full_depth()
            _fit_once(recipe, model, data, folder, origin, recipe.epochs, "teacher at full depth", progress)
        data.teacher_probabilities = _ask(model.eval().to(recipe.device), data)
        write_tensors(kept, model.encoder.state_dict(), {"origin": origin})
    write_tensors(said, {"probabilities": data.teacher_probabilities}, {"origin": origin})
    _clean(folder)
    return said, kept


@torch.no_grad()
def _ask(model: DACT, data: LightningDataModule) -> Tensor:
    """Return a model's probabilities of the training examples ``[examples, classes]``, in their order."""
    rows, answers = [], []
    for batch in data.train_dataloader():
        signals.check()
        rows.append(batch["row"])
        answers.append(model(move(batch, model.device)).probabilities.cpu())
    return torch.cat(answers)[torch.cat(rows).argsort()]


# ---------------------------------------------------------------------- the frozen encoder


def _freeze(recipe: Recipe, folder: Path, found: Survey, start: Path | None, progress: Progress) -> Path | None:
    """Warm the encoder up, compute its states, and return the file with its weights (None for the factory's own)."""
    model, data = found.model, found.data
    if start is not None:
        model.encoder.load_state_dict(read_tensors(start)[0])
    taught_by = fingerprint_tensor(getattr(data, "teacher_probabilities", None))
    encoder = start
    if recipe.warm_up_epochs:
        encoder = folder / "encoder.safetensors"
        origin = digest(
            [fingerprint_encoder(model.encoder), found.identity["data"], recipe.warm_up_epochs, recipe.seed]
        )
        origin = f"{origin}/{taught_by}"
        if _origin(encoder) != origin:
            model.lambda_reg = 0.0  # no price for layers: here the encoder learns, and nothing else stays
            with seeded(recipe.seed):
                _fit_once(
                    recipe, model, data, folder, origin, recipe.warm_up_epochs, "warm-up of the encoder", progress
                )
            write_tensors(encoder, model.encoder.state_dict(), {"origin": origin})
            _clean(folder)
        # Read back even here, so that a resumed run has the same states whatever the precision of the Trainer.
        model.encoder.float().load_state_dict(read_tensors(encoder)[0])
    model.encoder.eval().requires_grad_(False)
    fingerprint = f"{fingerprint_encoder(model.encoder)}/{found.identity['data']}/{taught_by}"
    model.to(recipe.device)
    for split, loader in (("train", data.train_dataloader()), ("val", data.val_dataloader())):
        compute_features(model.encoder, loader, folder / split, fingerprint)
    return encoder


# ---------------------------------------------------------------------- both


def _origin(path: Path) -> str | None:
    """Return what a file was made of, None where there is none.

    Raises:
        ValueError: If it is corrupted.
    """
    return read_tensors(path)[1].get("origin") if path.is_file() else None


def _fit_once(
    recipe: Recipe,
    model: DACT,
    data: LightningDataModule,
    folder: Path,
    origin: str,
    epochs: int,
    what: str,
    progress: Progress,
) -> None:
    """Fit, and resume with the epoch in which an earlier call was stopped."""
    checkpoints = folder / f"fit_{hashlib.sha256(origin.encode()).hexdigest()[:16]}"
    with progress.fit(f"{what}, {epochs} epochs") as bar, without_collapse_warning():
        resumable_fit(recipe.trainer, model, data, checkpoints, epochs=epochs, callbacks=[bar])


def _clean(folder: Path) -> None:
    """Remove the checkpoints of fits that are done."""
    for left_over in folder.glob("fit_*"):
        shutil.rmtree(left_over)
