"""Tables as files, for tests of what reads them."""

import pandas as pd


def write_table(path, columns):
    """Write columns of equal length as csv, json lines or parquet, by the ending of the path."""
    table = pd.DataFrame(columns)
    if path.suffix == ".csv":
        table.to_csv(path, index=False)
    elif path.suffix == ".jsonl":
        table.to_json(path, orient="records", lines=True, force_ascii=False)
    else:
        table.to_parquet(path)
