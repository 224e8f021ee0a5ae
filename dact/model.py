"""DACT, the LightningModule: an encoder, a classifier and a confidence."""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.utilities.rank_zero import rank_zero_warn  # type: ignore[attr-defined]
from torch import Tensor, nn
from torchmetrics.aggregation import MeanMetric
from torchmetrics.classification import MulticlassAccuracy, MulticlassF1Score

from dact import encoders, functional, inference
from dact.encoders.base import Batch, LayeredEncoder
from dact.files import DurableCheckpointIO, read_json, read_tensors, write_json, write_tensors
from dact.functional import HaltingRule, PonderKind
from dact.metrics import ExitHistogram, LayerAccuracy, MeanExitLayer
from dact.submodels import SubmodelConfig, Submodels, start_undecided

CONFIG_NAME = "config.json"
WEIGHTS_NAME = "model.safetensors"
FORMAT = "dact/1"
HALTING = ("halting", "halting_tolerance", "halting_margin")  # what decides when an example halts


@dataclass(frozen=True)
class DACTOutput:
    """What DACT says of a batch.

    Args:
        probabilities: ``[batch, classes]``: a_N from `DACT.forward`, a_n at the exit layer from `DACT.early_exit`.
            The halting rule guarantees the class of a_N, not its probabilities; the margin guarantees neither.
        exit_layer: int64 ``[batch]``, 1-based: the last layer that was run (from `DACT.forward`: that the halting
            rule would have run).
        layer_probabilities: y, ``[batch, layers, classes]``; from `DACT.forward` only.
        h: The confidence of each layer, ``[batch, layers]``; from `DACT.forward` only.
        p: The remaining share after each layer, ``[batch, layers]``; from `DACT.forward` only.
    """

    probabilities: Tensor
    exit_layer: Tensor
    layer_probabilities: Tensor | None = None
    h: Tensor | None = None
    p: Tensor | None = None

    def to(self, *args: Any, **kwargs: Any) -> DACTOutput:
        """The output with its tensors moved or cast as `torch.Tensor.to` does it; the Trainer moves predictions so."""
        tensors: dict[str, Any] = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        moved = {name: tensor.to(*args, **kwargs) for name, tensor in tensors.items() if tensor is not None}
        return dataclasses.replace(self, **moved)


