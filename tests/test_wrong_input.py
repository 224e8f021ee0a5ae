"""Wrong or unusual input: refused in one line, or used as it says; code in a model's folder never
runs."""

import contextlib
import json
import os
import pty
import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from torch.utils.data import DataLoader
from transformers import BertConfig, BertForSequenceClassification, BertModel

from dact import DACT, TextClassifier
from dact.agreement import check_class_order
from dact.calibration import calibrate
from dact.callbacks import SavePretrained
from dact.data import CompositionalSentiment
from dact.data.tokenizers import load_tokenizer
from dact.encoders import HuggingFaceEncoder, TransformerEncoder
from dact.encoders.huggingface import load_sequence_classifier
from dact.exporting import export
from dact.files import read_json
from dact.hub import NEEDED
from dact.submodels import SubmodelConfig
from tests.conftest import tiny_model

EVIL = """
from pathlib import Path
from transformers import {base}
Path({marker!r}).write_text("ran")
class Evil({base}):
    pass
"""


@pytest.fixture
def folder(fitted, tmp_path):
    shutil.copytree(fitted[1] / "model", tmp_path / "model")
    return tmp_path / "model"


def test_code_in_the_folder_of_a_tokenizer_or_teacher_never_runs(folder, tmp_path, monkeypatch):
    monkeypatch.setattr(
        "builtins.input", lambda *_: "y"
    )  # as the first text of standard input may say
    marker = tmp_path / "ran"
    config = read_json(folder / "tokenizer_config.json")
    config |= {"tokenizer_class": "Evil", "auto_map": {"AutoTokenizer": ["evil.Evil", None]}}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    (folder / "evil.py").write_text(EVIL.format(base="PreTrainedTokenizer", marker=str(marker)))
    with pytest.raises(ValueError, match="no tokenizer at"):
        load_tokenizer(str(folder))
    teacher = tmp_path / "teacher"
    teacher.mkdir()
    auto = {"AutoConfig": "evil.Evil", "AutoModelForSequenceClassification": "evil.Evil"}
    (teacher / "config.json").write_text(json.dumps({"model_type": "evil", "auto_map": auto}))
    (teacher / "evil.py").write_text(EVIL.format(base="PretrainedConfig", marker=str(marker)))
    with pytest.raises(ValueError, match="no sequence-classification model at"):
        load_sequence_classifier(str(teacher))
    assert not marker.exists()


@pytest.mark.parametrize(
    ("name", "text"),
    [("tokenizer.json", '{"model": {"type": "New"}}'), ("tokenizer_config.json", "[]")],
)
def test_a_tokenizer_that_cannot_be_read_is_one_line(folder, dact_here, tmp_path, name, text):
    (folder / name).write_text(text)
    (tmp_path / "new.csv").write_text("text\nfine\n")
    status, output = dact_here(
        "predict", "--model", folder, "--data.predict_file", "new.csv", cwd=tmp_path
    )
    assert status
    assert "no tokenizer at" in output
    assert "Traceback" not in output


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        (torch.tensor([-1, 0, 1, 0]), r"labels must be in 0 … 2 .* got -1"),
        (torch.tensor([1, 2, 3, 1]), r"labels must be in 0 … 2 .* got 3"),
        (torch.tensor([0, -100, 1, 2]), "a label is -100"),
        (torch.tensor([[0], [1], [2], [1]]), "labels must be integers of the shape"),
        (torch.eye(4)[:, :3], "labels must be integers of the shape"),
    ],
)
def test_a_promise_is_never_made_on_labels_that_are_no_classes(labels, message):
    batch = {"input_ids": torch.randint(3, 50, (4, 5)), "labels": labels}
    with pytest.raises(ValueError, match=message):
        calibrate(tiny_model(output_dimension=3), [batch], max_accuracy_loss=0.01)


