"""A teacher's class probabilities for the training examples, as targets of distillation."""

from __future__ import annotations

from typing import Any

import torch
from rich.progress import track
from torch import Tensor

from dact.agreement import names_of_classes
from dact.data.examples import Examples
from dact.data.tokenizers import load_tokenizer, tokenize
from dact.encoders.base import move
from dact.encoders.huggingface import is_of_dact, load_sequence_classifier, longest_input
from dact.encoders.pretrained import resolve_pretrained
from dact.model import DACT
from dact.tasks import MULTICLASS, Task

BATCH = 64


@torch.no_grad()
def teacher_probabilities(
    teacher: str,
    train: Examples,
    class_names: list[str],
    max_length: int,
    device: torch.device | None = None,
    task: Task = MULTICLASS,
) -> Tensor:
    """Return a fine-tuned model's probabilities for examples, ``[examples, classes]``, with the
    classes in the order of `class_names`.

    Raises:
        ValueError: If the teacher cannot be read, or has other classes or another task.
    """
    tokenizer = load_tokenizer(teacher)
    model, names, longest = _load(teacher)
    order = _order_of_classes(teacher, names, class_names)
    if isinstance(model, DACT) and model.task.name != task.name:
        raise ValueError(f"the teacher {teacher!r} is {model.task.name}, the data {task.name}")
    model = model.to(device or "cpu").eval()
    options = {"truncation": True, "max_length": min(max_length, longest or max_length)}
    # Texts of similar length go together, so that little padding is computed.
    by_length = sorted(range(len(train)), key=lambda row: len(train.texts[row]))
    answers = torch.empty(len(train), len(class_names))
    starts = range(0, len(train), BATCH)
    for start in track(starts, description=f"The teacher on {len(train):,} texts", transient=True):
        rows = by_length[start : start + BATCH]
        chosen = ([column[row] for row in rows] for column in train.columns)
        batch = move(tokenize(tokenizer, *chosen, **options), model.device)
        if isinstance(model, DACT):
            found = model(batch).probabilities
        else:
            found = task.answers(model(**batch).logits)
        answers[rows] = found.cpu()
    return answers[:, order]


def _load(teacher: str) -> tuple[Any, list[str], int | None]:
    """Return the model, the names of its classes, and its largest number of tokens, or None."""
    if is_of_dact(teacher):
        model = DACT.from_pretrained(resolve_pretrained(teacher))
        return model, names_of_classes(model), model.encoder.max_length
    classifier, names = load_sequence_classifier(teacher)
    return classifier, names, longest_input(classifier)


def _order_of_classes(teacher: str, names: list[str], class_names: list[str]) -> list[int]:
    """Return the position of each class of the data among the teacher's classes, which must have
    the same names or generic ones, such as LABEL_0."""
    if set(names) == set(class_names):
        return [names.index(name) for name in class_names]
    nameless = all(name in (str(label), f"LABEL_{label}") for label, name in enumerate(names))
    if len(names) != len(class_names) or not nameless:
        raise ValueError(
            f"the teacher {teacher!r} has the classes {', '.join(names)}, but the data has "
            f"{', '.join(class_names)}: use a teacher that was trained for these classes"
        )
    return [*range(len(names))]
