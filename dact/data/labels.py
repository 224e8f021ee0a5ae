"""Labels in files: class names, or the positions of classes."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable, Sequence
from decimal import Decimal
from numbers import Number
from typing import Any, Literal

Reading = Literal["names", "positions"]


def is_integer(label: Any) -> bool:
    """Return whether a label is an integer, also as a string."""
    if isinstance(label, bool):
        return False
    return isinstance(label, int) or (
        isinstance(label, str) and re.fullmatch(r"-?\d+", label.strip()) is not None
    )


def whole(labels: Sequence[Any]) -> Sequence[Any]:
    """Return labels as integers if all of them are whole numbers, such as 2.0 or "2.0", and
    otherwise as they are."""
    texts = [str(label).strip() for label in labels]
    is_whole = all(re.fullmatch(r"-?\d+(\.0+)?", text) for text in texts)
    return [int(text.partition(".")[0]) for text in texts] if is_whole else labels


def learn_class_names(labels: Sequence[Any], source: str) -> list[str]:
    """Return the classes of a training file: 0 … the largest integer, or the sorted strings.

    Raises:
        ValueError: If a label is missing, there is only one class, or an integer is larger than the
            number of rows.
    """
    check_present(labels, source)
    are_numbers = not any(isinstance(label, (str, bool)) for label in labels)
    if are_numbers and set(labels) == set(range(len(set(labels)))):
        labels = whole(labels)  # 0.0, 1.0, … of parquet and JSON
    if all(map(is_integer, labels)):
        largest = max(map(int, labels))
        if largest >= len(labels):
            raise ValueError(
                f"{source}: the label {largest} means {largest + 1} classes, but there are only {len(labels)} rows. "
                "Integer labels count from 0 unless class_names names them"
            )
        names = [str(label) for label in range(largest + 1)]
    else:
        names = sorted(
            {str(label).strip() for label in labels}, key=Decimal if are_numbers else None
        )
    alike: dict[str, str] = {}
    for name in names:
        if (
            other := alike.setdefault(re.sub(r"^(-?\d+)\.0+$", r"\1", name.casefold()), name)
        ) != name:
            how = (
                "differ only in case"
                if other.casefold() == name.casefold()
                else "are the same number"
            )
            raise ValueError(
                f"{source}: the labels {other!r} and {name!r} {how}: write them alike, or, if they are different "
                "classes, name all classes by class_names"
            )
    if len(names) == 1:
        raise ValueError(
            f"{source}: every label is {names[0]!r}: a classifier needs examples of two classes or more"
        )
    return names


def reading_of(labels: Sequence[Any], class_names: Sequence[str], source: str) -> Reading:
    """Return whether integer labels are names or positions of classes, as the labels of one file
    show.

    Raises:
        ValueError: If both are possible and mean different classes.
    """
    if not any(map(_is_number, class_names)):
        return "positions"
    names, counted = (
        set(class_names),
        {str(position): name for position, name in enumerate(class_names)},
    )
    texts = {str(label).strip() for label in labels}
    if not texts <= names:
        labels = whole(labels)
        texts = {str(label).strip() for label in labels}
    if not all(map(is_integer, labels)) or not texts <= counted.keys():
        return "names"
    numbers = _by_number(class_names)
    named = {text: text if text in names else numbers.get(Decimal(text)) for text in texts}
    if not set(named.values()) <= names:
        return "positions"
    if any(counted[text] != name for text, name in named.items()):
        raise ValueError(
            f"{source}: the labels {listed(sorted(texts))} may be names or positions of the classes "
            f"{listed(class_names)}: say which by integer_labels='names' or integer_labels='positions'"
        )
    return "names"


def to_classes(
    labels: Sequence[Any],
    class_names: Sequence[str],
    reading: Reading,
    source: str,
    rows: Sequence[int] | None = None,
) -> list[int]:
    """Return each label as a class, 0 … classes - 1.

    Args:
        labels: Strings or numbers, as they are in the file.
        class_names: Names of the classes, in their order.
        reading: Whether integer labels are names or positions, where all labels are integers.
        source: Name of the file for messages.
        rows: Row of each label in the file, for messages, if rows are left out.

    Raises:
        ValueError: If a label is missing or outside the classes.
    """
    check_present(labels, source, rows)
    counted = whole(labels) if reading == "positions" else labels
    positions = reading == "positions" and all(map(is_integer, counted))
    labels = counted if positions else labels
    by_name = {str(label) if positions else name: label for label, name in enumerate(class_names)}
    if not positions:  # 1 is the class 1.0 or 01 if there is no other
        numbers = _by_number(class_names)
        for text in {str(label).strip() for label in labels} - by_name.keys():
            if _is_number(text) and (name := numbers.get(Decimal(text))) is not None:
                by_name[text] = by_name[name]
    outside = [row for row, label in enumerate(labels) if str(label).strip() not in by_name]
    if outside:
        wrong = str(labels[outside[0]]).strip().casefold()
        meant = next(
            (f", perhaps {name!r}" for name in class_names if name.casefold() == wrong), ""
        )
        raise ValueError(
            f"{source}: {name_rows(outside, rows)} with a label outside the classes: {labels[outside[0]]!r}{meant}. "
            f"The {len(class_names)} classes are {listed(class_names)}"
            + (", counted from 0 in this file" if positions else "")
            + ". Correct the labels; or, for other classes, give them by class_names in their order, and train with "
            "examples of each"
        )
    return [by_name[str(label).strip()] for label in labels]


def absent_classes(labels: Iterable[int], class_names: Sequence[str]) -> list[str]:
    """Return the names of the classes without an example."""
    present = set(labels)
    return [name for label, name in enumerate(class_names) if label not in present]


def _is_number(text: str) -> bool:
    return re.fullmatch(r"-?\d+(\.\d+)?", text) is not None


def _by_number(class_names: Iterable[str]) -> dict[Decimal, str]:
    """Return the classes whose names are numbers, such as 1, 01 and 1.0, by their values, if no two
    have the same."""
    found: dict[Decimal, list[str]] = defaultdict(list)
    for name in class_names:
        if _is_number(name):
            found[Decimal(name)].append(name)
    return {value: names[0] for value, names in found.items() if len(names) == 1}


def check_present(labels: Sequence[Any], source: str, rows: Sequence[int] | None = None) -> None:
    """Raise a ValueError if a label is missing, or is no label."""
    missing = [
        row
        for row, label in enumerate(labels)
        if label != label or label is None or str(label).strip() == ""
    ]
    if missing:
        raise ValueError(
            f"{source}: {name_rows(missing, rows)} without a label: label or delete them. Texts without labels are for "
            "predict_file, or for unlabelled_file with a teacher"
        )
    others = [row for row, label in enumerate(labels) if not isinstance(label, (str, Number))]
    if others:
        raise ValueError(
            f"{source}: {name_rows(others, rows)} with a label that is neither a string nor a number: "
            f"{labels[others[0]]!r}. Each text has exactly one class"
        )


def listed(names: Sequence[str], limit: int = 10) -> str:
    """Return the names with commas, at most `limit` of them."""
    return ", ".join(names[:limit]) + (
        f" and {len(names) - limit} more" if len(names) > limit else ""
    )


def name_rows(rows: Sequence[int], within: Sequence[int] | None = None, limit: int = 5) -> str:
    """Return ``row 3``, or ``rows 3, 4, 9 and 2 more``; the first row of data is row 1.

    Args:
        rows: Row numbers from 0; positions in `within`, if it is given.
        within: Row numbers.
        limit: Most rows to name.
    """
    named = ", ".join(str((row if within is None else within[row]) + 1) for row in rows[:limit])
    more = f" and {len(rows) - limit} more" if len(rows) > limit else ""
    return f"row{'s' if len(rows) > 1 else ''} {named}{more}"
