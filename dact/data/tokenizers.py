"""Tokenizers: loaded like models, copied from the caller, or made of a list of words."""

from __future__ import annotations

import copy
import textwrap
from collections.abc import Sequence
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
from torch import Tensor
from transformers import AutoTokenizer, PreTrainedTokenizerFast
from transformers import PreTrainedTokenizerBase as PreTrainedTokenizerBase

from dact.encoders.pretrained import resolve_pretrained

# Texts that are tokenized in one call, since a tokenizer needs far more memory than its texts.
PORTION = 1000


def load_tokenizer(pretrained: str) -> PreTrainedTokenizerBase:
    """Return a loaded tokenizer. It pads on the right, since absolute positions count from the
    left.

    Args:
        pretrained: A Hub id, a local folder or ``"package:NAME/PATH"``.

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
    """Return a tokenizer, copied or loaded, that cuts texts to `max_length` tokens and pads on the
    right, even after it is saved."""
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
    """Return token ids and what belongs to them by name, int64 ``[texts, tokens]``: what
    ``padding=True, return_tensors="pt"`` gives, without the nested lists that transformers makes.

    Args:
        tokenizer: Tokenizer, which pads on the right.
        *texts: Texts or pairs of texts; or first and second texts.
        **options: Other arguments of the tokenizer, such as ``truncation``.
    """
    encoding: dict[str, list[Any]] = {"input_ids": []}
    for start in range(0, len(texts[0]), PORTION):
        columns = (column[start : start + PORTION] for column in texts)
        part = tokenizer(*columns, return_attention_mask=False, **options)
        for name, examples in part.items():
            encoding.setdefault(name, []).extend(examples)
    lengths = np.fromiter(map(len, encoding["input_ids"]), np.int64)
    mask = np.arange(lengths.max(initial=0)) < lengths[:, None]
    padding = {"input_ids": tokenizer.pad_token_id, "token_type_ids": tokenizer.pad_token_type_id}
    tensors = {"attention_mask": torch.from_numpy(mask.astype(np.int64))}
    for name, examples in encoding.items():
        values = np.full(mask.shape, padding.get(name) or 0, np.int64)
        values[mask] = np.fromiter(chain.from_iterable(examples), np.int64, lengths.sum())
        tensors[name] = torch.from_numpy(values)
    return tensors


def word_tokenizer(words: Sequence[str]) -> PreTrainedTokenizerFast:
    """Return a tokenizer that knows `words` in lower case; other words become ``[UNK]``, and
    ``[CLS]`` comes first."""
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
