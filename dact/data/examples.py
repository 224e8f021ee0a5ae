"""Examples of text, and their division into splits that share no text."""

from __future__ import annotations

import hashlib
import random
import unicodedata
from collections import defaultdict
from collections.abc import Collection, Hashable, Sequence
from dataclasses import dataclass, fields
from typing import Any


@dataclass(frozen=True)
class Examples:
    """The examples of one split.

    Args:
        texts: One string per example.
        pairs: Second text of each example, for text pairs.
        labels: Class of each example, 0 … classes - 1, or -100 if only a teacher labels it; None
            for prediction.
        depths: Number of steps that compose each example, if the data knows it.
        reasons: Reason why an example cannot be used, None if it can; only prediction has such
            examples.
    """

    texts: list[str]
    pairs: list[str] | None = None
    labels: list[int] | None = None
    depths: list[int] | None = None
    reasons: list[str | None] | None = None

    def __len__(self) -> int:
        return len(self.texts)

    def take(self, rows: Sequence[int]) -> Examples:
        """Return the examples of `rows`, in that order."""
        columns = {field.name: getattr(self, field.name) for field in fields(self)}
        return Examples(**{name: c and [c[row] for row in rows] for name, c in columns.items()})

    def text_keys(self) -> list[bytes]:
        """Return a digest of each normalised text or text pair: examples of equal keys are copies
        of each other."""
        if self.pairs is None:
            return [text_key(text) for text in self.texts]
        return [text_key(text, pair) for text, pair in zip(self.texts, self.pairs, strict=True)]


def join(parts: Sequence[Examples]) -> Examples:
    """Return the examples of all `parts`, one after the other; a column stays if every part has
    it."""

    def column(name: str) -> Any:
        columns = [getattr(part, name) for part in parts]
        return (
            None
            if any(values is None for values in columns)
            else [value for values in columns for value in values]
        )

    return Examples(**{field.name: column(field.name) for field in fields(Examples)})


def text_key(*texts: str) -> bytes:
    """Return a digest of texts that ignores case, blanks and compatible forms of a character.

    Example:
        >>> text_key("Good  film ") == text_key("good film") != text_key("goodfilm")
        True
    """
    normal = "\0".join(
        " ".join(unicodedata.normalize("NFKC", text).casefold().split()) for text in texts
    )
    return hashlib.blake2b(normal.encode(errors="surrogatepass"), digest_size=16).digest()


def stratified_split(
    labels: Sequence[int],
    fraction: float,
    seed: int,
    keys: Sequence[Hashable] | None = None,
    stay: Collection[Hashable] = (),
) -> tuple[list[int], list[int]]:
    """Divide rows in two, each class in the same proportion, with the copies of a text on one side.

    Args:
        labels: Class of each row. Copies of a text count for the class of the first of them.
        fraction: Share of the rows to set aside, in (0, 1). Of each class with two distinct texts
            or more, at least one is set aside and at least one is kept; a class with a single text
            is kept.
        seed: Seed for the draw.
        keys: Rows of equal keys are copies of a text; all rows differ if left out.
        stay: Keys of texts that may not be set aside.

    Returns:
        (rows that are kept, rows that are set aside), both in ascending order.
    """
    copies: dict[Hashable, list[int]] = defaultdict(list)
    for row, key in enumerate(range(len(labels)) if keys is None else keys):
        copies[key].append(row)
    classes: dict[int, list[list[int]]] = defaultdict(list)
    for rows in copies.values():
        classes[labels[rows[0]]].append(rows)

    generator = random.Random(seed)
    aside: set[int] = set()
    seen = 0
    for label in sorted(classes):
        texts = classes[label]
        seen += sum(map(len, texts))
        room = round(fraction * seen) - len(
            aside
        )  # the next class makes up for what this one cannot give
        candidates = [rows for rows in texts if keys is None or keys[rows[0]] not in stay]
        most = min(len(candidates), len(texts) - 1)
        chosen = 0
        for rows in generator.sample(candidates, len(candidates)):
            if chosen < most and len(rows) <= room:
                aside.update(rows)
                chosen, room = chosen + 1, room - len(rows)
        if most and not chosen:
            smallest = min(candidates, key=len)
            aside.update(smallest)
    return [row for row in range(len(labels)) if row not in aside], sorted(aside)
