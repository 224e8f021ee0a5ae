"""Few texts in unequal classes, for benchmarks/tuned.py."""

from __future__ import annotations

import random

from dact.data import VaderSentiment
from dact.data.examples import Examples

SHARES = (0.06, 0.14, 0.80)  # of the classes, which are negative, neutral and positive
SIZES = {"train": 450, "val": 300, "test": 1500}


class Imbalanced(VaderSentiment):
    """450 texts of VADER, four fifths of which are positive; validation and test have the same
    shares."""

    def examples(self, split: str) -> Examples:
        examples = super().examples(split)
        assert examples.labels is not None
        size, draw = (
            SIZES["test" if split == "predict" else split],
            random.Random(f"{self.split}/{split}"),
        )
        rows: list[int] = []
        for label, share in enumerate(SHARES):
            own = [row for row, other in enumerate(examples.labels) if other == label]
            rows += draw.sample(own, round(share * size))
        return examples.take(sorted(rows))
