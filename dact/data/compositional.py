"""CompositionalSentiment: generated product reviews whose class has to be composed, step by step."""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import TYPE_CHECKING

from dact.data.text import Examples, TextDataModule, word_tokenizer

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

CLASS_NAMES = ["negative", "neutral", "positive"]
GRADES = (
    ("awful", "terrible", "dreadful", "poor"),
    ("average", "ordinary", "okay", "middling"),
    ("great", "superb", "excellent", "wonderful"),
)
# Each adverb exchanges two grades: good and bad, good and average, bad and average. No two of them commute.
MODIFIERS = {"ironically": (0, 2), "modestly": (1, 2), "charitably": (0, 1)}
EMPHASIS = ("really", "quite", "simply", "just")
NOUNS = ("battery", "screen", "keyboard", "camera", "speaker", "charger", "hinge", "stand")
REMARKS = ("honestly", "overall", "so far", "for me")
CONCESSIONS = ("although {aside} , {main}", "{main} , although {aside}", "{aside} , but {main}")
EMPHASIS_SHARE, CONCESSION_SHARE, REMARK_SHARE = 0.3, 0.3, 0.5


@dataclass(frozen=True)
class Review:
    """A generated review.

    Args:
        text: The words, separated by blanks.
        label: 0 negative, 1 neutral, 2 positive.
        depth: How many steps compose the class: modifiers, plus one for a concession.
    """

    text: str
    label: int
    depth: int


def modify(grade: int, modifier: str) -> int:
    """The grade (0, 1 or 2) that `modifier` makes of `grade`."""
    low, high = MODIFIERS[modifier]
    return {low: high, high: low}.get(grade, grade)


def _clause(generator: random.Random, modifiers: int) -> tuple[str, int]:
    """A clause and its grade. Modifiers apply from the adjective outwards; words of emphasis change nothing."""
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


def generate_review(generator: random.Random, max_depth: int) -> Review:
    """Draw a review: class and depth are uniform and independent of each other."""
    depth, label = generator.randint(0, max_depth), generator.randrange(3)
    while True:
        concession = depth > 0 and generator.random() < CONCESSION_SHARE
        text, grade = _clause(generator, depth - concession)
        if grade == label:
            break
    if concession:  # the main clause decides, wherever it stands
        aside, _ = _clause(generator, generator.randrange(depth))
        text = generator.choice(CONCESSIONS).format(main=text, aside=aside)
    if generator.random() < REMARK_SHARE:
        text = f"{generator.choice(REMARKS)} {text}"
    if generator.random() < REMARK_SHARE:
        text = f"{text} {generator.choice(REMARKS)}"
    return Review(f"{text} .", label, depth)


class CompositionalSentiment(TextDataModule):
    """Embedded data: English-like product reviews, generated from a seed, without a download.

    The class, negative, neutral or positive, comes from an adjective and up to `max_depth` steps whose order matters:
    "ironically" exchanges good and bad, "modestly" good and average, "charitably" bad and average, applied from the
    adjective outwards; in a concession the main clause counts. Words of emphasis and remarks change nothing. Deep
    reviews need several layers: see benchmarks/README.md. Batches tell each example's ``depth``.

    Args:
        num_train: Training reviews.
        num_val: Validation reviews.
        num_test: Test reviews.
        max_depth: The most steps, 0 or more.
        seed: Of the reviews and of the order in training.
        batch_size: Examples per batch.

    Raises:
        ValueError: If a number is outside its range.

    Example:
        >>> data = CompositionalSentiment(num_train=100, num_val=10, num_test=10)
        >>> data.setup("fit")
        >>> data.splits["train"].texts[0]
        'the speaker is quite quite simply ironically great for me .'
    """

    def __init__(
        self,
        num_train: int = 20_000,
        num_val: int = 2_000,
        num_test: int = 2_000,
        *,
        max_depth: int = 4,
        seed: int = 0,
        batch_size: int = 128,
    ) -> None:
        super().__init__(None, max_length=16 + 16 * max(1, max_depth), batch_size=batch_size, seed=seed)
        for name, value, least in (
            ("num_train", num_train, 3),
            ("num_val", num_val, 3),
            ("num_test", num_test, 3),
            ("max_depth", max_depth, 0),
        ):
            if value < least:
                raise ValueError(f"CompositionalSentiment: {name} must be {least} or more, got {value}")
        self.sizes = {"train": num_train, "val": num_val, "test": num_test, "predict": num_test}
        self.max_depth = max_depth
        self.class_names = list(CLASS_NAMES)
        self._words: PreTrainedTokenizerFast | None = None

    @property
    def tokenizer(self) -> PreTrainedTokenizerFast:
        """One token per word of the generator's vocabulary."""
        if self._words is None:
            phrases = [*NOUNS, *MODIFIERS, *EMPHASIS, *REMARKS, *CONCESSIONS, *sum(GRADES, ()), "the is . ,"]
            words = [word for phrase in phrases for word in phrase.split() if not word.startswith("{")]
            self._words = word_tokenizer(words)
            self._words.model_max_length = self.max_length
        return self._words

    @property
    def vocab_size(self) -> int:
        """How many token ids there are."""
        return len(self.tokenizer)

    def examples(self, split: str) -> Examples:
        # A string seeds through its hash of bytes: splits are independent draws, the same on every machine.
        generator = random.Random(f"{self.seed}/{'test' if split == 'predict' else split}")
        reviews = [generate_review(generator, self.max_depth) for _ in range(self.sizes[split])]
        return Examples(
            [review.text for review in reviews],
            labels=[review.label for review in reviews],
            depths=[review.depth for review in reviews],
        )
