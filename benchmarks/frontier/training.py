"""Train one method and keep what its layers say of the validation and test texts."""

from __future__ import annotations

import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor

from dact import DACT, SubmodelConfig
from dact.data.base import TextDataModule
from dact.encoders import HuggingFaceEncoder, TransformerEncoder
from dact.encoders.base import move
from dact.files import read_tensors, write_tensors

from .data import Setting, make_data
from .methods import Method

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
HEAD = SubmodelConfig(num_layers=1, hidden_units=64)
HEAD_RATE = 1e-3  # many heads in little time need a larger rate than the encoder
TEACHER_SHARE = 0.5
APART = 0.05  # share of the training texts for the confidence of a DACT, as by default
NUM_UNLABELLED = {"unlabelled": 6_000, "plenty": 15_000}  # by option


@dataclass(frozen=True)
class Workshop:
    """Where trainings of one setting leave their models and answers, outside of the repository.

    Args:
        cache: Folder for all settings.
        setting: The data and the length of the training.
        precision: As for the Trainer of Lightning.
        keep_models: Save each model as `dact.DACT.from_pretrained` reads it, for
            benchmarks/speed.py.
    """

    cache: Path
    setting: Setting
    precision: str = "bf16-mixed"
    keep_models: bool = False

    @property
    def whole(self) -> Method:
        """The whole encoder, fine-tuned without a teacher; it teaches the others."""
        return Method("baseline", self.setting.encoder.num_layers)

    def teacher_of(self, method: Method) -> Method:
        """Return the whole encoder that teaches a method: for a DACT, one that has not learned the
        texts that are set apart for the confidence either."""
        return replace(self.whole, options=("apart",)) if method.kind == "dact" else self.whole

    def home(self, method: Method, seed: int) -> Path:
        return self.cache / str(self.setting) / f"{method}.{seed}"

    def answers(self, method: Method, seed: int) -> dict[str, Tensor]:
        """Return what the layers say: ``val_y`` and ``test_y`` ``[texts, layers, classes]``,
        ``…_h`` and ``…_target``; ``apart_…`` is of the texts that teach the confidence."""
        return read_tensors(self.home(method, seed) / "answers.safetensors")[0]

    def is_done(self, method: Method, seed: int) -> bool:
        return (self.home(method, seed) / "answers.safetensors").is_file()

    def train(self, method: Method, seed: int) -> None:
        """Train one model; all but the whole encoder need the whole one to be trained."""
        pl.seed_everything(seed, verbose=False)
        home = self.home(method, seed)
        unlabelled = sum(NUM_UNLABELLED.get(option, 0) for option in method.options)
        is_apart = method.kind == "dact" or "apart" in method.options
        data = make_data(self.setting, unlabelled, APART if is_apart else 0.0)
        start = time.perf_counter()
        data.teacher_probabilities = None
        model = make_model(self.setting, method)
        if method.kind != "baseline":
            teacher = self.teacher_of(method)
            data.teacher_probabilities = self._teacher(teacher, seed, data, unlabelled)
            start_from(model, self.home(teacher, seed) / "model.safetensors")
        fit(model, data, self.setting.epochs, self.precision)
        seconds = time.perf_counter() - start

        if method.kind == "baseline":
            write_tensors(home / "model.safetensors", model.state_dict())
        if self.keep_models:
            model.class_names = data.class_names
            model.save_pretrained(home / "model")
            data.tokenizer.save_pretrained(home / "model")
        said: dict[str, Tensor] = {}
        loaders = {"val": data.val_dataloader(), "test": data.test_dataloader()}
        if is_apart:
            loaders["apart"] = data.confidence_dataloader()
        for split, loader in loaders.items():
            y, h, target, row = self._ask(model, loader)
            order = row.argsort()
            said |= {f"{split}_y": y[order], f"{split}_h": h[order]}
            said[f"{split}_target"] = target[order]
        write_tensors(home / "answers.safetensors", said, {"seconds": f"{seconds:.1f}"})

    def _teacher(self, method: Method, seed: int, data: TextDataModule, unlabelled: int) -> Tensor:
        """Return the teacher's answers to the training texts ``[texts, classes]``, which are kept
        beside the trainings."""
        path = self.cache / str(self.setting) / f"teacher-{method}-{unlabelled}.{seed}.safetensors"
        if not path.is_file():
            teacher = make_model(self.setting, method)
            weights = read_tensors(self.home(method, seed) / "model.safetensors")[0]
            teacher.load_state_dict(weights)
            y, _, _, row = self._ask(teacher, data.train_dataloader())
            write_tensors(path, {"p": y[row.argsort(), -1].contiguous()})
        return read_tensors(path)[0]["p"]

    @torch.no_grad()
    def _ask(self, model: DACT, loader: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Return y and h of all layers, and the labels and rows of the texts, in the loader's
        order."""
        model.eval().to(DEVICE)
        found = []
        with torch.autocast(DEVICE.type, torch.bfloat16, enabled=self.precision == "bf16-mixed"):
            for batch in loader:
                output = model.full_depth(move(batch, DEVICE))
                assert output.layer_probabilities is not None
                assert output.h is not None
                said = output.layer_probabilities.float().cpu(), output.h.float().cpu()
                found.append((*said, batch["labels"].cpu(), batch["row"].cpu()))
        y, h, target, row = (torch.cat(part) for part in zip(*found, strict=True))
        return y, h, target, row


def make_model(setting: Setting, method: Method) -> DACT:
    arguments: dict[str, Any] = {"classifier": HEAD, "confidence": HEAD}
    if setting.source == "generated":
        arguments["encoder"] = TransformerEncoder(42, method.layers, 32, 2, slopes=(2.0, 2.0))
        arguments["learning_rate"] = 2e-3
    else:
        pretrained = setting.encoder.pretrained
        encoder = HuggingFaceEncoder(pretrained, num_layers=method.layers, pooling="mean")
        arguments |= {"encoder": encoder, "learning_rate": setting.encoder.rate}
        if method.kind != "baseline":  # plain fine-tuning has one rate
            arguments["submodel_learning_rate"] = HEAD_RATE

    model = DACT(**arguments)
    if method.kind == "dact":
        model.detach_exits = "detached" in method.options
    else:
        model.at_full_depth()
    if method.kind == "multi":  # h = 1 for ever: a_n is y_n, and the margin alone decides
        model.detach_exits = True
        model.halting = "exact"
    if model.detach_exits:
        model.exit_loss_weight = 1.0
    if method.kind != "baseline":
        model.distillation = TEACHER_SHARE
    return model


def start_from(model: DACT, path: Path) -> None:
    """Give the encoder of a model the weights of another model's, as far as it has such layers."""
    weights, _ = read_tensors(path)
    own = {name for name in model.state_dict() if name.startswith("encoder.")}
    model.load_state_dict({name: weights[name] for name in own}, strict=False)


def fit(model: DACT, data: TextDataModule, epochs: int, precision: str) -> None:
    trainer = pl.Trainer(
        max_epochs=epochs,
        devices=1,
        precision=precision,  # type: ignore[arg-type]
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        gradient_clip_val=1.0,
        num_sanity_val_steps=0,
        limit_val_batches=0,
    )
    trainer.fit(model, datamodule=data)
