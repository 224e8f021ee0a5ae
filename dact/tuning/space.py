"""The search spaces of the studies: Optuna's distributions by parameter, and the user's changes."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from difflib import get_close_matches
from typing import Any, TypeAlias

from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution
from optuna.trial import BaseTrial

Dimension: TypeAlias = FloatDistribution | IntDistribution | CategoricalDistribution
Space = Mapping[str, Dimension]
Spaces = Mapping[str, Space]
Starts = Mapping[str, Sequence[Mapping[str, Any]]]
KINDS = {"float": FloatDistribution, "int": IntDistribution, "categorical": CategoricalDistribution}


def _of_both(**dimensions: Dimension) -> dict[str, Dimension]:
    """Return the dimensions of the classifier's and the confidence's architecture."""
    return {
        f"{prefix}_{name}": one
        for prefix in ("classifier", "confidence")
        for name, one in dimensions.items()
    }


# Few dimensions, so that few trials can tell them apart.
DEFAULT_SPACES: dict[str, dict[str, Dimension]] = {
    "submodels": _of_both(
        num_layers=IntDistribution(0, 2),
        hidden_units=CategoricalDistribution([32, 64, 128, 256]),
        dropout=FloatDistribution(0.0, 0.4, step=0.1),
    ),
    "training": {
        "batch_size": CategoricalDistribution([32, 64]),
        "learning_rate": FloatDistribution(2e-5, 2e-3, log=True),
        "submodel_learning_rate": FloatDistribution(2e-4, 1e-2, log=True),
        "num_epochs": CategoricalDistribution([2, 3, 4]),
        "exit_loss_weight": FloatDistribution(0.1, 1.0, step=0.1),
        "detach_exits": CategoricalDistribution([True, False]),
    },
    "lambda_reg": {"lambda_reg": FloatDistribution(1e-3, 0.3, log=True)},
}
# Searched only where the user's search space names them.
MORE_DIMENSIONS: dict[str, dict[str, Dimension]] = {
    "submodels": _of_both(
        normalization=CategoricalDistribution(["none", "batch", "layer"]),
        activation=CategoricalDistribution(["relu", "leaky_relu", "gelu", "tanh"]),
        layer_strategy=CategoricalDistribution(
            ["constant", "pyramidal", "inverted_pyramidal", "bow_tie"]
        ),
    ),
    "training": {
        "weight_decay": FloatDistribution(1e-4, 1e-1, log=True),
        "warmup_fraction": FloatDistribution(0.0, 0.3, step=0.05),
        "num_layers": IntDistribution(1, 1000),  # see `complete_spaces`
    },
}


def build_spaces(
    changes: Mapping[str, Any] | None, *, frozen: bool = False, final_frozen: bool = False
) -> dict[str, dict[str, Dimension]]:
    """Return the spaces of the three stages, with the user's changes.

    Args:
        changes: Changes by parameter name: an Optuna distribution, or some of its entries ``low``,
            ``high``, ``log``, ``step`` and ``choices``. Entries alone, such as ``{"high": 0.1}``,
            change the default; with ``type`` (``"float"``, ``"int"`` or ``"categorical"``) they
            replace it. Naming one of `MORE_DIMENSIONS` adds it.
        frozen: Whether only the submodels learn in trials.
        final_frozen: Whether only the submodels learn in the final fit.

    Raises:
        ValueError: If a name or an entry is unknown, or a range is empty.

    Example:
        >>> build_spaces({"lambda_reg": {"high": 0.1}})["lambda_reg"]
        {'lambda_reg': FloatDistribution(high=0.1, log=True, low=0.001, step=None)}
    """
    spaces = {stage: dict(space) for stage, space in DEFAULT_SPACES.items()}
    known = {stage: {**space, **MORE_DIMENSIONS.get(stage, {})} for stage, space in spaces.items()}
    if frozen:
        # The encoder learns in no trial; the submodels have their own rate.
        del spaces["training"]["learning_rate"], known["training"]["learning_rate"]
    if frozen and not final_frozen:
        # The gain of attached exits on frozen states is lost once the encoder learns
        # (benchmarks/detached.py).
        spaces["training"]["detach_exits"] = CategoricalDistribution([True])

    home = {name: stage for stage, space in known.items() for name in space}
    for name, change in (changes or {}).items():
        if name not in home:
            meant = get_close_matches(name, home, n=1)
            hint = f"Did you mean {meant[0]}?" if meant else f"The parameters are {', '.join(home)}"
            raise ValueError(f"search_space: unknown parameter {name!r}. {hint}")
        try:
            spaces[home[name]][name] = _changed(known[home[name]][name], change)
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            hint = "Give low, high, log and step, or choices, and a type: float, int or categorical"
            raise ValueError(f"search_space: {name}: got {change!r}: {error}. {hint}") from error
    return spaces


def _changed(default: Dimension, change: Any) -> Dimension:
    if isinstance(change, Dimension):
        return change
    entries = {name: value for name, value in change.items() if name != "type"}
    if "type" in change:
        return KINDS[change["type"]](**entries)
    return type(default)(**{**vars(default), **entries})


def complete_spaces(
    spaces: Spaces, layers: int, starts: Starts, bounded: Collection[str] = ()
) -> tuple[dict[str, dict[str, Dimension]], dict[str, list[dict[str, Any]]]]:
    """Return spaces for an encoder with this number of `layers`, widened to hold the first trials,
    and these trials, limited to the parameters that their studies search.

    Args:
        starts: Parameters of the first trials, by stage.
        bounded: Names of the parameters whose bounds the user gave. These parameters are not
            widened, nor are those with a single choice: a first trial gets the nearest value.
    """
    complete = {stage: dict(space) for stage, space in spaces.items()}
    training = complete["training"]
    kept = training.get("num_layers")
    if isinstance(kept, IntDistribution):
        training["num_layers"] = IntDistribution(kept.low, min(kept.high, layers), step=kept.step)
    elif kept is None and layers > 1:
        # Placed first, since the console may have no room for the last parameters.
        upper_half = {"num_layers": IntDistribution((layers + 1) // 2, layers)}
        complete["training"] = {**upper_half, **training}

    trials: dict[str, list[dict[str, Any]]] = {stage: [] for stage in complete}
    for stage, space in complete.items():
        for values in starts.get(stage, ()):
            start = {name: values[name] for name in space if name in values}
            for name, value in start.items():
                fixed = name in bounded or space[name].single()
                space[name], start[name] = holding(space[name], value, fixed)
            if start and start not in trials[stage]:
                trials[stage].append(start)
    return complete, trials


def holding(dimension: Dimension, value: Any, fixed: bool) -> tuple[Dimension, Any]:
    """Return a dimension and a value that it holds.

    The dimension is widened to hold `value`, and loses a step that would miss it. A `fixed`
    dimension stays as it is; the value is then its nearest one, or the first of its choices.
    """
    if isinstance(dimension, CategoricalDistribution):
        if value in dimension.choices:
            return dimension, value
        if fixed:
            return dimension, dimension.choices[0]
        return CategoricalDistribution([*dimension.choices, value]), value
    low, high, step = dimension.low, dimension.high, dimension.step
    if fixed:
        inside = min(max(value, low), high)
        return dimension, inside if step is None else low + step * round((inside - low) / step)
    low, high = min(low, value), max(high, value)
    if isinstance(dimension, IntDistribution):
        return IntDistribution(low, high, dimension.log), value
    if step is not None and abs(math.remainder(value - low, step)) > 1e-9:
        step = None
    return FloatDistribution(low, high, dimension.log and low > 0, step), value


def suggest(trial: BaseTrial, name: str, dimension: Dimension) -> Any:
    """Return the value of the parameter `name` that `trial` chooses."""
    if isinstance(dimension, CategoricalDistribution):
        return trial.suggest_categorical(name, dimension.choices)
    draw: Any = trial.suggest_int if isinstance(dimension, IntDistribution) else trial.suggest_float
    return draw(name, dimension.low, dimension.high, step=dimension.step, log=dimension.log)