def test_a_model_of_other_classes_never_answers_by_their_position(tmp_path):
    data = CompositionalSentiment(num_train=60, num_val=30, num_test=30)
    model = DACT(encoder=TransformerEncoder(42, 2, 8, 2), class_names=["sports", "tech", "world"])
    trainer = Trainer(max_epochs=1, accelerator="cpu", logger=False, enable_checkpointing=False)
    with pytest.raises(
        ValueError, match="load the model with class_names=None, so that it takes those of the data"
    ):
        trainer.fit(model, data)
    check_class_order(["a", "b"], ["a", "b"])
    with pytest.raises(ValueError, match=r"give the data class_names=\['b', 'a'\]$"):
        check_class_order(["b", "a"], ["a", "b"])


def test_prediction_cuts_where_the_text_classifier_does(folder, dact_here, tmp_path):
    config = read_json(folder / "tokenizer_config.json")
    config.pop("model_max_length")  # as tokenizers of one's own are often saved
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    words = [token for token in load_tokenizer(str(folder)).get_vocab() if token.isalpha()]
    texts = [" ".join(words[(n * m) % len(words)] for m in range(1, 400)) for n in range(1, 40)]
    (tmp_path / "new.csv").write_text("text\n" + "\n".join(texts) + "\n")
    answers = TextClassifier.from_pretrained(folder)(texts)
    for options, same in (((), True), (("--data.init_args.max_length", 2), False)):
        words = [
            "predict",
            "--model",
            folder,
            "--data.predict_file",
            "new.csv",
            "--output",
            "out.jsonl",
            *options,
        ]
        status, output = dact_here(*words, cwd=tmp_path)
        assert not status, output
        found = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
        scores = [
            row[f"probability_{answer.label}"] for row, answer in zip(found, answers, strict=True)
        ]
        assert (scores == pytest.approx([answer.score for answer in answers], abs=1e-4)) == same


def test_options_of_training_are_refused_where_a_stored_model_is_evaluated(
    folder, dact_here, tmp_path
):
    (tmp_path / "new.csv").write_text("text\nfine\n")
    words = ["predict", "--model", folder, "--data.predict_file", "new.csv"]
    status, output = dact_here(*words, "--model.num_layers", 2, cwd=tmp_path)
    assert status
    assert "leave --model.num_layers out" in output
    status, output = dact_here(*words, "--model.halting_margin", 0.5, cwd=tmp_path)
    assert not status, output
    status, output = dact_here("predict", "--model", cwd=tmp_path)
    assert status
    assert "--model needs a value" in output
    (tmp_path / "wide.yaml").write_text("trainer: {}\n", encoding="utf-16")
    status, output = dact_here("fit", "--config", "wide.yaml", cwd=tmp_path)
    assert status
    assert "wide.yaml is not a text file in UTF-8" in output


def test_a_readme_of_ones_own_and_other_files_survive_another_export(folder, tmp_path):
    output = tmp_path / "exported"
    export(folder, output)
    (output / "README.md").write_text("# My model\n")
    export(folder, output)
    assert (output / "README.md").read_text() == "# My model\n"
    (output / ".git").mkdir()
    with pytest.raises(ValueError, match=r"holds .git, which no export wrote"):
        export(folder, output)
    exported = DACT.from_pretrained(output)
    ids = torch.randint(3, 40, (2, 4), dtype=torch.int32)
    assert exported.early_exit({"input_ids": ids}).probabilities.shape == (2, 3)


def test_calibrating_by_command_fits_the_temperatures_again(fitted, dact_here, tmp_path):
    shutil.copytree(fitted[1], tmp_path / "run")
    source = tmp_path / "run" / "model"
    model = DACT.from_pretrained(source)
    model.temperatures = [7.0] * model.num_layers
    model.save_pretrained(source)
    shutil.rmtree(tmp_path / "run" / "checkpoints")
    words = [
        "calibrate",
        "--model",
        source,
        "--config",
        fitted[1] / "config.yaml",
        "--max_accuracy_loss",
        0.2,
    ]
    status, output = dact_here(*words, "--confidence", "null", cwd=fitted[0])
    assert not status, output
    assert DACT.from_pretrained(source).temperatures != [7.0] * model.num_layers


