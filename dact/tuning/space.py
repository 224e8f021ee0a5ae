"""The search spaces of the studies: typed dimensions, their defaults, and the user's changes to
them."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from difflib import get_close_matches
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from optuna.trial import BaseTrial

Kind = Literal["float", "int", "categorical"]


@dataclass(frozen=True)
class Dimension:
    """One parameter of a search space.

    Args:
        type: ``"float"``, ``"int"`` or ``"categorical"``.
        low: Smallest value, for numbers.
        high: Largest value, for numbers.
        log: Whether to draw on a log scale, for numbers above 0.
        step: Distance between values, for numbers; not with `log`.
        choices: Values of a categorical dimension.

    Raises:
        TypeError: If a bound is of the wrong type.
        ValueError: If the range is empty or an entry does not go with the type.
    """

    type: Kind
    low: float | None = None
    high: float | None = None
    log: bool = False
    step: float | None = None
    choices: Sequence[Any] | None = None

    def __post_init__(self) -> None:
        if self.type == "categorical":
            if (
                isinstance(self.choices, str)
                or not isinstance(self.choices, Sequence)
                or not self.choices
            ):
                raise ValueError(
                    f"a categorical dimension needs a list of choices, got {self.choices!r}"
                )
            if (self.low, self.high, self.step, self.log) != (None, None, None, False):
                raise ValueError(
                    "a categorical dimension has choices, and no low, high, step or log"
                )
            return
        if self.type not in ("float", "int"):
            raise ValueError(f"type must be 'float', 'int' or 'categorical', got {self.type!r}")
        if self.choices is not None:
            raise ValueError(f"choices go with type: categorical, not with type: {self.type}")
        for name in ("low", "high", "step"):
            value = getattr(self, name)
            if value is None and name == "step":
                continue
            whole = isinstance(value, int) or (isinstance(value, float) and self.type == "float")
            if isinstance(value, bool) or not whole or not math.isfinite(value):
                raise TypeError(
                    f"{name} must be {'an integer' if self.type == 'int' else 'a number'}, got {value!r}"
                )
        assert self.low is not None and self.high is not None
        if self.low > self.high:
            raise ValueError(f"the range is empty: low={self.low} is above high={self.high}")
        if self.log and (self.low <= 0 or self.step is not None):
            raise ValueError(
                f"log needs low above 0 and no step, got low={self.low} and step={self.step}"
            )
        if self.step is not None and self.step <= 0:
            raise ValueError(f"step must be above 0, got {self.step}")

    @property
    def first(self) -> Any:
        """The lowest value, or the first of the choices."""
        return self.low if self.choices is None else self.choices[0]

    def holding(self, value: Any) -> Dimension:
        """Return the dimension, widened to hold `value`; a step that would miss it is dropped."""
        if self.type == "categorical":
            assert self.choices is not None
            return self if value in self.choices else replace(self, choices=[*self.choices, value])
        assert self.low is not None and self.high is not None
        low, high, step = min(self.low, value), max(self.high, value), self.step
        if step is not None and not math.isclose(
            round((value - low) / step) * step, value - low, abs_tol=1e-9
        ):
            step = None
        return replace(self, low=low, high=high, step=step, log=self.log and low > 0)

    def nearest(self, value: Any) -> Any:
        """Return the value of the dimension that is nearest to `value`: of choices without it, the
        first."""
        if self.type == "categorical":
            assert self.choices is not None
            return value if value in self.choices else self.first
        assert self.low is not None and self.high is not None
        if self.holding(value) == self:
            return value
        inside = min(max(value, self.low), self.high)
        if self.step is None:
            return inside
        steps = min(
            round((inside - self.low) / self.step), math.floor((self.high - self.low) / self.step)
        )
        return self.low + steps * self.step

    def suggest(self, trial: BaseTrial, name: str) -> Any:
        """Return the value of `name` that `trial` chooses."""
        if self.type == "categorical":
            assert self.choices is not None
            return trial.suggest_categorical(name, list(self.choices))
        assert self.low is not None and self.high is not None
        if self.type == "int":
            return trial.suggest_int(
                name, int(self.low), int(self.high), step=int(self.step or 1), log=self.log
            )
        return trial.suggest_float(name, self.low, self.high, step=self.step, log=self.log)


def _of_both(**dimensions: Dimension) -> dict[str, Dimension]:
    """Return the dimensions of the classifier's and the confidence's architecture."""
    return {
        f"{prefix}_{name}": one
        for prefix in ("classifier", "confidence")
        for name, one in dimensions.items()
    }


# Few dimensions, so that few trials can tell; `MORE_DIMENSIONS` are searched where the search space
# names them.
DEFAULT_SPACES: dict[str, dict[str, Dimension]] = {
    "submodels": _of_both(
        num_layers=Dimension("int", 0, 2),
        hidden_units=Dimension("categorical", choices=[32, 64, 128, 256]),
        dropout=Dimension("float", 0.0, 0.4, step=0.1),
    ),
    "training": {
        "batch_size": Dimension("categorical", choices=[32, 64]),
        "learning_rate": Dimension("float", 2e-5, 2e-3, log=True),
        "submodel_learning_rate": Dimension("float", 2e-4, 1e-2, log=True),
        "num_epochs": Dimension("categorical", choices=[2, 3, 4]),
        "exit_loss_weight": Dimension("float", 0.1, 1.0, step=0.1),
        "detach_exits": Dimension("categorical", choices=[True, False]),
    },
    "lambda_reg": {"lambda_reg": Dimension("float", 1e-3, 1.0, log=True)},
}
MORE_DIMENSIONS: dict[str, dict[str, Dimension]] = {
    "submodels": _of_both(
        normalization=Dimension("categorical", choices=["none", "batch", "layer"]),
        activation=Dimension("categorical", choices=["relu", "leaky_relu", "gelu", "tanh"]),
        layer_strategy=Dimension(
            "categorical", choices=["constant", "pyramidal", "inverted_pyramidal", "bow_tie"]
        ),
    ),
    "training": {
        "weight_decay": Dimension("float", 1e-4, 1e-1, log=True),
        "warmup_fraction": Dimension("float", 0.0, 0.3, step=0.05),
        "num_layers": Dimension(
            "int", 1, 1000
        ),  # by default the upper half of the encoder's; see `complete_spaces`
    },
}
FROZEN_RATE = "learning_rate"  # in frozen mode only the submodels learn, at submodel_learning_rate


def _nested(changes: Mapping[str, Any]) -> dict[str, Any]:
    """Return changes by parameter; on a command line one may be given as ``batch_size.high``."""
    nested: dict[str, Any] = {}
    for path, change in changes.items():
        name, _, entry = path.partition(".")
        nested[name] = {**nested.get(name, {}), entry: change} if entry else change
    return nested


def build_spaces(
    changes: Mapping[str, Any] | None, *, frozen: bool = False, final_frozen: bool = False
) -> dict[str, dict[str, Dimension]]:
    """Return the spaces of the three stages, with the user's changes.

    Args:
        changes: Changes by parameter name, each a `Dimension` or entries of one. Entries without
            ``type`` narrow the default, such as ``{"high": 0.1}``; with ``type`` they replace it.
            Naming one of `MORE_DIMENSIONS` adds it.
        frozen: Whether only the submodels learn in trials.
        final_frozen: Whether only they learn in the final fit as well.

    Raises:
        ValueError: If a name is unknown or a dimension is not as `Dimension` describes it.
        TypeError: If a bound is of the wrong type.
    """
    spaces = {stage: dict(space) for stage, space in DEFAULT_SPACES.items()}
    known = {
        stage: {**space, **MORE_DIMENSIONS.get(stage, {})}
        for stage, space in DEFAULT_SPACES.items()
    }
    home = {name: stage for stage, space in known.items() for name in space}
    if frozen:
        del spaces["training"][FROZEN_RATE]
    if frozen and not final_frozen:
        # What attached exits gain on frozen states, they lose once the encoder learns
        # (benchmarks/detached.py).
        spaces["training"]["detach_exits"] = Dimension("categorical", choices=[True])
    if not isinstance(changes or {}, Mapping):
        raise TypeError(
            f"search_space: expected a mapping from parameters to their changes, got {changes!r}"
        )
    for name, change in _nested(changes or {}).items():
        if name not in home:
            meant = get_close_matches(name, home, n=1)
            hint = f"Did you mean {meant[0]}?" if meant else f"The parameters are {', '.join(home)}"
            raise ValueError(f"search_space: unknown parameter {name!r}. {hint}")
        if frozen and name == FROZEN_RATE:
            raise ValueError(
                "search_space: learning_rate is that of the encoder, which learns in no trial of frozen mode: give "
                "submodel_learning_rate"
            )
        try:
            spaces[home[name]][name] = _changed(known[home[name]][name], change)
        except (ValueError, TypeError) as error:
            raise type(error)(f"search_space: {name}: {error}") from None
    price = spaces["lambda_reg"]["lambda_reg"]
    if price.type != "float" or price.step is not None:
        raise ValueError(
            f"search_space: lambda_reg: must be of type float without a step, got type={price.type}, "
            f"step={price.step}: its study places the values where the curve bends"
        )
    return spaces


Space = Mapping[str, Dimension]
Spaces = Mapping[str, Space]
Starts = Mapping[str, Sequence[Mapping[str, Any]]]


def complete_spaces(
    spaces: Spaces, layers: int, starts: Starts, bounded: Collection[str] = ()
) -> tuple[Spaces, dict[str, list[dict[str, Any]]]]:
    """Return spaces for an encoder of this number of layers, widened to hold the parameters of the
    first trials.

    A dimension of one choice stays as it is.

    Args:
        spaces: Spaces from `build_spaces`.
        layers: Number of the encoder's layers.
        starts: Parameters of the first trials, by stage.
        bounded: Names of the parameters whose bounds the user gave. They are not widened; the
            sampler draws the parameter of a first trial that lies outside.

    Returns:
        The spaces, and the first trials without parameters that no study searches.

    Raises:
        ValueError: If the search space allows no number of layers that the encoder has.
    """
    complete = {stage: dict(space) for stage, space in spaces.items()}
    training = complete["training"]
    if "num_layers" in training:
        given = training["num_layers"]
        if given.type == "int":
            assert given.low is not None and given.high is not None
            if given.low > layers:
                raise ValueError(
                    f"search_space: num_layers: low={given.low} is above the {layers} layers of the encoder"
                )
            training["num_layers"] = replace(given, high=min(given.high, layers))
        elif not all(isinstance(one, int) and 1 <= one <= layers for one in given.choices or ()):
            raise ValueError(
                f"search_space: num_layers: choices must be in 1 … {layers}, the layers of the encoder, got "
                f"{', '.join(map(str, given.choices or ()))}"
            )
    elif layers > 1:  # first, since the console may have no room for the last ones
        complete["training"] = {
            "num_layers": Dimension("int", (layers + 1) // 2, layers),
            **training,
        }
    kept: dict[str, list[dict[str, Any]]] = {stage: [] for stage in complete}
    for stage, space in complete.items():
        for values in starts.get(stage, ()):
            start = {}
            for name in [name for name in space if name in values]:
                wider = space[name].holding(values[name])
                fixed = name in bounded or len(space[name].choices or ()) == 1
                if not fixed or wider == space[name]:
                    space[name], start[name] = wider, values[name]
            if start:
                kept[stage].append(start)
    return complete, kept


def _changed(default: Dimension, change: Any) -> Dimension:
    if isinstance(change, Dimension):
        return change
    if not isinstance(change, Mapping):
        raise TypeError(
            f"expected a mapping such as {{type: float, low: 0.1, high: 0.5}}, got {change!r}"
        )
    unknown = set(change) - set(asdict(default))
    if unknown:
        raise ValueError(
            f"unknown entry {sorted(unknown)[0]!r}; expected {', '.join(asdict(default))}"
        )
    return Dimension(**(change if "type" in change else {**asdict(default), **change}))


def describe(space: Mapping[str, Dimension]) -> dict[str, dict[str, Any]]:
    """Return `space` as plain data, to compare and to store."""
    plain = {name: asdict(dimension) for name, dimension in space.items()}
    for entries in plain.values():
        entries["choices"] = None if entries["choices"] is None else list(entries["choices"])
    return plain
