"""Tables as columns: files, standard input, and splits of `datasets`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from dact.data.rows import check_columns, read_rows

DATASET = "dataset:"


def read_columns(path: str, columns: Mapping[str, str]) -> dict[str, list[Any]]:
    """Return some columns of a table by name.

    Args:
        path: A file or standard input, as for `read_rows`; or ``"dataset:NAME#SPLIT"``, a split of
            the data set that `datasets.load_dataset` finds under a name on the Hub or in a folder.
            Its class labels become names.
        columns: See `read_rows`.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: As `read_rows`, and if there is no such data set.
    """
    if path.startswith(DATASET):
        return _read_dataset(path, columns)
    found: dict[str, list[Any]] = {name: [] for name in columns}
    for row in read_rows(path, columns):
        for values, value in zip(found.values(), row, strict=True):
            values.append(value)
    return found


def _read_dataset(address: str, columns: Mapping[str, str]) -> dict[str, list[Any]]:
    """Return columns of ``dataset:NAME#SPLIT``."""
    name, _, split = address.removeprefix(DATASET).rpartition("#")
    if not name or not split:
        raise ValueError(
            f"{address!r}: expected 'dataset:NAME#SPLIT', such as 'dataset:stanfordnlp/imdb#train'"
        )
    import datasets

    bars, level = datasets.is_progress_bar_enabled(), datasets.logging.get_verbosity()
    datasets.disable_progress_bars()
    datasets.logging.set_verbosity(datasets.logging.CRITICAL)
    try:
        table = datasets.load_dataset(name, split=split)
    except Exception as error:  # datasets, huggingface_hub and pyarrow raise many kinds
        reason = " ".join(str(error).split())[:200]
        raise ValueError(
            f"{address!r} cannot be loaded by datasets.load_dataset: {reason}"
        ) from error
    finally:  # as the caller had them
        datasets.logging.set_verbosity(level)
        if bars:
            datasets.enable_progress_bars()
    check_columns(address, columns, table.column_names)
    if len(table) == 0:
        raise ValueError(f"{address} has no rows")
    found = {name: list(table[name]) for name in columns}
    for name in columns:
        feature = table.features[name]
        if isinstance(feature, datasets.ClassLabel):  # -1 stands for a label that is kept secret
            found[name] = [
                None if label in (None, -1) else feature.int2str(label) for label in found[name]
            ]
    return found
