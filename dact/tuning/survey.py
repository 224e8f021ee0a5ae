"""The survey before a run: one model and one datamodule, their checks, and what all trials have in common."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

from lightning.pytorch import LightningDataModule

from dact.agreement import check_classes
from dact.model import DACT
from dact.tuning.digests import data_digest, digest, encoder_digest
from dact.tuning.fitting import seeded
from dact.tuning.recipe import Recipe
from dact.tuning.run import Winners
from dact.tuning.space import Spaces, Starts, complete_spaces
from dact.tuning.stages import LAMBDA_REG, SUBMODELS, TRAINING


@dataclass(frozen=True)
class Surveyed:
    """A model and a datamodule of the factories, and what all trials of the run have in common.

    Args:
        recipe: Recipe of the run; its promise is one that model and data can keep.
        model: Untrained model.
        data: Datamodule, set up for a fit.
        teacher: Teacher that the data names, or None.
        identity: Settings that all trials have in common; see `Recipe.identity`.
        spaces: Dimension of each parameter, by stage.
        first_trials: Parameters of the first trials, by stage.
        initial: Settings of trials until a study has chosen others.
    """

    recipe: Recipe
    model: DACT
    data: LightningDataModule
    teacher: str | None
    identity: dict[str, Any]
    spaces: Spaces
    first_trials: Starts
    initial: Mapping[str, Any]

    def untuned_settings(self) -> tuple[dict[str, Any], dict[str, Any]]:
        """Return the defaults of the factories and the recommended settings; see `Winners.settings`."""
        recommended, defaults = self.first_trials[TRAINING.name]
        settings = Winners(**SUBMODELS.parse(self.first_trials[SUBMODELS.name][0])).settings()
        for first in self.first_trials[LAMBDA_REG.name]:
            settings |= first
        return {**settings, **defaults}, {**settings, **recommended}


def survey(recipe: Recipe, spaces: Spaces, bounded: Collection[str] = (), *, measured: bool = False) -> Surveyed:
    """Build one model and one datamodule, and check that they fit the run.

    Args:
        recipe: Recipe of the run.
        spaces: Spaces from `build_spaces`.
        bounded: Names of the parameters whose bounds the user gave; see `complete_spaces`.
        measured: Whether the run will measure a final model, which needs a test split.

    Raises:
        ValueError: If classes, promise or search space do not fit model and data.
    """
    with seeded(recipe.seed):
        model = recipe.make_model()
        recipe = recipe.resolved(model)
        data: Any = recipe.make_data()
    if measured:
        recipe.make_data(batch_size=1)  # fails early if the factory takes no batch_size
    teacher = getattr(data, "teacher", None)
    if teacher is not None:
        data.teacher = None  # it runs once, in `prepare`
    data.prepare_data()
    data.setup("fit")
    if measured:
        data.setup("test")
        data_digest(data.test_dataloader())  # fails early if it cannot be measured
    check_classes(getattr(data, "class_names", None), recipe.output_dimension)
    examples = data_digest(data.train_dataloader()) + data_digest(data.val_dataloader())
    identity = recipe.identity(digest([model.config(), encoder_digest(model.encoder)]), examples, teacher)
    first_trials = recipe.first_trials(model, data)
    recommended = first_trials[TRAINING.name][0]
    initial = {name: recommended[name] for name in ("submodel_learning_rate", "detach_exits", "num_layers")}
    spaces, first_trials = complete_spaces(spaces, model.num_layers, first_trials, bounded)
    return Surveyed(recipe, model, data, teacher, identity, spaces, first_trials, initial)
