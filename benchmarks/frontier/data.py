"""The data sets of the comparison and their divisions into training, validation and test texts."""

from __future__ import annotations

import random
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

from benchmarks.encoders import ENCODERS, Encoder
from benchmarks.texts import AllTests
from dact.data import CompositionalSentiment, VaderSentiment
from dact.data.base import TextDataModule
from dact.data.examples import Examples, stratified_split
from dact.data.vader import CORPORA
from dact.functional import UNLABELLED

CLOSED = ("film", "product", "generated")  # opened once, at the end: nothing is decided on them


@dataclass(frozen=True)
class Setting:
    """A data set, one division of it, and how long everything trains on it.

    Args:
        name: ``"vader"`` (all corpora), one corpus, or ``"generated"`` (composed reviews, for a
            small encoder from scratch), with a number of training texts after a hyphen:
            ``"vader-2000"``; ``"vader-2000-more"`` tests the texts that these leave out as well.
        split: Which division into training, validation and test texts.
        epochs: Passes over the training texts, the same for every method.
        batch_size: Texts per optimizer step.
        encoder_name: One of `ENCODERS`; not used for ``"generated"``.
    """

    name: str
    split: int
    epochs: int = 3
    batch_size: int = 32
    encoder_name: str = "minilm"

    def __post_init__(self) -> None:
        if self.source not in (*CORPORA, "vader", "generated"):
            known = ", ".join(("vader", "generated", *CORPORA))
            raise ValueError(f"the data set must be one of {known}, got {self.name!r}")

    @property
    def source(self) -> str:
        return self.name.split("-")[0]

    @property
    def num_train(self) -> int | None:
        return int(self.name.split("-")[1]) if "-" in self.name else None

    @property
    def encoder(self) -> Encoder:
        return ENCODERS[self.encoder_name]

    def __str__(self) -> str:
        name = f"{self.name}.{self.split}"
        return name if self.encoder_name == "minilm" else f"{self.encoder_name}.{name}"


class WithUnlabelled(VaderSentiment):
    """VADER's corpora with more training texts, which come without their class.

    Args:
        num_train: Number of labelled training texts, the same ones that `VaderSentiment` takes.
        num_unlabelled: Number of training texts without their class, drawn from the others; at most
            all of them.
        **arguments: Those of `VaderSentiment`.
    """

    def __init__(self, *, num_train: int, num_unlabelled: int, **arguments: Any) -> None:
        super().__init__(**arguments)  # with all training texts
        self.num_labelled, self.num_unlabelled = num_train, num_unlabelled

    def examples(self, split: str) -> Examples:
        examples = super().examples(split)
        if split != "train":
            return examples
        others, kept = stratified_split(
            examples.labels, self.num_labelled / len(examples), self.split
        )
        chosen = random.Random(self.split).sample(others, min(self.num_unlabelled, len(others)))
        labels = [examples.labels[row] for row in kept] + [UNLABELLED for _ in chosen]
        return replace(examples.take([*kept, *chosen]), labels=labels)


@lru_cache(maxsize=4)
def make_data(
    setting: Setting, num_unlabelled: int = 0, confidence_fraction: float = 0.0
) -> TextDataModule:
    """Return the data of a setting, tokenized once per process. Set `teacher_probabilities` before
    each training."""
    data: TextDataModule
    sizes: dict[str, Any] = {
        "batch_size": setting.batch_size,
        "confidence_fraction": confidence_fraction,
    }
    if setting.num_train is not None:
        sizes["num_train"] = setting.num_train
    of_vader: dict[str, Any] = {
        "tokenizer": setting.encoder.pretrained,
        "split": setting.split,
        **sizes,
    }
    if setting.source != "vader":
        of_vader["corpora"] = [setting.source]
    if num_unlabelled:
        if setting.source == "generated" or setting.num_train is None:
            raise ValueError(f"unlabelled texts need data such as vader-2000, got {setting.name}")
        data = WithUnlabelled(num_unlabelled=num_unlabelled, **of_vader)
    elif setting.source == "generated":
        data = CompositionalSentiment(max_depth=3, seed=setting.split, **sizes)
    else:
        data = (AllTests if setting.name.endswith("-more") else VaderSentiment)(**of_vader)
    data.setup("fit")
    data.setup("test")
    return data
