"""Texts that nobody wanted, through ``dact predict``: each gets a row."""

import json
import random

import pandas as pd
import pytest

from dact import DACT
from dact.data.tokenizers import word_tokenizer
from dact.encoders import TransformerEncoder
from tests.commands import dact


def hostile_texts(number):
    """Texts of many kinds, some of which are no text at all; one has a megabyte."""
    generator = random.Random(0)
    alphabets = [
        "".join(map(chr, range(1, 32))),  # control characters
        "שלום مرحبا \u202e\u200f\u2066",  # right to left, and what turns the direction
        "😀👩‍👩‍👧‍👦🏳️‍🌈\u200d\ufe0f",  # emoji, joined ones too
        "äöüßñçø éè \u0301\u0308",  # combining marks
        "漢字かな한글",
        "\"',;\\\t\r\n<>&%${}[]",
        "good bad fine ",
        "\ufeff\ufffe\uffff\u0000",
    ]
    for row in range(number):
        kind = row % 12
        if kind == 0:
            yield generator.choice(["", " ", "\t\n", "\u00a0\u2003", "\u200b"])
        elif kind == 1:
            yield generator.choice([None, 3, 2.5, True, [], ["good"], {"text": "good"}])
        elif kind == 2:
            yield generator.choice("aé漢😀 .") * 1000
        elif row == 3:
            yield "".join(generator.choices("good bad\n", k=1000)) * 1000
        else:
            yield "".join(
                generator.choices(generator.choice(alphabets), k=generator.randint(1, 200))
            )


@pytest.fixture
def folder(tmp_path):
    model = DACT(encoder=TransformerEncoder(7, 2, 8, 2), class_names=["a", "b", "c"])
    model.save_pretrained(tmp_path / "model")
    word_tokenizer(["good", "bad", "fine", "."]).save_pretrained(tmp_path / "model")
    return tmp_path


def predict(folder, name, output):
    words = ["predict", "--model", "model", "--data.max_length", "32", "--data.predict_file", name]
    assert "Traceback" not in dact(*words, "--output", output, cwd=folder).stderr


@pytest.mark.slow
def test_hostile_texts_each_get_a_row_in_order(folder):
    """A label, or the reason why they have none."""
    texts = list(hostile_texts(1200))
    rows = [
        json.dumps({"text": text, "n": n}, ensure_ascii=n % 2 == 0) for n, text in enumerate(texts)
    ]
    file = folder / "texts.jsonl"
    file.write_text("\n".join(rows) + "\n", encoding="utf-8", errors="surrogatepass")
    predict(folder, file.name, "out.jsonl")
    frame = pd.read_json(folder / "out.jsonl", lines=True)
    assert len(frame) == len(texts)
    answered = frame["label"].notna()
    assert (answered != frame["reason"].notna()).all()
    assert answered.sum() > len(texts) / 2
    for text, label, reason in zip(texts, frame["label"], frame["reason"], strict=True):
        if text is None:
            assert reason == "no text"
        elif not isinstance(text, str):
            assert reason.startswith("not a text but"), (text, reason)
        elif not text.strip():
            assert reason == "empty text", (text, reason)
        else:
            assert label in ("a", "b", "c"), (text[:50], reason)
