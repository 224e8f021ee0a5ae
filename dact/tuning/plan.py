"""The plan of a run: what the studies search, and what they begin with."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from lightning.pytorch import LightningDataModule
from optuna.distributions import CategoricalDistribution

from dact.model import DACT
from dact.tuning import report
from dact.tuning.recipe import Recipe, as_written, recommended
from dact.tuning.settings import Settings
from dact.tuning.space import Spaces, complete_spaces, holding
from dact.tuning.stages import LAMBDA_REG, SUBMODELS, TRAINING, Stage
from dact.tuning.trainer import TAUGHT_STEPS, enough_epochs

EPOCHS_TRIED = (2 / 3, 1, 4 / 3)  # multiples of the recommended number of epochs


@dataclass(frozen=True)
class Plan:
    """What the studies search, and what they begin with.

    Args:
        spaces: Dimension of each parameter, by stage.
        first_trials: Parameters of the first trials, by stage.
        recommended: The recommended settings within the user's bounds: the number of epochs, and
            what differs from the factories' settings.
        parameters: Encoder and settings of the factories, by their names in TensorBoard.
    """

    spaces: Spaces
    first_trials: Mapping[str, Sequence[Mapping[str, Any]]]
    recommended: Settings
    parameters: Mapping[str, Any]

    def winners(self, stage: Stage, params: Mapping[str, Any]) -> dict[str, Any]:
        """Return the winners that the parameters of a trial stand for; see `Stage.parse`."""
        # By name: a worker has a copy. Parameters that are not searched keep the factory's values.
        if stage.name == SUBMODELS.name:
            params = {**_of_submodels(self.parameters), **params}
        return stage.parse(params)


def _of_submodels(parameters: Mapping[str, Any]) -> dict[str, Any]:
    """Return those of the architectures; what the confidence reads is not searched."""
    own = {name: value for name, value in parameters.items() if name != "confidence_reads"}
    return {n: v for n, v in own.items() if n.startswith(("classifier_", "confidence_"))}


def make_plan(
    recipe: Recipe,
    spaces: Spaces,
    bounded: Collection[str],
    model: DACT,
    data: LightningDataModule,
) -> Plan:
    """Return the plan of a run.

    `data` must be set up for a fit; `bounded` names the parameters whose ranges the user gave.
    """
    size, epochs = getattr(data, "batch_size", None), recipe.epochs
    training = dict(spaces[TRAINING.name])
    if "num_epochs" not in bounded:
        epochs = enough_epochs(recipe.trainer, data, epochs, TAUGHT_STEPS)
        choices = sorted({max(1, round(part * epochs)) for part in EPOCHS_TRIED})
        training["num_epochs"] = CategoricalDistribution(choices)
        spaces = {**spaces, TRAINING.name: training}

    written, advised = as_written(model, size, epochs), recommended(model, size, epochs)
    inside, own = advised.arguments(), written.arguments()
    for name in {*bounded} & training.keys() & inside.keys():
        _, inside[name] = holding(training[name], inside[name], fixed=True)
    differing = {name: value for name, value in inside.items() if value != own.get(name)}
    parameters = report.parameters_of(model, written)
    price = advised.model["lambda_reg"]
    starts = {
        SUBMODELS.name: [_of_submodels(parameters)],
        TRAINING.name: [inside, *([own] if differing else [])],
        LAMBDA_REG.name: [{"lambda_reg": price}] if price > 0 else [],
    }
    complete, first_trials = complete_spaces(spaces, model.encoder.num_layers, starts, bounded)
    chosen = Settings.of({**differing, "num_epochs": inside["num_epochs"]})
    return Plan(complete, first_trials, chosen, parameters)
