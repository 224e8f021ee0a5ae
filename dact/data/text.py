"""Labelled text: from examples to padded batches, and the datamodule for your own files."""

from __future__ import annotations

import random
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import LightningDataModule
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
from torch import Tensor
from torch.utils.data import DataLoader, Sampler
from transformers import AutoTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from dact.data.tables import REPLACEMENT, read_table
from dact.data.teacher import teacher_probabilities
from dact.encoders.pretrained import resolve_pretrained

INFERENCE_BATCH = 1024  # examples that test and predict hand on at a time: early exit regroups within them
SPLITS = {"fit": ("train", "val"), "validate": ("val",), "test": ("test",), "predict": ("predict",)}


@dataclass(frozen=True)
class Examples:
    """The examples of one split.

    Args:
        texts: One string per example.
        pairs: The second text of each example, for text pairs.
        labels: The class of each example, 0 … classes - 1; None for prediction.
        depths: How many steps each example is composed of, where the data knows it.
        reasons: Why an example cannot be used, None where it can; only prediction has such examples.
    """

    texts: list[str]
    pairs: list[str] | None = None
    labels: list[int] | None = None
    depths: list[int] | None = None
    reasons: list[str | None] | None = None

    def __len__(self) -> int:
        return len(self.texts)

    def take(self, rows: Sequence[int]) -> Examples:
        """The examples of `rows`, in that order."""
        columns = {name: getattr(self, name) for name in ("texts", "pairs", "labels", "depths", "reasons")}
        return replace(self, **{name: [c[row] for row in rows] for name, c in columns.items() if c is not None})


