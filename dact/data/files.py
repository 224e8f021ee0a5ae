"""Rows of files, standard input and `datasets` splits, in bounded memory but for JSON lists."""

from __future__ import annotations

import csv
import difflib
import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import IO, Any

from lightning.pytorch.utilities.rank_zero import rank_zero_warn  # type: ignore[attr-defined]

STANDARD_INPUT = "-"
DATASET = "dataset:"
DELIMITERS = (",", ";", "\t")
# Rows decoded at a time.
CHUNK = 4096
# Most names in a message.
MOST_LISTED = 20


def read_rows(
    path: str, columns: Mapping[str, str], delimiter: str | None = None
) -> Iterator[list[Any]]:
    """Return the values of `columns` in each row; a byte that is not UTF-8 is a lone surrogate.

    Args:
        path: File, ``"-"`` or ``"dataset:NAME#SPLIT"``; see `TextClassificationData`.
        columns: Names of the columns, each with the option that sets it, such as ``text_column``.
        delimiter: Separator of a csv file; a comma, semicolon or tab by its header if left out.

    Raises:
        ValueError: If the ending is unknown, a column is missing, or a row cannot be read.
    """
    ending = Path(path).suffix.lower()
    if path.startswith(DATASET):
        return _dataset(path, columns)
    if path == STANDARD_INPUT or ending == ".txt":
        return _lines(path, columns)
    if ending in (".csv", ".tsv"):
        return _csv(path, columns, delimiter)
    if ending in (".json", ".jsonl"):
        return _json(path, columns)
    if ending == ".parquet":
        return _parquet(path, columns)
    known = ".csv, .tsv, .jsonl, .json, .parquet, .txt"
    raise ValueError(f"{path}: unknown ending {ending!r}, expected one of {known}")


def first_row(path: str) -> int:
    """Return the number of the first row of data as a spreadsheet shows it: a header is row 1."""
    return 2 if path.lower().endswith((".csv", ".tsv")) else 1


def listed(names: Sequence[Any]) -> str:
    """Return the names with commas, at most 20 of them."""
    rest = len(names) - MOST_LISTED
    more = f" and {rest} more" if rest > 0 else ""
    return ", ".join(map(str, names[:MOST_LISTED])) + more


def text_fault(texts: Sequence[Any]) -> str | None:
    """Return why the text or the two texts of a row cannot be used, or None."""
    for text in texts:
        if text is None or text != text:
            return "no text"
        if not isinstance(text, str):
            return f"not a text but {type(text).__name__}"
        if not text.strip():
            return "empty text"
        try:
            text.encode()
        except UnicodeEncodeError as error:
            # Bytes in another encoding are read as these; other surrogates are broken escapes.
            is_byte = "\udc80" <= text[error.start] <= "\udcff"
            return "not valid UTF-8" if is_byte else "half of a character"
    return None


def suggestion(word: str, known: Sequence[str]) -> str:
    """Return ``, perhaps 'NAME'`` for the name that resembles `word`, or an empty string."""
    folded = {name.strip().casefold(): name for name in known}
    close = difflib.get_close_matches(word.strip().casefold(), folded, 1)
    return f", perhaps {folded[close[0]]!r}" if close else ""


def _check_columns(path: str, columns: Mapping[str, str], present: Sequence[Any]) -> None:
    for name, option in columns.items():
        if name not in present:
            raise ValueError(
                f"{path} has no column {name!r}; it has {', '.join(map(repr, present))}: "
                f"set {option}{suggestion(name, present)}"
            )


def _open(path: str, newline: str = "\n") -> IO[str]:
    return Path(path).open(encoding="utf-8-sig", errors="surrogateescape", newline=newline)


def _lines(path: str, columns: Mapping[str, str]) -> Iterator[list[Any]]:
    if len(columns) > 1:
        raise ValueError(f"{path} has one text a line, and no columns {', '.join(columns)}")
    if path == STANDARD_INPUT:
        stdin: Any = sys.stdin
        stdin.reconfigure(encoding="utf-8-sig", errors="surrogateescape", newline="\n")
    with nullcontext(sys.stdin) if path == STANDARD_INPUT else _open(path) as lines:
        for line in lines:
            yield [line.rstrip("\r\n")]


