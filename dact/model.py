"""DACT, the LightningModule: an encoder, a classifier and a confidence."""

from __future__ import annotations

import dataclasses
import inspect
import math
from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal, Self

import torch
from lightning.fabric.utilities.data import AttributeDict
from lightning.pytorch import LightningModule
from lightning.pytorch.utilities.rank_zero import rank_zero_info  # type: ignore[attr-defined]
from torch import Tensor

from dact import encoders, functional, hub, inference, model_card, saving
from dact.agreement import check_agreement
from dact.checks import Range, check_arguments, check_count
from dact.confidence import (
    MOST_EXAMPLES,
    PRICE,
    AnswerConfidence,
    best_temperature,
    fit_confidence,
)
from dact.encoders.base import Batch, LayeredEncoder, check_batch, move
from dact.functional import Halting, HaltingRule, Margin, PonderKind, Tolerance
from dact.metrics import LoaderMetrics
from dact.model_card import Metrics
from dact.optimization import schedule
from dact.outputs import DACTOutput as DACTOutput
from dact.outputs import Loss as Loss
from dact.submodels import SubmodelConfig, Submodels, start_at, start_undecided
from dact.tasks import Task, TaskName, task_of

Weight = Annotated[float, Range("[0, inf)")]
Rate = Annotated[float, Range("(0, inf)")]
Tokens = Annotated[int, Range("[1, inf)", "it counts tokens")]
ShareOfSteps = Annotated[float, Range("[0, 1]", "it is a share of the optimizer steps")]
ConfidenceInput = Literal["answer", "state"]
ShareOfTargets = Annotated[float, Range("[0, 1]", "it is the teacher's share of the targets")]


