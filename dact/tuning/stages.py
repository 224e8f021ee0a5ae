"""The three stages as data: what a trial's parameters mean, what a trial is worth, and what the winner sets."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from dact.submodels import SubmodelConfig

Direction = Literal["minimize", "maximize"]
SUBMODEL_FIELDS = tuple(field.name for field in dataclasses.fields(SubmodelConfig))


@dataclass(frozen=True)
class Stage:
    """One of the three studies.

    Args:
        name: Name of the stage, of its folder, and of its study after the run tag.
        method: Method of `TuningEngine` that runs the study.
        directions: Direction of each objective.
        parse: Function from the parameters of a trial to the winners they stand for, by name.
        read: Function from the metrics of a trial's best epoch to its value or values.
    """

    name: str
    method: str
    directions: tuple[Direction, ...]
    parse: Callable[[Mapping[str, Any]], dict[str, Any]]
    read: Callable[[Mapping[str, float]], Any]

    @property
    def prunes(self) -> bool:
        """Whether trials may be pruned: Optuna prunes studies of one objective only."""
        return len(self.directions) == 1


def _submodels(params: Mapping[str, Any]) -> dict[str, Any]:
    """Return ``{"classifier_dropout": …, "confidence_dropout": …}`` as one configuration per submodel."""
    return {
        f"{prefix}_config": {
            name: params[f"{prefix}_{name}"] for name in SUBMODEL_FIELDS if f"{prefix}_{name}" in params
        }
        for prefix in ("classifier", "confidence")
    }


def _training(params: Mapping[str, Any]) -> dict[str, Any]:
    return {"external_config": dict(params)}


def _lambda_reg(params: Mapping[str, Any]) -> dict[str, Any]:
    return {"lambda_reg": params["lambda_reg"]}


def _validation_loss(metrics: Mapping[str, float]) -> float:
    return metrics["val_loss"]


def _loss_and_layers(metrics: Mapping[str, float]) -> tuple[float, float]:
    return metrics["val_task_loss"], metrics["val_exit_layer"]


SUBMODELS = Stage("submodels", "joint_tune_study", ("minimize",), _submodels, _validation_loss)
TRAINING = Stage("training", "train_tune_study", ("minimize",), _training, _validation_loss)
LAMBDA_REG = Stage("lambda_reg", "lambda_reg_study", ("minimize", "minimize"), _lambda_reg, _loss_and_layers)
STAGES = (SUBMODELS, TRAINING, LAMBDA_REG)
