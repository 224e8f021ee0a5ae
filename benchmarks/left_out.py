"""The training texts that a small `num_train` leaves out, which plain.py and tuned.py ask about."""

from __future__ import annotations

from dact.data import VaderSentiment
from dact.data.examples import Examples, join


def left_out(data: VaderSentiment) -> Examples:
    """Return the training texts of VADER that `data` leaves out."""
    whole, seen = (
        VaderSentiment(split=data.split).examples("train"),
        set(data.examples("train").text_keys()),
    )
    return whole.take([row for row, key in enumerate(whole.text_keys()) if key not in seen])


class MoreTests(VaderSentiment):
    """VADER whose test split is joined by two thirds of the training texts that are left out;
    plain.py has the others."""

    def examples(self, split: str) -> Examples:
        if split != "test":
            return super().examples(split)
        others = left_out(self)
        return join(
            [super().examples("test"), others.take([row for row in range(len(others)) if row % 3])]
        )
