"""TextClassifier: raw text in; label, score, probabilities and exit layer out."""

from __future__ import annotations

import contextlib
import sys
import threading
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any, Unpack

import torch
from tqdm import tqdm  # type: ignore[import-untyped]

from dact import hub
from dact.agreement import names_of_classes
from dact.calibration.temperature import temper
from dact.checks import check_count, check_type
from dact.data.files import is_utf8
from dact.data.tokenizers import (
    PreTrainedTokenizerBase,
    load_tokenizer,
    tokenize,
    tokenizer_for,
)
from dact.encoders.base import LayeredEncoder
from dact.model import DACT
from dact.model_card import Metrics

Text = str | tuple[str, str] | list[str]
NO_LIMIT = 10**20  # a tokenizer's `model_max_length` above it means none
BAR_DELAY = 2.0  # seconds after which a progress bar appears


@dataclass(frozen=True)
class Prediction:
    """The answer for one text.

    Args:
        label: Name of the class.
        score: Probability of that class at the exit layer, in [0, 1]; calibrated if the model has
            temperatures. At tolerance 0 and margin 1 the class is that of full depth, but the
            probability is not.
        exit_layer: Number of the last layer that was run, 1-based.
        probabilities: Probabilities of all classes, by their names.
    """

    label: str
    score: float
    exit_layer: int
    probabilities: dict[str, float]


