"""Ten thousand texts that nobody wanted, through ``dact predict``."""

import json
import random

import pandas as pd
import pytest

from dact import DACT
from dact.data.tokenizers import word_tokenizer
from dact.encoders import TransformerEncoder
from tests import warm
from tests.commands import environment

NUMBER = 10_000


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


def predict(folder, name, output):
    """Predict a file; the most memory that this took, in MiB."""
    words = ["predict", "--model", "model", "--data.max_length", "32", "--data.predict_file", name]
    words = [json.dumps({"peak": True}), *words, "--output", output]
    process = warm.start("tests.killed", words, cwd=folder, env=environment())
    said, errors = process.communicate(timeout=500)
    assert process.returncode == 0, said + errors
    assert "Traceback" not in errors
    return int(said.split("PEAK")[1])


def check_rows(frame, texts):
    """Each input has its row, in order: a label, or the reason why it has none."""
    assert len(frame) == len(texts)
    answered = frame["label"].notna()
    assert (answered != frame["reason"].notna()).all()
    assert answered.sum() > len(texts) / 2
    for text, label, reason in zip(texts, frame["label"], frame["reason"], strict=True):
        if not isinstance(text, str):
            assert isinstance(reason, str), text
            assert reason == "no text" if text is None else reason.startswith("not a text but"), (
                text,
                reason,
            )
        elif not text.strip():
            assert reason == "empty text", (text, reason)
        else:
            assert label in ("a", "b", "c"), (text[:50], reason)


@pytest.mark.slow
def test_ten_thousand_hostile_texts_each_get_a_row(folder):
    # Five megabyte-long rows, and then five times as many rows and as much text.
    small, large = list(hostile_texts(NUMBER // 5, 5)), list(hostile_texts(NUMBER, 25))
    sizes, peaks = [], []
    for name, texts in (("small", small), ("large", large)):
        rows = [
            json.dumps({"text": text, "n": n}, ensure_ascii=n % 2 == 0)
            for n, text in enumerate(texts)
        ]
        file = folder / f"{name}.jsonl"
        file.write_text("\n".join(rows) + "\n", encoding="utf-8", errors="surrogatepass")
        sizes.append(file.stat().st_size / 2**20)
        peaks.append(predict(folder, file.name, f"{name}.out.jsonl"))
    check_rows(pd.read_json(folder / "large.out.jsonl", lines=True), large)
    assert peaks[1] - peaks[0] < 6 * (sizes[1] - sizes[0]), f"{peaks} MiB for {sizes} MiB"


@pytest.mark.slow
def test_mixed_encodings_get_a_row_or_a_reason(folder):
    generator = random.Random(1)
    lines, valid = [], []
    for row in range(500):
        encoding = generator.choice(["utf-8", "latin-1", "utf-16-le"]) if row % 2 else "utf-8"
        lines.append(b"%d\t" % row + "good é bad".encode(encoding).replace(b"\x00", b""))
        valid.append(encoding == "utf-8")
    (folder / "mixed.tsv").write_bytes(b"n\ttext\n" + b"\n".join(lines) + b"\n")
    predict(folder, "mixed.tsv", "out.csv")
    frame = pd.read_csv(folder / "out.csv")
    assert len(frame) == 500
    assert frame["label"].notna().tolist() == valid
    assert (frame["reason"][[not v for v in valid]] == "not valid UTF-8").all()
