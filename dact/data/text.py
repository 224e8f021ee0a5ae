"""TextClassificationData: the datamodule for your own files."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Mapping
from typing import Any

from lightning.pytorch.utilities.rank_zero import rank_zero_warn  # type: ignore[attr-defined]

from dact.checks import check_choice, check_class_names, check_range
from dact.data.base import TextDataModule
from dact.data.examples import Examples, join, stratified_split
from dact.data.labels import (
    Reading,
    absent_classes,
    check_present,
    is_integer,
    learn_class_names,
    listed,
    name_rows,
    reading_of,
    to_classes,
)
from dact.data.rows import check_readable, is_utf8, printable, text_fault
from dact.data.tables import DATASET, read_columns
from dact.data.tokenizers import PreTrainedTokenizerBase
from dact.functional import UNLABELLED

COPIES_SHARE = 0.01  # a larger share of copies deserves a warning
FEW, FEW_SHARE = (
    5,
    0.002,
)  # fewer examples of a class than this, or a smaller share, may be mistyped labels


class TextClassificationData(TextDataModule):
    """Your own labelled text, from files.

    A file is csv, tsv, json lines or parquet, by its ending, or txt with one text a line where no
    label is needed. ``"dataset:NAME#SPLIT"`` stands for a split of the data set that
    `datasets.load_dataset` finds under a name on the Hub or in a folder, and ``"-"`` as
    predict_file for standard input, one text a line. Labels are strings or integers from 0; the
    classes are the sorted strings. Texts that differ only in case and blanks are copies of each
    other: a division of a file keeps them on one side, and a warning counts copies between given
    files.

    Args:
        train_file: Training examples.
        val_file: Validation examples; a stratified part of the training file if left out.
        test_file: Test examples.
        predict_file: Texts to classify; no label column is needed.
        unlabelled_file: Texts without labels that only a teacher labels. In training batches their
            ``labels`` are -100. Copies of validation and calibration texts are left out.
        calibration_file: Examples for `dact.calibrate`, instead of a `calibration_fraction`.
        tokenizer: A tokenizer, which is copied and never changed, or where to load one from: a Hub
            id, a local folder or ``"package:NAME/PATH"``. If None, `suggest_tokenizer` must be
            called before `setup`.
        text_column: Name of the column with the text.
        text_pair_column: Name of the column with a second text, for text pairs.
        label_column: Name of the column with the label.
        class_names: Names of the classes in their order, if the training file does not determine
            them. Labels are these names, or their positions from 0.
        integer_labels: Whether integer labels are names or positions of `class_names`. By default
            the training file decides, and labels that fit both are refused.
        max_length: Number of tokens to which longer inputs are cut.
        batch_size: Number of examples per batch.
        val_fraction: Share of the training file for validation, in (0, 1), if there is no val_file.
        calibration_fraction: Share of the validation examples, in [0, 1), that is set aside for
            `dact.calibrate`.
        num_workers: Number of processes that prepare batches.
        seed: Seed for the divisions and for the order of training examples.
        teacher: Fine-tuned model to learn from; see `TextDataModule`.

    Raises:
        FileNotFoundError, ValueError: In `setup`; the message names the file and the rows or
            columns at fault.

    Example:
        >>> TextClassificationData("train.csv", tokenizer="google-bert/bert-base-uncased", val_fraction=1.5)
        Traceback (most recent call last):
        ...
        ValueError: TextClassificationData: val_fraction must be in (0, 1), got 1.5
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
        class_names: list[str | int] | None = None,
        integer_labels: Reading | None = None,
        max_length: int = 128,
        batch_size: int = 32,
        val_fraction: float = 0.1,
        calibration_fraction: float = 0.0,
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
            calibration_fraction=calibration_fraction,
            teacher=teacher,
        )
        check_range("TextClassificationData: val_fraction", val_fraction, "(0, 1)")
        if integer_labels is not None:
            check_choice("TextClassificationData: integer_labels", integer_labels, Reading)
        if calibration_file is not None and calibration_fraction:
            raise ValueError(
                "TextClassificationData: give a calibration_file or a calibration_fraction, not both: "
                f"set calibration_fraction, {calibration_fraction:g}, to 0, or calibration_file to null"
            )
        files = {
            "train": train_file,
            "val": val_file,
            "test": test_file,
            "predict": predict_file,
            "unlabelled": unlabelled_file,
            "calibration": calibration_file,
        }
        self.files = {
            split: file and str(file) for split, file in files.items()
        }  # a Path is welcome
        self.text_column = text_column
        self.text_pair_column = text_pair_column
        self.label_column = label_column
        self.val_fraction = val_fraction
        self.class_names = (
            None if class_names is None else [str(name).strip() for name in class_names]
        )
        check_class_names(f"{type(self).__name__}: class_names", self.class_names)
        self._reading = integer_labels
        self._read: dict[str, Examples] = {}

    @property
    def needs_teacher(self) -> bool:  # type: ignore[override]
        """Whether there are texts without labels and no teacher to label them."""
        return (
            self.files["unlabelled"] is not None
            and self.teacher is None
            and self.teacher_probabilities is None
        )

    def setup(self, stage: str) -> None:
        test = self.files["test"]
        if (
            stage == "fit" and test is not None and not test.startswith(DATASET)
        ):  # or it would show only after the fit
            check_readable(test, "name the right test_file, or leave it out")
        before = set(self.splits)
        super().setup(stage)
        if stage == "fit" and test is not None and not test.startswith(DATASET):
            self.examples("test")  # whose columns and labels are checked
        for split in ("val", "calibration", "test"):
            if split in self.splits and split not in before:
                self._warn_of_leaks(split)

    def _warn_of_leaks(self, split: str) -> None:
        keys = self.splits[split].text_keys()
        earlier = {"training": self._read.get("train")}
        if split != "val":
            earlier["validation"] = self.splits.get("val")
        if split == "test":
            earlier["calibration"] = self.splits.get("calibration")
        for name, examples in earlier.items():
            if examples is None:
                continue
            known = set(examples.text_keys())
            share = sum(key in known for key in keys) / len(keys)
            if share > COPIES_SHARE:
                rank_zero_warn(
                    f"{share:.0%} of the {split} texts are in the {name} data as well, so their metrics are too "
                    "optimistic: leave them out of one of the two"
                )

    # ------------------------------------------------------------------ splits

    def examples(self, split: str) -> Examples:
        if split not in self._read:
            if self.class_names is None and split not in ("train", "predict"):
                self.examples("train")  # the training file determines the classes
            if split == "predict":
                self._read[split] = self._texts(split)
            elif split == "train" or (split == "val" and self.files["val"] is None):
                self._read_training()
            else:
                self._read[split] = self._labelled(split)
        return self._read[split]

    def _read_training(self) -> None:
        """Read the training file, divide it if validation comes from it, and add texts without
        labels."""
        train = self._labelled("train")
        if self.files["val"] is None:
            train, self._read["val"] = self._divide(train)
        self._read["train"] = train
        if self.files["unlabelled"] is not None:
            self._read["train"] = self._with_unlabelled(train)

    def _with_unlabelled(self, train: Examples) -> Examples:
        """Return the training examples, followed by the texts that only a teacher labels."""
        more = self._texts("unlabelled")
        assert more.reasons is not None
        usable = [row for row, reason in enumerate(more.reasons) if reason is None]
        held_out = {
            key
            for split in ("val", "calibration")
            if split == "val" or self.files[split] is not None
            for key in self.examples(split).text_keys()
        }
        kept = [
            row
            for row, key in zip(usable, more.take(usable).text_keys(), strict=True)
            if key not in held_out
        ]
        if len(kept) < len(more):
            rank_zero_warn(
                f"{self.files['unlabelled']}: {len(more) - len(usable)} of {len(more)} texts cannot be used, and "
                f"{len(usable) - len(kept)} are in validation or calibration: they are left out"
            )
        more = more.take(kept)
        return join([train, Examples(more.texts, more.pairs, [UNLABELLED] * len(more))])

    def _parts(self, split: str) -> dict[str, Examples]:
        if split == "val" and self.files["calibration"] is not None:
            # For calibration alone, of a model that is fitted, a calibration_file is enough.
            needed = (
                ["val", "calibration"]
                if self.files["train"] or self.files["val"]
                else ["calibration"]
            )
            return {name: self.examples(name) for name in needed}
        return super()._parts(split)

    def texts_of_training(self) -> Collection[bytes]:
        if self.files["val"] is None or self.files["train"] is None:
            return ()  # training and validation are parts of one file, or training is not known
        return set(self.examples("train").text_keys())

    def calibration_dataloader(self) -> Any:
        return (
            self._loader("calibration")
            if self.files["calibration"]
            else super().calibration_dataloader()
        )

    def _divide(self, train: Examples) -> tuple[Examples, Examples]:
        """Divide the training file into training and validation examples that share no text."""
        file = self.files["train"]
        keys = train.text_keys()
        assert train.labels is not None
        assert self.class_names is not None
        counts = Counter(train.labels)
        alone = [name for label, name in enumerate(self.class_names) if counts[label] == 1]
        if alone:
            most = 2 * len(alone) > len(self.class_names)
            doubt = (
                f". Is {self.label_column!r} the column of the labels? They name classes"
                if most
                else ""
            )
            raise ValueError(
                f"{file}: class {listed(alone)} has one example only, so a split for validation would leave training "
                f"or validation without it: correct a mistyped label, add examples or give a val_file{doubt}"
            )
        kept, aside = stratified_split(train.labels, self.val_fraction, self.seed, keys)
        if not aside:
            raise ValueError(
                f"{file}: no class has two distinct texts, so no example is left for validation: add examples or give "
                "a val_file"
            )
        if (share := 1 - len(set(keys)) / len(keys)) > COPIES_SHARE:
            rank_zero_warn(
                f"{file}: {share:.0%} of the examples are copies of another one; training and validation never share a "
                "text"
            )
        if absent := absent_classes((train.labels[row] for row in aside), self.class_names):
            rank_zero_warn(
                f"{file}: class {', '.join(absent)} has copies of one text only, which stay in training: validation "
                "says nothing about it"
            )
        return train.take(kept), train.take(aside)

    # ------------------------------------------------------------------ files

    def _file(self, split: str) -> str:
        file = self.files[split]
        if file is None:
            unknown = split == "train" and self.class_names is None
            more = " (or class_names, for the classes in their order)" if unknown else ""
            raise ValueError(
                f"TextClassificationData: no {split}_file was given, and this command needs one{more}"
            )
        return file

    @property
    def _text_columns(self) -> dict[str, str]:
        pair = {} if self.text_pair_column is None else {self.text_pair_column: "text_pair_column"}
        return {self.text_column: "text_column", **pair}

    def _columns(
        self, split: str, columns: Mapping[str, str]
    ) -> tuple[dict[str, list[Any]], list[str | None]]:
        """Return columns of a file, and the reason why the texts of each row cannot be used, None
        if they can."""
        file = self._file(split)
        table = read_columns(file, columns)
        labels = (
            table.get(self.label_column, []) if self.label_column not in self._text_columns else []
        )
        if garbled := [
            row for row, label in enumerate(labels) if isinstance(label, str) and not is_utf8(label)
        ]:
            raise ValueError(
                f"{file}: {name_rows(garbled)} with a label that is not valid UTF-8: save the file in UTF-8"
            )
        reasons = [
            text_fault(texts)
            for texts in zip(*(table[name] for name in self._text_columns), strict=True)
        ]
        return {name: list(map(printable, values)) for name, values in table.items()}, reasons

    def _labelled(self, split: str) -> Examples:
        file = self._file(split)
        columns = {**self._text_columns, self.label_column: "label_column"}
        table, reasons = self._columns(split, columns)
        # An empty row is a blank line, as csv files may have at their end.
        kept = [
            row
            for row in range(len(reasons))
            if any(table[name][row] not in (None, "") for name in columns)
        ]
        table = {name: [table[name][row] for row in kept] for name in columns}
        reasons = [reasons[row] for row in kept]
        if not kept:
            raise ValueError(f"{file} has no rows")
        faults = {row: reason for row, reason in enumerate(reasons) if reason is not None}
        if faults:
            first = next(iter(faults.values()))
            raise ValueError(
                f"{file}: {name_rows([*faults], kept)} cannot be used for training or evaluation ({first}): "
                + (
                    "save the file in UTF-8"
                    if "UTF-8" in first
                    else "leave them out, or complete them"
                )
            )
        labels = self._classes(split, table[self.label_column], kept)
        assert self.class_names is not None
        absent = absent_classes(labels, self.class_names)
        if absent and split == "train":
            raise ValueError(
                f"{file}: class {listed(absent)} of {listed(self.class_names)} has no example. "
                + (
                    "Integer labels count from 0; if yours do not, name the classes in their order by class_names"
                    if all(map(is_integer, table[self.label_column]))
                    else "Add examples of it, or leave it out of class_names"
                )
            )
        if absent and split != "test":
            rank_zero_warn(
                f"{file}: class {listed(absent)} of {listed(self.class_names)} has no example, so this file says "
                "nothing about it"
            )
        pairs = None if self.text_pair_column is None else table[self.text_pair_column]
        return Examples(table[self.text_column], pairs, labels)

    def _classes(self, split: str, labels: list[Any], rows: list[int]) -> list[int]:
        """Return each label of a file as a class; the training file decides on classes and integer
        labels."""
        file = self._file(split)
        check_present(labels, file, rows)
        learned = self.class_names is None
        if self.class_names is None:
            self.class_names = learn_class_names(labels, file)
            self._reading = "names"
        if (
            self._reading is None
            and split != "train"
            and self.files["train"]
            and any(map(is_integer, self.class_names))
        ):
            self.examples("train")
        if self._reading is None:
            self._reading = reading_of(labels, self.class_names, file)
        classes = to_classes(labels, self.class_names, self._reading, file, rows)
        counts = Counter(classes)
        few = [
            self.class_names[label]
            for label in counts
            if counts[label] < max(FEW, FEW_SHARE * len(classes))
        ]
        if learned and few and len(classes) > FEW * len(self.class_names):
            rank_zero_warn(
                f"{file}: class {listed(few)} has very few examples. If that is a mistyped label, correct it; if it is "
                "a class, name all classes by class_names, and nothing is said"
            )
        return classes

    def _texts(self, split: str) -> Examples:
        """Return the texts of a file without labels, each with the reason why it cannot be used or
        None."""
        table, reasons = self._columns(split, self._text_columns)
        pairs = None if self.text_pair_column is None else table[self.text_pair_column]
        unusable = [row for row, reason in enumerate(reasons) if reason is not None]
        if unusable and split == "predict":
            rank_zero_warn(
                f"{self._file(split)}: {name_rows(unusable)} cannot be classified and get no prediction; 'row' in a "
                "batch counts the rows of the file from 0"
            )
        return Examples(table[self.text_column], pairs, reasons=reasons)