class TextClassifier:
    """A fitted model with its tokenizer and class names.

    Each text gets exactly one class; several labels per text and regression are not supported.
    Calls from several threads are safe, and it can be pickled for other processes and machines.

    Args:
        model: Model, a `DACT`. It is put into eval mode and moved to `device`, as by a pipeline of
            transformers.
        tokenizer: Tokenizer of the model, which is copied, or its name, as for the data. Texts are
            cut to the length that tokenizer and encoder take.
        batch_size: Number of texts that are classified together, 1 or more. More make early exit
            faster, up to about a thousand on a CPU and ten thousand on a GPU. In float32 no answer
            depends on it; in half precision rounding may change a few.
        device: Device to run on, such as ``"cuda"``; the device of the model if left out.
        dtype: Precision of the encoder and its heads, such as ``torch.bfloat16`` or ``"bfloat16"``,
            by ``torch.autocast``; the weights stay as they are. Half precision may change the class
            of a few texts.

    Raises:
        ValueError: If `batch_size` is below 1, `device` cannot be used here, `dtype` is not one of
            float32, bfloat16 and float16, or the tokenizer has more ids than the encoder.

    Example:
        >>> from dact.data import CompositionalSentiment
        >>> from dact.encoders import TransformerEncoder
        >>> data = CompositionalSentiment(num_train=10)
        >>> model = DACT(encoder=TransformerEncoder(data.vocab_size, 2, 8, 2), class_names=data.class_names)
        >>> classifier = TextClassifier(model, data.tokenizer)
        >>> classifier(["the screen is ironically great ."])[0].exit_layer
        2
    """

    def __init__(
        self,
        model: DACT,
        tokenizer: PreTrainedTokenizerBase | str,
        *,
        batch_size: int = 1024,
        device: str | torch.device | None = None,
        dtype: str | torch.dtype | None = None,
    ) -> None:
        if not hasattr(model, "early_exit"):
            kind = type(model).__name__
            raise TypeError(
                f"TextClassifier: model must be a DACT, got {kind}; from_pretrained loads one from a folder"
            )
        check_count("TextClassifier: batch_size", batch_size)
        _check_device(device)
        self.dtype = _checked_dtype(dtype)
        self._is_rounded = False
        self.model: Any = model.eval()
        if device is not None:
            self.model.to(device)
        self.batch_size = batch_size
        if isinstance(tokenizer, str):
            tokenizer = load_tokenizer(tokenizer)
        such_as = "transformers.AutoTokenizer.from_pretrained(…)"
        check_type("TextClassifier: tokenizer", tokenizer, PreTrainedTokenizerBase, such_as)
        encoder = getattr(model, "encoder", None)
        if isinstance(encoder, LayeredEncoder):
            encoder.check_tokens(tokenizer, None)
        longest = getattr(encoder, "max_length", None) or tokenizer.model_max_length
        self.tokenizer = tokenizer_for(tokenizer, min(tokenizer.model_max_length, longest))
        self.class_names = names_of_classes(model)
        self._tokenizing = (
            threading.Lock()
        )  # a fast tokenizer refuses a second thread ("Already borrowed")

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in vars(self).items() if name != "_tokenizing"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state, _tokenizing=threading.Lock())

    @classmethod
    def from_pretrained(
        cls,
        directory: str | Path,
        *,
        batch_size: int = 1024,
        device: str | torch.device | None = None,
        dtype: str | torch.dtype | None = None,
        revision: str | None = None,
        token: str | bool | None = None,
        cache_dir: str | Path | None = None,
        local_files_only: bool = False,
        **overrides: Any,
    ) -> TextClassifier:
        """Return the classifier of a ``model/`` folder, as ``dact fit``, ``dact tune`` and ``dact
        export`` write it, or of a repository on the Hub.

        Args:
            directory: Folder with the model and its tokenizer, or a Hub id ``"OWNER/NAME"``.
            batch_size: As for `TextClassifier`.
            device: As for `TextClassifier`.
            dtype: As for `TextClassifier`; the weights of the loaded encoder are held in it as
                well.
            revision: Branch, tag or commit on the Hub.
            token: Access token.
            cache_dir: Folder of the cache.
            local_files_only: Whether to look only in the cache.
            **overrides: Arguments for `DACT.from_pretrained`, such as ``halting_tolerance=0.3``.

        Raises:
            FileNotFoundError, ValueError: As for `DACT.from_pretrained`, or if the folder has no
                tokenizer.
        """
        _check_device(device)
        directory = hub.local_folder(
            directory,
            revision=revision,
            token=token,
            cache_dir=cache_dir,
            local_files_only=local_files_only,
        )
        model = DACT.from_pretrained(directory, **overrides)
        held = _checked_dtype(dtype) if "encoder" not in overrides else None
        if held is not None:  # otherwise autocast casts all weights in each call
            model.encoder.to(held)
        tokenizer = load_tokenizer(str(directory.resolve()))
        classifier = cls(model, tokenizer, batch_size=batch_size, device=device, dtype=dtype)
        has_weights = any(True for _ in model.encoder.parameters())
        classifier._is_rounded = has_weights and held not in (None, torch.float32)
        return classifier

    def save_pretrained(self, directory: str | Path, **card: Any) -> None:
        """Write the model, its tokenizer and a model card into `directory`; see
        `DACT.save_pretrained`.

        Raises:
            ValueError: If the weights of its encoder were rounded to half precision when it was
                loaded.
        """
        if self._is_rounded:
            raise ValueError(
                "the encoder's weights were rounded to half precision when it was loaded: load it without dtype to "
                "save it"
            )
        self.model.save_pretrained(directory, **card)
        self.tokenizer.save_pretrained(str(directory))

    def push_to_hub(
        self, repo_id: str, *, metrics: Metrics = None, **options: Unpack[hub.Publication]
    ) -> str:
        """Publish the model with its tokenizer on the Hub; see `DACT.push_to_hub`."""
        return hub.publish(partial(self.save_pretrained, metrics=metrics), repo_id, options)

    @property
    def device(self) -> torch.device:
        """Device that the model is on."""
        return getattr(self.model, "device", torch.device("cpu"))

    def __call__(self, texts: Sequence[Text]) -> list[Prediction]:
        """Return one prediction per text, in their order; a progress bar appears on a terminal if
        it takes long.

        Args:
            texts: Texts, or pairs of texts as tuples or lists of two.

        Raises:
            TypeError: If `texts` is one string or a table, an entry is neither a text nor a pair,
                or texts and pairs are mixed.
            ValueError: If a text is empty.
        """
        _check_texts(texts)
        # All texts are checked before the first is classified.
        checked = _checked(enumerate(texts))
        with _Bar(
            total=len(checked),
            unit="text",
            delay=BAR_DELAY,
            leave=False,
            disable=sys.stderr is None or not sys.stderr.isatty(),
        ) as bar:
            found = []
            for start in range(0, len(checked), self.batch_size):
                found += self._classify(checked[start : start + self.batch_size])
                bar.update(len(found) - bar.n)
        return found

    def stream(self, texts: Iterable[Text]) -> Iterator[Prediction]:
        """Yield one prediction per text from a source of any length, which is read at most one
        batch ahead."""
        _check_texts(texts)
        source = enumerate(texts)
        while waiting := _checked(islice(source, self.batch_size)):
            yield from self._classify(waiting)

    def _classify(self, texts: list[Text]) -> list[Prediction]:
        with self._tokenizing:
            cut = self.tokenizer.model_max_length < NO_LIMIT
            encoding = tokenize(self.tokenizer, texts, truncation=cut)
        half = self.dtype is not None and self.dtype != torch.float32
        precision = (
            torch.autocast(self.device.type, self.dtype) if half else contextlib.nullcontext()
        )
        with precision:
            output = self.model.early_exit(
                {name: value.to(self.device) for name, value in encoding.items()}
            )
        labels = output.probabilities.argmax(dim=1)
        probabilities = temper(
            output.probabilities, output.exit_layer, getattr(self.model, "temperatures", None)
        )
        return [
            Prediction(
                self.class_names[label],
                row[label],
                exit_layer,
                dict(zip(self.class_names, row, strict=True)),
            )
            for label, row, exit_layer in zip(
                labels.tolist(), probabilities.tolist(), output.exit_layer.tolist(), strict=True
            )
        ]


