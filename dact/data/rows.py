"""Rows of a file or of standard input, one after another: the memory needed does not grow with the
input."""

from __future__ import annotations

import codecs
import csv
import io
import json
import sys
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

READABLE = (".csv", ".tsv", ".jsonl", ".json", ".parquet", ".txt")
STANDARD_INPUT = "-"
CHUNK = 4096  # rows that a reader holds at a time


def check_readable(path: str, remedy: str = "") -> None:
    """Raise an error unless `path` is ``-`` or a file of a known kind.

    Args:
        path: The path.
        remedy: What to do if there is no such file, for the message.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If its ending is unknown.
    """
    if path == STANDARD_INPUT:
        return
    if (ending := Path(path).suffix.lower()) not in READABLE:
        raise ValueError(
            f"{path}: unknown ending {ending!r}, expected one of {', '.join(READABLE)}"
        )
    if not Path(path).is_file():
        raise FileNotFoundError(f"there is no file {path}" + (f": {remedy}" if remedy else ""))


def read_rows(path: str, columns: Mapping[str, str]) -> Iterator[list[Any]]:
    """Yield the values of `columns` of each row, in their order.

    In csv and tsv every value is a string, and no string stands for a missing value. A byte that is
    not UTF-8 becomes a lone surrogate.

    Args:
        path: csv, tsv, json lines, parquet or txt by ending, or ``-`` for standard input. txt and
            standard input have one text a line, and no columns.
        columns: The option that names each column, such as ``text_column``, by the name of the
            column.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If the ending is unknown, a column is missing, the file has no rows, or it
            cannot be read.
    """
    check_readable(path)
    ending = ".txt" if path == STANDARD_INPUT else Path(path).suffix.lower()
    readers = {
        ".txt": _lines,
        ".parquet": _parquet,
        ".jsonl": _json,
        ".json": _json,
        ".csv": _csv,
        ".tsv": _csv,
    }
    rows = 0
    if path != STANDARD_INPUT and ending != ".parquet":
        with Path(path).open("rb") as file:
            if file.read(2) in (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE):
                raise ValueError(f"{path} is in UTF-16: save it in UTF-8")
    try:
        for row in readers[ending](path, columns):
            rows += 1
            yield row
    except _Fault as error:
        raise ValueError(str(error)) from None
    except Exception as error:  # pandas and pyarrow raise many kinds
        hint = (
            ". Put texts that hold commas in quotation marks"
            if "Error tokenizing data" in str(error)
            else ""
        )
        raise ValueError(
            f"{path} cannot be read as {ending[1:]}: {str(error).strip().rstrip('.')}{hint}"
        ) from error
    if not rows:
        raise ValueError(f"{'standard input' if path == STANDARD_INPUT else path} has no rows")


def text_fault(texts: Sequence[Any]) -> str | None:
    """Return why the text or the two texts of a row cannot be used, or None."""
    for text in texts:
        if not isinstance(text, str):
            return "no text" if text is None else f"not a string: {str(text)[:40]!r}"
        if not text.strip():
            return "empty text"
        if not is_utf8(text):
            return "not valid UTF-8"
    return None


def printable(value: Any) -> Any:
    """Return a value of a row, a string with the replacement character instead of what is not
    UTF-8."""
    if not isinstance(value, str) or is_utf8(value):
        return value
    return value.encode("utf-16", errors="surrogatepass").decode("utf-16", errors="replace")


