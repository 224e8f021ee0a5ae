"""Labels in files: the names of classes, or their positions."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from numbers import Number
from typing import Any

from dact.data.files import is_utf8, suggestion

WHOLE = re.compile(r"(-?(?:0|[1-9]\d*))(?:\.0+)?")
MOST_ROWS = 20  # row numbers in a message


def label_fault(label: Any) -> str | None:
    """Return why the label of a row cannot be used, or None."""
    if label is None or label != label or str(label).strip() == "":
        return "no label"
    if not isinstance(label, (str, Number)):
        return "a label that is neither a string nor a number"
    return None if is_utf8(str(label)) else "a label that is not valid UTF-8"


def learn_class_names(labels: Sequence[Any], source: str) -> list[str]:
    """Return the classes of a training file, which are its distinct labels, sorted: as numbers if
    all of them are whole ones, such as 1, ``"1"`` or the 1.0 that a missing value makes of a 1.

    Raises:
        ValueError: If there is only one class.
    """
    texts = {str(label).strip() for label in labels}
    numbers = [WHOLE.fullmatch(text) for text in texts]
    names = sorted(texts)
    if all(numbers):
        names = [str(number) for number in sorted({int(number[1]) for number in numbers if number})]
    if len(names) == 1:
        raise ValueError(f"{source}: every label is {names[0]!r}: a classifier needs two classes")
    return names


def to_classes(
    labels: Mapping[int, Any], class_names: Sequence[str], source: str, *, by_position: bool
) -> list[int]:
    """Return each label as a class, 0 … classes - 1.

    Args:
        labels: Labels by the numbers of their rows.
        class_names: Names of the classes, in their order.
        source: Name of the file for messages.
        by_position: Whether a label may also be the position of a class, counted from 0, if no
            class is named by a whole number.

    Raises:
        ValueError: If a label is outside the classes.
    """
    known = {name: label for label, name in enumerate(class_names)}
    if by_position and not any(map(WHOLE.fullmatch, class_names)):
        known |= {str(label): label for label in known.values()}
    texts = {row: str(label).strip() for row, label in labels.items()}
    for text in {*texts.values()} - known.keys():
        number = WHOLE.fullmatch(text)
        if number and number[1] in known:
            known[text] = known[number[1]]
    outside = [row for row, text in texts.items() if text not in known]
    if outside:
        wrong = texts[outside[0]]
        raise ValueError(
            f"{source}: {name_rows(outside)} with a label outside the classes: {wrong!r}"
            f"{suggestion(wrong, class_names)}. The {len(class_names)} classes are "
            f"{listed(class_names)}: correct the labels, or name all classes by class_names"
        )
    return [known[text] for text in texts.values()]


def listed(names: Sequence[str], limit: int = 10) -> str:
    """Return the names with commas, at most `limit` of them."""
    more = f" and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(names[:limit]) + more


def name_rows(rows: Sequence[int]) -> str:
    """Return ``row 3``, or ``rows 3, 4, 9 and 2 more``, at most 20 numbers."""
    return f"row{'s' if len(rows) > 1 else ''} {listed([str(row) for row in rows], MOST_ROWS)}"
