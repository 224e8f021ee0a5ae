"""Tokenizers: loaded like models, copied from the caller, or made of a list of words."""

from __future__ import annotations

import copy
import textwrap
from collections import defaultdict
from collections.abc import Mapping, Sequence
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
from torch import Tensor
from transformers import AutoTokenizer, PreTrainedTokenizerFast
from transformers import PreTrainedTokenizerBase as PreTrainedTokenizerBase

from dact.encoders.pretrained import resolve_pretrained

# Texts per call of a tokenizer, which needs far more memory than the texts.
PORTION = 1000
Array = npt.NDArray[Any]


def load_tokenizer(pretrained: str) -> PreTrainedTokenizerBase:
    """Return the tokenizer at a Hub id, a local folder or ``"package:NAME/PATH"``. It pads on the
    right, since absolute positions count from the left.

    Raises:
        ValueError: If there is no tokenizer.
    """
    try:
        return AutoTokenizer.from_pretrained(
            resolve_pretrained(pretrained), padding_side="right", trust_remote_code=False
        )
    except Exception as error:  # the libraries raise many kinds
        reason = textwrap.shorten(str(error), 300, placeholder=" …") or type(error).__name__
        raise ValueError(
            f"no tokenizer at {pretrained!r}. Expected a Hub id (with a network, or downloaded "
            f"before), a local folder, or 'package:NAME/PATH'. The library says: {reason}"
        ) from error


def tokenizer_for(
    tokenizer: str | PreTrainedTokenizerBase, max_length: int
) -> PreTrainedTokenizerBase:
    """Return a copied or loaded tokenizer that cuts texts and pads on the right, also if saved."""
    if isinstance(tokenizer, (str, Path)):
        own = load_tokenizer(str(tokenizer))
    else:
        own = copy.deepcopy(tokenizer)
    own.model_max_length = max_length
    own.padding_side = "right"
    return own


def tokenize(
    tokenizer: PreTrainedTokenizerBase, *texts: Sequence[Any], **options: Any
) -> dict[str, Tensor]:
    """Return the same as the tokenizer with ``padding=True, return_tensors="pt"``, int64 ``[texts,
    tokens]`` by name, but without the nested lists that transformers builds."""
    return pad(*flat_tokens(tokenizer, *texts, **options), padding_of(tokenizer))


def flat_tokens(
    tokenizer: PreTrainedTokenizerBase, *texts: Sequence[Any], **options: Any
) -> tuple[Array, dict[str, Array]]:
    """Return the number of tokens of each text, ``[texts]``, and the tokenizer's values for each
    token by name, ``[tokens of all texts]``."""
    lengths: list[int] = []
    parts: dict[str, list[Array]] = defaultdict(list)
    for start in range(0, len(texts[0]), PORTION):
        columns = (column[start : start + PORTION] for column in texts)
        part = tokenizer(*columns, return_attention_mask=False, **options)
        lengths += map(len, part["input_ids"])
        for name, rows in part.items():
            kind = np.int8 if name == "token_type_ids" else np.int32
            parts[name].append(np.fromiter(chain.from_iterable(rows), kind))
    return np.array(lengths), {name: np.concatenate(arrays) for name, arrays in parts.items()}


def pad(
    lengths: Array, values: Mapping[str, Array], padding: Mapping[str, int]
) -> dict[str, Tensor]:
    """Return the values of `flat_tokens`, padded on the right to int64 ``[texts, tokens]``, and the
    ``attention_mask``."""
    mask = np.arange(lengths.max(initial=0)) < lengths[:, None]
    tensors = {"attention_mask": torch.from_numpy(mask.astype(np.int64))}
    for name, flat in values.items():
        padded = np.full(mask.shape, padding.get(name, 0), np.int64)
        padded[mask] = flat
        tensors[name] = torch.from_numpy(padded)
    return tensors


def padding_of(tokenizer: PreTrainedTokenizerBase) -> dict[str, int]:
    """Return the padding values by name; other names are padded with 0."""
    names = {"input_ids": tokenizer.pad_token_id, "token_type_ids": tokenizer.pad_token_type_id}
    return {name: value or 0 for name, value in names.items()}


def word_tokenizer(words: Sequence[str]) -> PreTrainedTokenizerFast:
    """Return a tokenizer of `words` in lower case, with ``[UNK]`` for others and a ``[CLS]``."""
    special = ["[PAD]", "[UNK]", "[CLS]"]
    vocabulary = {word: index for index, word in enumerate([*special, *sorted(set(words))])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    cls = ("[CLS]", vocabulary["[CLS]"])
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A", pair="[CLS] $A [CLS] $B:1", special_tokens=[cls]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="[PAD]",
        unk_token="[UNK]",
        cls_token="[CLS]",
        model_input_names=["input_ids", "attention_mask"],
    )