def is_utf8(text: str) -> bool:
    """Return whether a text can be encoded: a lone surrogate, as from broken escapes, cannot."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


class _Fault(ValueError):
    """An error whose message already names the file."""


def check_columns(path: str, columns: Mapping[str, str], present: Sequence[Any]) -> None:
    """Raise a ``ValueError`` that names the option to set if a column is not `present`; see
    `read_rows`."""
    for name, option in columns.items():
        if name not in present:
            names = [str(other) for other in present]
            meant = next(
                (repr(other) for other in names if other.strip().casefold() == name.casefold()),
                "NAME",
            )
            remedy = f"set {option} (on the command line --data.{option} {meant})"
            if len(names) == 1 and path.lower().endswith((".csv", ".tsv")):
                tsv = path.lower().endswith(".tsv")
                remedy = (
                    f"save it with {'tabs' if tsv else 'commas'} between its columns, or {remedy}"
                )
            if any(other.startswith('"') for other in names):
                remedy = (
                    "in tsv a quotation mark is an ordinary character: save it without, or as csv"
                )
            raise _Fault(
                f"{path} has no column {name!r}; it has {', '.join(map(repr, present))}: {remedy}"
            )


def _lines(path: str, columns: Mapping[str, str]) -> Iterator[list[Any]]:
    if len(columns) > 1:
        name = "standard input" if path == STANDARD_INPUT else path
        raise _Fault(
            f"{name} has one text a line, and no column {list(columns)[1]!r}: give csv or json lines instead"
        )
    source = sys.stdin.buffer if path == STANDARD_INPUT else Path(path).open("rb")  # noqa: SIM115
    file = io.TextIOWrapper(source, encoding="utf-8-sig", errors="surrogateescape", newline=None)
    try:
        for row, line in enumerate(file):
            text = line.removesuffix("\n")
            if not row and not columns.keys().isdisjoint(text.split(",")):
                warnings.warn(
                    f"one text a line, without a header, was expected: the first line, {text!r}, counts as a text",
                    stacklevel=2,
                )
            yield [text]
    finally:
        if path == STANDARD_INPUT:
            file.detach()  # standard input belongs to the caller
        else:
            file.close()


def _csv(path: str, columns: Mapping[str, str]) -> Iterator[list[Any]]:
    import pandas as pd  # type: ignore[import-untyped]

    tabs = path.lower().endswith(".tsv")
    form: dict[str, Any] = {
        "sep": "\t" if tabs else ",",
        # A quotation mark in a tsv file is an ordinary character: one alone must not swallow the
        # rows after it.
        "quoting": csv.QUOTE_NONE if tabs else csv.QUOTE_MINIMAL,
        "dtype": object,
        "na_filter": False,
        "skip_blank_lines": False,
        "encoding": "utf-8-sig",
        "encoding_errors": "surrogateescape",
    }
    try:
        header = (
            pd.read_csv(path, header=None, nrows=1, **form).iloc[0].tolist()
        )  # which pandas would number
        if twice := [name for name in columns if header.count(name) > 1]:
            raise _Fault(
                f"{path}: the column {twice[0]!r} occurs {header.count(twice[0])} times: rename the others"
            )
        frames = pd.read_csv(path, chunksize=CHUNK, **form)
    except pd.errors.EmptyDataError:
        return
    with frames:
        for frame in frames:
            check_columns(path, columns, list(frame.columns))
            if not isinstance(
                frame.index, pd.RangeIndex
            ):  # pandas took the first values of each row for its name
                header = len(frame.columns)
                raise _Fault(
                    f"{path}: row 1 has {header + frame.index.nlevels} values, and the header has {header} columns: "
                    f"put texts that hold {'tabs' if tabs else 'commas'} in quotation marks, or name every column"
                )
            yield from ([*row] for row in zip(*(frame[name] for name in columns), strict=True))


def _json(path: str, columns: Mapping[str, str]) -> Iterator[list[Any]]:
    with Path(path).open(encoding="utf-8-sig", errors="surrogateescape") as file:
        start = next((line.lstrip()[0] for line in file if line.strip()), "")
        file.seek(0)
        records = json.load(file) if start == "[" else _records(path, file)
        for number, record in enumerate(records, start=1):
            if not isinstance(record, dict):
                raise _Fault(f"{path}: row {number} is not an object with columns")
            if number == 1:
                check_columns(path, columns, list(record))
            yield [record.get(name) for name in columns]


def _records(path: str, lines: Iterable[str]) -> Iterator[Any]:
    for number, line in enumerate(lines, start=1):
        if line.strip():
            try:
                yield json.loads(line)
            except ValueError as error:
                raise _Fault(f"{path}: line {number} is no JSON: {error}") from error


def _parquet(path: str, columns: Mapping[str, str]) -> Iterator[list[Any]]:
    from pyarrow.parquet import ParquetFile  # type: ignore[import-untyped]

    with ParquetFile(path) as file:
        check_columns(path, columns, file.schema_arrow.names)
        for batch in file.iter_batches(batch_size=CHUNK, columns=list(columns)):
            yield from (
                [*row]
                for row in zip(*(batch.column(name).to_pylist() for name in columns), strict=True)
            )
