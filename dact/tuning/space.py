"""What the studies search: typed dimensions, their defaults, and how a user narrows or replaces them."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
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
        log: Draw on a log scale, for numbers above 0.
        step: Distance of the values, for numbers; not with `log`.
        choices: The values of a categorical dimension.

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
            if not self.choices or isinstance(self.choices, str):
                raise ValueError(f"a categorical dimension needs a list of choices, got {self.choices!r}")
            if (self.low, self.high, self.step, self.log) != (None, None, None, False):
                raise ValueError("a categorical dimension has choices, and no low, high, step or log")
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
                raise TypeError(f"{name} must be {'an integer' if self.type == 'int' else 'a number'}, got {value!r}")
        assert self.low is not None
        assert self.high is not None
        if self.low > self.high:
            raise ValueError(f"the range is empty: low={self.low} is above high={self.high}")
        if self.log and (self.low <= 0 or self.step is not None):
            raise ValueError(f"log needs low above 0 and no step, got low={self.low} and step={self.step}")
        if self.step is not None and self.step <= 0:
            raise ValueError(f"step must be above 0, got {self.step}")

    @property
    def mean(self) -> float:
        """The middle of the range, or the mean of the choices: what a trial has on average, for numbers."""
        values = self.choices or (self.low, self.high)
        return sum(map(float, values)) / len(values)  # type: ignore[arg-type]

    def suggest(self, trial: BaseTrial, name: str) -> Any:
        """The value of `name` that `trial` chooses."""
        if self.type == "categorical":
            assert self.choices is not None
            return trial.suggest_categorical(name, list(self.choices))
        if self.type == "int":
            return trial.suggest_int(name, self.low, self.high, step=self.step or 1, log=self.log)  # type: ignore[arg-type]
        assert self.low is not None
        assert self.high is not None
        return trial.suggest_float(name, self.low, self.high, step=self.step, log=self.log)


def _submodel(prefix: str) -> dict[str, Dimension]:
    return {
        f"{prefix}_num_layers": Dimension("int", 0, 3),
        f"{prefix}_hidden_units": Dimension("categorical", choices=[16, 32, 64, 128, 256]),
        f"{prefix}_dropout": Dimension("float", 0.0, 0.5, step=0.1),
        f"{prefix}_normalization": Dimension("categorical", choices=["none", "batch", "layer"]),
        f"{prefix}_activation": Dimension("categorical", choices=["relu", "leaky_relu", "gelu", "tanh"]),
        f"{prefix}_layer_strategy": Dimension(
            "categorical", choices=["constant", "pyramidal", "inverted_pyramidal", "bow_tie"]
        ),
    }


DEFAULT_SPACES: dict[str, dict[str, Dimension]] = {
    "submodels": {**_submodel("classifier"), **_submodel("confidence")},
    "training": {
        "batch_size": Dimension("categorical", choices=[32, 64, 128]),
        "learning_rate": Dimension("float", 1e-5, 1e-2, log=True),
        "num_epochs": Dimension("categorical", choices=[2, 3, 4]),
        "weight_decay": Dimension("float", 1e-4, 1e-1, log=True),
        "warmup_fraction": Dimension("float", 0.0, 0.3, step=0.05),
        "exit_loss_weight": Dimension("float", 0.0, 1.0, step=0.1),
    },
    "lambda_reg": {"lambda_reg": Dimension("float", 1e-3, 1.0, log=True)},
}


def build_spaces(changes: Mapping[str, Any] | None) -> dict[str, dict[str, Dimension]]:
    """The spaces of the three stages, with the user's changes.

    Args:
        changes: From a parameter's name to a `Dimension` or to entries of one. Entries without ``type`` narrow the
            default, such as ``{"high": 0.1}``; with ``type`` they replace it.

    Raises:
        ValueError: If a name is unknown or a dimension is not as `Dimension` describes it.
        TypeError: If a bound is of the wrong type.
    """
    spaces = {stage: dict(space) for stage, space in DEFAULT_SPACES.items()}
    home = {name: stage for stage, space in spaces.items() for name in space}
    for name, change in (changes or {}).items():
        if name not in home:
            raise ValueError(f"search_space: unknown parameter {name!r}; the parameters are {', '.join(home)}")
        default = spaces[home[name]][name]
        try:
            spaces[home[name]][name] = _changed(default, change)
        except (ValueError, TypeError) as error:
            raise type(error)(f"search_space: {name}: {error}") from None
    price = spaces["lambda_reg"]["lambda_reg"]
    if price.type != "float" or price.step is not None:
        raise ValueError(
            f"search_space: lambda_reg: must be of type float without a step, got type={price.type}, step={price.step}: "
            "its study places the values where the curve bends"
        )
    return spaces


def _changed(default: Dimension, change: Any) -> Dimension:
    if isinstance(change, Dimension):
        return change
    if not isinstance(change, Mapping):
        raise TypeError(f"expected a mapping such as {{type: float, low: 0.1, high: 0.5}}, got {change!r}")
    unknown = set(change) - set(asdict(default))
    if unknown:
        raise ValueError(f"unknown entry {sorted(unknown)[0]!r}; expected {', '.join(asdict(default))}")
    return Dimension(**(change if "type" in change else {**asdict(default), **change}))


def describe(space: Mapping[str, Dimension]) -> dict[str, dict[str, Any]]:
    """`space` as plain data, to compare and to store."""
    plain = {name: asdict(dimension) for name, dimension in space.items()}
    for entries in plain.values():
        entries["choices"] = None if entries["choices"] is None else list(entries["choices"])
    return plain