def test_half_of_a_surrogate_pair_is_named_with_its_position(folder):
    with pytest.raises(ValueError, match="the text at position 1 is not valid Unicode"):
        TextClassifier.from_pretrained(folder)(["fine", "half \ud800"])


def test_vocabularies_of_every_family_are_downloaded():
    assert "*.codes" in NEEDED, "BERTweet and PhoBERT keep theirs in bpe.codes"


class Wider(DACT):
    """A model of somebody's own, with weights of its own."""

    def __init__(self, **arguments):
        super().__init__(**arguments)
        self.more = torch.nn.Linear(2, 2)


def test_a_model_of_ones_own_with_weights_of_its_own_is_saved_after_its_fit(tmp_path):
    data = CompositionalSentiment(num_train=60, num_val=30, num_test=30)
    trainer = Trainer(
        max_epochs=1,
        accelerator="cpu",
        logger=False,
        default_root_dir=tmp_path,
        callbacks=[ModelCheckpoint(tmp_path / "checkpoints"), SavePretrained()],
    )
    trainer.fit(Wider(encoder=TransformerEncoder(42, 2, 8, 2), output_dimension=3), data)
    assert Wider.from_pretrained(tmp_path / "model").more.weight.shape == (2, 2)


def test_what_belongs_to_no_example_is_left_out_of_early_exit():
    model = tiny_model()
    batch = {"input_ids": torch.randint(3, 50, (4, 5))}
    more = {**batch, "step": torch.tensor(3)}
    torch.testing.assert_close(
        model.early_exit(more).probabilities, model.early_exit(batch).probabilities
    )


def test_a_run_that_is_not_found_is_named_with_what_to_do(dact_here, tmp_path):
    for name in ("mine", "half/submodels"):
        (tmp_path / "lightning_logs" / name).mkdir(parents=True)
    expected = {
        "mine": "did you mean lightning_logs/mine?",
        "lightning_logs/half": "is a run of dact tune without its final model: resume it with the command that began it",
    }
    for model, text in expected.items():
        status, output = dact_here(
            "predict", "--model", model, "--data.predict_file", "x.csv", cwd=tmp_path
        )
        assert status == 1
        assert text in output


@pytest.mark.slow
def test_no_progress_bar_stands_among_predictions_on_a_terminal(folder, tmp_path):
    (tmp_path / "new.txt").write_text("the screen is great\n" * 3)
    words = ["predict", "--model", folder, "--data.predict_file", "new.txt", "--output", "-"]
    terminal, slave = pty.openpty()
    with subprocess.Popen(
        [sys.executable, "-m", "dact", *words], cwd=tmp_path, stdout=slave, stderr=slave
    ):
        os.close(slave)
        text = b""
        with contextlib.suppress(OSError):  # of a terminal whose other end is closed
            while chunk := os.read(terminal, 4096):
                text += chunk
    os.close(terminal)
    lines = text.decode().splitlines()
    assert len(lines) == 5
    assert lines[0].startswith("label,probability_")
    assert lines[-1] == "3 predictions are in standard output"


def test_numbers_and_names_of_numpy_are_saved_as_plain_ones(tmp_path):
    encoder = TransformerEncoder(vocab_size=np.int64(42), num_layers=2, hidden_size=8, num_heads=2)
    classifier = SubmodelConfig(hidden_units=np.int64(8))
    names = np.array(["bad", "fair", "good"])
    model = DACT(
        encoder=encoder, lambda_reg=np.float64(0.1), class_names=list(names), classifier=classifier
    )
    trainer = Trainer(
        max_epochs=1, limit_train_batches=1, limit_val_batches=1, default_root_dir=tmp_path
    )
    batch = {"input_ids": torch.randint(3, 42, (4, 5)), "labels": torch.randint(0, 3, (4,))}
    loader = DataLoader([batch], batch_size=None)
    trainer.fit(model, loader, loader)
    trainer.save_checkpoint(tmp_path / "one.ckpt")
    model.save_pretrained(tmp_path / "model")
    for loaded in (
        DACT.load_from_checkpoint(tmp_path / "one.ckpt"),
        DACT.from_pretrained(tmp_path / "model"),
    ):
        assert (loaded.lambda_reg, loaded.class_names, loaded.encoder.vocab_size) == (
            0.1,
            [*map(str, names)],
            42,
        )


