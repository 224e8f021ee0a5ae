"""Selections of VADER's texts for benchmarks/tuned.py: more test texts, and unequal classes."""

from __future__ import annotations

import random

from dact.data import VaderSentiment
from dact.data.examples import Examples, join

SHARES = (0.06, 0.14, 0.80)  # of the classes, which are negative, neutral and positive
SIZES = {"train": 450, "val": 300, "test": 1500}


class MoreTests(VaderSentiment):
    """VADER with a larger test split: two thirds of the training texts that a small `num_train`
    leaves out are added."""

    every = 3  # of so many texts that are left out, the first is not tested

    def examples(self, split: str) -> Examples:
        if split != "test":
            return super().examples(split)
        whole = VaderSentiment(split=self.split).examples("train")
        seen = set(self.examples("train").text_keys())
        left_out = [row for row, key in enumerate(whole.text_keys()) if key not in seen]
        taken = [row for place, row in enumerate(left_out) if not self.every or place % self.every]
        return join([super().examples("test"), whole.take(taken)])


class AllTests(MoreTests):
    """The same with all texts that are left out."""

    every = 0


class Imbalanced(VaderSentiment):
    """450 texts of VADER, four fifths positive; validation and test have the same shares."""

    def examples(self, split: str) -> Examples:
        examples = super().examples(split)
        size = SIZES["test" if split == "predict" else split]
        draw = random.Random(f"{self.split}/{split}")
        rows: list[int] = []
        for label, share in enumerate(SHARES):
            own = [row for row, other in enumerate(examples.labels) if other == label]
            rows += draw.sample(own, round(share * size))
        return examples.take(sorted(rows))
