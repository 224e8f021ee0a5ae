"""Predictions for a file or a stream: rows are read, classified and written a batch at a time.

Several processes share the work: each classifies its part of the rows and writes a file of its own.
"""

from __future__ import annotations

import contextlib
import csv
import json
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningDataModule, LightningModule, Trainer
from lightning.pytorch.utilities.rank_zero import rank_zero_info  # type: ignore[attr-defined]
from torch import Tensor
from typing_extensions import override

from dact import signals
from dact.agreement import names_of_classes
from dact.calibration.temperature import temper
from dact.checks import check_count
from dact.data.files import STANDARD_INPUT, check_readable, read_rows, text_fault
from dact.data.tokenizers import tokenize
from dact.files import check_writable_folder, replacing
from dact.model import DACTOutput

WRITABLE = (".csv", ".jsonl", ".parquet")
STANDARD_OUTPUT = "-"
BATCH = 1024  # texts that are read at a time; early exit regroups within them
OUTPUT = "predictions.csv"  # unless another file is given
Row = dict[str, Any]


class PredictionData(LightningDataModule):
    """The texts of a file, or of standard input, to classify. Several processes take turns, a batch
    each.

    Args:
        predict_file: csv, tsv, json lines, parquet or txt (one text a line) by ending; ``-`` is
            standard input, with one text a line.
        tokenizer, text_column, text_pair_column, max_length: As for
            `dact.data.TextClassificationData`.
        batch_size: Number of texts that are read at a time.

    Attributes:
        unusable: Reasons why rows cannot be classified, by row number from 0, for rows that have
            been read and not yet written.
    """

    def __init__(
        self,
        predict_file: str,
        tokenizer: Any,
        *,
        text_column: str = "text",
        text_pair_column: str | None = None,
        max_length: int = 128,
        batch_size: int = BATCH,
    ) -> None:
        super().__init__()
        check_count("data.max_length", max_length, least=1)
        check_readable(predict_file)
        self.predict_file = predict_file
        self.tokenizer = tokenizer
        self.columns = {text_column: "text_column"}
        if text_pair_column is not None:
            self.columns[text_pair_column] = "text_pair_column"
        self.max_length = max_length
        self.batch_size = batch_size
        self.unusable: dict[int, str] = {}

    def batches(self) -> Iterator[dict[str, Tensor]]:
        """Yield batches of usable texts with their ``row`` numbers, and record in `unusable` why
        others are not."""
        rank, processes = (
            (0, 1) if self.trainer is None else (self.trainer.global_rank, self.trainer.world_size)
        )
        if processes > 1 and self.predict_file == STANDARD_INPUT:
            raise ValueError(
                f"standard input has one reader, not {processes}: use one device, or give a file"
            )
        rows = enumerate(read_rows(self.predict_file, self.columns))
        waiting = signals.at_once if self.predict_file == STANDARD_INPUT else contextlib.nullcontext
        while True:
            with waiting():
                window = list(islice(rows, self.batch_size))
            if not window:
                return
            if window[0][0] // self.batch_size % processes != rank:
                continue
            faults = {
                row: fault for row, texts in window if (fault := text_fault(texts)) is not None
            }
            self.unusable |= faults
            usable = [(row, texts) for row, texts in window if row not in faults]
            if not usable:
                continue
            texts = [list(column) for column in zip(*(texts for _, texts in usable), strict=True)]
            encoding = tokenize(self.tokenizer, *texts, truncation=True, max_length=self.max_length)
            encoding["row"] = torch.tensor([row for row, _ in usable])
            has_tokens = encoding["attention_mask"].any(dim=1)
            self.unusable |= {int(row): "no tokens" for row in encoding["row"][~has_tokens]}
            if has_tokens.any():
                kept = {name: values[has_tokens] for name, values in encoding.items()}
                yield kept

    @override
    def predict_dataloader(self) -> Iterator[dict[str, Tensor]]:
        return self.batches()


