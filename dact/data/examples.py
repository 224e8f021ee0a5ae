"""Examples of text, and their division into splits that share no text."""

from __future__ import annotations

import hashlib
import random
import unicodedata
from collections import defaultdict
from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field
from itertools import chain
from typing import Any

from dact.tasks import UNLABELLED


@dataclass(frozen=True)
class Examples:
    """The examples of one split; a column that the data lacks is empty.

    Args:
        texts: One string per example.
        pairs: Second text of each example, for text pairs.
        labels: Class of each example, 0 … classes - 1, or -100 if only a teacher labels it; for
            several labels, a tuple with 1, 0 or -100 per label.
    """

    texts: list[str]
    pairs: list[str] = field(default_factory=list)
    labels: list[Any] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self.texts)

    @property
    def columns(self) -> list[list[str]]:
        """The texts, and the second texts if there are some."""
        return [self.texts, self.pairs] if self.pairs else [self.texts]

    @property
    def strata(self) -> list[int]:
        """The class of each example for a stratified division. All sets of labels count as one
        class, since most sets are rare."""
        return [0 if isinstance(label, tuple) else label for label in self.labels]

    def take(self, rows: Sequence[int]) -> Examples:
        """Return the examples of `rows`, in that order."""
        return Examples(*([c[row] for row in rows if c] for c in vars(self).values()))

    def text_keys(self) -> list[bytes]:
        """Return the `text_key` of each text or text pair; copies have the same key."""
        return [text_key(*texts) for texts in zip(*self.columns, strict=True)]


def classes_of(label: int | tuple[int, ...]) -> list[int]:
    """Return the classes that a label of `Examples` stands for; -100 for an unknown one."""
    if not isinstance(label, tuple):
        return [label]
    return [UNLABELLED] if UNLABELLED in label else [n for n, one in enumerate(label) if one]


def join(parts: Sequence[Examples]) -> Examples:
    """Return the examples of all `parts`; a column is kept if every part has it."""
    columns = zip(*(vars(part).values() for part in parts if len(part)), strict=True)
    return Examples(*([*chain(*values)] if all(values) else [] for values in columns))


def text_key(*texts: str) -> bytes:
    """Return a digest of texts that ignores case, extra blanks and compatible forms of a character.

    Example:
        >>> text_key("Good  film ") == text_key("good film") != text_key("goodfilm")
        True
    """
    normal = "\0".join(
        " ".join(unicodedata.normalize("NFKC", text).casefold().split()) for text in texts
    )
    return hashlib.blake2b(normal.encode(errors="surrogatepass"), digest_size=16).digest()


def hash_split(
    labels: Sequence[int], keys: Sequence[bytes], fraction: float, seed: int
) -> tuple[list[int], list[int]]:
    """Divide rows in two by a hash of each text, a number in [0, 1): a text whose number is below
    `fraction` is set aside, whatever the other rows are.

    A class with two texts or more keeps at least one and sets at least one aside: those with the
    largest and the smallest number.

    Args:
        labels: Class of each row. All copies of a text count for the class of the first one.
        keys: `text_key` of each row.
        fraction: Bound on the number, in (0, 1).
        seed: Seed of the hash.

    Returns:
        (rows that are kept, rows that are set aside), both in ascending order.
    """
    first = {key: label for label, key in zip(reversed(labels), reversed(keys), strict=True)}
    salt = str(seed).encode()[:16]
    classes: dict[int, list[tuple[bytes, bytes]]] = defaultdict(list)
    for key, label in first.items():
        number = hashlib.blake2b(key, digest_size=8, salt=salt).digest()
        classes[label].append((number, key))
    aside: set[bytes] = set()
    for texts in classes.values():
        below = sum(int.from_bytes(number) / 2**64 < fraction for number, _ in texts)
        count = min(max(below, 1), len(texts) - 1)
        aside.update(key for _, key in sorted(texts)[:count])
    return _sides([key in aside for key in keys])


def _sides(aside: Sequence[bool]) -> tuple[list[int], list[int]]:
    """Return the rows that are kept and those that are set aside."""
    sides: tuple[list[int], list[int]] = ([], [])
    for row, is_aside in enumerate(aside):
        sides[is_aside].append(row)
    return sides


def stratified_split(
    labels: Sequence[int], fraction: float, seed: int, keys: Sequence[Hashable] | None = None
) -> tuple[list[int], list[int]]:
    """Divide rows in two at random, each class in the same proportion; otherwise as `hash_split`.

    Args:
        labels: Class of each row.
        fraction: Share of the rows to set aside, in (0, 1).
        seed: Seed for the draw.
        keys: Key of each row; rows with equal keys are copies of a text. All differ if left out.
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
        # The next class makes up for what this one cannot give.
        room = round(fraction * seen) - len(aside)
        most = len(texts) - 1
        chosen = 0
        for rows in generator.sample(texts, len(texts)):
            if chosen < most and len(rows) <= room:
                aside.update(rows)
                chosen, room = chosen + 1, room - len(rows)
        if most and not chosen:
            aside.update(sorted(texts, key=len)[0])
    return _sides([row in aside for row in range(len(labels))])
