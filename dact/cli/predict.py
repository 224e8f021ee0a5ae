"""``dact predict``: rows are read, classified and written a batch at a time."""

from __future__ import annotations

import csv
import io
import json
import sys
from collections.abc import Iterator
from contextlib import ExitStack
from itertools import islice
from pathlib import Path
from typing import Any, BinaryIO

from dact.cli.errors import UsageError
from dact.data.files import read_rows, text_fault
from dact.files import replacing
from dact.text_classifier import TextClassifier

Row = dict[str, Any]


def check_output(output: str, file: str | None) -> None:
    """Raise an error unless there are texts, and predictions can be written beside them."""
    path = Path(output).expanduser()
    if file is None:
        raise UsageError("dact predict needs --data.predict_file FILE, or - for standard input")
    if output != "-" and path.suffix not in (".csv", ".jsonl", ".parquet"):
        raise UsageError(f"--output {output} must end in .csv, .jsonl or .parquet, or be -")
    if path.is_file() and Path(file).is_file() and path.samefile(file):
        raise UsageError(f"--output {output} is the file with the texts: name another")


def write_predictions(
    classifier: TextClassifier, file: str, texts: list[str], kept: list[str] | None, output: str
) -> None:
    """Classify the rows of a file, or of standard input, and write one row for each.

    Args:
        classifier: Classifier.
        file: File with the texts; see `dact.data.files.read_rows`.
        texts: Names of the columns of the text, or of the pair of texts.
        kept: Columns to copy; by default those of the texts, and ``id`` if there is one.
        output: File to write, csv, json lines or parquet by ending; ``-`` writes csv to stdout.
    """
    if kept is None:
        kept = [*texts, *(["id"] if _has_column(file, "id") else [])]
    options = dict(zip(texts, ("text_column", "text_pair_column"), strict=False))
    columns = {**dict.fromkeys(kept, "keep_columns"), **options}
    rows, places = read_rows(file, columns), {name: n for n, name in enumerate(columns)}
    count = unusable = 0
    with ExitStack() as stack:
        sink: BinaryIO = sys.stdout.buffer
        if output != "-":
            partial = stack.enter_context(replacing(Path(output).expanduser().resolve()))
            sink = stack.enter_context(partial.open("wb"))
        table = stack.enter_context(Table(sink, Path(output).suffix))
        while window := list(islice(rows, classifier.batch_size)):
            found = [[row[places[name]] for name in texts] for row in window]
            copied = [{name: row[places[name]] for name in kept} for row in window]
            answered = list(_answers(classifier, found, copied))
            table.write(answered)
            count += len(answered)
            unusable += sum(row["reason"] is not None for row in answered)
    place = "standard output" if output == "-" else output
    reasons = f", {unusable} of them without a label, with the reason" if unusable else ""
    print(f"{count} rows are in {place}{reasons}", file=sys.stderr)


def _has_column(file: str, name: str) -> bool:
    try:
        return file != "-" and Path(file).suffix != ".txt" and any(read_rows(file, {name: name}))
    except ValueError:
        return False


def _answers(classifier: TextClassifier, texts: list[Any], copied: list[Row]) -> Iterator[Row]:
    """Yield the answer to each text or pair, or the reason why there is none, beside its copied
    columns."""
    reasons = [text_fault(row) for row in texts]
    usable = [row for row, reason in zip(texts, reasons, strict=True) if reason is None]
    found = iter(classifier([row[0] if len(row) == 1 else tuple(row) for row in usable]))
    nothing = dict.fromkeys(classifier.class_names)
    for before, reason in zip(copied, reasons, strict=True):
        answer = next(found) if reason is None else None
        probabilities = nothing if answer is None else answer.probabilities
        row: Row = {
            "label": answer and answer.label,
            "score": answer and _short(answer.score),
            **{f"probability_{name}": v and _short(v) for name, v in probabilities.items()},
            "exit_layer": answer and answer.exit_layer,
            "reason": reason,
        }
        yield {f"input_{n}" if n in row else n: _clean(v) for n, v in before.items()} | row


def _short(value: float) -> float:
    """Return a number of float32 with the digits that it has."""
    return float(f"{value:.7g}")


def _clean(value: Any) -> Any:
    """Return a value without the lone surrogates that stand for bytes that are not UTF-8."""
    return value.encode(errors="replace").decode() if isinstance(value, str) else value


class Table:
    """A table whose rows are written a few at a time; all have the same columns.

    Args:
        file: File to write to.
        ending: ``".jsonl"``, ``".parquet"``, or anything else for csv.
    """

    def __init__(self, file: BinaryIO, ending: str) -> None:
        self.file, self.ending = file, ending
        self.writer: Any = None

    def __enter__(self) -> Table:
        return self

    def __exit__(self, *error: object) -> None:
        if self.ending == ".parquet" and self.writer is not None:
            self.writer.close()

    def write(self, rows: list[Row]) -> None:
        if self.ending == ".parquet":
            self._write_parquet(rows)
        elif self.ending == ".jsonl":
            lines = [json.dumps(row, ensure_ascii=False, default=str) + "\n" for row in rows]
            self.file.write("".join(lines).encode())
        else:
            text = io.StringIO()
            writer = csv.DictWriter(text, list(rows[0]), lineterminator="\n")
            if self.writer is None:
                writer.writeheader()
            writer.writerows(rows)
            self.writer = writer
            self.file.write(text.getvalue().encode())
        # The reader of a pipe need not wait.
        self.file.flush()

    def _write_parquet(self, rows: list[Row]) -> None:
        import pyarrow as pa  # type: ignore[import-untyped]
        from pyarrow.parquet import ParquetWriter  # type: ignore[import-untyped]

        if self.writer is None:
            # The columns of the answers have their types even if no row of these has an answer.
            kinds = {"score": pa.float64(), "exit_layer": pa.int64()}
            kinds |= {n: pa.float64() for n in rows[0] if n.startswith("probability_")}
            found = pa.Table.from_pylist(rows).schema
            types = [
                kinds.get(f.name, pa.string() if pa.types.is_null(f.type) else f.type)
                for f in found
            ]
            self.writer = ParquetWriter(self.file, pa.schema(zip(found.names, types, strict=True)))
        self.writer.write_table(pa.Table.from_pylist(rows, self.writer.schema))
