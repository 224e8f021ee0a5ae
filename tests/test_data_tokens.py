"""Tokens and batches: the caller's tokenizer stays as it was, padding stands on the right, and
memory stays small."""

import copy
import tracemalloc

import pandas as pd
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer, BertTokenizerFast

from dact.data import TextClassificationData
from dact.data.batching import collate, encode
from dact.data.examples import Examples
from tests.tables import write_table

WORDS = [f"word{number}" for number in range(60)]


def bert_tokenizer(**arguments):
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS]
    return BertTokenizerFast(vocab={word: id for id, word in enumerate(words)}, **arguments)


def write(folder, texts, labels=("a", "b")):
    path = folder / "data.csv"
    labels = [labels[row % len(labels)] for row in range(len(texts))]
    write_table(path, pd.DataFrame({"text": texts, "label": labels}))
    return str(path)


def texts_of_length(count, tokens):
    """Texts of so many tokens, [CLS] and [SEP] included."""
    return [
        " ".join(WORDS[(row + n * (1 + row // 60)) % 60] for n in range(tokens - 2))
        for row in range(count)
    ]


def test_a_tokenizer_that_was_given_is_never_changed_and_a_saved_one_does_as_training_did(tmp_path):
    given_tokenizer = bert_tokenizer(model_max_length=512, padding_side="left")
    before = copy.deepcopy(given_tokenizer)
    module = TextClassificationData(write(tmp_path, WORDS), tokenizer=given_tokenizer, max_length=5)
    module.setup("fit")
    next(iter(module.train_dataloader()))
    assert (given_tokenizer.model_max_length, given_tokenizer.padding_side) == (512, "left")
    assert given_tokenizer.backend_tokenizer.to_str() == before.backend_tokenizer.to_str()
    module.tokenizer.save_pretrained(tmp_path / "saved")
    saved = AutoTokenizer.from_pretrained(tmp_path / "saved")
    ids = saved([" ".join(WORDS), "word1"], truncation=True, padding=True)["input_ids"]
    assert [len(row) for row in ids] == [5, 5]
    assert ids[1][-2:] == [saved.pad_token_id] * 2


@settings(max_examples=40)
@given(
    st.lists(st.tuples(st.integers(0, 12), st.integers(0, 12)), min_size=1, max_size=20),
    st.integers(3, 12),
    st.booleans(),
)
def test_batches_are_those_of_the_tokenizer_itself(sizes, max_length, paired):
    texts = [" ".join(WORDS[:one]) for one, _ in sizes]
    pairs = [" ".join(WORDS[30 : 30 + other]) for _, other in sizes] if paired else None
    tokenizer, own = bert_tokenizer(), bert_tokenizer(model_max_length=8)
    expected = tokenizer(
        texts, pairs, truncation=True, max_length=max_length, padding=True, return_tensors="pt"
    )
    encoded, cut = encode(Examples(texts, pairs, labels=list(range(len(texts)))), own, max_length)
    batch = collate(encoded, {})
    assert {"input_ids", "attention_mask", "token_type_ids"} == set(expected)
    for name in expected:
        assert torch.equal(batch[name], expected[name])
        assert batch[name].dtype == torch.int64
    assert batch["labels"].tolist() == batch["row"].tolist() == list(range(len(texts)))
    whole = [len(ids) for ids in tokenizer(texts, pairs)["input_ids"]]
    assert sorted(cut) == sorted(length for length in whole if length > max_length)


def test_an_example_of_128_tokens_takes_little_memory_beside_its_text(tmp_path):
    texts = texts_of_length(300, 128)
    module = TextClassificationData(
        write(tmp_path, texts), tokenizer=bert_tokenizer(), class_names=["a", "b"], max_length=128
    )
    module.setup("fit")  # what is loaded once is loaded now
    module.splits, module._encoded, module._read = {}, {}, {}
    tracemalloc.start()
    module.setup("fit")
    used, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    text = sum(text.__sizeof__() for text in texts)
    assert all(len(item["input_ids"]) == 128 for item in module._encoded["train"])
    assert (used - text) / len(texts) < 1000


def test_texts_that_are_cut_are_counted_with_the_length_that_would_do(tmp_path):
    texts = [text for tokens in range(11, 31) for text in texts_of_length(10, tokens)]
    file = write(tmp_path, texts)
    module = TextClassificationData(file, tokenizer=bert_tokenizer(), max_length=24)
    with pytest.warns(UserWarning, match="the train texts are longer than max_length=24") as seen:
        module.setup("fit")
    train = sorted(len(text.split()) + 2 for text in module.splits["train"].texts)
    share = sum(length > 24 for length in train) / len(train)
    messages = [str(warning.message) for warning in seen]
    (message,) = [text for text in messages if text.startswith(f"{share:.0%} of the train texts")]
    assert f"max_length={train[-1 - len(train) // 100]} would keep 99% of them whole" in message


def test_a_missing_tokenizer_is_named(tmp_path):
    with pytest.raises(ValueError, match="give the tokenizer of the encoder"):
        TextClassificationData(write(tmp_path, WORDS)).setup("fit")
