"""TextClassifier: raw text in; label, score, probabilities and exit layer out."""

from __future__ import annotations

import threading
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Annotated, Any, overload

import torch
from tqdm import tqdm  # type: ignore[import-untyped]

from dact import hub
from dact.agreement import names_of_classes
from dact.calibration.temperature import temper
from dact.checks import Range, check_arguments
from dact.data.files import text_fault
from dact.data.tokenizers import PreTrainedTokenizerBase, load_tokenizer, tokenize, tokenizer_for
from dact.model import DACT
from dact.model_card import Metrics, metrics_of

Text = str | tuple[str, str] | list[str]
MOST_TOKENS = 8192  # if neither encoder nor tokenizer has a limit: memory grows with its square
BAR_DELAY = 2.0  # seconds after which a progress bar appears
TOKENIZING = threading.Lock()  # a fast tokenizer fails in a second thread ("Already borrowed")
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True)
class Prediction:
    """The answer for one text.

    Args:
        label: Name of the class. None if texts may have several labels, and, like score and exit
            layer, for a text that has no answer.
        score: Probability of that class at the exit layer, in [0, 1]; calibrated if the model has
            temperatures. The proof holds for the class, not for its probability. With several
            labels, the probability of the least certain decision whether a label is present.
        exit_layer: Number of the last layer that was run, 1-based.
        probabilities: Probabilities of all classes, by name.
        reason: Reason why there is no answer, such as ``"empty text"``; None if there is one.
        labels: Labels of a text that may have several, with their probabilities.
    """

    label: str | None
    score: float | None
    exit_layer: int | None
    probabilities: dict[str, float]
    reason: str | None = None
    labels: dict[str, float] | None = None