class _Bar(tqdm):  # type: ignore[misc]
    """A progress bar without tqdm's monitor thread, which would outlive the call."""

    monitor_interval = 0


def _checked(texts: Iterable[tuple[int, object]]) -> list[Any]:
    """Return the texts, or pairs as tuples, of (position, entry); raise an error unless all are of
    one kind."""
    found: list[Any] = []
    for row, entry in texts:
        parts = (entry,) if isinstance(entry, str) else entry
        if not isinstance(parts, (tuple, list)) or (len(parts) != 2 and parts is entry):
            raise TypeError(
                f"expected texts or pairs of texts, got {_kind(entry)} at position {row}"
            )
        check_text(parts, row)
        found.append(entry if isinstance(entry, str) else tuple(parts))
        if isinstance(entry, str) != isinstance(found[0], str):
            raise TypeError(
                f"expected only texts or only pairs, got both: {_kind(entry)} at position {row}"
            )
    return found


def _check_texts(texts: object) -> None:
    if isinstance(texts, str):
        raise TypeError("expected a sequence of texts, got one string: pass [text]")
    if isinstance(texts, Mapping) or hasattr(
        texts, "columns"
    ):  # iterating over it gives the names of its columns
        raise TypeError(
            f"expected a sequence of texts, got a {type(texts).__name__}: pass one column as a list"
        )


def check_text(text: str | Sequence[object], position: int) -> None:
    """Raise an error unless a text, or each of a pair, is a string that a tokenizer can read."""
    for part in [text] if isinstance(text, str) else text:
        if not isinstance(part, str):
            raise TypeError(f"expected strings, got {type(part).__name__} at position {position}")
        if not part.strip():
            raise ValueError(f"the text at position {position} is empty")
        if not is_utf8(part):  # JSON, for one, may hold halves of a character
            raise ValueError(
                f"the text at position {position} is not valid Unicode: it has half of a surrogate pair"
            )


def _kind(entry: object) -> str:
    if isinstance(entry, str):
        return "a text"
    return f"a {type(entry).__name__}" + (
        f" of {len(entry)}" if isinstance(entry, (tuple, list)) else ""
    )


def _check_device(device: str | torch.device | None) -> None:
    """Raise an error unless tensors can be on `device` here."""
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        first = str(error).strip().partition("\n")[0]
        raise ValueError(
            f"TextClassifier: device={str(device)!r} cannot be used here, cpu can: {first}"
        ) from error


def _checked_dtype(dtype: str | torch.dtype | None) -> torch.dtype | None:
    known = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
    found = known.get(dtype) if isinstance(dtype, str) else dtype
    if dtype is not None and found not in known.values():
        raise ValueError(f"TextClassifier: dtype must be one of {', '.join(known)}, got {dtype}")
    return found