class DACT(LightningModule):
    r"""A classifier that runs only as many layers of its encoder as each example needs.

    Training minimises :math:`-\log a_N[\text{target}] + \lambda \rho` plus `exit_loss_weight` times
    the mean cross-entropy of the layers' own classifications; see `dact.functional` for the symbols
    and their source. The logged val_loss excludes the exit loss and the λ warm-up; val_task_loss,
    val_accuracy, val_macro_f1 and val_exit_layer are measured with early exit.

    At tolerance 0 and margin 1, early exit provably returns the class of all N layers, in float32.
    Half precision rounds y and h, which may change the class of one example in a few hundred.

    A subclass names all arguments of its constructor, the encoder first, and calls
    ``self.save_hyperparameters(ignore=["encoder"])`` in it, to store them with the model.

    Args:
        encoder: The stack of layers, one of `dact.encoders` or your own.
        output_dimension: Number of classes (2 or more) or of labels (1 or more).
        classifier: Architecture of the classifier f.
        confidence: Architecture of the confidence g.
        task: ``"multiclass"``, one class per example, or ``"multilabel"``, any number of labels:
            y_n is then a sigmoid, the loss is the binary cross-entropy, summed over the labels, and
            the answer is the set of labels above their thresholds. *Class* then stands for label.
        lambda_reg: λ, the price of a unit of ponder cost, 0 or more; defaults to 0.04 / N, or to
            0.02 for a confidence that reads states.
        lambda_warmup: Share of the optimizer steps, in [0, 1], over which λ rises linearly from 0;
            only a confidence that reads states is affected.
        ponder: The ponder cost ρ, ``"p"`` (mean of Σ p_n) or ``"h"`` (mean of Σ h_n).
        confidence_reads: Input of g. ``"answer"``: lead and entropy of y_n, and the depth. Before
            each validation, g and one temperature per layer are fitted again, to the datamodule's
            `confidence_dataloader`, whose texts train nothing else, or else to the answers recorded
            during training (see `dact.confidence`). ``"state"``: z_n, as published; g is trained in
            every step with the rest of the model.
        exit_loss_weight: Weight of the exit loss, 0 or more.
        detach_exits: Whether the exit loss alone trains encoder and classifier, as in a multi-exit
            model, while the loss of a_N and the ponder cost train only the confidence.
        distillation: Share of a teacher's probabilities in the targets of a_N and of every y_n, in
            [0, 1]; the rest is the label. Training batches then carry ``teacher`` ``[batch,
            classes]``.
        consistency: Weight, 0 or more, of the divergence between the y_n of two passes with
            different dropout masks, which is added to the exit loss (`dact.functional.divergence`).
            Above 0, a step takes up to twice the time and memory.
        share_submodels: Whether all layers share one pair of submodels.
        num_layers: N, the number of layers used, counted from the encoder's first; all of them if
            left out. *All N layers* means these. (With fewer than all, DDP needs the strategy
            ``"ddp_find_unused_parameters_true"``.)
        halting: Halting rule, ``"exact"``, ``"paper"`` or ``"never"``; see
            `dact.functional.can_halt`.
        halting_tolerance: Largest probability, in [0, 1), by which the class that the halting rule
            returns may end behind the final winner.
        halting_margin: Lead of the first class of y_n over its second, in [0, 1], above which an
            example also leaves: smaller means fewer layers, at 1 only the halting rule decides.
            With several labels, the lead is the smallest distance of a label from its threshold, as
            a share of the largest possible distance.
        thresholds: One threshold per label, in (0, 1), above which the label is returned; 0.5 if
            left out.
        class_weights: One weight per class for the training and validation losses; with several
            labels, the weight of a label where it is present.
        learning_rate: Peak learning rate of AdamW; the encoder's default if left out.
        submodel_learning_rate: Peak learning rate of the submodels; `learning_rate` by default.
        weight_decay: Weight decay of AdamW, on matrices only (not on biases and norms).
        warmup_fraction: Share of the steps over which the learning rate rises; it then falls to 0.
        class_names: Names of the classes; taken from the datamodule if left out.
        step_tokens: Number of tokens that enter a layer in one step of early exit, with padding;
            chosen by the encoder or the device if left out.
        window_tokens: Number of tokens whose states are in memory at a time; 16 steps by default.

    Raises:
        TypeError, ValueError: If a value has the wrong type or is outside its range.

    Example:
        >>> from dact import DACT
        >>> from dact.encoders import TransformerEncoder
        >>> encoder = TransformerEncoder(vocab_size=50, num_layers=2, hidden_size=8, num_heads=2)
        >>> model = DACT(encoder=encoder).eval()
        >>> output = model.early_exit({"input_ids": torch.tensor([[4, 2], [7, 1]])})
        >>> output.probabilities.shape, output.exit_layer.tolist()
        (torch.Size([2, 3]), [2, 2])
    """

    encoder: LayeredEncoder
    class_weights: Tensor | None
    exit_temperatures: Tensor
    # Under "hyper_parameters", LightningCLI would mistake the configuration for its own.
    CHECKPOINT_HYPER_PARAMS_KEY = saving.CHECKPOINT_KEY

    def __init__(
        self,
        encoder: LayeredEncoder,
        output_dimension: Annotated[int, Range("[1, inf)", "it counts the classes")] = 3,
        classifier: SubmodelConfig = SubmodelConfig(),
        confidence: SubmodelConfig = SubmodelConfig(),
        *,
        task: TaskName = "multiclass",
        lambda_reg: Weight | None = None,
        lambda_warmup: ShareOfSteps = 0.3,
        ponder: PonderKind = "p",
        confidence_reads: ConfidenceInput = "answer",
        exit_loss_weight: Weight = 0.3,
        detach_exits: bool = False,
        distillation: ShareOfTargets = 0.0,
        consistency: Weight = 0.0,
        share_submodels: bool = False,
        num_layers: Annotated[int, Range("[1, inf)")] | None = None,
        halting: HaltingRule = "exact",
        halting_tolerance: Tolerance = 0.0,
        halting_margin: Margin = 1.0,
        thresholds: list[float] | None = None,
        class_weights: list[float] | None = None,
        learning_rate: Rate | None = None,
        submodel_learning_rate: Rate | None = None,
        weight_decay: Weight = 0.01,
        warmup_fraction: ShareOfSteps = 0.1,
        class_names: list[str] | None = None,
        step_tokens: Tokens | None = None,
        window_tokens: Tokens | None = None,
    ) -> None:
        super().__init__()
        check_arguments(DACT.__init__, locals(), "DACT: ")
        _check_together(locals())
        self.save_hyperparameters({})  # makes Lightning log `hparams_initial`
        self.encoder = encoder
        self.output_dimension = output_dimension
        self.task: Task = task_of(task, thresholds)
        self.lambda_warmup = lambda_warmup
        self.ponder = ponder
        self.confidence_reads = confidence_reads
        self.exit_loss_weight = exit_loss_weight
        self.detach_exits = detach_exits
        self.distillation = distillation
        self.consistency = consistency
        self.share_submodels = share_submodels
        self.num_layers = encoder.num_layers if num_layers is None else num_layers
        self.exit_rule = Halting(halting, halting_tolerance, halting_margin)
        if lambda_reg is None:
            lambda_reg = PRICE / self.num_layers if confidence_reads == "answer" else 0.02
        self.lambda_reg = lambda_reg
        self.rate_is_by_encoder = learning_rate is None
        self.learning_rate = learning_rate or encoder.default_learning_rate
        self.submodel_learning_rate = submodel_learning_rate
        self.weight_decay = weight_decay
        self.warmup_fraction = warmup_fraction
        self.class_names = None if class_names is None else [str(name) for name in class_names]
        self.step_tokens = step_tokens
        self.window_tokens = window_tokens
        weights = None if class_weights is None else torch.tensor(class_weights)
        self.register_buffer("class_weights", weights, persistent=False)
        self.calibration = None
        # One per exit layer, for the scores that users see.
        self.temperatures: list[float] | None = None
        # Examples per exit layer, int64 [layers], of the first loader of the last evaluation.
        self.exit_histogram: Tensor | None = None
        self._metrics: dict[int, LoaderMetrics] = {}  # by loader

        sizes = self.num_layers, encoder.hidden_size
        self.classifier = Submodels(classifier, *sizes, output_dimension, share_submodels)
        self.confidence: Submodels
        self._is_refitted = confidence_reads == "answer"
        if self._is_refitted:
            self.confidence = AnswerConfidence(confidence, self.num_layers, self.task)
        else:
            self.confidence = Submodels(confidence, *sizes, 1, share_submodels)
            start_undecided(self.confidence)
        # One per layer, [layers]; the classifier's output is divided by it.
        ones = torch.ones(self.num_layers)
        self.register_buffer("exit_temperatures", ones, persistent=self._is_refitted)
        # The classifier's output and the labels of this epoch's steps, recorded only if no texts
        # are set apart for the confidence; and the step after which it was last fitted.
        self._said: list[tuple[Tensor, Tensor]] = []
        self._records, self._taught_at = False, -1

    # ------------------------------------------------------------------ the halting rule

    @property
    def halting(self) -> HaltingRule:
        """The rule of `exit_rule`."""
        return self.exit_rule.rule

    @halting.setter
    def halting(self, rule: HaltingRule) -> None:
        self.exit_rule = dataclasses.replace(self.exit_rule, rule=rule)

    @property
    def halting_tolerance(self) -> float:
        """The tolerance of `exit_rule`."""
        return self.exit_rule.tolerance

    @halting_tolerance.setter
    def halting_tolerance(self, tolerance: float) -> None:
        self.exit_rule = self.exit_rule.with_dial("halting_tolerance", tolerance)

    @property
    def halting_margin(self) -> float:
        """The margin of `exit_rule`."""
        return self.exit_rule.margin

    @halting_margin.setter
    def halting_margin(self, margin: float) -> None:
        self.exit_rule = self.exit_rule.with_dial("halting_margin", margin)

    @property
    def thresholds(self) -> list[float] | None:
        """The thresholds of the labels; None for classes, or for 0.5 each."""
        found = self.task.thresholds
        return None if found is None else list(found)

    @thresholds.setter
    def thresholds(self, thresholds: Sequence[float] | None) -> None:
        _check_entries("thresholds", thresholds, self.output_dimension)
        self.task = task_of(self.task.name, thresholds)

    @property
    def calibration(self) -> dict[str, Any] | None:
        """The record of `dact.calibrate`; None unless it was made for the current halting rule."""
        record = self._calibration
        if record is None or any(record.get(n) != getattr(self, n) for n in saving.HALTING):
            return None
        return record

    @calibration.setter
    def calibration(self, record: dict[str, Any] | None) -> None:
        self._calibration = record

    # ------------------------------------------------------------------ the DACT unit

    def forward(self, batch: Batch) -> DACTOutput:
        """Run all layers on a dict of Hugging Face inputs, as in training."""
        _, y, h = self._submodels(batch)
        return self._output(y, h)

    def early_exit(self, batch: Batch) -> DACTOutput:
        """Run only as many layers as each example needs, always in eval mode.

        Large batches are fastest. An answer does not depend on the other examples of the batch or
        on their order, except for rounding in half precision."""
        return self._inference(batch, self.exit_rule)

    def full_depth(self, batch: Batch) -> DACTOutput:
        """Return what `forward` returns, computed by the code of `early_exit`, in eval mode."""
        never = dataclasses.replace(self.exit_rule, rule="never")
        output = self._inference(batch, never, record=True)
        assert output.layer_probabilities is not None and output.h is not None
        return self._output(output.layer_probabilities, output.h)

    def _output(self, y: Tensor, h: Tensor) -> DACTOutput:
        a, p = functional.accumulate(y, h)
        exits = self.exit_rule.exit_layers(a.detach(), p.detach(), y.detach(), self.task)
        return DACTOutput(a[:, -1], exits, y, h, p)

    def _inference(self, batch: Batch, halting: Halting, record: bool = False) -> DACTOutput:
        with inference.evaluating(self):
            return inference.early_exit(
                *(self.encoder, self._unit, self.num_layers, batch),
                halting=halting,
                task=self.task,
                record=record,
                step_tokens=self.step_tokens,
                window_tokens=self.window_tokens,
            )

    def _unit(self, layer: int, state: Tensor) -> tuple[Tensor, Tensor]:
        """Return y_n ``[batch, classes]`` and h_n ``[batch]`` of a layer (1-based) from its states,
        in float32 or more."""
        logits = functional.at_least_float32(self.classifier.answer(layer, state))
        y = self.task.answers(logits / self.exit_temperatures[layer - 1])
        seen = y if self.confidence_reads == "answer" else state
        h = functional.at_least_float32(self.confidence.answer(layer, seen)).sigmoid().squeeze(-1)
        return y, h

    def _submodels(self, batch: Batch) -> tuple[Tensor, Tensor, Tensor]:
        """Return the classifier's output and y ``[batch, layers, classes]``, and h ``[batch,
        layers]``, in float32 or more."""
        check_batch(batch)
        if "states" in batch:  # computed before: training of the submodels alone
            states = batch["states"][:, : self.num_layers]
        elif self.num_layers == self.encoder.num_layers:
            states = self.encoder(batch)
        else:
            states = self.encoder.first_states(batch, self.num_layers)
        logits = functional.at_least_float32(self.classifier(states))
        y = self.task.answers(logits / self.exit_temperatures[:, None])
        if self.confidence_reads == "answer":
            seen = y.detach()
        else:
            seen = states.detach() if self.detach_exits else states
        return logits, y, functional.at_least_float32(self.confidence(seen)).sigmoid().squeeze(-1)

    def at_full_depth(self) -> DACT:
        """Switch this model to plain fine-tuning, and return it: every confidence is fixed at 1, so
        only the last layer's answer counts, in the loss as well."""
        start_at(self.confidence, 40.0)  # sigmoid(40) is 1 in float32
        self.confidence.requires_grad_(False)
        self.lambda_reg = self.exit_loss_weight = self.distillation = self.consistency = 0.0
        self.detach_exits = self._is_refitted = False
        self.halting = "never"
        return self

    # ------------------------------------------------------------------ the loss

    @property
    def needs_teacher(self) -> bool:
        """Whether training batches must carry ``teacher`` ``[batch, classes]``."""
        return self.distillation > 0

    def loss(self, batch: Batch, lambda_reg: float | None = None) -> Loss:
        """Return the training loss. It needs no Trainer, so any module can add it to its own loss.

        Args:
            batch: As for `forward`, with ``labels`` int64 ``[batch]`` and, for distillation,
                ``teacher`` ``[batch, classes]``. For an example labelled -100, the teacher is the
                only target, and its weight is that of any other example; without a teacher, the
                example only adds to ponder cost and consistency.
            lambda_reg: λ of this step; `warm_lambda` if left out.

        Raises:
            KeyError: If the batch has no labels, or distillation no teacher.
            ValueError: If a label is out of range.
        """
        labels = labels_of(batch, "training")
        if torch.is_grad_enabled():  # both belong to the weights before training
            self.calibration = self.temperatures = None
        teacher = batch.get("teacher") if self.needs_teacher else None
        if self.needs_teacher and teacher is None:
            raise KeyError(
                f"distillation={self.distillation:g} needs 'teacher' [batch, classes] in training "
                f"batches, got the keys {sorted(batch)}"
            )
        task, sizes = self.task, (self.output_dimension, teacher, self.distillation)
        target = task.targets(labels, *sizes)
        # Not for one example: batch normalization would treat its two passes as two examples.
        twice = self.training and self.consistency > 0 and "states" not in batch and len(labels) > 1
        if twice:
            batch, target = functional.twice(batch), target.repeat(2, 1)
        logits, _, h = self._submodels(batch)
        if self._records:
            self._said.append((logits.detach()[: len(labels)], labels))
        # The temperatures scale answers only; they are not part of the loss.
        y = task.likelihoods(logits)
        a, p = functional.accumulate(y.detach() if self.detach_exits else y, h)
        weights = task.weights(self.class_weights)
        task_loss = functional.task_loss(a[:, -1], target, weights)
        exit_loss = functional.exit_loss(logits, target, weights, task)
        if twice:
            first, second = logits.chunk(2)
            divergence = functional.divergence(first, second, task)
            exit_loss = exit_loss + self.consistency * divergence
        ponder_cost = functional.ponder_cost(p, h, self.ponder)
        price = self.warm_lambda() if lambda_reg is None else lambda_reg
        loss = task_loss + price * ponder_cost + self.exit_loss_weight * exit_loss
        return Loss(loss, task_loss, exit_loss, ponder_cost)

    def teach_confidence(self, batches: Iterable[Batch]) -> None:
        """Fit the confidence, and one temperature per layer, to labelled answers.

        A fit does this automatically. After a custom training loop, call it with examples that the
        loop did not train on.

        Args:
            batches: Batches with ``labels``; at most 2,048 examples are used.

        Raises:
            ValueError: If the confidence reads states, or no example has a label.
        """
        if self.confidence_reads == "state":
            raise ValueError("teach_confidence needs confidence_reads='answer', got 'state'")
        said: list[tuple[Tensor, Tensor]] = []
        with inference.evaluating(self), torch.no_grad():
            for batch in batches:
                moved = move(batch, self.device)
                said.append((self._submodels(moved)[0], labels_of(moved, "training")))
                if sum(len(labels) for _, labels in said) >= MOST_EXAMPLES:
                    break
        self._teach(said)

    def _teach(self, said: list[tuple[Tensor, Tensor]]) -> None:
        """Fit the confidence and the temperatures to the classifier's output and labels."""
        logits, labels = (torch.cat(parts)[-MOST_EXAMPLES:] for parts in zip(*said, strict=True))
        task, target = self.task, self.task.targets(labels, self.output_dimension)
        known = target.any(dim=1)
        if not known.any():
            raise ValueError("the confidence needs labelled examples, and none has a label")
        if not logits.isfinite().all():
            return  # the loss is not finite either, which ends the fit
        logits, target, weights = logits[known], target[known], task.weights(self.class_weights)
        for layer, of_layer in enumerate(logits.double().unbind(dim=1)):

            def losses(temperature: float, logits: Tensor = of_layer) -> Tensor:
                return -(target * task.log_likelihoods(logits / temperature)).sum(dim=-1)

            self.exit_temperatures[layer] = best_temperature(losses)
        y = task.answers(logits / self.exit_temperatures[:, None])
        assert isinstance(self.confidence, AnswerConfidence)
        fit_confidence(self.confidence, y, target, self.lambda_reg, self.ponder, weights)

    def warm_lambda(self) -> float:
        """Return λ at this step: in a fit with a known end, it rises linearly from 0 over the first
        `lambda_warmup` of all optimizer steps."""
        trainer = self._trainer
        if trainer is None or not trainer.training:
            return self.lambda_reg
        warmup = self.lambda_warmup * trainer.estimated_stepping_batches
        if not 0 < warmup < math.inf:
            return self.lambda_reg
        return self.lambda_reg * min(1.0, trainer.global_step / warmup)

    # ------------------------------------------------------------------ steps

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        loss, size = self.loss(batch).loss, len(batch["labels"])
        options: dict[str, Any] = {"on_step": False, "on_epoch": True, "sync_dist": True}
        self.log("train_loss", loss, prog_bar=True, batch_size=size, **options)
        return loss

    def validation_step(
        self, batch: Batch, batch_idx: int, dataloader_idx: int = 0
    ) -> dict[str, Tensor]:
        return self._measure("val", batch, self(batch), None, dataloader_idx)

    def test_step(self, batch: Batch, batch_idx: int, dataloader_idx: int = 0) -> dict[str, Tensor]:
        # Both all layers and early exit run through the code that predicts.
        full, early = self.full_depth(batch), self.early_exit(batch)
        return self._measure("test", batch, full, early, dataloader_idx)

    def predict_step(self, batch: Batch, batch_idx: int, dataloader_idx: int = 0) -> DACTOutput:
        return self.early_exit(batch)

    def _measure(
        self, stage: str, batch: Batch, full: DACTOutput, early: DACTOutput | None, loader: int
    ) -> dict[str, Tensor]:
        """Add a batch to the metrics of a loader (from 0), and return what callbacks need.

        If `early` is None, the answers of early exit are computed from `full`."""
        target, task = labels_of(batch, stage), self.task
        soft = task.targets(target, self.output_dimension)
        weights = task.weights(self.class_weights)
        y, h, p = full.layer_probabilities, full.h, full.p
        assert y is not None and h is not None and p is not None
        a, _ = functional.accumulate(y, h)
        early = early or DACTOutput(functional.answer_at(a, full.exit_layer), full.exit_layer)
        ponder_cost = functional.ponder_cost(p, h, self.ponder)
        loss = functional.task_loss(task.outcomes(a[:, -1]), soft, weights)
        loss = loss + self.lambda_reg * ponder_cost
        task_loss = functional.task_loss(task.outcomes(early.probabilities), soft, weights)
        if loader not in self._metrics:
            sizes = self.output_dimension, self.num_layers
            self._metrics[loader] = LoaderMetrics(task, *sizes, target.device)
        self._metrics[loader].update(target, a, early, loss, task_loss, ponder_cost)
        return {"loss": loss, "exit_layer": early.exit_layer, "layer_probabilities": y, "h": h}

    def _log_metrics(self, stage: str) -> None:
        """Log the metrics of all loaders of an evaluation; those after the first have a suffix."""
        for loader, metrics in self._metrics.items():
            metrics.add_up(self.trainer.strategy)
            suffix = f"/dataloader_idx_{loader}" if loader else ""
            options: dict[str, Any] = {"sync_dist": True, "add_dataloader_idx": False}
            for name, value in metrics.compute().items():
                kind, *layer = name.split("/")
                shown = loader == 0 and name in ("loss", "accuracy", "exit_layer")
                name = "/".join([f"{stage}_{kind}{suffix}", *layer])
                self.log(name, value, prog_bar=shown, **options)
            if loader == 0:
                self.exit_histogram = metrics.exits

    def on_validation_epoch_start(self) -> None:
        self.on_test_epoch_start()
        if self.trainer.state.fn == "fit" and not self.trainer.sanity_checking:
            self.learn_confidence()

    def on_test_epoch_start(self) -> None:
        self._metrics, self.exit_histogram = {}, None

    def on_validation_epoch_end(self) -> None:
        self._log_metrics("val")

    def on_test_epoch_end(self) -> None:
        self._log_metrics("test")

    # ------------------------------------------------------------------ a fit

    @property
    def hparams_initial(self) -> AttributeDict:
        """The settings for loggers: the configuration, and the hyper-parameters of a subclass.

        Names that the datamodule also has are left out, since a logger takes one value for each."""
        settings = self.config() | saving.plain_data(self.hparams)
        encoder = settings["encoder"] or {}
        settings["encoder"] = {n: v for n, v in encoder.items() if not isinstance(v, dict)}
        left_out = {*saving.LEARNED, "subclass"}
        left_out |= {*getattr(getattr(self._trainer, "datamodule", None), "hparams", {})}
        return AttributeDict({name: v for name, v in settings.items() if name not in left_out})

    def setup(self, stage: str) -> None:
        check_agreement(self, getattr(self.trainer, "datamodule", None), training=stage == "fit")
        if stage == "fit" and not any(module.training for module in self.modules()):
            self.train()  # a loaded model, which Lightning would train without dropout

    def on_fit_start(self) -> None:
        self._taught_at = -1
        # Of encoders that are not pretrained, no size says what rate is too high.
        best = vars(self.encoder).get("default_learning_rate", math.inf)
        if self.rate_is_by_encoder or self.learning_rate > 2 * best:
            rank_zero_info(
                f"learning_rate is {self.learning_rate:g}; {self.encoder.default_learning_rate:g} "
                f"is the default for the encoder's hidden size of {self.encoder.hidden_size}"
            )
        if self._is_refitted and self._confidence_batches() is None:
            rank_zero_info(
                "no texts are set apart for the confidence (a datamodule's "
                "confidence_dataloader): it is fitted to answers to training texts, and trusts the "
                "first layers too much if the model has memorized these texts"
            )

    def on_train_epoch_start(self) -> None:
        self._said = []
        self._records = self._is_refitted and self._confidence_batches() is None

    def on_train_epoch_end(self) -> None:
        self.learn_confidence()  # if there was no validation

    def _confidence_batches(self) -> Any:
        data = getattr(self.trainer, "datamodule", None)
        return getattr(data, "confidence_dataloader", lambda: None)()

    def learn_confidence(self) -> None:
        """Fit a confidence that reads answers, unless it was already fitted after this step."""
        step = self.trainer.global_step
        if not self._is_refitted or step == self._taught_at:
            return
        batches = self._confidence_batches()
        # A loader draws a seed, which must not advance the generator of encoder and classifiers.
        with self.trainer.precision_plugin.forward_context(), torch.random.fork_rng(devices=[]):
            if batches is not None:
                self.teach_confidence(batches)
            elif self._said:
                self._teach(self._said)
        # Each process has recorded its own answers; all of them use the first one's fit.
        for learned in (*self.confidence.state_dict().values(), self.exit_temperatures):
            learned.copy_(self.trainer.strategy.broadcast(learned))
        self._taught_at = step

    def configure_optimizers(self) -> Any:
        stacked = [*self.classifier.parameters(), *self.confidence.parameters()]
        encoder = set(self.encoder.parameters())
        # Parameters of the submodels, and any that a subclass adds.
        others = [parameter for parameter in self.parameters() if parameter not in encoder]
        rate = self.submodel_learning_rate or self.learning_rate
        return schedule(
            ((self.encoder.parameters(), self.learning_rate), (others, rate)),
            self.weight_decay,
            self.warmup_fraction,
            self.trainer.estimated_stepping_batches,
            stacked=stacked,
        )

    # ------------------------------------------------------------------ on disk

    def config(self) -> dict[str, Any]:
        """Return the configuration as plain data (strings, numbers, lists, dicts), from which
        `from_config` rebuilds the model."""
        names = (*inspect.signature(DACT).parameters, *saving.LEARNED)
        config = {name: saving.plain_data(getattr(self, name)) for name in names}
        if type(self) is not DACT and self.hparams:
            own = saving.plain_data(self.hparams)
            arguments = {name: value for name, value in own.items() if name[0] != "_"}
            config["subclass"] = {"name": type(self).__qualname__, "arguments": arguments}
        return config

    @classmethod
    def from_config(cls, config: Mapping[str, Any], **overrides: Any) -> Self:
        """Build a model with fresh weights from `config`; keyword arguments replace its entries. A
        subclass is built with the hyper-parameters that it saved.

        Raises:
            TypeError: If an argument of the constructor is missing or unknown.
            ValueError: If the encoder cannot be rebuilt, or an argument is outside its range.
        """
        stored = dict(config)
        learned = {name: stored.pop(name, None) for name in saving.LEARNED}
        subclass, arguments = stored.pop("subclass", None), stored
        if cls is not DACT and subclass is not None:
            passed = {"encoder"} & inspect.signature(cls).parameters.keys()
            arguments = {name: stored[name] for name in passed} | subclass["arguments"]
        arguments = {**arguments, **overrides}
        for name in {"classifier", "confidence"} & arguments.keys():
            if isinstance(arguments[name], Mapping):
                arguments[name] = SubmodelConfig(**arguments[name])
        if "encoder" in arguments and not isinstance(arguments["encoder"], LayeredEncoder):
            arguments["encoder"] = encoders.from_config(arguments["encoder"])
        model = cls(**arguments)
        # They may have been changed after a subclass's constructor set them.
        for name in {*saving.HALTING, "class_names"} & (stored.keys() - overrides.keys()):
            setattr(model, name, stored[name])
        if stored.get("num_layers") in (None, model.num_layers):  # else "all layers" has changed
            for name, value in learned.items():
                setattr(model, name, value)
        return model

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint[saving.CHECKPOINT_KEY] = self.config()

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        saving.adopt(self, checkpoint)

    @classmethod
    def load_from_checkpoint(  # type: ignore[override]
        cls,
        checkpoint_path: str | Path,
        map_location: Any = "cpu",
        *,
        weights_only: bool = True,
        encoder: LayeredEncoder | None = None,
        **overrides: Any,
    ) -> Self:
        """Return the model in a checkpoint, read by torch's weights-only loading.

        Args:
            checkpoint_path: File, or its address, such as ``s3://…``.
            map_location: As for `torch.load`.
            weights_only: Ignored.
            encoder, **overrides: As for `from_pretrained`.
        """
        config, weights = saving.read_checkpoint(checkpoint_path, map_location)
        if encoder is not None:
            overrides["encoder"] = encoder
        model: Self = saving.load(cls, config, weights, overrides)
        return model.to(map_location) if isinstance(map_location, (str, torch.device)) else model

    def save_pretrained(
        self, directory: str | Path, *, metrics: Metrics = None, repo_id: str | None = None
    ) -> None:
        """Write config.json, model.safetensors and a model card into `directory`, which is created
        if needed. A hand-written README.md there is kept.

        `metrics` and `repo_id` go into the card; see `dact.model_card.write_card`."""
        saving.write_folder(self, Path(directory))
        model_card.write_card(Path(directory), self, metrics, repo_id)

    def push_to_hub(self, repo_id: str, *, metrics: Metrics = None, **options: Any) -> str:
        """Publish the model on the Hub in one commit, and return its address;
        `TextClassifier.push_to_hub` publishes the tokenizer as well.

        Args:
            repo_id: Hub id ``"OWNER/NAME"`` of a repository, which is created if needed.
            metrics: As for `save_pretrained`.
            **options: ``token``, ``private`` and ``revision``, as for `dact.hub.publish`.
        """
        return hub.publish(partial(self.save_pretrained, metrics=metrics), repo_id, **options)

    @classmethod
    def from_pretrained(
        cls,
        directory: str | Path,
        *,
        encoder: LayeredEncoder | None = None,
        **overrides: Any,
    ) -> Self:
        """Return a model that `save_pretrained` wrote or `push_to_hub` published, in eval mode.

        Weights that another tool re-saved in half precision are cast to float32.

        Args:
            directory: Folder, or Hub id ``"OWNER/NAME"``.
            encoder: Encoder, built as it was for training; needed only for a custom encoder.
            **overrides: Constructor arguments that replace stored ones; ``revision``, ``token``,
                ``cache_dir`` and ``local_files_only`` are passed to `dact.hub.local_folder`.

        Raises:
            FileNotFoundError: If there is no such folder or repository, or a file is missing.
            ValueError: If a file cannot be read, or the weights do not fit the configuration.
        """
        options = {name: overrides.pop(name) for name in hub.OPTIONS & overrides.keys()}
        config, weights = saving.read_folder(hub.local_folder(directory, **options))
        if encoder is not None:
            overrides["encoder"] = encoder
        model: Self = saving.load(cls, config, weights, overrides)
        return model.eval()