class PredictionWriter(Callback):
    """Write one row per input, in input order: label, the probability of each class, exit layer,
    and the reason why an input could not be classified.

    Label and probabilities are those of `TextClassifier`, scaled by the temperatures of the model
    if it has them.

    A batch may carry the numbers of its rows, from 0, as ``row`` ``[batch]``; otherwise rows are
    counted. A number that no batch carries is a row without a label, whose reason is in
    ``unusable`` of the datamodule. With several processes, each writes the rows that it classified,
    with their numbers, to a file of its own.

    Args:
        path: csv, json lines or parquet by ending; ``-`` writes csv to standard output. The first
            of three processes writes to ``NAME-1-of-3.csv`` instead.

    Attributes:
        path: File to which this process writes.
        labelled, unlabelled: Numbers of rows that it wrote with and without a label.
    """

    def __init__(self, path: str | Path) -> None:
        check_writable(path)
        self.path = str(
            Path(path).expanduser()
        )  # a shell leaves the ~ of --output=~/answers.csv as it is
        self.labelled = self.unlabelled = 0
        self._next_row = 0
        self._rank, self._processes = 0, 1
        self._is_stream = False
        self._reasons: dict[int, str] = {}  # by row; a stream adds to them while it is read
        self._open = contextlib.ExitStack()
        self._write: Callable[[list[Row]], None] | None = None

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self._rank, self._processes = trainer.global_rank, trainer.world_size
        data: Any = getattr(trainer, "datamodule", None)
        self._is_stream = hasattr(data, "unusable")
        known = getattr(getattr(data, "splits", {}).get("predict"), "reasons", None) or []
        in_memory = {row: reason for row, reason in enumerate(known) if reason is not None}
        self._reasons = data.unusable if self._is_stream else in_memory
        if self._processes == 1 or stage != "predict":
            return
        if self.path == STANDARD_OUTPUT:
            raise ValueError(
                f"{self._processes} processes cannot share standard output: use one device, or name a file"
            )
        path = Path(self.path)
        first, own = (
            path.with_stem(f"{path.stem}-{n}-of-{self._processes}") for n in (1, self._rank + 1)
        )
        self.path = str(own)
        rank_zero_info(
            f"{self._processes} processes write one file each, {first} and so on. Their column row is the number of an "
            "input, from 0"
        )

    @override
    def on_predict_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, *args: Any
    ) -> None:
        assert isinstance(outputs, DACTOutput)
        names, count = names_of_classes(pl_module), len(outputs.exit_layer)
        numbered = isinstance(batch, Mapping) and "row" in batch
        if self._processes > 1 and not numbered:
            raise ValueError(
                f"the batches have no 'row' [batch], by which the rows of {self._processes} processes could be told "
                "apart: add it, or use one device"
            )
        numbers = (
            batch["row"].tolist()
            if numbered
            else list(range(self._next_row, self._next_row + count))
        )
        labels = outputs.probabilities.argmax(dim=1).tolist()
        temperatures: Any = getattr(pl_module, "temperatures", None)
        probabilities = temper(outputs.probabilities.float(), outputs.exit_layer, temperatures)
        classified = zip(
            numbers,
            labels,
            _shortest(probabilities.cpu()),
            outputs.exit_layer.tolist(),
            strict=True,
        )
        rows: list[Row] = []
        for number, label, vector, exit_layer in sorted(classified):
            if number < self._next_row:
                raise ValueError(
                    f"row {number} comes after a later one: batches to predict must be in the order of rows"
                )
            rows += self._without_label(names, number)
            self.labelled += 1
            self._next_row = number + 1
            rows.append(self._row(number, names, names[label], vector, exit_layer))
        self._write_rows(names, rows)

    @override
    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        # Not in on_predict_end: a file in which nothing can be classified gives no batch, but has
        # rows to write.
        if stage == "predict":
            names, last = names_of_classes(pl_module), max(self._reasons, default=-1)
            self._write_rows(names, self._without_label(names, last + 1))
            self._open.close()

    @override
    def on_exception(
        self, trainer: Trainer, pl_module: LightningModule, exception: BaseException
    ) -> None:
        self._open.__exit__(type(exception), exception, exception.__traceback__)

    def _without_label(self, names: Sequence[str], end: int) -> list[Row]:
        """Return the rows before `end` that no batch carried; with several processes, only those of
        this one."""
        numbers: Iterable[int] = range(self._next_row, end)
        if self._processes > 1:
            # A stream has only the reasons of this process; data that holds all its examples has
            # those of all.
            mine = (
                number
                for number in numbers
                if self._is_stream or number % self._processes == self._rank
            )
            numbers = [number for number in mine if number in self._reasons]
        found = list(numbers)
        self.unlabelled += len(found)
        nothing = [None] * len(names)
        return [
            self._row(n, names, None, nothing, None, self._reasons.pop(n, "not in the data"))
            for n in found
        ]

    def _row(
        self,
        number: int,
        names: Sequence[str],
        label: str | None,
        vector: Sequence[float | None],
        exit_layer: int | None,
        reason: str | None = None,
    ) -> Row:
        probabilities = {
            f"probability_{name}": value for name, value in zip(names, vector, strict=True)
        }
        row = {"label": label, **probabilities, "exit_layer": exit_layer, "reason": reason}
        return row if self._processes == 1 else {"row": number, **row}

    def _write_rows(self, names: Sequence[str], rows: list[Row]) -> None:
        if self._write is None:
            columns = list(self._row(0, names, None, [None] * len(names), None))
            self._write = self._open.enter_context(_open_table(self.path, columns))
        self._write(rows)


