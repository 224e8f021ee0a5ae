"""TextClassifier: raw text in, label, score and exit layer out."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dact.data.tokenizers import load_tokenizer
from dact.model import DACT

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class Prediction:
    """The answer for one text.

    Args:
        label: The name of the class.
        score: The probability of that class where early exit left, in [0, 1]. (The class is that of full depth at
            tolerance 0 and margin 1; the probability is not.)
        exit_layer: The last layer that was run, 1-based.
    """

    label: str
    score: float
    exit_layer: int


class TextClassifier:
    """A fitted model with its tokenizer and class names.

    Args:
        model: The model; it is put into eval mode.
        tokenizer: Its tokenizer.
        window: Texts that are classified together, 1 or more. More make early exit faster, up to about a thousand on a
            CPU and some ten thousand on a GPU; no answer depends on it.

    Example:
        >>> from dact.data import CompositionalSentiment
        >>> from dact.encoders import TransformerEncoder
        >>> data = CompositionalSentiment(num_train=10)
        >>> model = DACT(encoder=TransformerEncoder(data.vocab_size, 2, 8, 2), class_names=data.class_names)
        >>> classifier = TextClassifier(model, data.tokenizer)
        >>> classifier(["the screen is ironically great ."])[0].exit_layer
        2
    """

    def __init__(self, model: DACT, tokenizer: PreTrainedTokenizerBase, *, window: int = 1024) -> None:
        if window < 1:
            raise ValueError(f"TextClassifier: window counts texts and must be 1 or more, got {window}")
        self.model = model.eval()
        self.tokenizer = tokenizer
        self.window = window
        self.class_names = model.class_names or [str(label) for label in range(model.output_dimension)]

    @classmethod
    def from_pretrained(cls, directory: str | Path, *, window: int = 1024, **overrides: Any) -> TextClassifier:
        """The classifier of a ``model/`` folder, as ``dact fit`` and ``dact tune`` leave it.

        Args:
            directory: The folder with the model and its tokenizer.
            window: Texts that are classified together.
            **overrides: As for `DACT.from_pretrained`, such as ``halting_tolerance=0.3``.

        Raises:
            FileNotFoundError, ValueError: As for `DACT.from_pretrained`, or if the folder has no tokenizer.
        """
        model = DACT.from_pretrained(directory, **overrides)
        return cls(model, load_tokenizer(str(Path(directory).resolve())), window=window)

    def __call__(self, texts: Sequence[str]) -> list[Prediction]:
        """One prediction per text, in their order.

        Raises:
            TypeError: If `texts` is one string, or an entry is no string.
            ValueError: If a text is empty.
        """
        if isinstance(texts, str):
            raise TypeError("expected a sequence of texts, got one string: pass [text]")
        # All of them before the first is classified.
        return list(self.stream([_checked(row, text) for row, text in enumerate(texts)]))

    def stream(self, texts: Iterable[str]) -> Iterator[Prediction]:
        """Likewise for any source of texts, however long, which is read no further than one window ahead."""
        if isinstance(texts, str):
            raise TypeError("expected a sequence of texts, got one string: pass [text]")
        source = enumerate(texts)
        while waiting := [_checked(row, text) for row, text in islice(source, self.window)]:
            yield from self._classify(waiting)

    def _classify(self, texts: list[str]) -> list[Prediction]:
        encoding = self.tokenizer(texts, truncation=True, padding=True, return_tensors="pt")
        output = self.model.early_exit({name: value.to(self.model.device) for name, value in encoding.items()})
        scores, labels = output.probabilities.max(dim=1)
        return [
            Prediction(self.class_names[label], score, exit_layer)
            for label, score, exit_layer in zip(
                labels.tolist(), scores.tolist(), output.exit_layer.tolist(), strict=True
            )
        ]


def _checked(row: int, text: object) -> str:
    if not isinstance(text, str):
        raise TypeError(f"expected strings, got {type(text).__name__} at position {row}")
    if not text.strip():
        raise ValueError(f"the text at position {row} is empty")
    return text