def test_answers_that_are_no_numbers_are_an_error_and_no_class(folder):
    classifier = TextClassifier.from_pretrained(folder)
    torch.nn.init.constant_(next(classifier.model.classifier.parameters()), float("nan"))
    with pytest.raises(ValueError, match="the model's answers are not finite"):
        classifier(["the screen is great"])


def test_weights_that_were_rounded_for_speed_are_not_saved(folder, tmp_path):
    classifier = TextClassifier.from_pretrained(folder, dtype="bfloat16")
    with pytest.raises(ValueError, match="load it without dtype to save it"):
        classifier.save_pretrained(tmp_path / "saved")
    assert not (tmp_path / "saved").exists()


def test_an_exported_model_from_elsewhere_names_no_file_outside_its_folder(
    folder, tmp_path, monkeypatch
):
    exported = tmp_path / "a" / "exported"
    export(folder, exported)
    monkeypatch.chdir(tmp_path / "a")
    classifier = TextClassifier.from_pretrained("exported")
    monkeypatch.chdir("/")
    classifier.save_pretrained(tmp_path / "saved")
    assert TextClassifier.from_pretrained(tmp_path / "saved")(["the screen is great"])
    config = read_json(exported / "config.json")
    layers = config["encoder"]["layers"]
    shutil.copy(exported / layers[0], tmp_path / "payload.onnx")
    config["encoder"]["digests"]["payload.onnx"] = config["encoder"]["digests"][layers[0]]
    layers[0] = "../../payload.onnx"
    (exported / "config.json").write_text(json.dumps(config))
    with pytest.raises(
        ValueError, match="the name of a graph must be that of a file in this folder"
    ):
        DACT.from_pretrained(exported)


def test_files_of_ones_own_next_to_an_export_are_not_replaced(folder, tmp_path):
    export(folder, tmp_path / "exported")
    export(folder, tmp_path / "exported")
    (tmp_path / "exported" / "answers.csv").write_text("mine")
    with pytest.raises(ValueError, match=r"holds answers\.csv, which no export wrote"):
        export(folder, tmp_path / "exported")
    assert (tmp_path / "exported" / "answers.csv").read_text() == "mine"


def test_no_folder_makes_transformers_load_a_kernel(folder, tmp_path, monkeypatch):
    monkeypatch.setattr(
        "transformers.modeling_utils.PreTrainedModel._check_and_adjust_attn_implementation",
        lambda self, wanted, *_, **__: (
            wanted if wanted in (None, "eager", "sdpa") else pytest.fail(f"loads {wanted}")
        ),
    )
    config = BertConfig(
        vocab_size=50,
        hidden_size=8,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=8,
    )
    teacher = tmp_path / "teacher"
    BertForSequenceClassification(config).save_pretrained(teacher)
    own = tmp_path / "own"
    DACT(encoder=HuggingFaceEncoder.from_model(BertModel(config))).save_pretrained(own)
    kernel = {
        "attribute_map": {"kernel": "_attn_implementation"},
        "kernel": "kernels-community/any",
    }
    described = read_json(teacher / "config.json")
    (teacher / "config.json").write_text(
        json.dumps({**described, "attn_implementation": "kernels-community/any"})
    )
    assert load_sequence_classifier(str(teacher))[1]
    described = read_json(own / "config.json")
    described["encoder"]["model"] |= kernel
    (own / "config.json").write_text(json.dumps(described))
    assert DACT.from_pretrained(own).num_layers == 2


def test_loading_a_model_leaves_the_random_generator_of_the_caller(folder):
    torch.manual_seed(0)
    expected = torch.rand(1)
    torch.manual_seed(0)
    DACT.from_pretrained(folder)
    assert torch.rand(1) == expected
