"""Hugging Face models as layered encoders: eight families, each run layer by layer.

For each family, running the layers one by one gives the same states as the plain forward pass of
transformers 5."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from operator import attrgetter
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForSequenceClassification,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers.masking_utils import (
    create_bidirectional_mask,
    create_bidirectional_sliding_window_mask,
)

from dact.checks import check_choice, check_count
from dact.encoders.base import Batch, LayeredEncoder, Pooling, pool_tokens
from dact.encoders.pretrained import resolve_pretrained

# Entries of a configuration that make transformers fetch and run code: kernels from the Hub, or
# modules next to the configuration. An attribute map could hide them under other names.
RUNS_CODE = {
    "attn_implementation",
    "experts_implementation",
    "auto_map",
    "kernel_config",
    "attribute_map",
}
# Pattern of the encoder's weight names in a model of dact, and its replacement in transformers.
OF_DACT = {r"^encoder\.model\.": ""}


def _attention_bias(model: Any, hidden: Tensor, mask: Tensor) -> Tensor | None:
    return create_bidirectional_mask(config=model.config, inputs_embeds=hidden, attention_mask=mask)


@dataclass(frozen=True)
class _Family:
    """How one family of models runs its layers; the defaults fit BERT.

    Args:
        embed: Function from (model, inputs) to the hidden state before layer 1.
        layers: Attribute path of the list of layers in the model.
        layer: Function from (model, 1-based layer, its module, hidden, context) to the hidden state
            after it.
        context: Function from (model, hidden, mask) to what all layers share.
        inputs: Names of the batch entries that the embedding takes.
        norm: Function from the model to the norm after its last layer, for families with
            unnormalised layers.
    """

    embed: Callable[..., Tensor] = lambda model, inputs: model.embeddings(**inputs)
    layers: str = "encoder.layer"
    layer: Callable[..., Tensor] = lambda model, n, module, hidden, context: module(hidden, context)
    context: Callable[[Any, Tensor, Tensor], Any] = _attention_bias
    inputs: tuple[str, ...] = ("input_ids", "token_type_ids")
    norm: Callable[[Any], nn.Module | None] = lambda model: None


def _electra_embed(model: Any, inputs: Batch) -> Tensor:
    hidden = model.embeddings(**inputs)
    return model.embeddings_project(hidden) if hasattr(model, "embeddings_project") else hidden


def _deberta_context(model: Any, hidden: Tensor, mask: Tensor) -> tuple[Tensor, ...]:
    encoder = model.encoder
    positions, embeddings = encoder.get_rel_pos(hidden), encoder.get_rel_embedding()
    return mask, encoder.get_attention_mask(mask), positions, embeddings


def _deberta_layer(model: Any, n: int, module: Any, hidden: Tensor, context: Any) -> Tensor:
    mask, bias, positions, embeddings = context
    output = module(hidden, bias, relative_pos=positions, rel_embeddings=embeddings)[0]
    if n == 1 and model.encoder.conv is not None:
        output = model.encoder.conv(hidden, output, mask)
    return output


def _modernbert_context(model: Any, hidden: Tensor, mask: Tensor) -> dict[str, tuple[Any, Any]]:
    """Return (attention bias, rotary embedding) for each kind of layer, full or sliding-window."""
    positions = torch.arange(hidden.shape[1], device=hidden.device).unsqueeze(0)
    arguments = {"config": model.config, "inputs_embeds": hidden, "attention_mask": mask}
    biases = {
        "full_attention": create_bidirectional_mask(**arguments),
        "sliding_attention": create_bidirectional_sliding_window_mask(**arguments),
    }
    kinds = set(model.config.layer_types)
    return {kind: (biases[kind], model.rotary_emb(hidden, positions, kind)) for kind in kinds}


def _modernbert_layer(model: Any, n: int, module: Any, hidden: Tensor, context: Any) -> Tensor:
    bias, rotary = context[module.attention_type]
    return module(hidden, attention_mask=bias, position_embeddings=rotary)


FAMILIES: dict[str, _Family] = {
    "bert": _Family(),
    "roberta": _Family(),
    "electra": _Family(embed=_electra_embed),
    "distilbert": _Family(layers="transformer.layer", inputs=("input_ids",)),
    "albert": _Family(
        embed=lambda model, inputs: model.encoder.embedding_hidden_mapping_in(
            model.embeddings(**inputs)
        ),
        layers="encoder.albert_layer_groups",
    ),
    "mpnet": _Family(
        layer=lambda model, n, module, hidden, context: module(hidden, *context)[0],
        context=lambda model, hidden, mask: (
            _attention_bias(model, hidden, mask),
            model.encoder.compute_position_bias(hidden),
        ),
        inputs=("input_ids",),
    ),
    "deberta-v2": _Family(
        layer=_deberta_layer,
        context=_deberta_context,
        inputs=("input_ids", "token_type_ids", "attention_mask"),
    ),
    "modernbert": _Family(
        layers="layers",
        layer=_modernbert_layer,
        context=_modernbert_context,
        inputs=("input_ids",),
        norm=lambda model: model.final_norm,
    ),
}


def _learning_rate(hidden_size: int) -> float:
    """Return a peak learning rate for fine-tuning: wide encoders need a lower one."""
    # Measured on 2,000 texts of VADER: MPNet-base (768 wide) reaches 80.4 % at 3e-5 and 77.6 % at
    # 1e-4; MiniLM-L6 (384 wide) is best at 1e-4.
    if hidden_size <= 512:
        return 1e-4
    return 3e-5 if hidden_size <= 896 else 2e-5


class HuggingFaceEncoder(LayeredEncoder):
    """A pretrained encoder from the transformers library.

    Families: BERT, RoBERTa, ELECTRA, DistilBERT, ALBERT, MPNet, DeBERTa-v2 and ModernBERT. Weights
    are loaded in float32 whatever their type in the checkpoint, without the head of another task.

    Args:
        pretrained: Hub id, local folder, or ``"package:NAME/PATH"`` (a folder inside an installed
            package). From a ``model/`` folder that dact wrote, only the encoder is loaded.
        pooling: ``"mean"`` of the tokens or the ``"first"`` token. In the early layers of a
            sentence encoder, the first token says little about the text.
        num_layers: Number of layers to keep, counted from the first; all by default.

    Raises:
        ValueError: If the model cannot be found, is of another family, lacks weights, or has fewer
            layers.

    Example:
        >>> from transformers import BertConfig
        >>> tiny = BertConfig(
        ...     hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32
        ... )
        >>> encoder = HuggingFaceEncoder.from_model(AutoModel.from_config(tiny))
        >>> encoder({"input_ids": torch.tensor([[5, 6, 7]])}).shape
        torch.Size([1, 2, 16])
    """

    def __init__(
        self, pretrained: str, *, pooling: Pooling = "mean", num_layers: int | None = None
    ) -> None:
        super().__init__()
        self._adopt(_load(pretrained, num_layers), pooling)

    @classmethod
    def from_model(cls, model: PreTrainedModel, *, pooling: Pooling = "mean") -> HuggingFaceEncoder:
        """Return an encoder around a model that is already in memory, which is put into train mode
        and loses its pooler."""
        encoder = cls.__new__(cls)
        LayeredEncoder.__init__(encoder)
        encoder._adopt(model, pooling)
        return encoder

    @classmethod
    def from_config(cls, model: dict[str, Any], pooling: Pooling) -> HuggingFaceEncoder:
        """Return the encoder that `config` described, with random weights; no pretrained model is
        read."""
        _check_family(model.get("model_type"), "the encoder's configuration")
        config = _config_from(model)
        return cls.from_model(AutoModel.from_config(config, dtype=torch.float32), pooling=pooling)

    def _adopt(self, model: PreTrainedModel, pooling: Pooling) -> None:
        check_choice("HuggingFaceEncoder: pooling", pooling, Pooling)
        _check_family(model.config.model_type, type(model).__name__)
        model = model.base_model  # without the head of another task
        if getattr(model, "pooler", None) is not None:
            # It is never used here, and DDP fails on parameters without a gradient.
            model.pooler = None
        # Loaded models are in eval mode, and Lightning would train them without dropout.
        self.model = model.train()
        self.pooling = pooling
        self.num_layers = model.config.num_hidden_layers
        self.hidden_size = model.config.hidden_size
        self.default_learning_rate = _learning_rate(self.hidden_size)
        self.vocab_size = model.config.vocab_size
        self.max_length = longest_input(model)
        table = _position_table(model)
        # RoBERTa and MPNet count positions from the first token, the others from the first column.
        self.counts_columns = table is not None and table.padding_idx is None

    @property
    def _family(self) -> _Family:
        # A property, since lambdas cannot be pickled.
        return FAMILIES[self.model.config.model_type]

    def embed(self, batch: Batch) -> Tensor:
        inputs = {name: batch[name] for name in self._family.inputs if name in batch}
        if "attention_mask" in self._family.inputs:
            # DeBERTa's embeddings take the attention mask as `mask`.
            inputs.pop("attention_mask", None)
            inputs["mask"] = self.mask(batch)
        return self._family.embed(self.model, inputs)

    def context(self, hidden: Tensor, mask: Tensor) -> Any:
        return self._family.context(self.model, hidden, mask)

    def keep(self, context: Any, rows: Tensor, hidden: Tensor, mask: Tensor) -> Any:
        is_bias = self._family.context is _attention_bias
        if is_bias and context is None:
            # No position is masked, so none is in the remaining rows.
            return None
        if is_bias and isinstance(context, Tensor) and context.dim() == 4:
            length = hidden.shape[1]
            return context[..., :length, :length].index_select(0, rows)
        return self.context(hidden, mask)

    def layer(self, layer: int, hidden: Tensor, context: Any) -> Tensor:
        # ALBERT has fewer modules than layers: each serves a group of layers, one after the other.
        modules = attrgetter(self._family.layers)(self.model)
        # Rounded as in transformers.
        module = modules[int((layer - 1) / (self.model.config.num_hidden_layers / len(modules)))]
        return self._family.layer(self.model, layer, module, hidden, context)

    def pool(self, layer: int, hidden: Tensor, mask: Tensor) -> Tensor:
        norm = self._family.norm(self.model)
        return pool_tokens(hidden if norm is None else norm(hidden), mask, self.pooling)

    def config(self) -> dict[str, Any] | None:
        if type(self) is not HuggingFaceEncoder:
            # A subclass may pool or embed in another way.
            return None
        model = json.loads(self.model.config.to_json_string(use_diff=False))
        # These entries describe how the model was loaded.
        for name in ("_name_or_path", "architectures", "transformers_version", "dtype"):
            model.pop(name, None)
        return {"type": "HuggingFaceEncoder", "pooling": self.pooling, "model": model}


def longest_input(model: PreTrainedModel) -> int | None:
    """Return the number of positions, None for families that have only relative ones."""
    table = _position_table(model)
    if table is None:
        return None
    # RoBERTa and MPNet count positions from the id after the padding id.
    return table.num_embeddings - (0 if table.padding_idx is None else table.padding_idx + 1)


def _position_table(model: PreTrainedModel) -> Any:
    """Return the embedding of absolute positions, None if the model has none."""
    table = getattr(getattr(model.base_model, "embeddings", None), "position_embeddings", None)
    return table if isinstance(table, nn.Embedding) else None


def is_of_dact(pretrained: str) -> bool:
    """Return whether a model on the Hub or in a folder was saved by dact."""
    return _is_of_dact(_describe(pretrained))


def load_sequence_classifier(pretrained: str) -> tuple[nn.Module, list[str]]:
    """Return a fine-tuned sequence-classification model and the names of its classes, in the order
    of its outputs.

    Raises:
        ValueError: If there is no such model, or it lacks weights of its classifier.
    """
    config = _config_from(_describe(pretrained))
    model = _load_weights(AutoModelForSequenceClassification, pretrained, config)
    return model, [config.id2label[label] for label in range(config.num_labels)]


def _load(pretrained: str, num_layers: int | None) -> PreTrainedModel:
    described, renamed = _describe(pretrained), {}
    if _is_of_dact(described):
        # Only the encoder is loaded; the model's other weights are ignored.
        described, renamed = (described["encoder"] or {}).get("model", {}), OF_DACT
        if not described:
            raise ValueError(
                f"pretrained={pretrained!r} is a model of dact whose encoder is not from Hugging "
                "Face: load the whole model with DACT.from_pretrained"
            )
    _check_family(described.get("model_type"), f"pretrained={pretrained!r}")
    config = _config_from(described)
    _keep_layers(config, num_layers, pretrained)
    return _load_weights(AutoModel, pretrained, config, key_mapping=renamed)


def _describe(pretrained: str) -> dict[str, Any]:
    """Return the content of a model's config.json."""
    try:
        return PreTrainedConfig.get_config_dict(resolve_pretrained(pretrained))[0]
    except OSError as error:
        raise ValueError(
            f"no model at pretrained={pretrained!r}. Expected a Hub id, a folder with a "
            f"config.json, or 'package:NAME/PATH'. The library says: {str(error).splitlines()[0]}"
        ) from error


