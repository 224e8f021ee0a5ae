"""Rows of a file or of standard input, one after another: the memory needed does not grow with the input."""

from __future__ import annotations

import csv
import io
import json
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

READABLE = (".csv", ".tsv", ".jsonl", ".json", ".parquet", ".txt")
STANDARD_INPUT = "-"
REPLACEMENT = "\N{REPLACEMENT CHARACTER}"  # stands where bytes were not UTF-8
CHUNK = 4096  # rows that a reader holds at a time


def check_readable(path: str) -> None:
    """Raise an error unless `path` is ``-`` or a file of a known kind.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If its ending is unknown.
    """
    if path == STANDARD_INPUT:
        return
    if not Path(path).is_file():
        raise FileNotFoundError(f"there is no file {path}")
    if (ending := Path(path).suffix.lower()) not in READABLE:
        raise ValueError(f"{path}: unknown ending {ending!r}, expected one of {', '.join(READABLE)}")


def read_rows(path: str, columns: Sequence[str]) -> Iterator[list[Any]]:
    """Yield the values of `columns` of each row, in their order.

    Args:
        path: csv, tsv, json lines, parquet or txt by ending, or ``-`` for standard input. txt and standard input have
            one text a line, and no columns.
        columns: Names of the columns.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If the ending is unknown, a column is missing, the file has no rows, or it cannot be read.
    """
    check_readable(path)
    ending = ".txt" if path == STANDARD_INPUT else Path(path).suffix.lower()
    readers = {".txt": _lines, ".parquet": _parquet, ".jsonl": _json, ".json": _json, ".csv": _csv, ".tsv": _csv}
    rows = 0
    try:
        for row in readers[ending](path, columns):
            rows += 1
            yield row
    except _Fault as error:
        raise ValueError(str(error)) from None
    except Exception as error:  # pandas and pyarrow raise many kinds
        raise ValueError(f"{path} cannot be read as {ending[1:]}: {error}") from error
    if not rows:
        raise ValueError(f"{'standard input' if path == STANDARD_INPUT else path} has no rows")


def text_fault(texts: Sequence[Any], replaced: bool = False) -> str | None:
    """Return why the texts of a row cannot be used, or None.

    Args:
        texts: The text of the row, or both texts of a pair.
        replaced: Whether a replacement character stands for bytes that are not UTF-8.
    """
    for text in texts:
        if not isinstance(text, str):
            return "no text" if text is None else f"not a string: {str(text)[:40]!r}"
        if not text.strip():
            return "empty text"
        if replaced and REPLACEMENT in text:
            return "not valid UTF-8"
        try:
            text.encode()
        except UnicodeEncodeError:  # a byte that is not UTF-8 is read as a lone surrogate
            return "not valid UTF-8"
    return None


class _Fault(ValueError):
    """An error whose message already names the file."""


def _check_columns(path: str, columns: Sequence[str], present: Sequence[Any]) -> None:
    for name in columns:
        if name not in present:
            single = len(present) == 1 and path.lower().endswith((".csv", ".tsv"))
            hint = " (csv has commas between its columns, tsv tabs)" if single else ""
            option = "text_column" if name == columns[0] else "text_pair_column"
            raise _Fault(f"{path} has no column {name!r}; it has {', '.join(map(repr, present))}{hint}: set {option}")


def _lines(path: str, columns: Sequence[str]) -> Iterator[list[Any]]:
    if len(columns) > 1:
        raise _Fault(f"{path} has one text a line, and no column {columns[1]!r}: give text pairs as csv or json lines")
    source = sys.stdin.buffer if path == STANDARD_INPUT else Path(path).open("rb")  # noqa: SIM115
    with io.TextIOWrapper(source, encoding="utf-8-sig", errors="surrogateescape", newline=None) as file:
        for line in file:
            yield [line.removesuffix("\n")]


def _csv(path: str, columns: Sequence[str]) -> Iterator[list[Any]]:
    import pandas as pd  # type: ignore[import-untyped]

    tabs = path.lower().endswith(".tsv")
    try:
        frames = pd.read_csv(
            path,
            sep="\t" if tabs else ",",
            # A quotation mark in a tsv file is an ordinary character: one alone must not swallow the rows after it.
            quoting=csv.QUOTE_NONE if tabs else csv.QUOTE_MINIMAL,
            dtype=object,
            na_filter=False,
            skip_blank_lines=False,
            encoding="utf-8-sig",
            encoding_errors="surrogateescape",
            chunksize=CHUNK,
        )
    except pd.errors.EmptyDataError:
        return
    with frames:
        for frame in frames:
            _check_columns(path, columns, list(frame.columns))
            yield from ([*row] for row in zip(*(frame[name] for name in columns), strict=True))


def _json(path: str, columns: Sequence[str]) -> Iterator[list[Any]]:
    with Path(path).open(encoding="utf-8-sig", errors="surrogateescape") as file:
        start = file.read(1)
        file.seek(0)
        records = json.load(file) if start == "[" else (json.loads(line) for line in file if line.strip())
        for number, record in enumerate(records, start=1):
            if not isinstance(record, dict):
                raise _Fault(f"{path}: row {number} is not an object with columns")
            if number == 1:
                _check_columns(path, columns, list(record))
            yield [record.get(name) for name in columns]


def _parquet(path: str, columns: Sequence[str]) -> Iterator[list[Any]]:
    from pyarrow.parquet import ParquetFile  # type: ignore[import-untyped]

    with ParquetFile(path) as file:
        _check_columns(path, columns, file.schema_arrow.names)
        for batch in file.iter_batches(batch_size=CHUNK, columns=list(columns)):
            yield from ([*row] for row in zip(*(batch.column(name).to_pylist() for name in columns), strict=True))
