"""Predictions for a file or a stream: rows are read, classified and written a batch at a time."""

from __future__ import annotations

import contextlib
import csv
import json
import os
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningDataModule, LightningModule, Trainer
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset
from typing_extensions import override

from dact.data.rows import check_readable, read_rows, text_fault
from dact.files import replacing
from dact.model import DACT, DACTOutput

WRITABLE = (".csv", ".jsonl", ".parquet")
STANDARD_OUTPUT = "-"
BATCH = 1024  # texts that are read at a time; early exit regroups within them
Row = dict[str, Any]


class PredictionData(LightningDataModule):
    """The texts of a file, or of standard input, to classify.

    Args:
        predict_file: csv, tsv, json lines, parquet or txt (one text a line) by ending; ``-`` is standard input, with one
            text a line.
        tokenizer: A Hugging Face tokenizer.
        text_column: Name of the column with the text.
        text_pair_column: Name of the column with a second text, for text pairs.
        max_length: Number of tokens to which longer inputs are cut.
        batch_size: Number of texts that are read at a time.

    Attributes:
        unusable: Why a row cannot be classified, by its number from 0, of the rows that have been read and not yet
            been asked for.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If its ending is unknown, and while reading as `dact.data.rows.read_rows`.
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
        check_readable(predict_file)
        self.predict_file = predict_file
        self.tokenizer = tokenizer
        self.columns = [text_column] if text_pair_column is None else [text_column, text_pair_column]
        self.max_length = max_length
        self.batch_size = batch_size
        self.unusable: dict[int, str] = {}

    def batches(self) -> Iterator[dict[str, Tensor]]:
        """Yield batches of usable texts with their ``row`` numbers, and note in `unusable` why the others are not."""
        rows = enumerate(read_rows(self.predict_file, self.columns))
        while window := list(islice(rows, self.batch_size)):
            faults = {row: fault for row, texts in window if (fault := text_fault(texts)) is not None}
            self.unusable |= faults
            usable = [(row, texts) for row, texts in window if row not in faults]
            if not usable:
                continue
            texts = [list(column) for column in zip(*(texts for _, texts in usable), strict=True)]
            encoding = self.tokenizer(
                *texts, truncation=True, max_length=self.max_length, padding=True, return_tensors="pt"
            )
            yield {**encoding, "row": torch.tensor([row for row, _ in usable])}

    @override
    def predict_dataloader(self) -> DataLoader[Any]:
        return DataLoader(_Stream(self.batches), batch_size=None)


class _Stream(IterableDataset[Any]):
    def __init__(self, batches: Callable[[], Iterator[dict[str, Tensor]]]) -> None:
        self.batches = batches

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        return self.batches()


class PredictionWriter(Callback):
    """Write one row per input, in input order: label, the probability of each class, exit layer, and the reason of an
    input that could not be classified.

    A batch may carry the numbers of its rows, from 0, as ``row`` ``[batch]``; otherwise rows are counted. A number that
    no batch carries is a row without a label, whose reason the datamodule has in ``unusable``.

    Args:
        path: csv, json lines or parquet by ending; ``-`` writes csv to standard output.

    Attributes:
        labelled: Number of rows written with a label.
        unlabelled: Number of rows written without one.

    Raises:
        ValueError: If the ending is unknown.
        OSError: If nothing can be written there.
    """

    def __init__(self, path: str | Path) -> None:
        check_writable(path)
        self.path = str(path)
        self.labelled = self.unlabelled = 0
        self._open = contextlib.ExitStack()
        self._write: Callable[[list[Row]], None] | None = None

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if trainer.world_size > 1:
            raise ValueError(f"predictions go to one file: use one device, not {trainer.world_size}")

    @override
    def on_predict_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, *args: Any
    ) -> None:
        assert isinstance(outputs, DACTOutput)
        names, next_row = _class_names(pl_module), self.labelled + self.unlabelled
        count = len(outputs.exit_layer)
        numbered = isinstance(batch, Mapping) and "row" in batch
        numbers = batch["row"].tolist() if numbered else list(range(next_row, next_row + count))
        classified = zip(numbers, outputs.probabilities.float().tolist(), outputs.exit_layer.tolist(), strict=True)
        rows: list[Row] = []
        for number, vector, exit_layer in sorted(classified):
            if number < next_row + len(rows):
                raise ValueError(
                    f"row {number} comes after a later one: batches to predict must be in the order of rows"
                )
            rows += self._without_label(trainer, names, range(next_row + len(rows), number))
            self.labelled += 1
            rows.append(_row(names, names[vector.index(max(vector))], vector, exit_layer))
        self._write_rows(names, rows)

    @override
    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        # Not in on_predict_end: a file in which nothing can be classified has no batch, but still rows to write.
        if stage == "predict":
            next_row, names = self.labelled + self.unlabelled, _class_names(pl_module)
            last = max(_reasons(trainer), default=-1)
            self._write_rows(names, self._without_label(trainer, names, range(next_row, last + 1)))
            self._open.close()

    @override
    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        self._open.__exit__(type(exception), exception, exception.__traceback__)

    def _without_label(self, trainer: Trainer, names: Sequence[str], numbers: range) -> list[Row]:
        reasons = _reasons(trainer)
        self.unlabelled += len(numbers)
        nothing = [None] * len(names)
        return [_row(names, None, nothing, None, reasons.pop(number, "not in the data")) for number in numbers]

    def _write_rows(self, names: Sequence[str], rows: list[Row]) -> None:
        if self._write is None:
            self._write = self._open.enter_context(_open_table(self.path, names))
        self._write(rows)


def check_writable(path: str | Path) -> None:
    """Raise an error unless predictions can be written to `path`.

    Raises:
        ValueError: If the ending is unknown.
        OSError: If it is a folder, or lies in a folder that cannot be written to.
    """
    if str(path) == STANDARD_OUTPUT:
        return
    path = Path(path)
    if (ending := path.suffix.lower()) not in WRITABLE:
        raise ValueError(
            f"{path}: unknown ending {ending!r}, expected one of {', '.join(WRITABLE)}, or - for standard output"
        )
    if path.is_dir():
        raise IsADirectoryError(f"{path} is a folder: name a file to write to")
    above = next(folder for folder in path.absolute().parents if folder.exists())
    if not above.is_dir() or not os.access(above, os.W_OK):
        raise PermissionError(f"{path} cannot be written: {above} is no folder that this user may write to")


def _reasons(trainer: Trainer) -> dict[int, str]:
    """Return why rows cannot be classified, from `PredictionData` or from a datamodule that holds all its examples."""
    data = trainer.datamodule  # type: ignore[attr-defined]
    if hasattr(data, "unusable"):
        unusable: dict[int, str] = data.unusable
        return unusable
    examples = getattr(data, "splits", {}).get("predict")
    return {row: reason for row, reason in enumerate(getattr(examples, "reasons", None) or []) if reason is not None}


def _class_names(model: LightningModule) -> list[str]:
    assert isinstance(model, DACT)
    return model.class_names or [str(label) for label in range(model.output_dimension)]


def _row(
    names: Sequence[str], label: str | None, vector: Sequence[Any], exit_layer: int | None, reason: str | None = None
) -> Row:
    probabilities = {f"probability_{name}": value for name, value in zip(names, vector, strict=True)}
    return {"label": label, **probabilities, "exit_layer": exit_layer, "reason": reason}


@contextlib.contextmanager
def _open_table(path: str, names: Sequence[str]) -> Iterator[Callable[[list[Row]], None]]:
    """Yield a function that writes rows; the file is whole at the end, or not there if an exception leaves the block."""
    columns = list(_row(names, None, [None] * len(names), None))
    if path == STANDARD_OUTPUT:
        write = _csv_writer(sys.stdout, columns)

        def write_and_flush(rows: list[Row]) -> None:  # for a reader that waits
            write(rows)
            sys.stdout.flush()

        yield write_and_flush
        return
    with replacing(Path(path)) as partial:
        if path.lower().endswith(".parquet"):
            import pyarrow  # type: ignore[import-untyped]
            from pyarrow.parquet import ParquetWriter  # type: ignore[import-untyped]

            kinds = {"label": pyarrow.string(), "exit_layer": pyarrow.int64(), "reason": pyarrow.string()}
            schema = pyarrow.schema([(name, kinds.get(name, pyarrow.float64())) for name in columns])
            with ParquetWriter(partial, schema) as writer:
                yield lambda rows: writer.write_table(pyarrow.Table.from_pylist(rows, schema)) if rows else None
            return
        with partial.open("w", encoding="utf-8", newline="") as file:
            if path.lower().endswith(".csv"):
                yield _csv_writer(file, columns)
            else:
                yield lambda rows: file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def _csv_writer(file: Any, columns: list[str]) -> Callable[[list[Row]], None]:
    writer = csv.DictWriter(file, columns, lineterminator="\n")
    writer.writeheader()
    return writer.writerows