def _csv(path: str, columns: Mapping[str, str], delimiter: str | None) -> Iterator[list[Any]]:
    tsv = path.lower().endswith(".tsv")
    csv.field_size_limit(2**31 - 1)
    with _open(path, newline="") as file:
        if delimiter is None:
            delimiter = "\t" if tsv else _guess_delimiter(file.readline(), columns)
            file.seek(0)
            if not tsv and delimiter != ",":
                rank_zero_warn(f"{path}: its columns seem to be separated by {delimiter!r}")
        # One quotation mark in a tsv must not swallow the rows after it.
        quoting: Any = csv.QUOTE_NONE if tsv else csv.QUOTE_MINIMAL
        reader = csv.reader(file, delimiter=delimiter, quoting=quoting, strict=True)
        header = next(reader, None)
        if header is None:
            return
        _check_columns(path, columns, header)
        places, number = [header.index(name) for name in columns], 2
        try:
            for row in reader:
                if len(row) > len(header):
                    raise csv.Error(f"{len(row)} values are too many for {len(header)} columns")
                row += [""] * (len(header) - len(row))
                yield [row[place] for place in places]
                number += 1
        except csv.Error as error:
            raise ValueError(
                f"{path}: row {number}: {error}: put texts with the separator in quotation marks"
            ) from None


def _guess_delimiter(header: str, columns: Mapping[str, str]) -> str:
    """Return the delimiter that gives the most of the expected columns, then the most columns."""

    def found(delimiter: str) -> tuple[int, int]:
        names = next(csv.reader([header], delimiter=delimiter), [])
        return sum(name in names for name in columns), len(names)

    return max(DELIMITERS, key=found)


def _json(path: str, columns: Mapping[str, str]) -> Iterator[list[Any]]:
    with _open(path) as file:
        is_list = next((line for line in file if line.strip()), "").lstrip().startswith("[")
        file.seek(0)
        records = json.load(file) if is_list else _records(path, file)
        for number, record in enumerate(records):
            if number == 0:
                _check_columns(path, columns, list(record))
            yield [record.get(name) for name in columns]


def _records(path: str, lines: IO[str]) -> Iterator[Any]:
    for number, line in enumerate(lines, start=1):
        if line.strip():
            try:
                yield json.loads(line)
            except ValueError as error:
                raise ValueError(f"{path}: line {number} is not valid JSON: {error}") from None


def _parquet(path: str, columns: Mapping[str, str]) -> Iterator[list[Any]]:
    from pyarrow.parquet import ParquetFile  # type: ignore[import-untyped]

    with ParquetFile(path) as file:
        _check_columns(path, columns, file.schema_arrow.names)
        for batch in file.iter_batches(batch_size=CHUNK, columns=list(columns)):
            values = [batch.column(name).to_pylist() for name in columns]
            yield from map(list, zip(*values, strict=True))


def _dataset(address: str, columns: Mapping[str, str]) -> Iterator[list[Any]]:
    import datasets

    name, _, split = address.removeprefix(DATASET).rpartition("#")
    if not name or not split:
        raise ValueError(
            f"{address!r}: expected 'dataset:NAME#SPLIT', such as 'dataset:imdb#train'"
        )
    table = datasets.load_dataset(name, split=split)
    _check_columns(address, columns, table.column_names)
    for batch in table.select_columns(list(columns)).iter(batch_size=CHUNK):
        for column in columns:
            feature = table.features[column]
            if isinstance(feature, datasets.ClassLabel):
                # -1 stands for a label that is withheld.
                names = [*feature.names, None]
                batch[column] = [None if n is None else names[n] for n in batch[column]]
        yield from map(list, zip(*(batch[column] for column in columns), strict=True))
