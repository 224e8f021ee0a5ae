"""Tables in files: csv, tsv, json lines and parquet, by ending."""

from __future__ import annotations

import contextlib
import csv
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import datasets

from dact.files import replacing

READABLE = (".csv", ".tsv", ".jsonl", ".json", ".parquet")
WRITABLE = (".csv", ".jsonl", ".parquet")
REPLACEMENT = "\N{REPLACEMENT CHARACTER}"  # stands where bytes were not UTF-8


def check_ending(path: str | Path, endings: tuple[str, ...]) -> str:
    """The ending of `path`.

    Raises:
        ValueError: If it is none of `endings`.
    """
    ending = Path(path).suffix.lower()
    if ending not in endings:
        raise ValueError(f"{path}: unknown ending {ending!r}, expected one of {', '.join(endings)}")
    return ending


def read_table(path: str | Path) -> tuple[dict[str, list[Any]], bool]:
    """All columns of a file. In csv and tsv every value is a string; nothing is taken for a missing value.

    Returns:
        The columns, and whether the file is UTF-8; where it is not, the replacement character marks the places.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If the ending is unknown, or the file is empty or cannot be read as what its ending says.
    """
    ending = check_ending(path, READABLE)
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"there is no file {path}")
    with _quiet(), tempfile.TemporaryDirectory() as folder:
        try:
            valid = ending == ".parquet" or _is_utf8(path)
            source = path if valid else _replace_invalid(path, Path(folder))
            table = _read(source, ending, folder)
        except Exception as error:  # pandas, pyarrow and datasets raise many kinds
            cause = error.__cause__ or error
            if _is_without_rows(path, ending, cause):  # of which each library has something else to say
                raise ValueError(f"{path} has no rows") from None
            raise ValueError(f"{path} cannot be read as {ending[1:]}: {cause}") from error
        if len(table) == 0:
            raise ValueError(f"{path} has no rows")
        return {name: list(table[name]) for name in table.column_names}, valid


def _is_without_rows(path: Path, ending: str, cause: BaseException) -> bool:
    """Whether a file could not be read because there is nothing in it but a header."""
    if ending == ".parquet":
        return "BatchSize must be greater than 0" in str(cause)
    lines = sum(1 for line in path.read_bytes().splitlines() if line.strip())
    return lines == (1 if ending in (".csv", ".tsv") else 0)


def _read(source: Path, ending: str, folder: str) -> datasets.Dataset:
    arguments: dict[str, Any] = {"cache_dir": folder, "keep_in_memory": True}
    if ending == ".parquet":
        return datasets.Dataset.from_parquet(str(source), **arguments)
    if ending in (".jsonl", ".json"):
        return datasets.Dataset.from_json(str(source), **arguments)
    separator = "\t" if ending == ".tsv" else ","
    # A quotation mark in a tsv file is an ordinary character: one alone must not swallow the rows after it.
    quoting: Any = csv.QUOTE_NONE if ending == ".tsv" else csv.QUOTE_MINIMAL
    with source.open(encoding="utf-8-sig", newline="") as file:
        header = next(csv.reader(file, delimiter=separator, quoting=quoting), [])
    if not header:
        raise ValueError("the file is empty")
    features = datasets.Features({name: datasets.Value("string") for name in header})
    return datasets.Dataset.from_csv(
        str(source),
        features=features,
        sep=separator,
        quoting=quoting,
        encoding="utf-8-sig",
        na_filter=False,
        skip_blank_lines=False,
        **arguments,
    )


def write_table(path: str | Path, columns: dict[str, list[Any]]) -> None:
    """Write columns of equal length as csv, json lines or parquet, whole or not at all.

    Raises:
        ValueError: If the ending is unknown.
    """
    ending = check_ending(path, WRITABLE)
    with _quiet(), replacing(Path(path)) as unfinished:
        table = datasets.Dataset.from_dict(columns)
        if ending == ".csv":
            table.to_csv(str(unfinished), index=False)
        elif ending == ".parquet":
            table.to_parquet(str(unfinished))
        else:
            table.to_json(str(unfinished), lines=True, force_ascii=False)


def _is_utf8(path: Path) -> bool:
    with path.open(encoding="utf-8") as file:
        try:
            while file.read(1 << 20):
                pass
        except UnicodeDecodeError:
            return False
    return True


def _replace_invalid(path: Path, folder: Path) -> Path:
    """A copy of a text file in which the replacement character stands for what is not UTF-8."""
    copy = folder / path.name
    with path.open(encoding="utf-8", errors="replace", newline="") as source:
        with copy.open("w", encoding="utf-8", newline="") as target:
            while chunk := source.read(1 << 20):
                target.write(chunk)
    return copy


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keep the library's progress bars and messages off the console."""
    bars, level = datasets.is_progress_bar_enabled(), datasets.logging.get_verbosity()
    datasets.disable_progress_bars()
    datasets.logging.set_verbosity(datasets.logging.CRITICAL)
    try:
        yield
    finally:
        datasets.logging.set_verbosity(level)
        if bars:
            datasets.enable_progress_bars()
