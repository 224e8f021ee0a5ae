"""TextClassificationData: the datamodule for your own files."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence, Set
from dataclasses import replace
from typing import Any

from lightning.pytorch.utilities.rank_zero import rank_zero_warn  # type: ignore[attr-defined]
from typing_extensions import override

from dact.checks import check_range
from dact.data.base import TextDataModule
from dact.data.examples import Examples, hash_split, join
from dact.data.files import first_row, listed, read_rows, suggestion, text_fault
from dact.data.tokenizers import PreTrainedTokenizerBase
from dact.functional import UNLABELLED

PRESENT, ABSENT = ("1", "1.0", "true"), ("0", "0.0", "false")  # in a column of one label
FILES = ("train", "val", "test", "predict", "unlabelled", "calibration")


class TextClassificationData(TextDataModule):
    """Your own labelled text, from files.

    A file is csv, tsv, json lines or parquet, by its ending, or txt with one text a line where no
    label is needed. Instead of a file, ``"dataset:NAME#SPLIT"`` names a split of a data set that
    `datasets.load_dataset` finds on the Hub or in a folder. As predict_file, ``"-"`` is standard
    input, one text a line. Text is in UTF-8.

    The classes are the sorted distinct labels, strings or numbers. For several labels per text, the
    label column holds lists (json lines, parquet) or names joined by `label_separator`, or each
    label has a column, `label_columns`. A text may then have no label at all. A hash of each text
    decides whether it is for training, validation or calibration, whatever the other texts are.
    Texts that differ only in case and blanks count as one. Training texts are left out of other
    files.

    Args:
        train_file: Training examples.
        val_file: Validation examples; a part of the training file if left out.
        test_file: Test examples.
        predict_file: Texts for ``dact predict`` and `Trainer.predict`; no label column is needed.
        unlabelled_file: Texts that only a teacher labels; in batches their ``labels`` are -100.
        calibration_file: Examples for `dact.calibrate`, instead of a `calibration_fraction`.
        text_column: Name of the column with the text.
        text_pair_column: Name of the column with a second text, for text pairs.
        label_column: Name of the column with the label.
        label_separator: Text between the names of several labels in that column, such as ``"|"``.
        label_columns: Names of the columns with 0 or 1 for each label, instead of a label_column.
        class_names: Names of the classes in their order, if the training file does not determine
            them. Labels are these names or, if no name is a whole number, positions from 0.
        delimiter: Character between the columns of a csv file; a comma, semicolon or tab by its
            header if left out.
        drop_unusable: Whether to leave out rows without a usable text or label, instead of raising
            an error that lists them.
        val_fraction: Share of the training file for validation, in (0, 1), without a val_file.
        seed: Seed for the divisions and for the order of training examples.
        **options: Further arguments of `TextDataModule`, such as ``max_length`` and ``batch_size``.

    Raises:
        ValueError: In `setup`; the message names the file and the rows or columns at fault.

    Example:
        >>> data = TextClassificationData("train.csv", tokenizer="bert-base-uncased", seed=1)
        >>> data.batch_size
        32
    """

    def __init__(
        self,
        train_file: str | None = None,
        val_file: str | None = None,
        test_file: str | None = None,
        predict_file: str | None = None,
        *,
        unlabelled_file: str | None = None,
        calibration_file: str | None = None,
        tokenizer: str | PreTrainedTokenizerBase | None = None,
        text_column: str = "text",
        text_pair_column: str | None = None,
        label_column: str = "label",
        label_separator: str | None = None,
        label_columns: list[str] | None = None,
        class_names: list[str | int] | None = None,
        delimiter: str | None = None,
        drop_unusable: bool = False,
        val_fraction: float = 0.1,
        **options: Any,
    ) -> None:
        super().__init__(tokenizer, **options)
        check_range("val_fraction", val_fraction, "(0, 1)")
        if calibration_file is not None and self.calibration_fraction:
            raise ValueError("give a calibration_file or a calibration_fraction, not both")
        files = (train_file, val_file, test_file, predict_file, unlabelled_file, calibration_file)
        # each may be a Path
        self.files = {split: f and str(f) for split, f in zip(FILES, files, strict=True)}
        self._text_columns = {text_column: "text_column"}
        if text_pair_column is not None:
            self._text_columns[text_pair_column] = "text_pair_column"
        self.label_column, self.label_separator = label_column, label_separator
        self.label_columns = label_columns
        if label_separator is not None or label_columns is not None:
            self.task = "multilabel"
        self.delimiter = delimiter
        self.drop_unusable = drop_unusable
        self.val_fraction = val_fraction
        if class_names is not None:
            self.class_names = [str(name).strip() for name in class_names]
        self._names_given = class_names is not None
        self._read: dict[str, Examples] = {}
        # Keys of all texts of the training file.
        self._training: frozenset[bytes] = frozenset()

    @property
    def needs_teacher(self) -> bool:  # type: ignore[override]
        """Whether there are texts without labels and no teacher to label them."""
        no_teacher = self.teacher is None and self.teacher_probabilities is None
        return self.files["unlabelled"] is not None and no_teacher

    @override
    def setup(self, stage: str) -> None:
        if stage == "fit" and self.files["test"] is not None:
            # A mistake in the test file would otherwise show only after the fit.
            self.examples("test")
        super().setup(stage)
        if stage == "predict":
            self._encode("predict", self._texts("predict"))

    @override
    def examples(self, split: str) -> Examples:
        if split in self._read:
            return self._read[split]
        if split == "train":
            self._read_training()
        elif self.files["train"] or self.class_names is None:
            # The training file determines the classes, and the texts that other files leave out.
            self.examples("train")
        if split not in self._read:
            known = self._training
            if split == "calibration" and self.files["val"] is not None:
                known |= {*self.examples("val").text_keys()}
            self._read[split] = self._without(known, split, self._labelled(split))
        return self._read[split]

    @override
    def calibration_dataloader(self) -> Any:
        set_aside = self.calibration_fraction or self.files["calibration"]
        return self._loader("calibration") if set_aside else None

    @override
    def predict_dataloader(self) -> Any:
        return self._loader("predict")

    # ------------------------------------------------------------------ splits

    def _read_training(self) -> None:
        """Read the training file, divide it if there is no val_file, and add unlabelled texts."""
        train, file = self._labelled("train"), self.files["train"]
        keys, names = train.text_keys(), self.class_names or []
        self._training = frozenset(keys)
        labels_of = Counter(key for key, _ in {*zip(keys, train.labels, strict=True)})
        conflicting = sum(count > 1 for count in labels_of.values())
        if conflicting:
            rank_zero_warn(f"{file}: texts with conflicting labels: {conflicting:,}")
        self._read["train"] = train
        if self.files["val"] is None:
            kept, aside = hash_split(train.strata, keys, self.val_fraction, self.seed)
            alone = [name for label, name in enumerate(names) if train.labels.count(label) == 1]
            if alone or not aside:
                raise ValueError(
                    f"{file}: class {listed(alone or names)} has one text only, which training and "
                    "validation cannot share: correct the label, add examples, or give a val_file "
                    "(or a label_separator, if a text may have several labels)"
                )
            self._read |= {"train": train.take(kept), "val": train.take(aside)}
        if self.files["unlabelled"] is not None:
            self._read["train"] = join([self._read["train"], self._unlabelled()])

    @override
    def set_aside(self, validation: Examples) -> tuple[list[int], list[int]]:
        share = self.calibration_fraction
        if self.files["val"] is None:
            # The hash interval of calibration is a part of the validation interval.
            share *= self.val_fraction
        return hash_split(validation.strata, validation.text_keys(), share, self.seed)

    @override
    def _parts(self, split: str) -> dict[str, Examples]:
        if split != "val" or self.files["calibration"] is None:
            return super()._parts(split)
        # To calibrate a fitted model, a calibration_file alone is enough.
        needed = ["val"] if self.files["train"] or self.files["val"] else []
        return {name: self.examples(name) for name in (*needed, "calibration")}

    def _without(self, known: Set[bytes], split: str, examples: Examples) -> Examples:
        """Return the examples whose texts are not `known`, and warn about the others."""
        kept = [row for row, key in enumerate(examples.text_keys()) if key not in known]
        file, count = self.files[split], len(examples) - len(kept)
        if not kept and split == "test":
            rank_zero_warn(f"{file}: all its texts are in training: it says nothing about new ones")
            return examples
        if not kept:
            raise ValueError(f"{file}: all of its texts are used elsewhere too: give other texts")
        if count:
            what = f"{count:,} of {len(examples):,} texts are left out"
            rank_zero_warn(f"{file}: {what}: training, validation, calibration or test has them")
        return examples.take(kept)

    def _unlabelled(self) -> Examples:
        """Return the texts that only a teacher labels."""
        held = [one for one in ("val", "calibration", "test") if one == "val" or self.files[one]]
        held_out = {key for split in held for key in self.examples(split).text_keys()}
        more = self._without(held_out, "unlabelled", self._texts("unlabelled"))
        nothing: Any = UNLABELLED
        if self.task == "multilabel":
            nothing = (UNLABELLED,) * len(self.class_names or [])
        return replace(more, labels=[nothing] * len(more))

    # ------------------------------------------------------------------ files

    def _texts(self, split: str) -> Examples:
        """Return the usable texts of a file, without labels."""
        rows = self._rows(split, self._text_columns)
        return Examples(*map(list, zip(*rows.values(), strict=True)))

    def _labelled(self, split: str) -> Examples:
        """Return the usable examples of a file."""
        columns = {self.label_column: "label_column"}
        if self.label_columns is not None:
            columns = dict.fromkeys(self.label_columns, "label_columns")
        rows, width = self._rows(split, {**self._text_columns, **columns}), len(self._text_columns)
        file = str(self.files[split])
        values = {number: row[width:] for number, row in rows.items()}
        texts = Examples(*([row[place] for row in rows.values()] for place in range(width)))
        if isinstance(next(iter(values.values()))[0], list):
            self.task = "multilabel"
        if self.task == "multilabel":
            return replace(texts, labels=self._sets(values, file))
        labels = [(number, str(label).strip()) for number, (label,) in values.items()]
        if self.class_names is None:
            self.class_names = _names({label for _, label in labels})
            if len(self.class_names) == 1:
                only = self.class_names[0]
                raise ValueError(f"{file}: every label is {only!r}: a classifier needs two classes")
        return replace(texts, labels=self._classes(labels, self.class_names, file))

    def _sets(self, values: Mapping[int, list[Any]], file: str) -> list[tuple[int, ...]]:
        """Return the labels of each row, 0 or 1 for each class."""
        found = {row: self._set(value) for row, value in values.items()}
        labels = [(row, label) for row, names in found.items() for label in names]
        if self.class_names is None:
            self.class_names = self.label_columns or _names({label for _, label in labels})
        classes = iter(self._classes(labels, self.class_names, file))
        sets = [{next(classes) for _ in names} for names in found.values()]
        return [tuple(int(n in one) for n in range(len(self.class_names))) for one in sets]

    def _set(self, values: list[Any]) -> list[str]:
        """Return the names of the labels of a row."""
        if self.label_columns is not None:
            pairs = zip(self.label_columns, values, strict=True)
            return [name for name, value in pairs if str(value).lower() in PRESENT]
        names = values[0]
        if self.label_separator is not None and not isinstance(names, list):
            names = str(names or "").split(self.label_separator)
        return [str(name).strip() for name in names if str(name).strip()]

    def _classes(
        self, labels: Sequence[tuple[int, str]], names: Sequence[str], file: str
    ) -> list[int]:
        """Return the class, 0 … classes - 1, of each pair (number of the row, label)."""
        known = {name: label for label, name in enumerate(names)}
        if self._names_given and not any(map(_is_integer, names)):
            known |= {str(label): label for label in range(len(names))}
        # A column of integers with a missing value has floats.
        found = [known.get(label, known.get(label.removesuffix(".0"))) for _, label in labels]
        pairs = zip(labels, found, strict=True)
        outside = {row: label for (row, label), number in pairs if number is None}
        if outside:
            wrong, many = next(iter(outside.values())), "s" * (len(outside) > 1)
            raise ValueError(
                f"{file}: row{many} {listed([*outside])} with a label outside the classes: "
                f"{wrong!r}{suggestion(wrong, names)}. The {len(names)} classes are "
                f"{listed(names)}: correct the labels, or fit with all of them as class_names"
            )
        return [number for number in found if number is not None]

    def _label_fault(self, label: Any) -> str | None:
        """Return why a label of a row cannot be used, or None."""
        if self.label_columns is not None:
            is_known = str(label).lower() in (*PRESENT, *ABSENT)
            return None if is_known else f"{label!r} instead of 0 or 1"
        empty = label is None or label != label or label == ""
        if isinstance(label, list) or (empty and self.label_separator is not None):
            return None
        return "no label, which a label_separator allows" if empty else text_fault([str(label)])

    def _rows(self, split: str, columns: Mapping[str, str]) -> dict[int, list[Any]]:
        """Return the usable rows of a file by number; other rows are an error or left out."""
        file = self.files[split]
        if file is None:
            remedy = ", or class_names for the classes" if split == "train" else ""
            raise ValueError(f"no {split}_file was given{remedy}")
        usable: dict[int, list[Any]] = {}
        faults: dict[str, list[int]] = {}
        for number, row in enumerate(read_rows(file, columns, self.delimiter), first_row(file)):
            fault = text_fault(row[: len(self._text_columns)])
            for value in row[len(self._text_columns) :]:
                fault = fault or self._label_fault(value)
            if not fault:
                usable[number] = row
            elif any(value not in (None, "") for value in row):
                # An empty row is a blank line, such as at the end of a file.
                faults.setdefault(fault, []).append(number)
        text = "; ".join(f"rows {listed(rows)} ({fault})" for fault, rows in faults.items())
        # In another encoding, each text with an accent has a fault: dropping them is no remedy.
        is_misread = "UTF-8" in text
        if faults and self.drop_unusable and not is_misread:
            total = sum(map(len, faults.values()))
            rank_zero_warn(f"{file}: {total:,} unusable rows are left out: {text}")
        elif faults:
            remedy = "complete them, or leave them out by drop_unusable: true"
            remedy = "save the file in UTF-8" if is_misread else remedy
            raise ValueError(f"{file} has unusable rows: {text}: {remedy}")
        if not usable:
            raise ValueError(f"{file} has no rows")
        return usable


def _is_integer(name: str) -> bool:
    return name.removeprefix("-").isdecimal()


def _names(labels: Set[str]) -> list[str]:
    """Return the sorted classes: by value if all are integers, where 1.0 counts as 1."""
    names = {label.removesuffix(".0") for label in labels}
    return sorted(sorted(names), key=int) if all(map(_is_integer, names)) else sorted(labels)