class TextDataModule(LightningDataModule, ABC):
    """What all text has in common: tokens, padding to the longest of a batch, batches of similar length in training.

    A subclass gives `examples` and sets `class_names` there or before.

    Args:
        tokenizer: A tokenizer, or where to find one: a Hub id, a local folder or ``"package:NAME/PATH"``.
        max_length: Longer inputs are cut to so many tokens.
        batch_size: Examples per batch in training and validation, 1 or more. Test and predict hand on 1,024 at a time,
            which early exit divides by itself.
        num_workers: Processes that prepare batches; with 0 the training process does.
        seed: Of the order of training examples.
        teacher: A fine-tuned model to learn from: training batches carry its ``teacher`` ``[batch, classes]``, for the
            `distillation` of `DACT`. A ``model/`` folder of dact, or a sequence-classification model: a Hub id, a local
            folder, or ``"package:NAME/PATH"``.

    Attributes:
        teacher_probabilities: What training batches carry, ``[training examples, classes]``: asked of `teacher` in
            `setup`, or set before.
        calibration_fraction: Share of the validation examples, in [0, 1), that is set aside for `dact.calibrate`;
            to be set before `setup`.
    """

    class_names: list[str] | None = None
    calibration_fraction: float = 0.0

    def __init__(
        self,
        tokenizer: str | PreTrainedTokenizerBase | None,
        *,
        max_length: int = 128,
        batch_size: int = 32,
        num_workers: int = 0,
        seed: int = 0,
        teacher: str | None = None,
    ) -> None:
        super().__init__()
        name = type(self).__name__
        for argument, value, least in (("max_length", max_length, 3), ("batch_size", batch_size, 1)):
            if value < least:
                raise ValueError(f"{name}: {argument} must be {least} or more, got {value}")
        self._tokenizer = tokenizer
        self.max_length = max_length
        self.batch_size = batch_size
        self.num_workers = num_workers
        self.seed = seed
        self.teacher = teacher
        self.teacher_probabilities: Tensor | None = None
        self.splits: dict[str, Examples] = {}
        self._encoded: dict[str, list[dict[str, Any]]] = {}

    @abstractmethod
    def examples(self, split: str) -> Examples:
        """The examples of ``"train"``, ``"val"``, ``"test"`` or ``"predict"``."""

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The tokenizer, loaded when first asked for."""
        if isinstance(self._tokenizer, str):
            self._tokenizer = load_tokenizer(self._tokenizer)
        tokenizer: Any = self._tokenizer
        tokenizer.model_max_length = self.max_length  # so that what is saved cuts texts as training did
        return tokenizer

    def setup(self, stage: str) -> None:
        for split in SPLITS[stage]:
            if split in self._encoded:
                continue
            parts = {split: self.examples(split)}
            if split == "val" and self.calibration_fraction:
                labels = parts["val"].labels
                assert labels is not None
                rows, set_aside = stratified_split(labels, self.calibration_fraction, self.seed)
                parts = {"val": parts["val"].take(rows), "calibration": parts["val"].take(set_aside)}
            for name, examples in parts.items():
                self.splits[name] = examples
                self._encoded[name] = self._encode(examples)
        if stage == "fit" and self.teacher is not None and self.teacher_probabilities is None:
            if getattr(getattr(self.trainer, "lightning_module", None), "distillation", None) == 0:
                raise ValueError(
                    f"{type(self).__name__}: a teacher was given, but the model would not learn from it: give the model a "
                    "distillation above 0, such as 0.5, or leave the teacher out"
                )
            train = self.splits["train"]
            assert self.class_names is not None
            self.teacher_probabilities = teacher_probabilities(
                self.teacher,
                load_tokenizer(self.teacher, "teacher with a tokenizer"),
                train.texts,
                train.pairs,
                self.class_names,
                self.max_length,
                torch.device("cpu") if self.trainer is None else self.trainer.strategy.root_device,
            )

    def _encode(self, examples: Examples) -> list[dict[str, Any]]:
        """One dict per usable example: token ids, mask, and its row, label and depth where there are."""
        usable = [row for row in range(len(examples)) if examples.reasons is None or examples.reasons[row] is None]
        chosen = examples.take(usable)
        if not usable:
            return []
        items: list[dict[str, Any]] = []
        for start, end in _portions(chosen):
            pairs = None if chosen.pairs is None else chosen.pairs[start:end]
            encoding = self.tokenizer(chosen.texts[start:end], pairs, truncation=True, max_length=self.max_length)
            items += ({name: encoding[name][i] for name in encoding} for i in range(end - start))
        for i, (row, item) in enumerate(zip(usable, items, strict=True)):
            item["row"] = row
            if chosen.labels is not None:
                item["labels"] = chosen.labels[i]
            if chosen.depths is not None:
                item["depth"] = chosen.depths[i]
        return items

    def collate(self, items: list[dict[str, Any]]) -> dict[str, Tensor]:
        """Pad to the longest example of the batch: input_ids and attention_mask ``[batch, length]``, labels ``[batch]``."""
        return _collate(items, self.tokenizer)

    def _loader(self, split: str) -> DataLoader[Any]:
        if split not in self._encoded:
            raise RuntimeError(f"{type(self).__name__}: the {split} split is not set up; call setup() first")
        items = self._encoded[split]
        sampler = None
        if split == "train":
            sampler = LengthGroupedSampler([len(item["input_ids"]) for item in items], self.batch_size, self.seed)
        size = self.batch_size if split in ("train", "val", "calibration") else max(self.batch_size, INFERENCE_BATCH)
        return DataLoader(
            items,  # type: ignore[arg-type]
            batch_size=size,
            sampler=sampler,
            # A function and no method: processes that prepare batches get the tokenizer, not the whole datamodule.
            collate_fn=partial(
                _collate,
                tokenizer=self.tokenizer,
                teacher=self.teacher_probabilities if split == "train" else None,
            ),
            num_workers=self.num_workers,
            persistent_workers=self.num_workers > 0,
        )

    def train_dataloader(self) -> DataLoader[Any]:
        return self._loader("train")

    def val_dataloader(self) -> DataLoader[Any]:
        return self._loader("val")

    def calibration_dataloader(self) -> DataLoader[Any] | None:
        """The validation examples that were set aside, if any were."""
        return self._loader("calibration") if self.calibration_fraction else None

    def test_dataloader(self) -> DataLoader[Any]:
        return self._loader("test")

    def predict_dataloader(self) -> DataLoader[Any]:
        return self._loader("predict")


def _collate(
    items: list[dict[str, Any]], tokenizer: PreTrainedTokenizerBase, teacher: Tensor | None = None
) -> dict[str, Tensor]:
    """A batch of examples, with what a teacher ``[training examples, classes]`` says of them."""
    own = ("row", "labels", "depth")
    tokens = [{name: value for name, value in item.items() if name not in own} for item in items]
    batch = dict(tokenizer.pad(tokens, return_tensors="pt"))
    for name in own:
        if name in items[0]:
            batch[name] = torch.tensor([item[name] for item in items])
    if teacher is not None:
        batch["teacher"] = teacher[batch["row"]]
    return batch


def _portions(examples: Examples, characters: int = 1_000_000) -> Iterator[tuple[int, int]]:
    """Ranges of rows of about so many characters: a tokenizer holds far more than the text that it is given."""
    start, size = 0, 0
    for row, text in enumerate(examples.texts):
        size += len(text) + (0 if examples.pairs is None else len(examples.pairs[row]))
        if size >= characters:
            yield start, row + 1
            start, size = row + 1, 0
    if start < len(examples):
        yield start, len(examples)


class LengthGroupedSampler(Sampler[int]):
    """A random order in which the examples of a batch have similar lengths, so that little padding is computed.

    The examples are shuffled, sorted by length within groups of 50 batches, and the batches are shuffled. The order
    depends on the seed and the epoch alone: a resumed run goes on as it would have.

    Args:
        lengths: Tokens of each example.
        batch_size: Examples per batch.
        seed: Of the shuffling.
    """

    def __init__(self, lengths: Sequence[int], batch_size: int, seed: int) -> None:
        self.lengths, self.batch_size, self.seed, self.epoch = lengths, batch_size, seed, 0

    def set_epoch(self, epoch: int) -> None:
        """Called by the Trainer at the start of each epoch."""
        self.epoch = epoch

    def __len__(self) -> int:
        return len(self.lengths)

    def __iter__(self) -> Iterator[int]:
        generator = random.Random(f"{self.seed}/{self.epoch}")
        order = generator.sample(range(len(self)), len(self))
        group = 50 * self.batch_size
        batches = []
        for start in range(0, len(order), group):
            by_length = sorted(order[start : start + group], key=lambda row: self.lengths[row])
            batches += [by_length[i : i + self.batch_size] for i in range(0, len(by_length), self.batch_size)]
        # A short batch stays last: the DataLoader cuts the order into batches from its beginning.
        last = [batches.pop()] if batches and len(batches[-1]) < self.batch_size else []
        generator.shuffle(batches)
        for batch in batches + last:
            yield from batch


def load_tokenizer(pretrained: str, what: str = "tokenizer") -> PreTrainedTokenizerBase:
    """The tokenizer of a Hub id, a local folder or ``"package:NAME/PATH"``; an error says `what` it was wanted for.

    Raises:
        ValueError: If there is none.
    """
    try:
        return AutoTokenizer.from_pretrained(resolve_pretrained(pretrained))
    except (OSError, ValueError) as error:
        raise ValueError(
            f"no {what} at {pretrained!r}. Expected a Hub id (with a network, or downloaded before), a local folder, "
            f"or 'package:NAME/PATH'. The library says: {' '.join(str(error).split())[:200]}"
        ) from error


def word_tokenizer(words: Sequence[str]) -> PreTrainedTokenizerFast:
    """A tokenizer that knows `words` in lower case and takes every other word for ``[UNK]``; ``[CLS]`` comes first."""
    special = ["[PAD]", "[UNK]", "[CLS]"]
    vocabulary = {word: index for index, word in enumerate([*special, *sorted(set(words))])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    cls = ("[CLS]", vocabulary["[CLS]"])
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A", pair="[CLS] $A [CLS] $B:1", special_tokens=[cls]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="[PAD]",
        unk_token="[UNK]",
        cls_token="[CLS]",
        model_input_names=["input_ids", "attention_mask"],
    )


def stratified_split(labels: Sequence[int], fraction: float, seed: int) -> tuple[list[int], list[int]]:
    """Rows for training and for validation, each class divided in the same proportion.

    Args:
        labels: The class of each row.
        fraction: The share for validation, in (0, 1); at least one example of each class.
        seed: Of the draw.

    Returns:
        (training rows, validation rows), both in ascending order.
    """
    generator = random.Random(seed)
    held_out: set[int] = set()
    for label in sorted(set(labels)):
        rows = [row for row, other in enumerate(labels) if other == label]
        held_out.update(generator.sample(rows, max(1, round(fraction * len(rows)))))
    return [row for row in range(len(labels)) if row not in held_out], sorted(held_out)


class TextClassificationData(TextDataModule):
    """Your own labelled text, from files.

    csv, tsv, json lines or parquet, by ending. Labels are strings or integers from 0; strings are sorted into classes.

    Args:
        train_file: The training examples.
        val_file: The validation examples; a stratified part of the training file if left out.
        test_file: The test examples.
        predict_file: Texts to classify; needs no label column.
        tokenizer: A tokenizer, or where to find one: a Hub id, a local folder or ``"package:NAME/PATH"``.
        text_column: Name of the column with the text.
        text_pair_column: Name of the column with a second text, for text pairs.
        label_column: Name of the column with the label.
        class_names: The classes in their order, where the training file does not tell: labels are these names, or
            their positions from 0.
        max_length: Longer inputs are cut to so many tokens.
        batch_size: Examples per batch.
        val_fraction: Share of the training file for validation, in (0, 1), if there is no val_file.
        num_workers: Processes that prepare batches.
        seed: Of the split and of the order of training examples.
        teacher: A fine-tuned model to learn from; see `TextDataModule`.

    Raises:
        FileNotFoundError, ValueError: In `setup`, with the file and the rows or columns at fault.
    """

    def __init__(
        self,
        train_file: str | None = None,
        val_file: str | None = None,
        test_file: str | None = None,
        predict_file: str | None = None,
        *,
        tokenizer: str | PreTrainedTokenizerBase,
        text_column: str = "text",
        text_pair_column: str | None = None,
        label_column: str = "label",
        class_names: list[str] | None = None,
        max_length: int = 128,
        batch_size: int = 32,
        val_fraction: float = 0.1,
        num_workers: int = 0,
        seed: int = 0,
        teacher: str | None = None,
    ) -> None:
        super().__init__(
            tokenizer,
            max_length=max_length,
            batch_size=batch_size,
            num_workers=num_workers,
            seed=seed,
            teacher=teacher,
        )
        if not 0.0 < val_fraction < 1.0:
            raise ValueError(f"TextClassificationData: val_fraction must be in (0, 1), got {val_fraction}")
        self.files = {"train": train_file, "val": val_file, "test": test_file, "predict": predict_file}
        self.text_column = text_column
        self.text_pair_column = text_pair_column
        self.label_column = label_column
        self.val_fraction = val_fraction
        self.class_names = None if class_names is None else [str(name) for name in class_names]
        self._read: dict[str, Examples] = {}

    def setup(self, stage: str) -> None:
        test = self.files["test"]
        if stage == "fit" and test is not None and not Path(test).is_file():  # or it would be missed after the fit
            raise FileNotFoundError(f"there is no file {test}: name the right test_file, or leave it out")
        super().setup(stage)

    def examples(self, split: str) -> Examples:
        if split == "predict":
            return self._texts_to_predict()
        if self.class_names is None and split != "train":
            self.examples("train")  # the training file tells the classes
        if self.files["val"] is not None or split == "test":
            return self._labelled(split)
        if "train" not in self._read:
            everything = self._labelled("train")
            assert everything.labels is not None and self.class_names is not None
            self._check_divisible(everything.labels)
            train, val = stratified_split(everything.labels, self.val_fraction, self.seed)
            self._read = {"train": everything.take(train), "val": everything.take(val)}
        return self._read[split]

    def _check_divisible(self, labels: list[int]) -> None:
        counts = Counter(labels)
        assert self.class_names is not None
        alone = [self.class_names[label] for label, count in counts.items() if count < 2]
        if alone:
            raise ValueError(
                f"{self.files['train']}: class {', '.join(alone)} has one example only, so a split for validation would "
                "leave training or validation without it: add examples or give a val_file"
            )

    def _file(self, split: str) -> str:
        file = self.files[split]
        if file is None:
            more = " (or class_names, for the classes in their order)" if split == "train" else ""
            raise ValueError(f"TextClassificationData: no {split}_file was given, and this command needs one{more}")
        return file

    def _columns(self, split: str, names: list[str]) -> tuple[dict[str, list[Any]], bool]:
        file = self._file(split)
        table, valid = read_table(file)
        for name in names:
            if name not in table:
                single = len(table) == 1 and file.lower().endswith((".csv", ".tsv"))
                hint = " (csv has commas between its columns, tsv tabs)" if single else ""
                raise ValueError(f"{file} has no column {name!r}; it has {', '.join(map(repr, table))}{hint}")
        return table, valid

    def _text_columns(self) -> list[str]:
        return [self.text_column] + ([] if self.text_pair_column is None else [self.text_pair_column])

    def _labelled(self, split: str) -> Examples:
        file = self._file(split)
        table, valid = self._columns(split, [*self._text_columns(), self.label_column])
        reasons = [_fault([table[name][row] for name in self._text_columns()], valid) for row in range(_rows(table))]
        faults = {row: reason for row, reason in enumerate(reasons) if reason is not None}
        if faults:
            first = next(iter(faults.values()))
            raise ValueError(f"{file}: {_name_rows(list(faults))} cannot be used for training or evaluation ({first})")
        if split == "train" and self.class_names is None:
            self.class_names = _learn_class_names(table[self.label_column], file)
        assert self.class_names is not None
        labels = _labels(table[self.label_column], self.class_names, file)
        absent = [name for label, name in enumerate(self.class_names) if label not in set(labels)]
        if absent and split != "test":
            raise ValueError(
                f"{file}: class {', '.join(absent)} of {', '.join(self.class_names)} has no example. Integer labels "
                "count from 0; if yours do not, name the classes in their order by class_names"
            )
        pairs = table[self.text_pair_column] if self.text_pair_column is not None else None
        return Examples(table[self.text_column], pairs, labels)

    def _texts_to_predict(self) -> Examples:
        table, valid = self._columns("predict", self._text_columns())
        reasons = [_fault([table[name][row] for name in self._text_columns()], valid) for row in range(_rows(table))]
        pairs = table[self.text_pair_column] if self.text_pair_column is not None else None
        return Examples(table[self.text_column], pairs, reasons=reasons)


def _rows(table: dict[str, list[Any]]) -> int:
    return len(next(iter(table.values())))


def _fault(texts: list[Any], valid_utf8: bool) -> str | None:
    """Why the texts of an example cannot be used, or None."""
    for text in texts:
        if not isinstance(text, str):
            return "no text" if text is None else f"not a string: {str(text)[:40]!r}"
        if not text.strip():
            return "empty text"
        if not valid_utf8 and REPLACEMENT in text:
            return "not valid UTF-8"
    return None


def _name_rows(rows: list[int], limit: int = 5) -> str:
    """``row 3``, or ``rows 3, 4, 9 and 2 more``; the first row of data is row 1."""
    named = ", ".join(str(row + 1) for row in rows[:limit])
    more = f" and {len(rows) - limit} more" if len(rows) > limit else ""
    return f"row{'s' if len(rows) > 1 else ''} {named}{more}"


def _is_integer(label: Any) -> bool:
    if isinstance(label, bool):
        return False
    return isinstance(label, int) or (isinstance(label, str) and label.strip().lstrip("-").isdecimal())


def _learn_class_names(labels: list[Any], file: str) -> list[str]:
    """The classes of the training file: 0 … the largest integer, or the sorted strings."""
    _refuse_missing_labels(labels, file)
    if all(map(_is_integer, labels)):
        largest = max(map(int, labels))
        if largest >= len(labels):
            raise ValueError(
                f"{file}: the label {largest} means {largest + 1} classes, but there are only {len(labels)} rows. Integer "
                "labels count from 0 unless class_names names them"
            )
        return [str(label) for label in range(largest + 1)]
    return sorted({str(label).strip() for label in labels})


def _refuse_missing_labels(labels: list[Any], file: str) -> None:
    missing = [row for row, label in enumerate(labels) if label is None or str(label).strip() == ""]
    if missing:
        raise ValueError(f"{file}: {_name_rows(missing)} without a label")


def _labels(labels: list[Any], class_names: list[str], file: str) -> list[int]:
    """Each label as a class 0 … classes - 1, by its name or else by its position."""
    _refuse_missing_labels(labels, file)
    by_name = {name: label for label, name in enumerate(class_names)}
    if all(map(_is_integer, labels)) and not all(str(label).strip() in by_name for label in labels):
        by_name = {str(label): label for label in range(len(class_names))}
    outside = [row for row, label in enumerate(labels) if str(label).strip() not in by_name]
    if outside:
        raise ValueError(
            f"{file}: {_name_rows(outside)} with a label outside the classes: {labels[outside[0]]!r}. "
            f"The {len(class_names)} classes are {', '.join(class_names)}"
        )
    return [by_name[str(label).strip()] for label in labels]
