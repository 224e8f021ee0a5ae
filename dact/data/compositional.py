"""CompositionalSentiment: generated product reviews whose class is composed step by step."""

from __future__ import annotations

import random
import zlib
from collections.abc import Callable
from typing import Any

from dact.data.base import TextDataModule
from dact.data.examples import Examples
from dact.data.tokenizers import word_tokenizer

CLASS_NAMES = ["negative", "neutral", "positive"]
GRADES = (
    ("awful", "terrible", "dreadful", "poor"),
    ("average", "ordinary", "okay", "middling"),
    ("great", "superb", "excellent", "wonderful"),
)
# Each adverb exchanges two grades, and no two of them commute.
MODIFIERS = {"ironically": (0, 2), "modestly": (1, 2), "charitably": (0, 1)}
EMPHASIS = ("really", "quite", "simply", "just")
NOUNS = ("battery", "screen", "keyboard", "camera", "speaker", "charger", "hinge", "stand")
REMARKS = ("honestly", "overall", "so far", "for me")
CONCESSIONS = ("although {aside} , {main}", "{main} , although {aside}", "{aside} , but {main}")
EMPHASIS_SHARE, CONCESSION_SHARE, REMARK_SHARE = 0.3, 0.3, 0.5


def modify(grade: int, modifier: str) -> int:
    """Return the grade (0, 1 or 2) into which `modifier` changes `grade`."""
    low, high = MODIFIERS[modifier]
    return {low: high, high: low}.get(grade, grade)


def _clause(generator: random.Random, modifiers: int) -> tuple[str, int]:
    """Draw a clause and its grade; modifiers apply from the adjective outwards."""
    grade = generator.randrange(3)
    words = [generator.choice(GRADES[grade])]
    for step in range(modifiers + 1):
        while generator.random() < EMPHASIS_SHARE:
            words.insert(0, generator.choice(EMPHASIS))
        if step < modifiers:
            modifier = generator.choice(list(MODIFIERS))
            grade = modify(grade, modifier)
            words.insert(0, modifier)
    return f"the {generator.choice(NOUNS)} is {' '.join(words)}", grade


def split_of(text: str) -> str:
    """Return the only split that may contain a text."""
    share = zlib.crc32(text.encode()) % 100
    return "val" if share < 10 else "test" if share < 20 else "train"


def generate_review(
    generator: random.Random, max_depth: int, accept: Callable[[str], bool] = lambda text: True
) -> tuple[str, int]:
    """Return a random text that `accept` allows, and its class, independent of its depth."""
    depth, label = generator.randint(0, max_depth), generator.randrange(3)
    while True:
        text, grade = _draw(generator, depth)
        if grade == label and accept(text):
            return text, label


def _draw(generator: random.Random, depth: int) -> tuple[str, int]:
    """Draw the text of a review and its grade."""
    concession = depth > 0 and generator.random() < CONCESSION_SHARE
    text, grade = _clause(generator, depth - concession)
    if concession:
        # The main clause decides, wherever it stands.
        aside, _ = _clause(generator, generator.randrange(depth))
        text = generator.choice(CONCESSIONS).format(main=text, aside=aside)
    if generator.random() < REMARK_SHARE:
        text = f"{generator.choice(REMARKS)} {text}"
    if generator.random() < REMARK_SHARE:
        text = f"{text} {generator.choice(REMARKS)}"
    return f"{text} .", grade


def _vocabulary() -> list[str]:
    """Return all words of the generator."""
    phrases = [*NOUNS, *MODIFIERS, *EMPHASIS, *REMARKS, *CONCESSIONS, *sum(GRADES, ())]
    words = " ".join([*phrases, "the is . ,"]).split()
    return [word for word in words if not word.startswith("{")]


class CompositionalSentiment(TextDataModule):
    """English-like product reviews, generated from a seed without a download.

    The class, negative, neutral or positive, comes from an adjective and up to `max_depth` steps
    whose order matters: "ironically" exchanges good and bad, "modestly" good and average,
    "charitably" bad and average. Steps apply from the adjective outwards, and in a concession the
    main clause counts. Deep reviews need several layers: see benchmarks/README.md.

    Args:
        num_train: Number of training reviews.
        num_val: Number of validation reviews.
        num_test: Number of test reviews.
        max_depth: Largest number of steps, 0 or more.
        **options: As for `dact.data.base.TextDataModule`; `seed` also determines the reviews.

    Example:
        >>> data = CompositionalSentiment(num_train=100, num_val=10, num_test=10)
        >>> data.setup("fit")
        >>> data.splits["train"].texts[0]
        'the camera is excellent , but the camera is terrible overall .'
    """

    def __init__(
        self,
        num_train: int = 20_000,
        num_val: int = 2_000,
        num_test: int = 2_000,
        *,
        max_depth: int = 4,
        batch_size: int = 128,
        **options: Any,
    ) -> None:
        options = {"max_length": 16 + 16 * max(1, max_depth), **options}
        super().__init__(word_tokenizer(_vocabulary()), batch_size=batch_size, **options)
        self.sizes = {"train": num_train, "val": num_val, "test": num_test}
        self.max_depth = max_depth
        self.class_names = list(CLASS_NAMES)

    @property
    def vocab_size(self) -> int:
        """Number of token ids."""
        return len(self.tokenizer)

    def examples(self, split: str) -> Examples:
        # A string is hashed into a seed: splits are independent draws, the same on every machine.
        generator = random.Random(f"{self.seed}/{split}")
        reviews = [
            generate_review(generator, self.max_depth, accept=lambda text: split_of(text) == split)
            for _ in range(self.sizes[split])
        ]
        return Examples([text for text, _ in reviews], labels=[label for _, label in reviews])
