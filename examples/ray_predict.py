"""Classify a folder of parquet files on all processors and machines of a Ray cluster.

    pip install "dact[ray]"
    python examples/ray_predict.py --model lightning_logs/mine/final/model \\
        --input texts/ --output answers/ --workers 2

Each worker holds the model once and classifies block after block; memory does not grow with the
data. Ray replaces a worker that dies and repeats its block. The output is a folder of parquet files
with all columns of the input and `label`, `score`, `exit_layer`, `reason` (why there is no answer)
and `labels` (of a model with several labels). The order of rows is not kept: give them an id.

By default, the script uses this machine alone. On a cluster, run it on the head node or set
RAY_ADDRESS; the model is sent to the workers, so that only the data must be where all of them can
read it."""

from __future__ import annotations

import argparse
from typing import Any

import pyarrow as pa
import ray

from dact import TextClassifier

COLUMNS = {
    "label": pa.string(),
    "score": pa.float64(),
    "exit_layer": pa.int64(),
    "reason": pa.string(),
    "labels": pa.list_(pa.string()),
}


class Classify:
    """A worker that adds the predictions of a classifier to each block of rows."""

    def __init__(self, classifier: TextClassifier, column: str, device: str) -> None:
        self.classifier, self.column = classifier, column
        self.classifier.model.to(device)

    def __call__(self, block: pa.Table) -> pa.Table:
        found = self.classifier(block[self.column].to_pylist())
        for name, kind in COLUMNS.items():
            values = [getattr(prediction, name) for prediction in found]
            names = [[*one] if isinstance(one, dict) else one for one in values]
            block = block.append_column(name, pa.array(names, kind))
        return block


def classify(
    texts: Any, classifier: TextClassifier, *, column: str, workers: int, gpus: float = 0
) -> Any:
    """Return `texts` with the columns of `COLUMNS`; nothing runs until the result is used.

    Args:
        texts: A `ray.data.Dataset`.
        classifier: Classifier on the CPU, which is sent to each worker.
        column: Name of the column with the text.
        workers: Number of workers.
        gpus: Number of GPUs per worker; 0 for the CPU.
    """
    return texts.map_batches(
        Classify,
        fn_constructor_args=(classifier, column, "cuda" if gpus else "cpu"),
        batch_format="pyarrow",
        batch_size=classifier.batch_size,
        compute=ray.data.ActorPoolStrategy(size=workers),
        num_gpus=gpus,
        num_cpus=1,
    )


def main() -> None:
    """Run the command line above."""
    parser = argparse.ArgumentParser(description="Classify parquet files with Ray Data")
    parser.add_argument("--model", required=True, help="model/ folder or Hub id")
    parser.add_argument(
        "--input", required=True, help="parquet file or folder, or an address such as s3://…"
    )
    parser.add_argument("--output", required=True, help="folder to write to")
    parser.add_argument("--column", default="text", help="column with the text")
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--gpus", type=float, default=0, help="GPUs per worker")
    options = parser.parse_args()
    ray.init(ignore_reinit_error=True)
    classifier = TextClassifier.from_pretrained(options.model)
    texts = ray.data.read_parquet(options.input)
    answers = classify(
        texts, classifier, column=options.column, workers=options.workers, gpus=options.gpus
    )
    answers.write_parquet(options.output)


if __name__ == "__main__":
    main()
