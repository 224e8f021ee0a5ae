"""``dact predict``: rows are read, classified and written a batch at a time."""

from __future__ import annotations

import sys
from contextlib import ExitStack, suppress
from itertools import islice
from pathlib import Path
from typing import Any

import pandas as pd  # type: ignore[import-untyped]
import pyarrow as pa  # type: ignore[import-untyped]
from pyarrow.parquet import ParquetWriter  # type: ignore[import-untyped]

from dact.cli.errors import UsageError
from dact.data.files import read_rows, text_fault
from dact.files import replacing
from dact.text_classifier import Prediction, TextClassifier

ENDINGS = (".csv", ".jsonl", ".parquet")
SEPARATOR = "|"  # between the labels of a text


def check_output(output: str, file: str | None) -> None:
    """Raise a `UsageError` without a file of texts, or if predictions cannot go to `output`."""
    path = Path(output).expanduser()
    if file is None:
        raise UsageError("dact predict needs --data.predict_file FILE, or - for standard input")
    if output != "-" and path.suffix not in ENDINGS:
        raise UsageError(f"--output {output} must end in {', '.join(ENDINGS)}, or be -")
    if path.is_file() and Path(file).is_file() and path.samefile(file):
        raise UsageError(f"--output {output} is the file with the texts: name another")


def write_predictions(
    classifier: TextClassifier,
    file: str,
    texts: list[str],
    kept: list[str] | None,
    output: str,
    delimiter: str | None = None,
) -> None:
    """Classify the texts in the columns `texts` of a file, and write one row for each of its rows,
    with the columns `kept`: by default the text columns, and ``id`` if there is one."""
    if kept is None:
        kept = [*texts, *(["id"] if _has_column(file, "id", delimiter) else [])]
    options = dict(zip(texts, ("text_column", "text_pair_column"), strict=False))
    columns = {**dict.fromkeys(kept, "keep_columns"), **options}
    rows, total, unusable = read_rows(file, columns, delimiter), 0, 0
    path = Path(output).expanduser()
    with ExitStack() as stack:
        sink: Any = sys.stdout
        if output != "-":
            partial = stack.enter_context(replacing(path.resolve()))
            is_binary = path.suffix == ".parquet"
            mode, encoding = ("wb", None) if is_binary else ("w", "utf-8")
            sink = stack.enter_context(partial.open(mode, encoding=encoding))
        write = _writer(stack, sink, path.suffix)
        while window := list(islice(rows, classifier.batch_size)):
            frame = pd.DataFrame(window, columns=list(columns), dtype=object)
            answers = _answers(classifier, frame[texts].values.tolist())
            copied = frame[kept].map(_printable)
            copied.columns = [f"input_{name}" if name in answers else name for name in kept]
            write(pd.concat([copied, answers], axis=1))
            total, unusable = total + len(frame), unusable + int(answers["reason"].count())
    place = "standard output" if output == "-" else output
    reasons = f", {unusable} of them without a label, with the reason" if unusable else ""
    print(f"{total} rows are in {place}{reasons}", file=sys.stderr)


def _has_column(file: str, name: str, delimiter: str | None) -> bool:
    if file == "-" or Path(file).suffix == ".txt":
        return False
    with suppress(ValueError):
        return any(read_rows(file, {name: name}, delimiter))
    return False


def _answers(classifier: TextClassifier, texts: list[list[Any]]) -> pd.DataFrame:
    """Return a row for each text or pair: its answer, or the reason why there is none."""
    reasons = [text_fault(row) for row in texts]
    usable = [number for number, reason in enumerate(reasons) if reason is None]
    found = classifier([texts[n][0] if len(texts[n]) == 1 else tuple(texts[n]) for n in usable])
    names = classifier.class_names
    probabilities = [f"probability_{name}" for name in names]
    columns = ["label", "score", *probabilities, "exit_layer"]
    values = [
        [_label(one), one.score, *map(one.probabilities.get, names), one.exit_layer]
        for one in found
    ]
    frame = pd.DataFrame(values, usable, columns).reindex(range(len(texts)))
    frame["reason"] = reasons
    numbers = dict.fromkeys(["score", *probabilities], "float32")
    return frame.astype({**numbers, "exit_layer": "Int64", "label": "string", "reason": "string"})


def _label(one: Prediction) -> str | None:
    """Return the label of an answer, or its labels joined by a separator."""
    return one.label if one.labels is None else SEPARATOR.join(one.labels)


def _printable(value: Any) -> Any:
    """Return a value without the lone surrogates that stand for bytes that are not UTF-8."""
    return value.encode(errors="replace").decode() if isinstance(value, str) else value


def _writer(stack: ExitStack, sink: Any, ending: str) -> Any:
    """Return a function that appends a frame to a file; `stack` closes the file."""
    written: list[Any] = []

    def write(frame: pd.DataFrame) -> None:
        is_first = not written
        if ending == ".parquet":
            table = pa.Table.from_pandas(frame, preserve_index=False)
            if is_first:
                written.append(stack.enter_context(ParquetWriter(sink, table.schema)))
            written[0].write_table(table.cast(written[0].schema))
        elif ending == ".jsonl":
            frame.to_json(sink, orient="records", lines=True, force_ascii=False)
        else:
            frame.to_csv(sink, index=False, header=is_first, lineterminator="\n")
            written.append(None)
        # The reader of a pipe gets each batch at once.
        sink.flush()

    return write