def _is_of_dact(described: dict[str, Any]) -> bool:
    return str(described.get("format")).startswith("dact/")


def _check_family(model_type: str | None, what: str) -> None:
    if model_type not in FAMILIES:
        raise ValueError(
            f"{what} is of the architecture {model_type!r}, which HuggingFaceEncoder cannot run "
            f"layer by layer. Supported: {', '.join(sorted(FAMILIES))}"
        )


def _config_from(described: dict[str, Any]) -> PreTrainedConfig:
    """Return a configuration of transformers, without the entries that make it run code."""
    harmless = {
        name: value
        for name, value in described.items()
        if name.lstrip("_").removesuffix("_internal") not in RUNS_CODE
    }
    config: PreTrainedConfig = AutoConfig.for_model(**harmless)
    return config


def _load_weights(
    kind: Any, pretrained: str, config: PreTrainedConfig, **options: Any
) -> PreTrainedModel:
    """Return a model in float32; raise a ``ValueError`` if weights are missing."""
    with _quiet_transformers():
        model, report = kind.from_pretrained(
            resolve_pretrained(pretrained),
            config=config,
            dtype=torch.float32,
            use_safetensors=True,
            trust_remote_code=False,
            output_loading_info=True,
            **options,
        )
    missing = sorted(key for key in report["missing_keys"] if not key.startswith("pooler."))
    if missing:
        raise ValueError(
            f"pretrained={pretrained!r} lacks {len(missing)} weights of {type(model).__name__}, "
            f"such as {missing[0]!r}"
        )
    return model


@contextmanager
def _quiet_transformers() -> Iterator[None]:
    """Keep the library's load report and progress bar off the console."""
    logging_of = transformers.logging
    level, bar = logging_of.get_verbosity(), logging_of.is_progress_bar_enabled()
    logging_of.set_verbosity_error()
    logging_of.disable_progress_bar()
    try:
        yield
    finally:
        logging_of.set_verbosity(level)
        if bar:
            logging_of.enable_progress_bar()


def _keep_layers(config: PreTrainedConfig, num_layers: int | None, pretrained: str) -> None:
    """Change `config` to describe only the first `num_layers` layers."""
    available = config.num_hidden_layers
    if num_layers is None:
        return
    hint = f"these are the layers of {pretrained!r}"
    check_count("num_layers", num_layers, most=available, hint=hint)
    config.num_hidden_layers = num_layers
    if getattr(config, "layer_types", None):
        config.layer_types = config.layer_types[:num_layers]
