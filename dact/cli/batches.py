"""The shape of batches, checked before a model sees them, for datamodules of any origin."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor
from typing_extensions import override

from dact.functional import UNLABELLED

EXPECTED = "a dict with input_ids [batch, length], attention_mask of the same shape and labels [batch]"


def check_batch(batch: Any, classes: int, *, labelled: bool, check_range: bool = True) -> None:
    """Raise an error unless a batch is one that `dact.DACT` can read.

    Args:
        batch: Batch from a dataloader.
        classes: Number of classes.
        labelled: Whether labels are needed.
        check_range: Whether to look at the values of the labels, which waits for a GPU.

    Raises:
        TypeError: If it is not a mapping of tensors.
        KeyError: If labels are needed and missing.
        ValueError: If the shapes differ, or a label is not a class.
    """
    if not isinstance(batch, Mapping):
        size = f" of {len(batch)}" if isinstance(batch, (tuple, list)) else ""
        raise TypeError(f"a batch must be {EXPECTED}, got a {type(batch).__name__}{size}")
    shapes = {name: list(value.shape) for name, value in batch.items() if isinstance(value, Tensor)}
    ids, mask, labels = (shapes.get(name) for name in ("input_ids", "attention_mask", "labels"))
    if labelled and labels is None:
        raise KeyError(f"a batch must be {EXPECTED}, got the keys {', '.join(map(str, batch))}")
    first = next(iter(shapes.values()), None)
    if ids is not None and (len(ids) != 2 or (mask is not None and mask[:2] != ids)):
        raise ValueError(f"a batch must be {EXPECTED}, got input_ids {ids} and attention_mask {mask}")
    if labels is None or not labelled:
        return
    rows = (ids or first or [0])[0]
    if len(labels) != 1 or labels[0] != rows or batch["labels"].is_floating_point():
        raise ValueError(
            f"labels must be one integer per example, [{rows}], got {batch['labels'].dtype} {labels}: several labels "
            "per example and numbers as targets are not supported"
        )
    values = batch["labels"]
    outside = values[((values < 0) & (values != UNLABELLED)) | (values >= classes)] if check_range else values[:0]
    if len(outside):
        raise ValueError(
            f"labels must be in 0 … {classes - 1}, got {outside[0].item()}: number the classes from 0, or set "
            "output_dimension to their number"
        )


class CheckBatches(Callback):
    """Check every batch on a CPU, and the first of each epoch on a GPU."""

    def _check(self, model: LightningModule, batch: Any, index: int, labelled: bool) -> None:
        check_batch(
            batch,
            int(model.output_dimension),  # type: ignore[arg-type]
            labelled=labelled,
            check_range=index == 0 or model.device.type == "cpu",
        )

    @override
    def on_validation_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        self._check(pl_module, batch, batch_idx, labelled=True)

    on_train_batch_start = on_test_batch_start = on_validation_batch_start

    @override
    def on_predict_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int, *args: Any
    ) -> None:
        self._check(pl_module, batch, batch_idx, labelled=False)
