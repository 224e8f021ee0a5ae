"""Files of predictions: what TextClassifier says, and one file per process."""

import os

import lightning.pytorch as pl
import pandas as pd
import pytest
import torch
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from dact import TextClassifier
from dact.cli.predictions import PredictionData, PredictionWriter
from dact.data import TextClassificationData
from dact.data.tokenizers import word_tokenizer
from tests.conftest import forked, free_port, tiny_model

WORDS = ["good", "bad", "film", "very", "not", "the"]
TEXTS = [" ".join(WORDS[(row + step) % 6] for step in range(row % 7 + 1)) for row in range(50)]
TEXTS[13] = TEXTS[14] = TEXTS[49] = ""  # cannot be classified


def model():
    torch.manual_seed(0)
    found = tiny_model(vocab=20, class_names=["minus", "none", "plus"])
    found.temperatures = [3.0, 0.5, 2.0, 4.0]
    return found


def predict(writer, data, **trainer):
    pl.Trainer(
        accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False, callbacks=[writer],
        enable_model_summary=False, **trainer,
    ).predict(model(), data, return_predictions=False)  # fmt: skip


def test_a_file_has_the_labels_and_the_tempered_scores_of_the_classifier(tmp_path):
    (tmp_path / "new.txt").write_text("\n".join(TEXTS[:13]))
    tokenizer = word_tokenizer(WORDS)
    predict(
        PredictionWriter(tmp_path / "out.csv"),
        PredictionData(str(tmp_path / "new.txt"), tokenizer, batch_size=5),
    )
    frame = pd.read_csv(tmp_path / "out.csv")
    expected = TextClassifier(model(), tokenizer)(TEXTS[:13])
    assert frame["label"].tolist() == [prediction.label for prediction in expected]
    for name in ("minus", "none", "plus"):
        scores = [prediction.probabilities[name] for prediction in expected]
        assert frame[f"probability_{name}"].tolist() == pytest.approx(scores, abs=1e-5)


def _process(rank, port, folder, output):
    os.environ.update(
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(port),
        WORLD_SIZE="2",
        NODE_RANK="0",
        LOCAL_RANK=str(rank),
    )
    torch.set_num_threads(1)
    file = f"{folder}/new.csv"
    data = TextClassificationData(
        predict_file=file, tokenizer=word_tokenizer(WORDS), batch_size=8, max_length=16
    )
    writer = PredictionWriter(f"{folder}/{output}")
    predict(writer, data, devices=2, strategy="ddp")
    assert writer.path == f"{folder}/out-{rank + 1}-of-2.parquet"


@pytest.mark.slow
def test_two_processes_write_a_file_each_and_every_row_once(tmp_path):
    """Of a datamodule; test_cli_predict.py has the same of `PredictionData`, through the
    command."""
    pd.DataFrame({"text": TEXTS}).to_csv(tmp_path / "new.csv", index=False)
    context, port = forked(__name__), free_port()
    arguments = [(rank, port, str(tmp_path), "out.parquet") for rank in range(2)]
    processes = [context.Process(target=_process, args=each) for each in arguments]
    for process in processes:
        process.start()
    for process in processes:
        process.join(180)
        assert process.exitcode == 0
    frames = [pd.read_parquet(tmp_path / f"out-{rank}-of-2.parquet") for rank in (1, 2)]
    assert all(10 < len(frame) < 40 for frame in frames), "both work"
    assert not (tmp_path / "out.parquet").exists()
    frame = pd.concat(frames).sort_values("row").reset_index(drop=True)
    assert frame["row"].tolist() == list(range(len(TEXTS)))
    usable = [row for row, text in enumerate(TEXTS) if text]
    assert frame.index[frame["label"].notna()].tolist() == usable
    expected = TextClassifier(model(), word_tokenizer(WORDS))([TEXTS[row] for row in usable])
    assert frame["label"][usable].tolist() == [prediction.label for prediction in expected]
    assert frame["reason"].notna().tolist() == [not text for text in TEXTS]


def test_several_processes_cannot_share_standard_output(tmp_path):
    trainer = type("Trainer", (), {"world_size": 2, "global_rank": 0})()
    with pytest.raises(
        ValueError, match="2 processes cannot share standard output: use one device, or name a file"
    ):
        PredictionWriter("-").setup(trainer, model(), "predict")
    data = PredictionData("-", word_tokenizer(WORDS))
    data.trainer = trainer
    with pytest.raises(ValueError, match="standard input has one reader, not 2"):
        next(data.batches())


def bare_tokenizer(words):
    """A tokenizer that adds no token of its own, and cleans some characters away."""
    plain = Tokenizer(
        models.WordLevel(
            {"[PAD]": 0, "[UNK]": 1, **{w: i for i, w in enumerate(words, 2)}}, "[UNK]"
        )
    )
    plain.normalizer, plain.pre_tokenizer = (
        normalizers.BertNormalizer(),
        pre_tokenizers.BertPreTokenizer(),
    )
    return PreTrainedTokenizerFast(tokenizer_object=plain, pad_token="[PAD]", unk_token="[UNK]")


def test_a_text_without_tokens_has_a_reason_and_stops_nothing(tmp_path):
    (tmp_path / "odd.csv").write_text("text\ngood\n\x01\nfine\n")
    data = PredictionData(str(tmp_path / "odd.csv"), bare_tokenizer(["good", "fine"]))
    assert [batch["row"].tolist() for batch in data.predict_dataloader()] == [[0, 2]]
    assert data.unusable == {1: "no tokens"}
    (tmp_path / "train.csv").write_text("text,label\ngood,a\n\x01,b\nfine,a\nbad,b\n")
    with pytest.raises(
        ValueError, match=r"the tokenizer has no token for the text '\\x01': leave it out"
    ):
        TextClassificationData(
            str(tmp_path / "train.csv"),
            str(tmp_path / "train.csv"),
            tokenizer=bare_tokenizer(["good", "fine"]),
        ).setup("fit")