def labels_of(batch: Batch, stage: str) -> Tensor:
    """Return the labels of a batch; of all stages, only ``"training"`` accepts -100."""
    check_batch(batch)
    if not isinstance(batch.get("labels"), Tensor):
        raise KeyError(
            f"a batch for {stage} needs 'labels' [batch], a tensor, got the keys {sorted(batch)}"
        )
    if stage != "training" and (batch["labels"] == functional.UNLABELLED).any():
        raise ValueError(f"a batch for {stage} has the label -100: only training takes it")
    return batch["labels"]


def _check_together(given: Mapping[str, Any]) -> None:
    if given["num_layers"] is not None:
        most = given["encoder"].num_layers
        check_count("DACT: num_layers", given["num_layers"], 1, most, "the layers of the encoder")
    for name in ("detach_exits", "consistency"):
        if given[name] and given["exit_loss_weight"] == 0:
            raise ValueError(f"DACT: {name} needs an exit_loss_weight above 0, got 0")
    classes, fewest = given["output_dimension"], task_of(given["task"]).fewest
    check_count("DACT: output_dimension", classes, fewest, hint="it counts the classes")
    for name in ("class_weights", "class_names", "thresholds"):
        _check_entries(name, given[name], classes)


def _check_entries(name: str, value: Sequence[Any] | None, classes: int) -> None:
    if value is not None and len(value) != classes:
        raise ValueError(
            f"DACT: {name} must have one entry per class ({classes}), got {len(value)}: {value}"
        )
