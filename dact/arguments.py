"""The arguments of DACT: their ranges, and those that are attributes of its halting rule."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from dact.checks import check_choice, check_class_names, check_count, check_range, check_type
from dact.encoders.base import LayeredEncoder
from dact.functional import PonderKind
from dact.submodels import SubmodelConfig


def check_arguments(given: Mapping[str, Any]) -> None:
    """Raise an error that names the argument of `DACT` that is outside its range."""
    encoder, classes = given["encoder"], given["output_dimension"]
    if not isinstance(encoder, LayeredEncoder):
        raise TypeError(
            f"DACT: encoder must be a dact.encoders.LayeredEncoder, got {type(encoder).__name__}. "
            "Subclass it for an encoder of your own"
        )
    for name in ("classifier", "confidence"):
        check_type(f"DACT: {name}", given[name], SubmodelConfig, "SubmodelConfig(num_layers=2)")
    for name in ("detach_exits", "share_submodels"):
        check_type(f"DACT: {name}", given[name], bool, "True")
    check_count("DACT: output_dimension", classes, least=2, hint="it counts the classes")
    check_choice("DACT: ponder", given["ponder"], PonderKind)
    for name in ("lambda_reg", "exit_loss_weight", "consistency", "weight_decay"):
        check_range(f"DACT: {name}", given[name], "[0, inf)")
    if given["detach_exits"] and given["exit_loss_weight"] == 0:
        raise ValueError(
            "DACT: detach_exits needs an exit_loss_weight above 0, got 0: encoder and classifier would learn nothing"
        )
    if given["consistency"] > 0 and given["exit_loss_weight"] == 0:
        raise ValueError(
            "DACT: consistency needs an exit_loss_weight above 0, got 0: it is a part of the exit loss"
        )
    check_range(
        "DACT: distillation",
        given["distillation"],
        "[0, 1]",
        "it is the teacher's share of the targets",
    )
    for name in ("lambda_warmup", "warmup_fraction"):
        check_range(f"DACT: {name}", given[name], "[0, 1]", "it is a share of the optimizer steps")
    for name in ("learning_rate", "submodel_learning_rate"):
        if given[name] is not None:
            check_range(f"DACT: {name}", given[name], "(0, inf)")
    if given["num_layers"] is not None:
        check_count(
            "DACT: num_layers",
            given["num_layers"],
            most=encoder.num_layers,
            hint="the layers of the encoder",
        )
    for name in ("step_tokens", "window_tokens"):
        if given[name] is not None:
            check_count(f"DACT: {name}", given[name], hint="it counts tokens")
    for name in ("class_weights", "class_names"):
        value = given[name]
        if isinstance(value, str):
            raise TypeError(f"DACT: {name} must be a list with one entry per class, got {value!r}")
        if value is not None and len(value) != classes:
            raise ValueError(
                f"DACT: {name} must have one entry per class ({classes}), got {len(value)}: {value}"
            )
    weights = given["class_weights"]
    if weights is not None and not (
        all(math.isfinite(weight) and weight >= 0 for weight in weights) and any(weights)
    ):
        raise ValueError(
            f"DACT: class_weights must be finite and 0 or more, one of them above 0, got {[*weights]}"
        )
    check_class_names("DACT: class_names", given["class_names"])
