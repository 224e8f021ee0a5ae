"""How long a run will take, from a few timed batches."""

from __future__ import annotations

import statistics
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from itertools import islice, pairwise
from typing import TYPE_CHECKING, Any

import torch
from lightning.pytorch import Callback
from torch.utils.data import DataLoader
from typing_extensions import override

from dact.encoders.base import Batch, LayeredEncoder
from dact.model import DACT
from dact.tuning.objective import fit, make_trainer, seed_trial

if TYPE_CHECKING:
    from dact.tuning.engine import TuningEngine

BATCHES = 4  # timed ones of training and of validation


@dataclass(frozen=True)
class Pace:
    """Seconds per example, in training and in validation."""

    train: float
    validation: float

    def epoch(self, train_examples: int, validation_examples: int) -> float:
        """Seconds of one epoch of so many examples."""
        return self.train * train_examples + self.validation * validation_examples


class _Clock(Callback):
    """When the first batch began and when each batch ended."""

    def __init__(self) -> None:
        self.train: list[float] = []
        self.validation: list[float] = []

    @override
    def on_train_batch_start(self, *args: Any) -> None:
        self.train = self.train or [time.perf_counter()]

    @override
    def on_train_batch_end(self, *args: Any) -> None:
        self.train.append(time.perf_counter())

    @override
    def on_validation_batch_start(self, *args: Any, **kwargs: Any) -> None:
        self.validation = self.validation or [time.perf_counter()]

    @override
    def on_validation_batch_end(self, *args: Any, **kwargs: Any) -> None:
        self.validation.append(time.perf_counter())


def measure_pace(
    arguments: Mapping[str, Any], model: DACT, train: Iterable[Batch], validation: Iterable[Batch]
) -> Pace:
    """Time a few batches in a Trainer of the run's own.

    Args:
        arguments: Of the Trainer.
        model: Is trained, so one to throw away.
        train: Training batches; the first few are taken.
        validation: Validation batches; likewise.
    """
    clock = _Clock()
    limits = {
        "limit_train_batches": BATCHES,
        "limit_val_batches": BATCHES,
        "max_epochs": 1,
        "enable_checkpointing": False,
    }
    trainer = make_trainer(arguments, callbacks=[clock], **limits)
    batches = list(islice(train, BATCHES)), list(islice(validation, BATCHES))
    # (The Trainer would take a bare list for one loader per entry.)
    train, validation = (DataLoader(taken, batch_size=None) for taken in batches)  # type: ignore[arg-type]
    fit(trainer, model, loaders=(train, validation))
    return Pace(_per_example(clock.train, batches[0]), _per_example(clock.validation, batches[1]))


def _per_example(times: list[float], batches: list[Batch]) -> float:
    """The median over the batches, without the first if there are more: it is slower than the rest."""
    steps = [after - before for before, after in pairwise(times)]
    return statistics.median(steps[1:] or steps) / len(batches[0]["labels"])


def random_states(encoder: LayeredEncoder, batch: Batch) -> dict[str, torch.Tensor]:
    """A batch as frozen mode has it, of the size of `batch`, without running the encoder."""
    labels = batch["labels"]
    return {"states": torch.randn(len(labels), encoder.num_layers, encoder.hidden_size), "labels": labels}


def _untaught(engine: TuningEngine) -> DACT:
    """A model whose batches need no teacher, who is asked only once the run has begun."""
    model = engine.make_model()
    model.distillation = 0.0
    return model


def expected_seconds(engine: TuningEngine, left: Mapping[str, int]) -> float:
    """How long a run will take, from a few timed batches; what pruning saves and evaluation takes is left out.

    Args:
        engine: The engine of the run.
        left: How many trials each study still has to do.
    """
    seed_trial(engine.seed)
    data = engine.plain_data()
    data.prepare_data()
    data.setup("fit")
    loaders = data.train_dataloader(), data.val_dataloader()
    examples = [len(loader.dataset) for loader in loaders]
    epochs = {stage: float(engine.trainer["max_epochs"]) for stage in left}
    epochs["training"] = epochs["lambda_reg"] = engine.spaces["training"]["num_epochs"].mean
    model = _untaught(engine)
    pace = measure_pace(engine.trainer, model, *loaders)
    seconds = 0.0
    if engine.encoder_training == "frozen":
        if not (engine.run_folder / "features" / "val.safetensors").is_file():
            passes = pace.validation * sum(examples)
            seconds += engine.warm_up_epochs * pace.epoch(*examples) + passes
        states = [[random_states(model.encoder, batch) for batch in islice(loader, BATCHES)] for loader in loaders]
        pace = measure_pace(engine.trainer, _untaught(engine), *states)
    trials = sum(max(0, count) * epochs[stage] for stage, count in left.items())
    fits = epochs["training"] + engine.compare_defaults * epochs["submodels"]
    return seconds + (trials / engine.workers + fits) * pace.epoch(*examples)
