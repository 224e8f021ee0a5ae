"""The interface of a datamodule for models, commands and tuning, and the base class for text."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import Counter
from functools import cached_property, partial
from typing import Any

from lightning.pytorch import LightningDataModule
from lightning.pytorch.utilities.rank_zero import rank_zero_warn  # type: ignore[attr-defined]
from torch import Tensor
from torch.utils.data import DataLoader, Subset
from typing_extensions import override

from dact.checks import check_count, check_range
from dact.data.batching import LengthGroupedSampler, collate, encode
from dact.data.examples import Examples, classes_of, hash_split, stratified_split
from dact.data.files import listed
from dact.data.teacher import teacher_probabilities
from dact.data.tokenizers import PreTrainedTokenizerBase, padding_of, tokenizer_for
from dact.tasks import UNLABELLED, TaskName, task_of

# Examples per test batch; early exit regroups the examples within a batch.
TEST_BATCH = 1024
# Validation examples per block of similar length.
VALIDATION_BLOCK = 64
APART = 1_000_003  # added to the seed, so that this hash differs from the validation hash
# Warn if more than this share of the texts is cut.
CUT_SHARE = 0.01
SPLITS = {"fit": ("train", "val"), "validate": ("val",), "test": ("test",)}


class ClassificationDataModule(LightningDataModule):
    """The part of a datamodule that `DACT`, `dact.calibrate`, the commands and tuning use.

    Other datamodules may have the same attributes; a missing one has the default value given here.
    Batches are dicts with ``labels`` and the inputs of the encoder.

    Attributes:
        task: The task of the labels; see `DACT`.
        class_names: Names of the classes in their order.
        tokenizer: Tokenizer of the batches, which is stored with the model.
        max_length: Number of tokens to which inputs are cut.
        batch_size: Number of examples per training batch.
        teacher: Name of a fine-tuned model whose probabilities training batches carry as
            ``teacher`` ``[batch, classes]``.
        teacher_probabilities: Teacher probabilities of the training examples, ``[examples,
            classes]``, if tuning has set them. Batches then need ``row``, each example's number.
        calibration_fraction: Share of the validation examples that is set aside for
            `calibration_dataloader`, in [0, 1).
        confidence_fraction: Share of the training examples that is set apart for
            `confidence_dataloader`, in [0, 1).
        needs_teacher: Whether there are training texts that only a teacher can label.
    """

    task: TaskName = "multiclass"
    class_names: list[str] | None = None
    tokenizer: Any = None
    max_length: int | None = None
    batch_size: int | None = None
    teacher: str | None = None
    teacher_probabilities: Tensor | None = None
    calibration_fraction: float = 0.0
    confidence_fraction: float = 0.0
    needs_teacher: bool = False

    def calibration_dataloader(self) -> Any:
        """Return labelled batches that are used neither for training nor for a choice, or None."""
        return None

    def confidence_dataloader(self) -> Any:
        """Return labelled batches that train only the confidence of `DACT`, or None."""
        return None


class TextDataModule(ClassificationDataModule, ABC):
    """A datamodule that tokenizes text and makes batches of similar length.

    A subclass implements `examples`, and sets `class_names` there or before.

    Args:
        tokenizer: A tokenizer, which is copied, or where to load one from: a Hub id, a local folder
            or ``"package:NAME/PATH"``.
        max_length: Number of tokens to which longer inputs are cut, 3 or more.
        batch_size: Number of examples per batch in training and validation; 1,024 or more in test.
        num_workers: Number of processes that prepare batches; with 0 the training process does.
        seed: Seed for the order of training examples.
        calibration_fraction: Share of the validation examples, in [0, 1), that is set aside for
            `dact.calibrate`. None of their texts is in validation or training.
        confidence_fraction: Share of the labelled training texts, in [0, 1), that is set apart by
            a hash for the confidence of `DACT`. Nothing else is trained on them.
        teacher: Fine-tuned model for the `distillation` of `DACT`: a ``model/`` folder of dact, or
            a sequence-classification model, given like `tokenizer`.

    Attributes:
        splits: The `Examples` of each split that is set up.
        teacher_probabilities: Set before `train_dataloader` is called, or computed there.
    """

    def __init__(
        self,
        tokenizer: str | PreTrainedTokenizerBase | None,
        *,
        max_length: int = 128,
        batch_size: int = 32,
        num_workers: int = 0,
        seed: int = 0,
        calibration_fraction: float = 0.0,
        confidence_fraction: float = 0.05,
        teacher: str | None = None,
    ) -> None:
        super().__init__()
        check_count("max_length", max_length, least=3)
        check_count("batch_size", batch_size)
        check_range("calibration_fraction", calibration_fraction, "[0, 1)")
        check_range("confidence_fraction", confidence_fraction, "[0, 1)")
        self._given_tokenizer = tokenizer
        self.max_length: int = max_length
        self.batch_size: int = batch_size
        self.num_workers = num_workers
        self.seed = seed
        self.calibration_fraction = calibration_fraction
        self.confidence_fraction = confidence_fraction
        # may be a Path
        self.teacher = teacher and str(teacher)
        self.splits: dict[str, Examples] = {}
        self._encoded: dict[str, Any] = {}

    @abstractmethod
    def examples(self, split: str) -> Examples:
        """Return the examples of ``"train"``, ``"val"`` or ``"test"``."""

    def set_aside(self, validation: Examples) -> tuple[list[int], list[int]]:
        """Return the rows for validation and the rows for calibration."""
        keys = validation.text_keys()
        return stratified_split(validation.strata, self.calibration_fraction, self.seed, keys)

    @cached_property
    def tokenizer(self) -> PreTrainedTokenizerBase:  # type: ignore[override]
        """The tokenizer of this data, loaded or copied on first access."""
        if self._given_tokenizer is None:
            raise ValueError(f"{type(self).__name__}: give the tokenizer of the encoder")
        return tokenizer_for(self._given_tokenizer, self.max_length)

    @override
    def setup(self, stage: str) -> None:
        for split in SPLITS.get(stage, ()):
            if split not in self._encoded:
                for name, examples in self._parts(split).items():
                    self._encode(name, examples)

    def _parts(self, split: str) -> dict[str, Examples]:
        """Return the examples of a split by name. Training is divided into ``train`` and
        ``confidence``, validation into ``val`` and ``calibration``."""
        examples = self.examples(split)
        if split == "train" and self.confidence_fraction:
            return self._apart(examples)
        if split != "val" or not self.calibration_fraction:
            return {split: examples}
        kept, aside = self.set_aside(examples)
        if not aside:
            raise ValueError(f"{len(examples)} validation examples are too few to set some aside")
        return {"val": examples.take(kept), "calibration": examples.take(aside)}

    def _apart(self, train: Examples) -> dict[str, Examples]:
        """Set apart the labelled training examples that train only the confidence."""
        keys = train.text_keys()
        _, apart = hash_split(train.strata, keys, self.confidence_fraction, self.seed + APART)
        rows = {row for row in apart if UNLABELLED not in classes_of(train.labels[row])}
        rest = [row for row in range(len(train)) if row not in rows]
        return {"train": train.take(rest), "confidence": train.take(sorted(rows))}

    def _encode(self, split: str, examples: Examples) -> None:
        items: Any
        items, cut = encode(examples, self.tokenizer, self.max_length)
        if len(cut) > CUT_SHARE * len(items):
            needed = sorted(cut, reverse=True)[int(CUT_SHARE * len(items))]
            rank_zero_warn(
                f"{len(cut) / len(items):.0%} of the {split} texts are longer than "
                f"max_length={self.max_length} tokens and are cut; max_length={needed} would keep "
                f"{1 - CUT_SHARE:.0%} of them whole, if the encoder takes that many"
            )
        if split in ("val", "calibration", "confidence"):
            # The order is the same for any batch size, and any limit_val_batches of the Trainer
            # keeps texts of all lengths.
            order = LengthGroupedSampler(items.lengths, VALIDATION_BLOCK, seed=0)
            items = Subset(items, list(order))
        self.splits[split] = examples
        self._encoded[split] = items

    def describe_classes(self) -> str:
        """Return the number of training examples of each class, or nothing before `setup`."""
        if "train" not in self.splits:
            return ""
        learned = [self.splits[name] for name in ("train", "confidence") if name in self.splits]
        labels = (label for part in learned for label in part.labels or ())
        counts = Counter(n for label in labels for n in classes_of(label))
        names = self.class_names or []
        text = listed([f"{name} {counts[label]:,}" for label, name in enumerate(names)])
        more = f"; {counts[UNLABELLED]:,} texts without a label" if counts[UNLABELLED] else ""
        return f"{len(names)} {task_of(self.task).nouns}: {text}{more}"

    def _loader(self, split: str) -> DataLoader[Any]:
        items = self._encoded[split]
        sampler, teacher, size = None, None, self.batch_size
        if split == "train":
            processes: dict[str, Any] = {}
            if self.trainer is not None and self.trainer.world_size > 1:
                processes = self.trainer.distributed_sampler_kwargs or {}
            sampler = LengthGroupedSampler(items.lengths, size, self.seed, **processes)
            teacher = self.teacher_probabilities
        elif split == "test":
            size = max(size, TEST_BATCH)
        return DataLoader(
            items,
            batch_size=size,
            sampler=sampler,
            collate_fn=partial(collate, padding=padding_of(self.tokenizer), teacher=teacher),
            num_workers=self.num_workers,
            persistent_workers=self.num_workers > 0,
        )

    @override
    def train_dataloader(self) -> DataLoader[Any]:
        """Return batches in training order; the teacher runs when this is first called."""
        if self.teacher and self.teacher_probabilities is None:
            device = None if self.trainer is None else self.trainer.strategy.root_device
            self.teacher_probabilities = teacher_probabilities(
                self.teacher,
                self.splits["train"],
                self.class_names or [],
                self.max_length,
                device,
                task_of(self.task),
            )
        return self._loader("train")

    @override
    def val_dataloader(self) -> DataLoader[Any]:
        return self._loader("val")

    @override
    def confidence_dataloader(self) -> DataLoader[Any] | None:
        return self._loader("confidence") if self.splits.get("confidence") else None

    @override
    def calibration_dataloader(self) -> DataLoader[Any] | None:
        return self._loader("calibration") if self.calibration_fraction else None

    @override
    def test_dataloader(self) -> DataLoader[Any]:
        return self._loader("test")
