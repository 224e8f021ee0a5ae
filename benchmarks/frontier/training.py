"""Train one method and keep what its layers say of the validation and test texts."""

from __future__ import annotations

import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor, nn

from dact import DACT, SubmodelConfig
from dact.data.base import TextDataModule
from dact.encoders import HuggingFaceEncoder, TransformerEncoder
from dact.encoders.base import LayeredEncoder, move
from dact.files import read_tensors, write_tensors

from .data import MINILM, Setting, make_data
from .learners import Learner
from .methods import FULL, Method

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
HEAD = SubmodelConfig(num_layers=1, hidden_units=64)
RATE, HEAD_RATE = 1e-4, 1e-3  # many heads in little time need a larger rate than the encoder
EXIT_WEIGHTS = {"heavy": 30.0, "exits": 3.0, "detached": 1.0}  # by option; 0.3 without one
LAMBDA, TEACHER_SHARE = 0.05, 0.5
FOLDS = 3  # of the option `crossfit`
NUM_UNLABELLED = {"unlabelled": 6_000, "plenty": 15_000}  # by option
NUM_TEACHERS = (
    3  # baselines (of the seeds 0, 1, …) whose mean is the teacher under the option `averaged`
)


@dataclass(frozen=True)
class Workshop:
    """Where trainings of one setting leave their models and answers; nothing of it belongs in the
    repository.

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
    def of_all_texts(self) -> Workshop:
        """The workshop of all VADER texts, whose divisions hold those of their parts."""
        return replace(self, setting=Setting("vader", self.setting.split, epochs=2, batch_size=64))

    def home(self, method: Method, seed: int) -> Path:
        return self.cache / str(self.setting) / f"{method}.{seed}"

    def answers(self, method: Method, seed: int) -> dict[str, Tensor]:
        """What the layers say: ``val_y`` and ``test_y`` ``[texts, layers, classes]``, ``…_h``, and
        ``…_target``."""
        return read_tensors(self.home(method, seed) / "answers.safetensors")[0]

    def is_done(self, method: Method, seed: int) -> bool:
        return (self.home(method, seed) / "answers.safetensors").is_file()

    def train(self, method: Method, seed: int) -> None:
        """Train one model. What it starts from must have been trained."""
        pl.seed_everything(seed, verbose=False)
        data = make_data(
            self.setting, sum(NUM_UNLABELLED.get(option, 0) for option in method.options)
        )
        start = time.perf_counter()
        data.teacher_probabilities = (
            None if method.kind == "baseline" else self._teacher(method, seed, data)
        )
        model = make_model(self.setting, method, data.tokenizer.mask_token_id)
        for other in method.needs:  # whoever has a teacher starts from its encoder
            parts = ("encoder", "classifier") if other.kind == "multi" else ("encoder",)
            start_from(model, self.home(other, seed) / "model.safetensors", parts)
        if isinstance(model, Learner) and "live" in method.options:
            model.learn_from(self._baseline(seed))
        epochs = self.setting.epochs * (2 if "long" in method.options else 1)
        fit(model, data, epochs, self.precision)
        seconds = time.perf_counter() - start
        if method in (
            Method("baseline", FULL),
            Method("multi", method.layers),
        ):  # others may start from it
            write_tensors(self.home(method, seed) / "model.safetensors", model.state_dict())
        if self.keep_models:
            model.class_names = data.class_names
            model.save_pretrained(self.home(method, seed) / "model")
            data.tokenizer.save_pretrained(self.home(method, seed) / "model")
        said: dict[str, Tensor] = {}
        for split, loader in (("val", data.val_dataloader()), ("test", data.test_dataloader())):
            y, h, target, row = self._ask(model, loader)
            order = row.argsort()
            said |= {
                f"{split}_y": y[order],
                f"{split}_h": h[order],
                f"{split}_target": target[order],
            }
        write_tensors(
            self.home(method, seed) / "answers.safetensors", said, {"seconds": f"{seconds:.1f}"}
        )

    def _teacher(self, method: Method, seed: int, data: TextDataModule) -> Tensor:
        """The targets of the training texts ``[texts, classes]``, in their order."""
        if "crossfit" in method.options:
            return self._kept(f"crossfit.{seed}", lambda: self._cross_fitted(seed, data))
        if "stronger" in method.options:
            return self._kept(
                f"stronger.{seed}", lambda: self._taught(self.of_all_texts._baseline(seed), data)
            )
        seeds = range(NUM_TEACHERS) if "averaged" in method.options else [seed]
        name = next((option for option in method.options if option in NUM_UNLABELLED), "labelled")
        return torch.stack(
            [
                self._kept(
                    f"teacher-{name}.{other}",
                    lambda other=other: self._taught(self._baseline(other), data),
                )
                for other in seeds
            ]
        ).mean(dim=0)

    def _kept(self, name: str, make: Any) -> Tensor:
        """A tensor that is made once and kept beside the trainings."""
        path = self.cache / str(self.setting) / f"{name}.safetensors"
        if not path.is_file():
            write_tensors(path, {"p": make()})
        return read_tensors(path)[0]["p"]

    def _baseline(self, seed: int) -> DACT:
        method = Method("baseline", FULL)
        model = make_model(self.setting, method)
        model.load_state_dict(read_tensors(self.home(method, seed) / "model.safetensors")[0])
        return model

    def _taught(self, teacher: DACT, data: TextDataModule) -> Tensor:
        y, _, _, row = self._ask(teacher, data.train_dataloader())
        return y[row.argsort(), -1]

    def _cross_fitted(self, seed: int, data: TextDataModule) -> Tensor:
        items = data._encoded["train"]
        order = torch.randperm(len(items), generator=torch.Generator().manual_seed(seed)).tolist()
        answers = torch.empty(len(items), 3)
        method = Method("baseline", FULL)
        for fold in range(FOLDS):
            held_out = set(order[fold::FOLDS])
            model = make_model(self.setting, method)
            data._encoded["train"] = items.take(
                [row for row in range(len(items)) if row not in held_out]
            )
            fit(model, data, self.setting.epochs, self.precision)
            data._encoded["train"] = items.take(sorted(held_out))
            y, _, _, row = self._ask(model, data.train_dataloader())
            answers[row] = y[:, -1]
        data._encoded["train"] = items
        return answers

    @torch.no_grad()
    def _ask(self, model: DACT, loader: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """y and h of all layers, and the labels and rows of the texts, in the order of the
        loader."""
        model.eval().to(DEVICE)
        y, h, target, rows = [], [], [], []
        with torch.autocast(DEVICE.type, torch.bfloat16, enabled=self.precision == "bf16-mixed"):
            for batch in loader:
                output = model.full_depth(move(batch, DEVICE))
                assert output.layer_probabilities is not None
                assert output.h is not None
                y.append(output.layer_probabilities.float().cpu())
                h.append(output.h.float().cpu())
                target.append(batch["labels"])
                rows.append(batch["row"])
        return torch.cat(y), torch.cat(h), torch.cat(target), torch.cat(rows)


def make_model(setting: Setting, method: Method, mask_token: int | None = None) -> Learner | DACT:
    rates: dict[str, Any] = {"learning_rate": RATE, "submodel_learning_rate": HEAD_RATE}
    encoder: LayeredEncoder
    if setting.source == "generated":
        encoder = TransformerEncoder(42, method.layers, 32, 2, slopes=(2.0, 2.0))
        rates = {"learning_rate": 2e-3}
    else:
        encoder = HuggingFaceEncoder(MINILM, num_layers=method.layers, pooling="mean")
    arguments: dict[str, Any] = {
        "encoder": encoder,
        "classifier": HEAD,
        "confidence": HEAD,
        **rates,
    }
    if method.kind == "baseline":  # plain fine-tuning has one rate
        return DACT(**{**arguments, "submodel_learning_rate": None}).at_full_depth()
    model = Learner(
        method=method,
        mask_token=mask_token,
        lambda_reg=0.0 if "free" in method.options else LAMBDA,
        exit_loss_weight=next(
            (weight for name, weight in EXIT_WEIGHTS.items() if name in method.options), 0.3
        ),
        **arguments,
    )
    if method.kind == "encoder":
        model.at_full_depth()
    if (
        method.kind == "multi"
    ):  # h = 1 for ever: a_n is y_n, and the margin alone decides when a text leaves
        model.at_full_depth().halting = "exact"
    model.distillation = TEACHER_SHARE
    return model


def start_from(model: nn.Module, path: Path, parts: tuple[str, ...]) -> None:
    """Give parts of a model the weights of another model's, as far as it has such layers."""
    weights, _ = read_tensors(path)
    own = {name for name in model.state_dict() if name.split(".")[0] in parts}
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
