"""DACT, the LightningModule: an encoder, a classifier and a confidence."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any, Self, Unpack

import torch
from lightning.pytorch import Callback
from lightning.pytorch.utilities.rank_zero import rank_zero_info  # type: ignore[attr-defined]
from torch import Tensor, nn

from dact import functional, hub, inference, model_card, saving
from dact.agreement import Agreement
from dact.arguments import check_arguments
from dact.consistency import divergence, twice
from dact.encoders.base import Batch, LayeredEncoder, check_batch
from dact.functional import Halting, HaltingRule, PonderKind
from dact.metric_logging import MetricLogging, labels_of, teacher_of
from dact.model_card import Metrics
from dact.optimization import optimizer_steps, schedule
from dact.outputs import DACTOutput as DACTOutput
from dact.outputs import Loss as Loss
from dact.submodels import SubmodelConfig, Submodels, start_undecided


class DACT(MetricLogging):
    r"""A classifier that spends only as many layers of its encoder as each example needs.

    Training minimises :math:`-\log a_N[\text{target}] + \lambda \rho` plus `exit_loss_weight` times
    the mean cross-entropy of the layers' own classifications; see `dact.functional` for the symbols
    and their source. The logged val_loss leaves the exit loss and the λ warm-up out, so that epochs
    and trials compare; val_task_loss, val_accuracy, val_macro_f1 and val_exit_layer are those of
    early exit.

    At a tolerance of 0 and a margin of 1 the class of early exit is provably that of full depth, in
    float32. Half precision rounds y and h, which may change the class of one example in a few
    hundred. With several processes, Lightning repeats some validation examples in a fit and, of
    data of your own, in a test: use one for exact numbers.

    Args:
        encoder: The stack of layers, one of `dact.encoders` or your own.
        output_dimension: Number of classes, 2 or more.
        classifier: Architecture of the classifier f.
        confidence: Architecture of the confidence g.
        lambda_reg: λ, the price of a unit of ponder cost, 0 or more.
        lambda_warmup: Share of the optimizer steps, in [0, 1], over which λ rises linearly from 0.
        ponder: The ponder cost ρ, ``"p"`` (mean of Σ p_n) or ``"h"`` (mean of Σ h_n).
        exit_loss_weight: Weight of the exit loss, 0 or more.
        detach_exits: Whether encoder and classifier learn only from the exit loss, as in a
            multi-exit model, while the loss of a_N and the ponder cost train only the confidence.
            The first layers then answer better.
        distillation: Share of a teacher's probabilities in the targets of a_N and of every y_n, in
            [0, 1]; the rest is the label. Training batches then carry ``teacher`` ``[batch,
            classes]``.
        consistency: Weight, 0 or more, of the divergence between the y_n of two passes with
            different dropout masks, a part of the exit loss (`dact.consistency`). Above 0, a step
            takes up to twice the time and memory.
        share_submodels: Whether all layers share one pair of submodels instead of having one pair
            each.
        num_layers: Number of layers that are used, counted from the encoder's first; all of them if
            left out. *Full depth* means these layers. (Under DDP the parameters of the others never
            get a gradient: use the strategy ``"ddp_find_unused_parameters_true"``, or cut the
            encoder itself.)
        halting: Halting rule, ``"exact"``, ``"paper"`` or ``"never"``; see
            `dact.functional.can_halt`.
        halting_tolerance: Largest probability, in [0, 1), by which the class that the halting rule
            returns may end behind the final winner.
        halting_margin: Lead, in [0, 1], of the first class of y_n over its second above which an
            example leaves as well (see `dact.functional.is_clear`). It is the second dial: smaller
            means fewer layers; 1 leaves all to the halting rule.
        class_weights: One weight per class for the training and validation losses.
        learning_rate: Peak learning rate of AdamW; the encoder's `default_learning_rate` if left
            out, which a fit says.
        submodel_learning_rate: Peak learning rate of the two submodels; `learning_rate` if left
            out.
        weight_decay: Weight decay of AdamW, on matrices only (not on biases and norms).
        warmup_fraction: Share of the optimizer steps over which the learning rate rises; it then
            falls to 0.
        class_names: Names of the classes; taken from the datamodule if left out.
        step_tokens: Number of tokens, padding included, per layer in a step of early exit; by
            default by the device.
        window_tokens: Number of tokens whose states early exit holds at a time; 16 steps by
            default.

    Raises:
        TypeError: If the encoder is not a `LayeredEncoder`.
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
    # Lightning's own key would hold the form that LightningCLI writes; this is what `config`
    # returns.
    CHECKPOINT_HYPER_PARAMS_KEY = saving.CHECKPOINT_KEY

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
        detach_exits: bool = False,
        distillation: float = 0.0,
        consistency: float = 0.0,
        share_submodels: bool = False,
        num_layers: int | None = None,
        halting: HaltingRule = "exact",
        halting_tolerance: float = 0.0,
        halting_margin: float = 1.0,
        class_weights: list[float] | None = None,
        learning_rate: float | None = None,
        submodel_learning_rate: float | None = None,
        weight_decay: float = 0.01,
        warmup_fraction: float = 0.1,
        class_names: list[str] | None = None,
        step_tokens: int | None = None,
        window_tokens: int | None = None,
    ) -> None:
        super().__init__()
        saving.name_plainly(self)
        self.subclass = saving.own_arguments(self, DACT)
        check_arguments(locals())
        self.encoder = encoder
        self.output_dimension = output_dimension
        self.lambda_reg = lambda_reg
        self.lambda_warmup = lambda_warmup
        self.ponder = ponder
        self.exit_loss_weight = exit_loss_weight
        self.detach_exits = detach_exits
        self.distillation = distillation
        self.consistency = consistency
        self.share_submodels = share_submodels
        self.num_layers = encoder.num_layers if num_layers is None else num_layers
        self.exit_rule = Halting(halting, halting_tolerance, halting_margin)
        self.rate_is_by_encoder = learning_rate is None
        self.learning_rate = (
            encoder.default_learning_rate if learning_rate is None else learning_rate
        )
        self.submodel_learning_rate = submodel_learning_rate
        self.weight_decay = weight_decay
        self.warmup_fraction = warmup_fraction
        self.class_names = None if class_names is None else [str(name) for name in class_names]
        self.step_tokens = step_tokens
        self.window_tokens = window_tokens
        weights = None if class_weights is None else torch.tensor(class_weights)
        self.register_buffer("class_weights", weights, persistent=False)
        self.calibration = None
        self.temperatures: list[float] | None = (
            None  # one per exit layer; they scale scores that are shown
        )
        self.provenance = (
            model_card.Provenance()
        )  # facts of the run that it was loaded from, for its model card
        self.steps_done = 0  # training steps so far, for the warm-up of λ
        self.total_steps = float("inf")  # all training steps; the Trainer knows them

        make = partial(
            Submodels,
            num_layers=self.num_layers,
            hidden_size=encoder.hidden_size,
            share=share_submodels,
        )
        self.classifier = make(classifier, output_size=output_dimension)
        self.confidence = make(confidence, output_size=1)
        start_undecided(self.confidence)
        self.make_metrics()

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
    def calibration(self) -> dict[str, Any] | None:
        """The record of `dact.calibrate`; None unless it was made for the present halting rule."""
        record = self._calibration
        if record is None or Halting(*(record[name] for name in saving.HALTING)) != self.exit_rule:
            return None
        return record

    @calibration.setter
    def calibration(self, record: dict[str, Any] | None) -> None:
        self._calibration = record

    # ------------------------------------------------------------------ the DACT unit

    def forward(self, batch: Batch) -> DACTOutput:
        """Run all layers, as training does. `batch` is a dict of Hugging Face's inputs; labels are
        not needed."""
        logits, h = self._submodels(batch)
        y = logits.softmax(dim=-1)
        a, p = functional.accumulate(y, h)
        return DACTOutput(a[:, -1], self.exit_layers(a.detach(), p.detach(), y.detach()), y, h, p)

    def early_exit(self, batch: Batch) -> DACTOutput:
        """Run each example only as deep as it needs, always in eval mode.

        Large batches are the fastest: examples of similar length go through the layers together,
        and the remaining ones are regrouped. Neither the batch nor the order of its rows changes an
        answer, except for rounding in half precision."""
        return self._inference(batch, self.exit_rule)

    def full_depth(self, batch: Batch) -> DACTOutput:
        """Return what `forward` returns, by the code of `early_exit`: for large batches, in eval
        mode, no gradients."""
        output = self._inference(
            batch, dataclasses.replace(self.exit_rule, rule="never"), record=True
        )
        y, h = output.layer_probabilities, output.h
        assert y is not None and h is not None
        a, p = functional.accumulate(y, h)
        return DACTOutput(a[:, -1], self.exit_layers(a, p, y), y, h, p)

    def _inference(self, batch: Batch, halting: Halting, record: bool = False) -> DACTOutput:
        with inference.evaluating(self):
            return inference.early_exit(
                self.encoder,
                self.classifier,
                self.confidence,
                batch,
                halting=halting,
                step_tokens=self.step_tokens,
                window_tokens=self.window_tokens,
                record=record,
            )

    def exit_layers(self, a: Tensor, p: Tensor, y: Tensor) -> Tensor:
        """Return the exit layers of this model, int64 ``[batch]``, from a, p and y; see
        `functional.exit_layers`."""
        return self.exit_rule.exit_layers(a, p, y)

    def _submodels(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Return the logits of y ``[batch, layers, classes]`` and h ``[batch, layers]``, in float32
        or more."""
        check_batch(batch)
        if "states" in batch:  # computed before: training of the submodels alone
            states = batch["states"][:, : self.num_layers]
        elif self.num_layers == self.encoder.num_layers:
            states = self.encoder(batch)
        else:
            states = self.encoder.first_states(batch, self.num_layers)
        logits = functional.at_least_float32(self.classifier(states))
        if self.detach_exits:
            states = states.detach()
        return logits, functional.at_least_float32(self.confidence(states)).sigmoid().squeeze(-1)

    def at_full_depth(self) -> DACT:
        """Return this model, changed to plain fine-tuning: all layers run, and only the last one
        answers and learns.

        Every confidence stays at 1, so that a_N = y_N. This is for baselines and teachers.
        """
        for submodel in self.confidence:
            last = submodel[-1]  # type: ignore[index]
            nn.init.zeros_(last.weight)
            nn.init.constant_(last.bias, 40.0)  # sigmoid(40) is 1 in float32
        self.confidence.requires_grad_(False)
        self.lambda_reg, self.exit_loss_weight, self.distillation, self.consistency = (
            0.0,
            0.0,
            0.0,
            0.0,
        )
        self.detach_exits = False
        self.halting = "never"
        return self

    # ------------------------------------------------------------------ steps

    @property
    def needs_teacher(self) -> bool:
        """Whether training batches must carry ``teacher`` ``[batch, classes]``."""
        return self.distillation > 0

    def loss(self, batch: Batch, lambda_reg: float | None = None) -> Loss:
        """Compute the training loss. It logs nothing and needs no Trainer, so that any module can
        add it to its own.

        Args:
            batch: As for `forward`, with ``labels`` int64 ``[batch]`` and, for distillation,
                ``teacher`` ``[batch, classes]``. An example labelled -100 learns only from its
                teacher, with the weight of any other; without a teacher it only adds to ponder cost
                and consistency.
            lambda_reg: λ of this step. If left out, it rises from 0 over the first `lambda_warmup`
                of `total_steps`; `steps_done` counts the calls in train mode. A Trainer sets both;
                elsewhere set `total_steps`.

        Raises:
            KeyError: If the batch has no labels, or distillation no teacher.
            ValueError: If a label is out of range.
        """
        labels = labels_of(batch, "train")
        teacher = teacher_of(batch, self.distillation)
        target = functional.soft_targets(labels, self.output_dimension, teacher, self.distillation)
        # Batch normalization would take two passes of one example for two examples.
        passes = (
            2
            if self.training and self.consistency > 0 and "states" not in batch and len(labels) > 1
            else 1
        )
        (logits, h), target = (
            self._submodels(twice(batch) if passes == 2 else batch),
            target.repeat(passes, 1),
        )
        y = logits.softmax(dim=-1)
        a, p = functional.accumulate(y.detach() if self.detach_exits else y, h)
        task_loss = functional.task_loss(a[:, -1], target, self.class_weights)
        exit_loss = functional.exit_loss(logits, target, self.class_weights)
        if passes == 2:
            exit_loss = exit_loss + self.consistency * divergence(*logits.chunk(2))
        ponder_cost = functional.ponder_cost(p, h, self.ponder)
        price = self._warm_lambda() if lambda_reg is None else lambda_reg
        loss = task_loss + price * ponder_cost + self.exit_loss_weight * exit_loss
        self.steps_done += self.training
        return Loss(loss, task_loss, exit_loss, ponder_cost)

    def _warm_lambda(self) -> float:
        """Return λ at this step: it rises linearly from 0 over the first `lambda_warmup` of all
        steps."""
        trainer = self._trainer
        if trainer is not None and trainer.training and trainer.lightning_module is self:
            self.steps_done = trainer.global_step  # optimizer steps, also after a resume
        warmup = self.lambda_warmup * self.total_steps
        if not 0 < warmup < float("inf"):
            return self.lambda_reg
        return self.lambda_reg * min(1.0, self.steps_done / warmup)

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        loss = self.loss(batch).loss
        size = len(batch["labels"])
        self.log(
            "train_loss",
            loss,
            on_step=False,
            on_epoch=True,
            prog_bar=True,
            batch_size=size,
            sync_dist=True,
        )
        return loss

    def validation_step(
        self, batch: Batch, batch_idx: int, dataloader_idx: int = 0
    ) -> dict[str, Tensor]:
        return self.measure("val", batch, self(batch), None, dataloader_idx)

    def test_step(self, batch: Batch, batch_idx: int, dataloader_idx: int = 0) -> dict[str, Tensor]:
        # Both full depth and early exit are computed by the code that predicts.
        return self.measure(
            "test", batch, self.full_depth(batch), self.early_exit(batch), dataloader_idx
        )

    def predict_step(self, batch: Batch, batch_idx: int, dataloader_idx: int = 0) -> DACTOutput:
        return self.early_exit(batch)

    # ------------------------------------------------------------------ a fit

    def configure_callbacks(self) -> list[Callback]:
        trainer: Any = self.trainer
        return [] if any(isinstance(one, Agreement) for one in trainer.callbacks) else [Agreement()]

    def setup(self, stage: str) -> None:
        self.show_settings(
            {name: value for name, value in self.config().items() if name not in saving.LEARNED}
        )
        if stage == "fit" and not any(module.training for module in self.modules()):
            self.train()  # a loaded model, which Lightning would train without dropout

    def on_fit_start(self) -> None:
        # They belong to the weights before the fit.
        self.calibration = self.temperatures = None
        self.provenance = model_card.Provenance()
        if self.rate_is_by_encoder:
            rank_zero_info(
                f"learning_rate is {self.learning_rate:g}, by the encoder's hidden size of "
                f"{self.encoder.hidden_size}; set learning_rate to change it"
            )

    def on_train_start(self) -> None:
        # Infinite or -1 if the end is not known: nothing warms up or decays. Lightning's tuners
        # train more than once.
        self.total_steps = optimizer_steps(self.trainer)

    def configure_optimizers(self) -> Any:
        encoder = {id(parameter) for parameter in self.encoder.parameters()}
        others = [
            one for one in self.parameters() if id(one) not in encoder
        ]  # the submodels', and those of a subclass
        rate = self.submodel_learning_rate or self.learning_rate
        rates = ((self.encoder.parameters(), self.learning_rate), (others, rate))
        return schedule(
            rates, self.weight_decay, self.warmup_fraction, optimizer_steps(self.trainer)
        )

    # ------------------------------------------------------------------ on disk

    def config(self) -> dict[str, Any]:
        """Return plain data (strings, numbers, lists, dicts) from which this model can be built
        again."""
        return saving.config_of(self, DACT)

    @classmethod
    def from_config(cls, config: Mapping[str, Any], **overrides: Any) -> Self:
        """Build a model with fresh weights as `config` describes it; keyword arguments replace its
        entries."""
        return saving.build(cls, DACT, config, overrides)

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
        weights_only: bool | None = None,
        encoder: LayeredEncoder | None = None,
        **overrides: Any,
    ) -> Self:
        """Return the model of a checkpoint, under torch's weights-only loading; `pretrained`
        weights are not read.

        Args:
            checkpoint_path: File that the Trainer's checkpointing wrote, or its address, such as
                ``s3://…``.
            map_location: As for `torch.load`.
            weights_only: Never False: a checkpoint of dact holds only data.
            encoder: Encoder, built as it was for training; needed only for an encoder of your own.
            **overrides: Constructor arguments that replace those of the checkpoint, such as
                ``halting_tolerance=0.3``.

        Raises:
            FileNotFoundError: If there is no such file.
            ValueError: If the file cannot be read, is not a checkpoint of DACT, or does not fit.
        """
        if weights_only is False:
            raise ValueError(
                "weights_only=False would let a checkpoint run code; dact's checkpoints load without it"
            )
        config, weights = saving.read_checkpoint(checkpoint_path, map_location)
        if encoder is not None:
            overrides["encoder"] = encoder
        model = saving.load(cls, DACT, config, weights, str(checkpoint_path), overrides)
        return model.to(map_location) if isinstance(map_location, (str, torch.device)) else model

    def save_pretrained(
        self, directory: str | Path, *, metrics: Metrics = None, repo_id: str | None = None
    ) -> None:
        """Write config.json, model.safetensors and a model card into `directory`, which is created
        if needed.

        Args:
            directory: Folder to write to. A README.md there that was written by hand is kept.
            metrics, repo_id: Content of metrics.json, and Hub id, for the card; see
                `dact.model_card.write_card`.
        """
        saving.write_folder(self, DACT, Path(directory))
        model_card.write_card(Path(directory), self, metrics, repo_id)

    def push_to_hub(
        self, repo_id: str, *, metrics: Metrics = None, **options: Unpack[hub.Publication]
    ) -> str:
        """Publish the model on the Hub in one commit; `TextClassifier.push_to_hub` publishes its
        tokenizer as well.

        Args:
            repo_id: Hub id ``"OWNER/NAME"`` of a repository, which is created if needed.
            metrics: As for `save_pretrained`.
            **options: ``token``, ``private``, ``revision`` and so on; see `dact.hub.Publication`.

        Returns:
            Address of the commit. Errors are those of `dact.hub.publish`.
        """
        return hub.publish(partial(self.save_pretrained, metrics=metrics), repo_id, options)

    @classmethod
    def from_pretrained(
        cls,
        directory: str | Path,
        *,
        encoder: LayeredEncoder | None = None,
        revision: str | None = None,
        token: str | bool | None = None,
        cache_dir: str | Path | None = None,
        local_files_only: bool = False,
        **overrides: Any,
    ) -> Self:
        """Return the model, in eval mode, that `save_pretrained` wrote or `push_to_hub` published.

        Files that other tools re-saved load as well, such as weights in half precision, which are
        cast to float32.

        Args:
            directory: A folder with config.json and model.safetensors, or a Hub id
                ``"OWNER/NAME"``.
            encoder: Encoder; needed only for an encoder of your own.
            revision, token, cache_dir, local_files_only: Options for a Hub id; see
                `dact.hub.local_folder`.
            **overrides: Constructor arguments that replace those of the folder, such as
                ``halting_tolerance=0.3``.

        Raises:
            FileNotFoundError: If there is no such folder or repository, or one of the two files is
                missing.
            ValueError: If a file cannot be read or does not fit.
        """
        folder = hub.local_folder(
            directory,
            revision=revision,
            token=token,
            cache_dir=cache_dir,
            local_files_only=local_files_only,
        )
        config, weights = saving.read_folder(folder, DACT)
        encoder = saving.encoder_with_files(config, folder) if encoder is None else encoder
        if encoder is not None:
            overrides["encoder"] = encoder
        model = saving.load(cls, DACT, config, weights, str(directory), overrides).eval()
        model.provenance = model_card.read_provenance(folder)
        return model
