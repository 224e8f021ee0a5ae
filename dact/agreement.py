"""Checks that a model and its data agree."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any


def check_agreement(model: Any, datamodule: Any, *, training: bool = True) -> None:
    """Check that data fits a model, before any long work.

    A model without class names takes the data's.

    Args:
        model: A `dact.DACT`.
        datamodule: Any datamodule, set up or not, or None. Attributes that it lacks are not
            checked.
        training: Whether the model will be trained on the data, so that a teacher matters.

    Raises:
        ValueError: If the task, tokens, lengths, classes or the teacher do not fit.
    """
    task = getattr(datamodule, "task", model.task.name)
    if task != model.task.name:
        raise ValueError(
            f"the data is {task}, but the model has task={model.task.name!r}: set task to {task!r}"
        )
    model.encoder.check_tokens(tokenizer_of(datamodule), getattr(datamodule, "max_length", None))
    names = getattr(datamodule, "class_names", None)
    check_classes(names, model.output_dimension)
    if names is not None:
        names = [str(name) for name in names]
        model.class_names = model.class_names or names
        if list(model.class_names) != names:  # answers would be wrong
            raise ValueError(
                f"the model has the classes {', '.join(model.class_names)}, in this order, but "
                f"those of the data are {', '.join(names)}: give the data class_names="
                f"{model.class_names}, or load the model with class_names=None if only names differ"
            )
    if not training:
        return
    # Custom datamodules may provide a teacher in another way.
    unknown = object()
    teacher = getattr(datamodule, "teacher", unknown)
    probabilities = getattr(datamodule, "teacher_probabilities", unknown)
    if model.needs_teacher and teacher is None and probabilities is None:
        raise ValueError(
            f"distillation={model.distillation:g} needs a teacher: give the data one "
            "(data.teacher), or set distillation to 0"
        )
    # Plain fine-tuning, as of the whole encoder, skips texts without labels.
    learns = model.needs_teacher or model.halting == "never"
    if not learns and getattr(datamodule, "needs_teacher", False):
        raise ValueError(
            "texts without labels need a teacher: give data.teacher and a distillation above 0"
        )
    if not model.needs_teacher and teacher not in (None, unknown):
        raise ValueError(
            f"{type(datamodule).__name__}: a teacher was given, but the model would not learn from "
            "it: give the model a distillation above 0, such as 0.5, or leave the teacher out"
        )


def tokenizer_of(datamodule: Any) -> Any:
    """Return the tokenizer of a datamodule, or None if it is not a transformers tokenizer."""
    tokenizer = getattr(datamodule, "tokenizer", None)
    return tokenizer if callable(getattr(tokenizer, "save_pretrained", None)) else None


def check_classes(names: Sequence[str] | None, output_dimension: int) -> None:
    """Raise a ``ValueError`` if the data's class names are more or fewer than the model's."""
    if names is not None and len(names) != output_dimension:
        raise ValueError(
            f"the data has {len(names)} classes ({', '.join(map(str, names))}), but the model has "
            f"output_dimension={output_dimension}: set output_dimension to {len(names)}"
        )


def names_of_classes(model: Any) -> list[str]:
    """Return the class names of a model, or the numbers of its classes if it has none."""
    return model.class_names or [str(label) for label in range(model.output_dimension)]
