"""The three stages as data: what a trial's parameters mean, its value, and which trial wins."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from operator import itemgetter
from typing import Any, Literal

from optuna.trial import FrozenTrial

from dact.tuning.outcome import OUTCOME, Outcome
from dact.tuning.selection import Point

Select = Callable[[Sequence[Point]], Point]  # the rule that chooses λ


@dataclass(frozen=True)
class Stage:
    """One of the three studies.

    Args:
        name: Name of the stage, of its folder, and of its study after the run tag.
        directions: Direction of each objective.
        parse: Function from the parameters of a trial to the winners by name.
        read: Function from the metrics of a trial's best epoch to its value or values.
    """

    name: str
    directions: tuple[Literal["minimize"], ...]
    parse: Callable[[Mapping[str, Any]], dict[str, Any]]
    read: Callable[[Mapping[str, float]], Any]

    @property
    def early_exit(self) -> bool:
        """Whether values are measured with early exit, at the dial that the promise would set.

        Such trials keep their `Outcome`; others may be pruned."""
        return len(self.directions) == 2

    def pick(self, trials: Sequence[FrozenTrial], select: Select) -> FrozenTrial:
        """Return the winner of the completed trials; in the study of λ, `select` chooses it."""
        if not self.early_exit:
            return min(trials, key=lambda trial: trial.values[0])
        points = []
        for trial in trials:
            outcome = Outcome.unpacked(trial.user_attrs[OUTCOME])
            loss, layers = trial.values
            points.append(Point(trial.params["lambda_reg"], loss, layers, outcome))
        return trials[points.index(select(points))]


def trials_per_stage(n_trials: int | Sequence[int]) -> dict[str, int]:
    """Return the number of trials of each stage by name, from one number or one per stage."""
    numbers = list(n_trials) if isinstance(n_trials, Sequence) else [n_trials] * len(STAGES)
    if len(numbers) != len(STAGES) or not all(isinstance(n, int) and n >= 0 for n in numbers):
        raise ValueError(
            f"TuningEngine: n_trials must be one or three integers of 0 or more, got {n_trials!r}"
        )
    return dict(zip((stage.name for stage in STAGES), numbers, strict=True))


def _submodels(params: Mapping[str, Any]) -> dict[str, Any]:
    """Return ``{"classifier_dropout": …, …}`` as one configuration per submodel."""
    found: dict[str, Any] = {"classifier_config": {}, "confidence_config": {}}
    for name, value in params.items():
        prefix, _, field = name.partition("_")
        found[f"{prefix}_config"][field] = value
    return found


def _training(params: Mapping[str, Any]) -> dict[str, Any]:
    settings = dict(params)
    if settings.get("exit_loss_weight") == 0:
        # Detached from everything else, encoder and classifier would learn nothing.
        settings["detach_exits"] = False
    return {"external_config": settings}


BOTH = itemgetter("val_task_loss", "val_exit_layer")
SUBMODELS = Stage("submodels", ("minimize",), _submodels, itemgetter("val_loss"))
TRAINING = Stage("training", ("minimize",), _training, itemgetter("val_loss"))
LAMBDA_REG = Stage("lambda_reg", ("minimize", "minimize"), dict, BOTH)
STAGES = (SUBMODELS, TRAINING, LAMBDA_REG)
