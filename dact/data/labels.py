"""Labels in files: class names, or the positions of classes."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from typing import Any, Literal

Reading = Literal["names", "positions"]


def is_integer(label: Any) -> bool:
    """Return whether a label is an integer, also as a string."""
    if isinstance(label, bool):
        return False
    return isinstance(label, int) or (isinstance(label, str) and re.fullmatch(r"-?\d+", label.strip()) is not None)


def learn_class_names(labels: Sequence[Any], source: str) -> list[str]:
    """Return the classes of a training file: 0 … the largest integer, or the sorted strings.

    Raises:
        ValueError: If a label is missing, all are the same string, or an integer is larger than the number of rows.
    """
    check_present(labels, source)
    if all(map(is_integer, labels)):
        largest = max(map(int, labels))
        if largest >= len(labels):
            raise ValueError(
                f"{source}: the label {largest} means {largest + 1} classes, but there are only {len(labels)} rows. "
                "Integer labels count from 0 unless class_names names them"
            )
        return [str(label) for label in range(largest + 1)]
    names = sorted({str(label).strip() for label in labels})
    if len(names) == 1:
        raise ValueError(f"{source}: every label is {names[0]!r}: a classifier needs examples of two classes or more")
    return names


def reading_of(labels: Sequence[Any], class_names: Sequence[str], source: str) -> Reading:
    """Return whether integer labels are names or positions of classes, as the labels of one file show.

    Raises:
        ValueError: If both are possible and mean different classes.
    """
    if not any(map(is_integer, class_names)):
        return "positions"
    counted = {str(position): name for position, name in enumerate(class_names)}
    values = {str(label).strip() for label in labels}
    if not all(map(is_integer, labels)) or not values <= counted.keys():
        return "names"
    if not values <= set(class_names):
        return "positions"
    if any(counted[value] != value for value in values):
        raise ValueError(
            f"{source}: the labels {', '.join(sorted(values))} may be names or positions of the classes "
            f"{', '.join(class_names)}: say which by integer_labels='names' or integer_labels='positions'"
        )
    return "names"


def to_classes(labels: Sequence[Any], class_names: Sequence[str], reading: Reading, source: str) -> list[int]:
    """Return each label as a class, 0 … classes - 1.

    Args:
        labels: Strings or integers, as they are in the file.
        class_names: Names of the classes, in their order.
        reading: Whether integer labels are names or positions, where all labels are integers.
        source: Name of the file for messages.

    Raises:
        ValueError: If a label is missing or outside the classes.
    """
    check_present(labels, source)
    positions = reading == "positions" and all(map(is_integer, labels))
    by_name = {str(label) if positions else name: label for label, name in enumerate(class_names)}
    outside = [row for row, label in enumerate(labels) if str(label).strip() not in by_name]
    if outside:
        raise ValueError(
            f"{source}: {name_rows(outside)} with a label outside the classes: {labels[outside[0]]!r}. "
            f"The {len(class_names)} classes are {', '.join(class_names)}"
            + (", counted from 0 in this file" if positions else "")
            + ". Give other classes by class_names, in their order"
        )
    return [by_name[str(label).strip()] for label in labels]


def absent_classes(labels: Iterable[int], class_names: Sequence[str]) -> list[str]:
    """Return the names of the classes without an example."""
    present = set(labels)
    return [name for label, name in enumerate(class_names) if label not in present]


def check_present(labels: Sequence[Any], source: str) -> None:
    """Raise a ValueError if a label is missing."""
    missing = [row for row, label in enumerate(labels) if label is None or str(label).strip() == ""]
    if missing:
        raise ValueError(
            f"{source}: {name_rows(missing)} without a label: label or delete them. Texts without labels are for "
            "predict_file, or for unlabelled_file with a teacher"
        )


def name_rows(rows: Sequence[int], limit: int = 5) -> str:
    """Return ``row 3``, or ``rows 3, 4, 9 and 2 more``; the first row of data is row 1."""
    named = ", ".join(str(row + 1) for row in rows[:limit])
    more = f" and {len(rows) - limit} more" if len(rows) > limit else ""
    return f"row{'s' if len(rows) > 1 else ''} {named}{more}"