class TextClassifier:
    """A fitted model with its tokenizer and class names.

    It can be called from several threads, and pickled for other processes and machines.

    Args:
        model: Model, which is put into eval mode and moved to `device`.
        tokenizer: Tokenizer of the model, which is copied, or its name, as for the data. Texts are
            cut to the length that tokenizer and encoder accept, or to 8,192 tokens if neither has a
            limit.
        batch_size: Number of texts that are classified together, 1 or more. Larger batches make
            early exit faster, up to about a thousand texts on a CPU and ten thousand on a GPU.
        device: Device to run on, such as ``"cuda"``; the device of the model if left out.
        dtype: Precision of the encoder and its heads, such as ``torch.bfloat16`` or ``"bfloat16"``,
            by ``torch.autocast``; the weights stay as they are. Half precision may change the class
            of a few texts.

    Raises:
        ValueError: If `batch_size` is below 1, `dtype` is not one of float32, bfloat16 and float16,
            or the tokenizer has more ids than the encoder.

    Example:
        >>> from dact.data import CompositionalSentiment
        >>> from dact.encoders import TransformerEncoder
        >>> data = CompositionalSentiment(num_train=10)
        >>> encoder = TransformerEncoder(data.vocab_size, num_layers=2, hidden_size=8, num_heads=2)
        >>> model = DACT(encoder=encoder, class_names=data.class_names)
        >>> classifier = TextClassifier(model, data.tokenizer)
        >>> classifier("the screen is ironically great .").exit_layer
        2
    """

    def __init__(
        self,
        model: DACT,
        tokenizer: PreTrainedTokenizerBase | str,
        *,
        batch_size: Annotated[int, Range("[1, inf)")] = 1024,
        device: str | torch.device | None = None,
        dtype: str | torch.dtype | None = None,
    ) -> None:
        check_arguments(TextClassifier.__init__, locals(), "TextClassifier: ")
        self.dtype = _checked_dtype(dtype)
        self.model = model.eval().to(device or model.device)
        self.batch_size = batch_size
        if isinstance(tokenizer, str):
            tokenizer = load_tokenizer(tokenizer)
        model.encoder.check_tokens(tokenizer, None)
        limits = (model.encoder.max_length, tokenizer.model_max_length)
        # A tokenizer without a limit reports a huge one.
        longest = min(limit for limit in limits if limit is not None)
        self.tokenizer = tokenizer_for(tokenizer, longest if longest < 10**20 else MOST_TOKENS)
        self.class_names = names_of_classes(model)
        self.metrics: Metrics = None

    @classmethod
    def from_pretrained(
        cls,
        directory: str | Path,
        *,
        batch_size: int = 1024,
        device: str | torch.device | None = None,
        dtype: str | torch.dtype | None = None,
        **overrides: Any,
    ) -> TextClassifier:
        """Return the classifier of a ``model/`` folder, as written by ``dact fit``, ``dact tune``
        and ``dact export``, or of a repository on the Hub.

        Args:
            directory: Folder of a run, or with the model and its tokenizer, or a Hub id
                ``"OWNER/NAME"``.
            batch_size, device: As for `TextClassifier`.
            dtype: As for `TextClassifier`; the loaded encoder's weights are also stored in this
                precision.
            **overrides: Arguments for `DACT.from_pretrained`, such as ``halting_tolerance=0.3``, or
                ``revision``, ``token``, ``cache_dir`` and ``local_files_only`` for the Hub.

        Raises:
            FileNotFoundError, ValueError: As for `DACT.from_pretrained`, or if the folder has no
                tokenizer.
        """
        options = {name: overrides.pop(name) for name in hub.OPTIONS & overrides.keys()}
        directory = hub.local_folder(directory, **options)
        model = DACT.from_pretrained(directory, **overrides)
        if dtype is not None and "encoder" not in overrides:
            # Otherwise autocast would cast all weights in each call.
            model.encoder.to(_checked_dtype(dtype))
        tokenizer = load_tokenizer(str(directory.resolve()))
        classifier = cls(model, tokenizer, batch_size=batch_size, device=device, dtype=dtype)
        classifier.metrics = metrics_of(directory)
        return classifier

    def save_pretrained(self, directory: str | Path, **card: Any) -> None:
        """Write the model, its tokenizer and a model card into `directory`; see
        `DACT.save_pretrained`.

        Raises:
            ValueError: If the encoder was loaded in half precision.
        """
        if any(one.dtype != torch.float32 for one in self.model.encoder.parameters()):
            raise ValueError(
                "the weights of the encoder are in half precision: load it without dtype to save it"
            )
        self.model.save_pretrained(directory, **{"metrics": self.metrics, **card})
        self.tokenizer.save_pretrained(str(directory))

    def push_to_hub(self, repo_id: str, *, metrics: Metrics = None, **options: Any) -> str:
        """Publish the model with its tokenizer on the Hub; see `DACT.push_to_hub`. By default,
        `metrics` come from the run that the model was loaded from."""
        save = partial(self.save_pretrained, metrics=metrics or self.metrics)
        return hub.publish(save, repo_id, **options)

    @property
    def device(self) -> torch.device:
        """Device of the model."""
        return self.model.device

    @overload
    def __call__(self, texts: str) -> Prediction: ...  # type: ignore[overload-overlap]
    @overload
    def __call__(self, texts: Iterable[Text]) -> list[Prediction]: ...
    def __call__(self, texts: str | Iterable[Text]) -> Prediction | list[Prediction]:
        """Return one prediction per text, in their order. For an entry that is empty or not a text,
        it has a reason instead of a label.

        Args:
            texts: One text, or texts and pairs of texts as tuples or lists of two. A single pair
                goes into a list.

        Raises:
            TypeError: If `texts` is a table, or nothing that has texts.
        """
        if isinstance(texts, str):
            return self._predict([texts])[0]
        _check_texts(texts)
        given = list(texts)
        options = {"unit": "text", "delay": BAR_DELAY, "leave": False, "disable": None}
        return list(tqdm(self.stream(given), total=len(given), **options))

    predict = __call__

    def stream(self, texts: Iterable[Text]) -> Iterator[Prediction]:
        """Yield one prediction per text from a source of any length, reading at most one batch
        ahead."""
        _check_texts(texts)
        source = iter(texts)
        while waiting := list(islice(source, self.batch_size)):
            yield from self._predict(waiting)

    def _predict(self, texts: Sequence[Text]) -> list[Prediction]:
        reasons = [_fault(text) for text in texts]
        found = [Prediction(None, None, None, {}, reason) for reason in reasons]
        usable = [row for row, reason in enumerate(reasons) if reason is None]
        singles = [row for row in usable if isinstance(texts[row], str)]
        pairs = [row for row in usable if not isinstance(texts[row], str)]
        # Single texts and pairs are tokenised in different ways.
        for rows in filter(None, (singles, pairs)):
            answers = self._classify([texts[row] for row in rows])
            for row, answer in zip(rows, answers, strict=True):
                found[row] = answer
        return found

    def _classify(self, texts: Sequence[Text]) -> Iterator[Prediction]:
        """Yield the answers for texts, or for pairs of texts."""
        given = [text if isinstance(text, str) else tuple(text) for text in texts]
        with TOKENIZING:
            encoding = tokenize(self.tokenizer, given, truncation=True)
        batch = {name: value.to(self.device) for name, value in encoding.items()}
        is_half = self.dtype in (torch.bfloat16, torch.float16)
        with torch.autocast(self.device.type, self.dtype, enabled=is_half):
            output = self.model.early_exit(batch)
        task, layers = self.model.task, output.exit_layer
        decisions = task.decide(output.probabilities)
        tempered = temper(output.probabilities, layers, self.model.temperatures, task)
        columns = decisions, task.scores(tempered, decisions), layers, tempered
        for decision, score, layer, row in zip(*(one.tolist() for one in columns), strict=True):
            by_name = dict(zip(self.class_names, row, strict=True))
            answer = task.named(decision, score, by_name)
            yield Prediction(**answer, exit_layer=layer, probabilities=by_name)


def _fault(text: object) -> str | None:
    """Return why an entry has no answer, or None if it has one."""
    if isinstance(text, (tuple, list)) and len(text) != 2:
        return f"neither a text nor a pair of texts, but a {type(text).__name__} of {len(text)}"
    return text_fault(text if isinstance(text, (tuple, list)) else [text])


def _check_texts(texts: object) -> None:
    """Raise a ``TypeError`` for a table, since iterating over one gives its column names, and for
    what has no texts."""
    is_table = isinstance(texts, Mapping) or hasattr(texts, "columns")
    if is_table or not isinstance(texts, Iterable):
        raise TypeError(
            f"expected a sequence of texts, got a {type(texts).__name__}: give one column as a list"
        )


def _checked_dtype(dtype: str | torch.dtype | None) -> torch.dtype | None:
    found = DTYPES.get(dtype) if isinstance(dtype, str) else dtype
    if dtype is not None and found not in DTYPES.values():
        raise ValueError(f"TextClassifier: dtype must be one of {', '.join(DTYPES)}, got {dtype}")
    return found
