"""Thousands of texts that nobody wanted, through ``dact predict``."""

import json
import random

import pandas as pd
import pytest

from dact import DACT
from dact.data.tokenizers import word_tokenizer
from dact.encoders import TransformerEncoder


def hostile_texts(number, megabytes):
    """Texts, and which of them are no text at all."""
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
        elif kind == 3 and row < 12 * megabytes:
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


@pytest.mark.slow
def test_thousands_of_hostile_texts_each_get_a_row(folder, dact_here):
    texts = list(hostile_texts(3000, 3))
    rows = [
        json.dumps({"text": text, "n": n}, ensure_ascii=n % 2 == 0) for n, text in enumerate(texts)
    ]
    content = "\n".join(rows) + "\n"
    (folder / "in.jsonl").write_text(content, encoding="utf-8", errors="surrogatepass")
    words = ["--model", "model", "--data.max_length", "32", "--data.predict_file", "in.jsonl"]
    status, text = dact_here("predict", *words, "--output", "out.jsonl", cwd=folder)
    assert status == 0, text
    frame = pd.read_json(folder / "out.jsonl", lines=True)
    assert len(frame) == len(texts)
    answered = frame["label"].notna()
    assert (answered != frame["reason"].notna()).all(), "a label, or why there is none"
    assert answered.sum() > len(texts) / 2
    for text, label, reason in zip(texts, frame["label"], frame["reason"], strict=True):
        if text is None:
            assert reason == "no text"
        elif not isinstance(text, str):
            assert reason.startswith("not a text but")
        elif not text.strip():
            assert reason == "empty text", text
        else:
            assert label in ("a", "b", "c"), (text[:50], reason)