class DACT(LightningModule):
    r"""A classifier that spends only as many layers of its encoder as each example needs.

    Training minimises :math:`-\log a_N[\text{target}] + \lambda \rho` plus `exit_loss_weight` times the mean
    cross-entropy of the layers' own classifications; see `dact.functional` for the symbols and their source. The
    logged val_loss leaves the exit loss and the λ warm-up out, so that epochs and trials compare; val_task_loss,
    val_accuracy, val_macro_f1 and val_exit_layer are those of early exit.

    Args:
        encoder: The stack of layers, one of `dact.encoders` or your own.
        output_dimension: Number of classes, 2 or more.
        classifier: Architecture of the classifier f.
        confidence: Architecture of the confidence g.
        lambda_reg: λ, the price of a unit of ponder cost, 0 or more.
        lambda_warmup: Share of the optimizer steps, in [0, 1], over which λ rises linearly from 0.
        ponder: The ponder cost ρ, ``"p"`` (mean of Σ p_n) or ``"h"`` (mean of Σ h_n).
        exit_loss_weight: Weight of the exit loss, 0 or more.
        distillation: Share of a teacher's probabilities in the targets of a_N and of every y_n, in [0, 1]; the rest is
            the label. Training batches then carry ``teacher`` ``[batch, classes]``.
        share_submodels: One pair of submodels for all layers instead of one pair per layer.
        halting: ``"exact"``, ``"paper"`` or ``"never"``; see `dact.functional.can_halt`.
        halting_tolerance: In [0, 1): the class that the halting rule returns ends at most this much probability behind
            the final winner.
        halting_margin: In [0, 1]: an example also leaves where y_n puts its first class more than this probability ahead
            of its second (see `dact.functional.is_clear`). A second dial: smaller means fewer layers; 1 leaves all to
            the halting rule.
        class_weights: One weight per class for the training and validation losses.
        learning_rate: Peak learning rate of AdamW.
        submodel_learning_rate: That of the two submodels; the same if left out.
        weight_decay: Of AdamW, on matrices only (not on biases and norms).
        warmup_fraction: Share of the optimizer steps over which the learning rate rises; it then falls to 0.
        class_names: Names of the classes; taken from the datamodule if left out.
        step_tokens: For early exit: tokens that enter a layer at a time, padding included; by the kind of device if
            left out.
        window_tokens: For early exit: tokens whose hidden states are held at a time, the bound of memory; 16 steps if
            left out.

    Raises:
        TypeError: If the encoder is no `LayeredEncoder`.
        ValueError: If a value is outside its range.

    Example:
        >>> from dact import DACT
        >>> from dact.encoders import TransformerEncoder
        >>> model = DACT(encoder=TransformerEncoder(vocab_size=50, num_layers=2, hidden_size=8, num_heads=2)).eval()
        >>> output = model.early_exit({"input_ids": torch.tensor([[4, 2], [7, 1]])})
        >>> output.probabilities.shape, output.exit_layer.tolist()
        (torch.Size([2, 3]), [2, 2])
    """

    encoder: LayeredEncoder
    class_weights: Tensor | None

    def __init__(
        self,
        encoder: LayeredEncoder,
        output_dimension: int = 3,
        classifier: SubmodelConfig = SubmodelConfig(),
        confidence: SubmodelConfig = SubmodelConfig(),
        *,
        lambda_reg: float = 0.02,
        lambda_warmup: float = 0.3,
        ponder: PonderKind = "p",
        exit_loss_weight: float = 0.3,
        distillation: float = 0.0,
        share_submodels: bool = False,
        halting: HaltingRule = "exact",
        halting_tolerance: float = 0.0,
        halting_margin: float = 1.0,
        class_weights: list[float] | None = None,
        learning_rate: float = 1e-4,
        submodel_learning_rate: float | None = None,
        weight_decay: float = 0.01,
        warmup_fraction: float = 0.1,
        class_names: list[str] | None = None,
        step_tokens: int | None = None,
        window_tokens: int | None = None,
    ) -> None:
        super().__init__()
        _check_arguments(locals())
        self.encoder = encoder
        self.output_dimension = output_dimension
        self.classifier_config = classifier
        self.confidence_config = confidence
        self.lambda_reg = lambda_reg
        self.lambda_warmup = lambda_warmup
        self.ponder = ponder
        self.exit_loss_weight = exit_loss_weight
        self.distillation = distillation
        self.share_submodels = share_submodels
        self.halting = halting
        self.halting_tolerance = halting_tolerance
        self.halting_margin = halting_margin
        self.learning_rate = learning_rate
        self.submodel_learning_rate = submodel_learning_rate
        self.weight_decay = weight_decay
        self.warmup_fraction = warmup_fraction
        self.class_names = None if class_names is None else list(class_names)
        self.step_tokens = step_tokens
        self.window_tokens = window_tokens
        self.calibration: dict[str, Any] | None = None  # what dact.calibrate found
        weights = None if class_weights is None else torch.tensor(class_weights)
        self.register_buffer("class_weights", weights, persistent=False)

        sizes: dict[str, Any] = {
            "num_layers": encoder.num_layers,
            "hidden_size": encoder.hidden_size,
            "share": share_submodels,
        }
        self.classifier = Submodels(classifier, output_size=output_dimension, **sizes)
        self.confidence = Submodels(confidence, output_size=1, **sizes)
        start_undecided(self.confidence)
        # One set each: sanity checks and a test inside a fit must not add to what validation counts.
        self.val_metrics = self._evaluation_metrics()
        self.test_metrics = self._evaluation_metrics()

    def _evaluation_metrics(self) -> nn.ModuleDict:
        classes, layers = self.output_dimension, self.encoder.num_layers

        def mean() -> MeanMetric:
            # Its default leaves NaN out, which would hide a broken model.
            return MeanMetric(nan_strategy="disable")

        return nn.ModuleDict(
            {
                "loss": mean(),
                "task_loss": mean(),
                "ponder_cost": mean(),
                "agreement": mean(),
                "accuracy": MulticlassAccuracy(classes, average="micro", validate_args=False),
                "macro_f1": MulticlassF1Score(classes, average="macro", validate_args=False),
                "exit_layer": MeanExitLayer(layers),
                "exit_histogram": ExitHistogram(layers),
                "layer_accuracy": LayerAccuracy(layers),
            }
        )

    def _metrics_of(self, stage: str) -> Any:
        return self.val_metrics if stage == "val" else self.test_metrics

    # ------------------------------------------------------------------ the DACT unit

    def forward(self, batch: Batch) -> DACTOutput:
        """Run all layers: what training uses. `batch` is a dict as Hugging Face has it; labels are not needed."""
        logits, h = self._submodels(batch)
        y = logits.softmax(dim=-1)
        a, p = functional.accumulate(y, h)
        return DACTOutput(a[:, -1], self.exit_layers(a.detach(), p.detach(), y.detach()), y, h, p)

    def early_exit(self, batch: Batch) -> DACTOutput:
        """Run each example only as deep as it needs. Call `eval()` first, as for any inference.

        A large batch pays: examples of similar length go through the layers together, and those that are left are
        regrouped. Neither the batch nor the order of its rows changes an answer.
        """
        exits = self._inference(batch, self.halting)
        return DACTOutput(exits.answers, exits.layers)

    def full_depth(self, batch: Batch) -> DACTOutput:
        """All layers, as `forward` has them, by the code of `early_exit`: for large batches, without gradients."""
        exits = self._inference(batch, "never", record=True)
        assert exits.y is not None
        assert exits.h is not None
        a, p = functional.accumulate(exits.y, exits.h)
        return DACTOutput(a[:, -1], self.exit_layers(a, p, exits.y), exits.y, exits.h, p)

    def stream(self, batches: Iterable[Batch]) -> Iterator[DACTOutput]:
        """`early_exit` for many batches, regrouped across them.

        Args:
            batches: Of any size; consumed lazily, `window_tokens` at a time.

        Yields:
            One output per batch, in their order.
        """
        _, window = inference.budget(self.device, self.step_tokens, self.window_tokens)
        for exits in inference.stream(batches, partial(self._inference, rule=self.halting), window):
            yield DACTOutput(exits.answers, exits.layers)

    def _inference(self, batch: Batch, rule: HaltingRule, record: bool = False) -> inference.Exits:
        return inference.early_exit(
            self.encoder,
            self.classifier,
            self.confidence,
            batch,
            rule=rule,
            tolerance=self.halting_tolerance,
            margin=self.halting_margin,
            step_tokens=self.step_tokens,
            window_tokens=self.window_tokens,
            record=record,
        )

    def exit_layers(self, a: Tensor, p: Tensor, y: Tensor) -> Tensor:
        """Where this model leaves, int64 ``[batch]``, from what all layers say; see `dact.functional.exit_layers`."""
        return functional.exit_layers(a, p, self.halting, self.halting_tolerance, y=y, margin=self.halting_margin)

    def _submodels(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """The logits of y ``[batch, layers, classes]`` and h ``[batch, layers]``, in float32 or more."""
        # States that were computed before take the place of the encoder: training of the submodels alone.
        states = batch["states"] if "states" in batch else self.encoder(batch)
        logits = functional.at_least_float32(self.classifier(states))
        return logits, functional.at_least_float32(self.confidence(states)).sigmoid().squeeze(-1)

    # ------------------------------------------------------------------ steps

    def _step(self, batch: Batch, stage: Literal["train", "val", "test"]) -> dict[str, Tensor]:
        """The loss of a batch and, in evaluation, its exit layers ``[batch]``: callbacks draw them."""
        if "labels" not in batch:
            raise KeyError(f"a batch for {stage} needs 'labels' [batch], got the keys {sorted(batch)}")
        target = batch["labels"]
        if stage == "test":  # by the code that predicts, all layers as well as early exit
            full = self.full_depth(batch)
            assert full.layer_probabilities is not None
            assert full.h is not None
            logits, y, h = None, full.layer_probabilities, full.h
        else:
            logits, h = self._submodels(batch)
            y = logits.softmax(dim=-1)
        a, p = functional.accumulate(y, h)
        full_loss = functional.task_loss(a[:, -1], target, self.class_weights)
        ponder_cost = functional.ponder_cost(p, h, self.ponder)
        if stage == "train":
            assert logits is not None
            exit_loss = functional.exit_loss(logits, target, self.class_weights)
            if self.distillation:
                full_loss, exit_loss = self._distill(batch, a[:, -1], logits, full_loss, exit_loss)
            loss = full_loss + self._warm_lambda() * ponder_cost + self.exit_loss_weight * exit_loss
            self.log("train_loss", loss, on_step=False, on_epoch=True, prog_bar=True, batch_size=len(target))
            return {"loss": loss}
        loss = full_loss + self.lambda_reg * ponder_cost
        if stage == "test":
            output = self.early_exit(batch)
        else:
            exit_layer = self.exit_layers(a, p, y)
            output = DACTOutput(functional.answer_at(a, exit_layer), exit_layer)
        self._measure(stage, loss, ponder_cost, a, output, target)
        return {"loss": loss, "exit_layer": output.exit_layer}

    def _distill(
        self, batch: Batch, answer: Tensor, logits: Tensor, full_loss: Tensor, exit_loss: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Both losses with a share of the teacher's answers in their targets."""
        if "teacher" not in batch:
            raise KeyError(
                f"distillation={self.distillation:g} needs 'teacher' [batch, classes] in training batches, got the keys "
                f"{sorted(batch)}: give the data a teacher, or set distillation to 0"
            )
        teacher, share = batch["teacher"], self.distillation
        taught_full = functional.distillation_loss(functional.log_of(answer), teacher)
        taught_exits = functional.distillation_loss(logits.log_softmax(dim=-1), teacher)
        return (1 - share) * full_loss + share * taught_full, (1 - share) * exit_loss + share * taught_exits

    def at_full_depth(self) -> DACT:
        """Make plain fine-tuning of this model: all layers are run, and the last one alone answers and learns.

        Every confidence says 1 for ever, so that a_N = y_N. For baselines and teachers.
        """
        for submodel in self.confidence:
            last = submodel[-1]  # type: ignore[index]
            nn.init.zeros_(last.weight)
            nn.init.constant_(last.bias, 40.0)  # sigmoid(40) is 1 in float32
        self.confidence.requires_grad_(False)
        self.lambda_reg, self.exit_loss_weight, self.distillation = 0.0, 0.0, 0.0
        self.halting = "never"
        return self

    def _measure(
        self, stage: str, loss: Tensor, ponder_cost: Tensor, a: Tensor, output: DACTOutput, target: Tensor
    ) -> None:
        """Update and log what evaluation measures: of all layers, a ``[batch, layers, classes]``, and of early exit."""
        metrics = self._metrics_of(stage)
        answer, exit_layer = output.probabilities, output.exit_layer
        agreement = (answer.argmax(dim=1) == a[:, -1].argmax(dim=1)).float().mean()
        task_loss = functional.task_loss(answer, target, self.class_weights)
        means = {"loss": loss, "task_loss": task_loss, "ponder_cost": ponder_cost, "agreement": agreement}
        for name, value in means.items():
            # One value per example: without its NaN check, torchmetrics takes no weights.
            metrics[name].update(value.expand(len(target)))
        metrics["accuracy"].update(answer, target)
        metrics["macro_f1"].update(answer, target)
        metrics["exit_layer"].update(exit_layer)
        metrics["exit_histogram"].update(exit_layer)
        metrics["layer_accuracy"].update(a, target)
        for name in ("loss", "task_loss", "ponder_cost", "agreement", "accuracy", "macro_f1", "exit_layer"):
            shown = name in ("loss", "accuracy", "exit_layer")
            self.log(f"{stage}_{name}", metrics[name], on_step=False, on_epoch=True, prog_bar=shown)

    def training_step(self, batch: Batch, batch_idx: int) -> dict[str, Tensor]:
        return self._step(batch, "train")

    def validation_step(self, batch: Batch, batch_idx: int) -> dict[str, Tensor]:
        return self._step(batch, "val")

    def test_step(self, batch: Batch, batch_idx: int) -> dict[str, Tensor]:
        return self._step(batch, "test")

    def predict_step(self, batch: Batch, batch_idx: int) -> DACTOutput:
        return self.early_exit(batch)

    def _end_evaluation(self, stage: str) -> None:
        """Log per-layer accuracy and reset what Lightning does not: the metrics that are no scalars."""
        metrics = self._metrics_of(stage)
        # (torchmetrics makes a scalar of a vector of one entry: an encoder of one layer.)
        accuracies = metrics["layer_accuracy"].compute().reshape(-1)
        names = {f"{stage}_layer_accuracy/{n}": value for n, value in enumerate(accuracies, start=1)}
        self.log_dict(names, on_step=False, on_epoch=True, sync_dist=False)
        self.exit_histogram = metrics["exit_histogram"].compute().reshape(-1).clone()
        for name in ("layer_accuracy", "exit_histogram"):
            metrics[name].reset()

    def on_validation_epoch_end(self) -> None:
        self._end_evaluation("val")

    def on_test_epoch_end(self) -> None:
        self._end_evaluation("test")

    def on_fit_end(self) -> None:
        layers = self.encoder.num_layers
        value = self.trainer.callback_metrics.get("val_exit_layer")
        if value is None or layers == 1 or self.halting == "never":
            return
        if value.item() in (1.0, float(layers)):
            every = "the first layer" if value.item() == 1.0 else f"all {layers} layers"
            remedy = "smaller" if value.item() == 1.0 else "larger"
            rank_zero_warn(
                f"the depth has collapsed: every validation example uses {every}. "
                f"Try a {remedy} lambda_reg than {self.lambda_reg:g}"
                + (f", or a halting_margin below {self.halting_margin:g}" if remedy == "larger" else "")
                + (", or a larger halting_margin" if remedy == "smaller" and self.halting_margin < 1 else "")
            )

    # ------------------------------------------------------------------ optimization

    def setup(self, stage: str) -> None:
        datamodule = getattr(self._trainer, "datamodule", None)
        self.encoder.check_tokens(getattr(datamodule, "tokenizer", None), getattr(datamodule, "max_length", None))
        # Other data may give a teacher in its own way.
        taught = getattr(datamodule, "teacher", None) or getattr(datamodule, "teacher_probabilities", ...)
        if stage == "fit" and self.distillation and taught is None:
            raise ValueError(
                f"distillation={self.distillation:g} needs a teacher: give the data one (data.teacher), or set distillation "
                "to 0"
            )
        names = getattr(datamodule, "class_names", None)
        check_classes(names, self.output_dimension)
        if names is not None and self.class_names is None:
            self.class_names = list(names)

    def _total_steps(self) -> float:
        return self.trainer.estimated_stepping_batches

    def on_fit_start(self) -> None:
        self.end_calibration()  # its promise was made for other weights

    def on_train_start(self) -> None:
        # Known once per training, also one of Lightning's own search for a batch size or learning rate; infinite for an
        # endless fit, in which nothing warms up or decays.
        self._steps = self._total_steps()

    def _warm_lambda(self) -> float:
        """λ at this optimizer step: it rises linearly from 0 over the first `lambda_warmup` of all steps."""
        warmup = self.lambda_warmup * self._steps
        if warmup == 0 or warmup == float("inf"):
            return self.lambda_reg
        return self.lambda_reg * min(1.0, self.trainer.global_step / warmup)

    def configure_optimizers(self) -> Any:
        # foreach: the submodels are many small tensors, and on a CPU it is not the default.
        optimizer = torch.optim.AdamW(self._parameter_groups(), lr=self.learning_rate, foreach=True)
        total = self._total_steps()
        if total == float("inf"):
            return optimizer
        warmup = self.warmup_fraction * total

        def factor(step: int) -> float:
            if step < warmup:
                return (step + 1) / (warmup + 1)
            return max(0.0, (total - step) / max(1.0, total - warmup))

        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, factor)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    def _parameter_groups(self) -> list[dict[str, Any]]:
        """Encoder and submodels, each with and without weight decay: biases and norms (vectors) get none."""
        submodels = [*self.classifier.parameters(), *self.confidence.parameters()]
        groups = []
        for parameters, rate in (
            (self.encoder.parameters(), self.learning_rate),
            (submodels, self.submodel_learning_rate or self.learning_rate),
        ):
            trained = [parameter for parameter in parameters if parameter.requires_grad]
            for decay, chosen in (
                (self.weight_decay, [parameter for parameter in trained if parameter.dim() > 1]),
                (0.0, [parameter for parameter in trained if parameter.dim() <= 1]),
            ):
                if chosen:
                    groups.append({"params": chosen, "lr": rate, "weight_decay": decay})
        return groups

    # ------------------------------------------------------------------ on disk

    def config(self) -> dict[str, Any]:
        """Plain data (strings, numbers, lists, dicts) from which this model can be built again."""
        weights = self.class_weights
        return {
            "encoder": self.encoder.config(),
            "output_dimension": self.output_dimension,
            "classifier": dataclasses.asdict(self.classifier_config),
            "confidence": dataclasses.asdict(self.confidence_config),
            "lambda_reg": self.lambda_reg,
            "lambda_warmup": self.lambda_warmup,
            "ponder": self.ponder,
            "exit_loss_weight": self.exit_loss_weight,
            "distillation": self.distillation,
            "share_submodels": self.share_submodels,
            "halting": self.halting,
            "halting_tolerance": self.halting_tolerance,
            "halting_margin": self.halting_margin,
            "class_weights": None if weights is None else weights.tolist(),
            "learning_rate": self.learning_rate,
            "submodel_learning_rate": self.submodel_learning_rate,
            "weight_decay": self.weight_decay,
            "warmup_fraction": self.warmup_fraction,
            "class_names": self.class_names,
            "step_tokens": self.step_tokens,
            "window_tokens": self.window_tokens,
            "calibration": self.calibration,
        }

    @classmethod
    def from_config(cls, config: Mapping[str, Any], **overrides: Any) -> DACT:
        """A model with fresh weights as `config` describes it; keyword arguments replace its entries."""
        known = inspect.signature(cls).parameters
        for name in overrides.keys() - known.keys():
            if not any(parameter.kind is parameter.VAR_KEYWORD for parameter in known.values()):
                raise TypeError(f"{cls.__name__} has no argument {name!r}: expected one of {', '.join(known)}")
        arguments = {**config, **overrides}
        calibration = arguments.pop("calibration", None)
        for name in ("classifier", "confidence"):
            if isinstance(arguments[name], Mapping):
                arguments[name] = SubmodelConfig(**arguments[name])
        if not isinstance(arguments.get("encoder"), LayeredEncoder):
            arguments["encoder"] = encoders.from_config(arguments.get("encoder"))
        model = cls(**arguments)
        if calibration is not None:
            dial = calibration["promise"]["dial"]
            if model._halts_as(calibration, dial=calibration[dial]):
                model.calibration = calibration
            elif dial not in overrides and getattr(model, dial) == calibration[dial]:
                setattr(model, dial, calibration["instead_of"])
        return model

    def end_calibration(self) -> None:
        """Forget a promise, and give its dial back the value that it had before."""
        if self.calibration is not None:
            dial = self.calibration["promise"]["dial"]
            if getattr(self, dial) == self.calibration[dial]:  # one that was moved since is the user's own
                setattr(self, dial, self.calibration["instead_of"])
            self.calibration = None

    def _halts_as(self, calibration: Mapping[str, Any], dial: Any) -> bool:
        """Whether this model halts as one of a calibration did, with `dial` as the value of the dial."""
        then = {name: calibration[name] for name in HALTING} | {calibration["promise"]["dial"]: dial}
        return then == {name: getattr(self, name) for name in HALTING}

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["hyper_parameters"] = self.config()

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        self._check_weights(checkpoint["state_dict"], "the checkpoint")
        stored = checkpoint.get("hyper_parameters", {}).get("class_names")
        if self.class_names is None:
            self.class_names = stored
        elif stored is not None and list(stored) != self.class_names:
            raise ValueError(
                f"the checkpoint has the classes {', '.join(stored)}, in this order, but here they are "
                f"{', '.join(self.class_names)}: give the data class_names={list(stored)}, or train anew"
            )
        calibration = checkpoint.get("hyper_parameters", {}).get("calibration")
        if calibration is None:
            return
        dial = calibration["promise"]["dial"]
        if self._halts_as(calibration, dial=calibration["instead_of"]):
            setattr(self, dial, calibration[dial])
            self.calibration = calibration
        elif not self._halts_as(calibration, dial=calibration[dial]):  # a dial that was moved since is the user's own
            then, now = (
                ", ".join(f"{name} {value}" for name, value in settings.items())
                for settings in (
                    {name: calibration[name] for name in HALTING},
                    {name: getattr(self, name) for name in HALTING},
                )
            )
            rank_zero_warn(
                f"the promise of the checkpoint does not hold here: it was made for {then}, and this is {now}"
            )

    def _check_weights(self, weights: Mapping[str, Tensor], what: str) -> None:
        own = self.state_dict()
        different = [
            f"{name}: {list(weights[name].shape)} instead of {list(own[name].shape)}"
            for name in own
            if name in weights and weights[name].shape != own[name].shape
        ]
        absent, unknown = sorted(own.keys() - weights.keys()), sorted(weights.keys() - own.keys())
        faults = different + [f"{name} is missing" for name in absent] + [f"{name} is unknown" for name in unknown]
        if faults:
            layers, theirs = self.encoder.num_layers, _layers_in(weights)
            if theirs not in (0, layers) and not self.share_submodels:
                faults = [f"{theirs} layers instead of {layers}", *faults]
            raise ValueError(
                f"{what} does not fit this model ({len(faults)} differences, such as {faults[0]}). Build the model with "
                f"the encoder, submodels and output_dimension ({self.output_dimension} here) that it was trained with, "
                "or use DACT.load_from_checkpoint, which reads them from the checkpoint (on the command line, give the config.yaml "
                "that the fit left)"
            )

    @classmethod
    def load_from_checkpoint(  # type: ignore[override]
        cls,
        checkpoint_path: str | Path,
        map_location: Any = "cpu",
        *,
        weights_only: bool | None = None,
        encoder: LayeredEncoder | None = None,
        **overrides: Any,
    ) -> DACT:
        """The model of a checkpoint, under torch's weights-only loading and without a look at `pretrained`.

        Args:
            checkpoint_path: What the Trainer's checkpointing wrote: a file, or an address such as ``s3://…``.
            map_location: As for `torch.load`.
            weights_only: Never False: a checkpoint of dact holds data alone.
            encoder: Needed only for an encoder of your own: one built as it was for training.
            **overrides: Replace constructor arguments, such as ``halting_tolerance=0.3``.

        Raises:
            FileNotFoundError: If there is no such file.
            ValueError: If the file cannot be read, is no checkpoint of DACT, or does not fit.
        """
        if weights_only is False:
            raise ValueError("weights_only=False would let a checkpoint run code; those of dact load without")
        checkpoint = DurableCheckpointIO().load_checkpoint(checkpoint_path, map_location, weights_only=True)
        if not {"hyper_parameters", "state_dict"} <= checkpoint.keys():
            raise ValueError(
                f"{checkpoint_path} is no checkpoint of DACT: it has {', '.join(map(str, checkpoint)) or 'no entries'}"
            )
        config, weights = checkpoint["hyper_parameters"], checkpoint["state_dict"]
        if encoder is not None:
            overrides["encoder"] = encoder
        return cls.from_config(config, **overrides)._load_weights(weights, checkpoint_path, map_location)

    def _load_weights(self, weights: Mapping[str, Tensor], path: str | Path, device: Any) -> DACT:
        self._check_weights(weights, str(path))
        self.load_state_dict(weights)
        return self.to(device) if isinstance(device, (str, torch.device)) else self

    def save_pretrained(self, directory: str | Path) -> None:
        """Write config.json and model.safetensors into `directory`, which is created if needed."""
        directory = Path(directory)
        write_tensors(directory / WEIGHTS_NAME, self.state_dict())
        write_json(directory / CONFIG_NAME, {"format": FORMAT, **self.config()})

    @classmethod
    def from_pretrained(cls, directory: str | Path, *, encoder: LayeredEncoder | None = None, **overrides: Any) -> DACT:
        """The model that `save_pretrained` wrote, in eval mode.

        Args:
            directory: A folder with config.json and model.safetensors.
            encoder: Needed only for an encoder of your own.
            **overrides: Replace constructor arguments, such as ``halting_tolerance=0.3``.

        Raises:
            FileNotFoundError: If one of the two files is missing.
            ValueError: If a file cannot be read or does not fit.
        """
        directory = Path(directory)
        if not directory.is_dir():
            raise FileNotFoundError(f"there is no folder {directory}: expected one that save_pretrained wrote")
        for name in (CONFIG_NAME, WEIGHTS_NAME):
            if not (directory / name).is_file():
                inside = [path for path in (directory / "model", directory / "final" / "model") if path.is_dir()]
                hint = f", such as {inside[0]}" if inside else ""
                raise FileNotFoundError(
                    f"{directory} has no {name}: expected a folder that save_pretrained wrote{hint}"
                )
        config = read_json(directory / CONFIG_NAME)
        weights, _ = read_tensors(directory / WEIGHTS_NAME)
        if not isinstance(config, dict) or config.pop("format", None) != FORMAT:
            raise ValueError(f"{directory / CONFIG_NAME} does not describe a model of dact")
        if encoder is not None:
            overrides["encoder"] = encoder
        return cls.from_config(config, **overrides)._load_weights(weights, directory, None).eval()


def check_classes(names: Sequence[str] | None, output_dimension: int) -> None:
    """Raise an error if the data has other classes than the model; data that does not name them may have any."""
    if names is not None and len(names) != output_dimension:
        raise ValueError(
            f"the data has {len(names)} classes ({', '.join(names)}), but the model has "
            f"output_dimension={output_dimension}: set output_dimension to {len(names)}"
        )


def _layers_in(weights: Mapping[str, Tensor]) -> int:
    """How many confidences there are among the weights of a DACT."""
    return len({name.split(".")[1] for name in weights if name.startswith("confidence.")})


def _check_arguments(given: Mapping[str, Any]) -> None:
    """Raise an error that names the argument of `DACT` that is outside its range."""
    if not isinstance(given["encoder"], LayeredEncoder):
        raise TypeError(
            f"DACT: encoder must be a dact.encoders.LayeredEncoder, got {type(given['encoder']).__name__}. "
            "Subclass it for an encoder of your own"
        )
    classes = given["output_dimension"]
    if classes < 2:
        raise ValueError(f"DACT: output_dimension counts the classes and must be 2 or more, got {classes}")
    functional.check_choice("DACT: ponder", given["ponder"], PonderKind)
    functional.check_choice("DACT: halting", given["halting"], HaltingRule)
    functional.check_tolerance(given["halting_tolerance"])
    functional.check_margin(given["halting_margin"])
    for name in ("lambda_reg", "exit_loss_weight", "weight_decay"):
        if not 0 <= given[name] < float("inf"):
            raise ValueError(f"DACT: {name} must be a finite number of 0 or more, got {given[name]}")
    for name in ("learning_rate", "submodel_learning_rate"):
        if given[name] is not None and not 0 < given[name] < float("inf"):
            raise ValueError(f"DACT: {name} must be a finite number above 0, got {given[name]}")
    for name in ("step_tokens", "window_tokens"):
        if given[name] is not None and given[name] < 1:
            raise ValueError(f"DACT: {name} counts tokens and must be 1 or more, got {given[name]}")
    if not 0 <= given["distillation"] <= 1:
        raise ValueError(f"DACT: distillation is a share of the targets, in [0, 1], got {given['distillation']}")
    for name in ("lambda_warmup", "warmup_fraction"):
        if not 0 <= given[name] <= 1:
            raise ValueError(f"DACT: {name} is a share of the optimizer steps, in [0, 1], got {given[name]}")
    for name in ("class_weights", "class_names"):
        value: Sequence[Any] | None = given[name]
        if value is not None and len(value) != classes:
            raise ValueError(f"DACT: {name} must have one entry per class ({classes}), got {len(value)}: {value}")
