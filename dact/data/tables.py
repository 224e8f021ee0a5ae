"""Tables: csv, tsv, json lines, parquet and txt files by ending, standard input, and splits of `datasets`."""

from __future__ import annotations

import contextlib
import csv
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import datasets

from dact.data.rows import READABLE, STANDARD_INPUT
from dact.files import replacing

WRITABLE = (".csv", ".jsonl", ".parquet")
DATASET = "dataset:"


def check_ending(path: str | Path, endings: tuple[str, ...]) -> str:
    """Return the ending of `path`.

    Raises:
        ValueError: If it is none of `endings`.
    """
    ending = Path(path).suffix.lower()
    if ending not in endings:
        raise ValueError(f"{path}: unknown ending {ending!r}, expected one of {', '.join(endings)}")
    return ending


def check_exists(path: str | Path, remedy: str = "") -> None:
    """Raise a FileNotFoundError with the `remedy` if there is no such file."""
    virtual = str(path) == STANDARD_INPUT or str(path).startswith(DATASET)
    if not virtual and not Path(path).is_file():
        raise FileNotFoundError(f"there is no file {path}" + (f": {remedy}" if remedy else ""))


def read_table(path: str | Path, text_column: str = "text") -> tuple[dict[str, list[Any]], bool]:
    """Read all columns. In csv and tsv every value is a string, and no string stands for a missing value.

    Args:
        path: A file; ``"-"`` for standard input, one text a line; or ``"dataset:NAME#SPLIT"``, a split of the data set
            that `datasets.load_dataset` finds under a name on the Hub or in a folder. Its class labels become names.
        text_column: Name of the column of txt files and standard input.

    Returns:
        The columns, and whether the file is UTF-8; if not, the replacement character marks the places.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If the ending is unknown, or the file is empty or cannot be read as what its ending says.
    """
    if str(path).startswith(DATASET):
        return _read_dataset(str(path)), True
    if str(path) == STANDARD_INPUT or check_ending(path, READABLE) == ".txt":
        lines = list(read_lines(path))
        if not lines:
            raise ValueError(f"{'standard input' if str(path) == STANDARD_INPUT else path} has no rows")
        return {text_column: [text for text, _ in lines]}, all(valid for _, valid in lines)
    check_exists(path)
    return _read_file(Path(path))


def read_lines(path: str | Path) -> Iterator[tuple[str, bool]]:
    """Yield each line of a txt file, or of standard input for ``"-"``, and whether it is UTF-8. Only one is in memory.

    Raises:
        FileNotFoundError: If there is no such file.
    """
    check_exists(path)
    with contextlib.ExitStack() as opened:
        lines = sys.stdin.buffer if str(path) == STANDARD_INPUT else opened.enter_context(Path(path).open("rb"))
        for number, line in enumerate(lines):
            line = line.removesuffix(b"\n").removesuffix(b"\r")
            try:
                yield line.decode("utf-8-sig" if number == 0 else "utf-8"), True
            except UnicodeDecodeError:
                yield line.decode("utf-8", errors="replace"), False


def _read_dataset(address: str) -> dict[str, list[Any]]:
    """Return the columns of ``dataset:NAME#SPLIT``."""
    name, _, split = address.removeprefix(DATASET).partition("#")
    if not name or not split:
        raise ValueError(f"{address!r}: expected 'dataset:NAME#SPLIT', such as 'dataset:stanfordnlp/imdb#train'")
    with _quiet():
        try:
            table = datasets.load_dataset(name, split=split)
        except Exception as error:  # datasets, huggingface_hub and pyarrow raise many kinds
            reason = " ".join(str(error).split())[:200]
            raise ValueError(f"{address!r} cannot be loaded by datasets.load_dataset: {reason}") from error
        columns = {column: list(table[column]) for column in table.column_names}
    if len(table) == 0:
        raise ValueError(f"{address} has no rows")
    for column, feature in table.features.items():
        if isinstance(feature, datasets.ClassLabel):  # -1 stands for a label that is kept secret
            columns[column] = [None if label in (None, -1) else feature.int2str(label) for label in columns[column]]
    return columns


def _read_file(path: Path) -> tuple[dict[str, list[Any]], bool]:
    ending = path.suffix.lower()
    with _quiet(), tempfile.TemporaryDirectory() as folder:
        try:
            valid = ending == ".parquet" or _is_utf8(path)
            source = path if valid else _replace_invalid(path, Path(folder))
            table = _read(source, ending, folder)
        except Exception as error:  # pandas, pyarrow and datasets raise many kinds
            cause = error.__cause__ or error
            if _is_without_rows(path, ending, cause):  # each library has another message for such a file
                raise ValueError(f"{path} has no rows") from None
            raise ValueError(f"{path} cannot be read as {ending[1:]}: {cause}") from error
        if len(table) == 0:
            raise ValueError(f"{path} has no rows")
        return {name: list(table[name]) for name in table.column_names}, valid


def _is_without_rows(path: Path, ending: str, cause: BaseException) -> bool:
    """Return whether a file cannot be read because there is nothing in it but a header."""
    if ending == ".parquet":
        return "BatchSize must be greater than 0" in str(cause)
    lines = sum(1 for line in path.read_bytes().splitlines() if line.strip())
    return lines == (1 if ending in (".csv", ".tsv") else 0)


def _read(source: Path, ending: str, folder: str) -> datasets.Dataset:
    arguments: dict[str, Any] = {"cache_dir": folder}  # a memory-mapped file: Arrow's own memory is never given back
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
    """Write columns of equal length as csv, json lines or parquet; the file is complete or left as it was.

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
    """Return a copy of a text file that has the replacement character instead of what is not UTF-8."""
    copy = folder / path.name
    with path.open(encoding="utf-8", errors="replace", newline="") as source:
        with copy.open("w", encoding="utf-8", newline="") as target:
            while chunk := source.read(1 << 20):
                target.write(chunk)
    return copy


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keep the library's progress bars and messages off the console during the block."""
    bars, level = datasets.is_progress_bar_enabled(), datasets.logging.get_verbosity()
    datasets.disable_progress_bars()
    datasets.logging.set_verbosity(datasets.logging.CRITICAL)
    try:
        yield
    finally:
        datasets.logging.set_verbosity(level)
        if bars:
            datasets.enable_progress_bars()
