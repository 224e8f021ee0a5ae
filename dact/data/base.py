"""TextDataModule: what all datamodules of text have in common."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Collection, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
from lightning.pytorch import LightningDataModule
from lightning.pytorch.overrides.distributed import UnrepeatedDistributedSampler
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities.rank_zero import rank_zero_warn  # type: ignore[attr-defined]
from torch import Tensor
from torch.utils.data import DataLoader, Sampler

from dact.checks import check_count, check_range
from dact.data.batching import (
    Encoded,
    LengthGroupedSampler,
    SharedLengthGroupedSampler,
    collate,
    encode,
    length_that_keeps,
)
from dact.data.examples import Examples, stratified_split
from dact.data.labels import listed
from dact.data.teacher import teacher_probabilities
from dact.data.tokenizers import PreTrainedTokenizerBase, mostly_unknown, tokenizer_for
from dact.functional import UNLABELLED

INFERENCE_BATCH = 1024  # examples per batch of test and predict; early exit regroups within a batch
VALIDATION_BLOCK = 64  # neighbours of similar length in validation
SPLITS = {"fit": ("train", "val"), "validate": ("val",), "test": ("test",), "predict": ("predict",)}
EVALUATING = (TrainerFn.VALIDATING, TrainerFn.TESTING)
CUT_SHARE = 0.01  # a larger share of texts that are cut deserves a warning …
UNKNOWN_SHARE = (
    0.01  # … and of texts that are mostly unknown to the tokenizer; in prediction a single one does
)


class TextDataModule(LightningDataModule, ABC):
    """A datamodule that tokenizes text, makes batches of similar length, and pads each to its
    longest text.

    A subclass implements `examples`, and sets `class_names` there or before.

    Args:
        tokenizer: A tokenizer, which is copied and never changed, or where to load one from: a Hub
            id, a local folder or ``"package:NAME/PATH"``. If None, `suggest_tokenizer` must be
            called before `setup`.
        max_length: Number of tokens to which longer inputs are cut.
        batch_size: Number of examples per batch in training and validation, 1 or more. Batches of
            test and predict have 1,024 or more, which early exit divides by itself.
        num_workers: Number of processes that prepare batches; with 0 the training process does.
        seed: Seed for the order of training examples.
        calibration_fraction: Share of the validation examples, in [0, 1), that is set aside for
            `dact.calibrate`. None of their texts is in validation or training.
        teacher: Fine-tuned model to learn from: training batches carry its probabilities as
            ``teacher`` ``[batch, classes]``, for the `distillation` of `DACT`. It is a ``model/``
            folder of dact, or a sequence-classification model: a Hub id, a local folder, or
            ``"package:NAME/PATH"``.

    Attributes:
        splits: The `Examples` of each split that is set up.
        teacher_probabilities: The ``teacher`` of training batches, ``[training examples,
            classes]``: set before `train_dataloader` is called, or computed there by `teacher`.
    """

    class_names: list[str] | None = None
    needs_teacher = False

    def __init__(
        self,
        tokenizer: str | PreTrainedTokenizerBase | None,
        *,
        max_length: int = 128,
        batch_size: int = 32,
        num_workers: int = 0,
        seed: int = 0,
        calibration_fraction: float = 0.0,
        teacher: str | None = None,
    ) -> None:
        super().__init__()
        name = type(self).__name__
        check_count(f"{name}: max_length", max_length, least=3)
        check_count(f"{name}: batch_size", batch_size)
        check_range(f"{name}: calibration_fraction", calibration_fraction, "[0, 1)")
        self._given_tokenizer = tokenizer
        self._tokenizer: PreTrainedTokenizerBase | None = None
        self.max_length = max_length
        self.batch_size = batch_size
        self.num_workers = num_workers
        self.seed = seed
        self.calibration_fraction = calibration_fraction
        self.teacher = teacher and str(teacher)  # a Path is welcome
        self.teacher_probabilities: Tensor | None = None
        self.splits: dict[str, Examples] = {}
        self._encoded: dict[str, Encoded] = {}

    @abstractmethod
    def examples(self, split: str) -> Examples:
        """Return the examples of ``"train"``, ``"val"``, ``"test"`` or ``"predict"``."""

    def texts_of_training(self) -> Collection[bytes]:
        """Return the keys of training texts that may be in validation as well; they are never set
        aside."""
        return ()

    # ------------------------------------------------------------------ the tokenizer

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The tokenizer of this data, loaded or copied on first access.

        Raises:
            ValueError: If none was given.
        """
        if self._tokenizer is None:
            if self._given_tokenizer is None:
                raise ValueError(
                    f"{type(self).__name__}: there is no tokenizer: give the one of the encoder, a Hub id, a local "
                    "folder or 'package:NAME/PATH'"
                )
            tokenizer = tokenizer_for(self._given_tokenizer, self.max_length)
            if tokenizer.pad_token_id is None:
                raise ValueError(
                    f"{type(self).__name__}: the tokenizer has no padding token: set its pad_token"
                )
            self._tokenizer = tokenizer
        return self._tokenizer

    def suggest_tokenizer(self, tokenizer: str | PreTrainedTokenizerBase) -> None:
        """Use a tokenizer, such as that of the encoder, if none was given to the constructor."""
        if self._given_tokenizer is None:
            self._given_tokenizer = tokenizer

    # ------------------------------------------------------------------ setup

    def setup(self, stage: str) -> None:
        for split in SPLITS[stage]:
            if split not in self._encoded:
                for name, examples in self._parts(split).items():
                    self.splits[name] = examples
                    encoded, cut = encode(examples, self.tokenizer, self.max_length)
                    self._encoded[name] = (
                        _with_little_padding(encoded) if name in ("val", "calibration") else encoded
                    )
                    self._warn_of_cuts(name, cut)
                    self._warn_of_unknown(name, encoded)

    def _parts(self, split: str) -> dict[str, Examples]:
        """Return the examples of a split and, with those of validation, those that are set aside
        for calibration."""
        examples = self.examples(split)
        if split != "val" or not self.calibration_fraction:
            return {split: examples}
        assert examples.labels is not None
        kept, aside = stratified_split(
            examples.labels,
            self.calibration_fraction,
            self.seed,
            examples.text_keys(),
            self.texts_of_training(),
        )
        if not aside:
            raise ValueError(
                f"{type(self).__name__}: calibration_fraction={self.calibration_fraction:g} of {len(examples)} "
                "validation examples sets none aside, since no class has two distinct texts that training does not "
                "have: give more validation examples"
            )
        return {"val": examples.take(kept), "calibration": examples.take(aside)}

    def _warn_of_cuts(self, split: str, cut: Sequence[int]) -> None:
        examples = len(self._encoded[split])
        if len(cut) > CUT_SHARE * examples:
            needed = length_that_keeps(1 - CUT_SHARE, examples, cut)
            rank_zero_warn(
                f"{len(cut) / examples:.0%} of the {split} texts are longer than max_length={self.max_length} tokens "
                f"and are cut; max_length={needed} would keep {1 - CUT_SHARE:.0%} of them whole, if the encoder takes "
                "that many"
            )

    def _warn_of_unknown(self, split: str, encoded: Encoded) -> None:
        pairs = self.splits[split].pairs is not None
        lengths = np.diff(encoded.offsets)
        unknown = int(
            mostly_unknown(self.tokenizer, encoded.tokens["input_ids"], lengths, pairs=pairs).sum()
        )
        if unknown > (0 if split == "predict" else UNKNOWN_SHARE * len(encoded)):
            rank_zero_warn(
                f"{unknown:,} of {len(encoded):,} {split} texts consist mostly of tokens that the tokenizer does not "
                "know, so that their classes mean little: is it the tokenizer of the encoder, and made for such texts?"
            )

    def describe_classes(self) -> str:
        """Return a text with the number of training examples of each class, empty before `setup`
        has read them."""
        if "train" not in self.splits:
            return ""
        counts = Counter(self.splits["train"].labels or [])
        unlabelled = counts.pop(UNLABELLED, 0)
        names = self.class_names or [str(label) for label in sorted(counts)]
        text = listed([f"{name} {counts[label]:,}" for label, name in enumerate(names)])
        return f"{len(names)} classes: {text}" + (
            f"; {unlabelled:,} texts without a label" if unlabelled else ""
        )

    # ------------------------------------------------------------------ batches

    def _loader(self, split: str) -> DataLoader[Any]:
        if split not in self._encoded:
            raise RuntimeError(
                f"{type(self).__name__}: the {split} split is not set up; call setup() first"
            )
        items, tokenizer = self._encoded[split], self.tokenizer
        padding = {
            "input_ids": tokenizer.pad_token_id,
            "token_type_ids": tokenizer.pad_token_type_id,
        }
        training = split == "train"
        sampler: Sampler[int] | None = None
        trainer = self.trainer
        shares: Any = (
            None
            if trainer is None or trainer.world_size == 1
            else trainer.distributed_sampler_kwargs
        )
        if training and shares:
            sampler = SharedLengthGroupedSampler(
                items.lengths, self.batch_size, self.seed, **shares
            )
        elif training:
            sampler = LengthGroupedSampler(items.lengths, self.batch_size, self.seed)
        elif shares and trainer is not None and trainer.state.fn in EVALUATING:
            # Lightning's own sampler repeats some examples. In a fit it must: all processes take
            # equally many steps.
            sampler = UnrepeatedDistributedSampler(items, **shares, shuffle=False)
        return DataLoader(
            items,
            batch_size=max(self.batch_size, INFERENCE_BATCH)
            if split in ("test", "predict")
            else self.batch_size,
            sampler=sampler,
            # Not a method: processes that prepare batches get two numbers and the teacher, not the
            # whole datamodule.
            collate_fn=partial(
                collate, padding=padding, teacher=self.teacher_probabilities if training else None
            ),
            num_workers=self.num_workers,
            persistent_workers=self.num_workers > 0,
        )

    def train_dataloader(self) -> DataLoader[Any]:
        """Return batches in training order; the teacher runs when this is first called."""
        if (
            self.teacher is not None
            and self.teacher_probabilities is None
            and "train" in self.splits
        ):
            assert self.class_names is not None
            device = (
                torch.device("cpu") if self.trainer is None else self.trainer.strategy.root_device
            )
            self.teacher_probabilities = teacher_probabilities(
                self.teacher, self.splits["train"], self.class_names, self.max_length, device
            )
        return self._loader("train")

    def val_dataloader(self) -> DataLoader[Any]:
        return self._loader("val")

    def calibration_dataloader(self) -> DataLoader[Any] | None:
        """Return the examples that are used for no training and no choice, or None if none are set
        aside."""
        return self._loader("calibration") if self.calibration_fraction else None

    def test_dataloader(self) -> DataLoader[Any]:
        return self._loader("test")

    def predict_dataloader(self) -> DataLoader[Any]:
        return self._loader("predict")


def _with_little_padding(encoded: Encoded) -> Encoded:
    """Return the examples in a fixed order in which neighbours have similar lengths, whatever the
    batch size.

    Validation compares fits example by example, so all of them must see one order. The blocks are
    shuffled, so that the Trainer's `limit_val_batches` keeps texts of all lengths."""
    return encoded.take(list(LengthGroupedSampler(encoded.lengths, VALIDATION_BLOCK, seed=0)))