def _shortest(probabilities: Tensor) -> list[list[float]]:
    """Return float32 values as the shortest decimal numbers that stand for them, which need 9
    digits at most."""
    return [[float(str(value)) for value in row] for row in probabilities.numpy()]


def check_writable(path: str | Path) -> None:
    """Raise an error unless predictions can be written to `path`."""
    if str(path) == STANDARD_OUTPUT:
        return
    path = Path(path).expanduser()
    if (ending := path.suffix.lower()) not in WRITABLE:
        raise ValueError(
            f"{path}: unknown ending {ending!r}, expected one of {', '.join(WRITABLE)}, or - for standard output"
        )
    try:
        path = path.resolve()  # what a link names is replaced, and not the link
    except RuntimeError as error:
        raise ValueError(f"{path} is a link that leads nowhere: name a file to write to") from error
    if path.exists() and not path.is_file() and not path.is_dir():
        raise ValueError(
            f"{path} is no regular file: name one to write to, or - for standard output"
        )
    if path.is_dir():
        raise IsADirectoryError(f"{path} is a folder: name a file to write to")
    above = next(folder for folder in path.parents if folder.exists())
    check_writable_folder(above, f"{path} cannot be written")


@contextlib.contextmanager
def _open_table(path: str, columns: list[str]) -> Iterator[Callable[[list[Row]], None]]:
    """Yield a function that writes rows. The file is complete at the end, and absent after an
    exception."""
    if path == STANDARD_OUTPUT:
        write = _csv_writer(sys.stdout, columns)

        def write_and_flush(rows: list[Row]) -> None:  # so that the reader of a pipe need not wait
            write(rows)
            sys.stdout.flush()

        yield write_and_flush
        return
    # What a link names, and not the link. Another command may write to the same file meanwhile.
    with replacing(Path(path).resolve(), shared=True) as partial:
        if path.lower().endswith(".parquet"):
            import pyarrow  # type: ignore[import-untyped]
            from pyarrow.parquet import ParquetWriter  # type: ignore[import-untyped]

            kinds = {"row": pyarrow.int64(), "exit_layer": pyarrow.int64()}
            kinds |= {"label": pyarrow.string(), "reason": pyarrow.string()}
            schema = pyarrow.schema(
                [(name, kinds.get(name, pyarrow.float64())) for name in columns]
            )
            with ParquetWriter(partial, schema) as writer:
                yield (
                    lambda rows: (
                        writer.write_table(pyarrow.Table.from_pylist(rows, schema))
                        if rows
                        else None
                    )
                )
            return
        with partial.open("w", encoding="utf-8", newline="") as file:
            if path.lower().endswith(".csv"):
                yield _csv_writer(file, columns)
            else:
                yield lambda rows: file.writelines(
                    json.dumps(row, ensure_ascii=False) + "\n" for row in rows
                )


def _csv_writer(file: Any, columns: list[str]) -> Callable[[list[Row]], None]:
    writer = csv.DictWriter(file, columns, lineterminator="\n")
    writer.writeheader()
    return writer.writerows
