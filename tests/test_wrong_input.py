"""Wrong or unusual input: refused in one line, or used as it says; code in a model's folder never
runs."""

import shutil

import pytest
import torch
from lightning.pytorch import Trainer
from transformers import BertConfig, BertForSequenceClassification, BertModel

from dact import DACT, TextClassifier
from dact.calibration import calibrate
from dact.data import CompositionalSentiment
from dact.data.tokenizers import load_tokenizer
from dact.encoders import HuggingFaceEncoder, TransformerEncoder
from dact.encoders.huggingface import load_sequence_classifier
from dact.exporting import export
from dact.files import read_json, write_json
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
    # as the first text of standard input may say
    monkeypatch.setattr("builtins.input", lambda *_: "y")
    marker = tmp_path / "ran"
    config = read_json(folder / "tokenizer_config.json")
    config |= {"tokenizer_class": "Evil", "auto_map": {"AutoTokenizer": ["evil.Evil", None]}}
    write_json(folder / "tokenizer_config.json", config)
    (folder / "evil.py").write_text(EVIL.format(base="PreTrainedTokenizer", marker=str(marker)))
    with pytest.raises(ValueError, match="no tokenizer at"):
        load_tokenizer(str(folder))
    teacher = tmp_path / "teacher"
    teacher.mkdir()
    auto = {"AutoConfig": "evil.Evil", "AutoModelForSequenceClassification": "evil.Evil"}
    write_json(teacher / "config.json", {"model_type": "evil", "auto_map": auto})
    (teacher / "evil.py").write_text(EVIL.format(base="PretrainedConfig", marker=str(marker)))
    with pytest.raises(ValueError, match="evil"):
        load_sequence_classifier(str(teacher))
    assert not marker.exists()


def test_a_tokenizer_that_cannot_be_read_is_one_line(folder, dact_here, tmp_path):
    (folder / "tokenizer.json").write_text('{"model": {"type": "New"}}')
    (tmp_path / "new.csv").write_text("text\nfine\n")
    words = ["predict", "--model", folder, "--data.predict_file", "new.csv"]
    status, output = dact_here(*words, cwd=tmp_path)
    assert status
    assert "no tokenizer at" in output
    assert "Traceback" not in output


@pytest.mark.parametrize(
    ("labels", "message"),
    [([-1, 0, 1, 0], r"labels must be in 0 … 2 .* got -1"), ([0, -100, 1, 2], "label -100")],
)
def test_a_promise_is_never_made_on_labels_that_are_no_classes(labels, message):
    batch = {"input_ids": torch.randint(3, 50, (4, 5)), "labels": torch.tensor(labels)}
    with pytest.raises(ValueError, match=message):
        calibrate(tiny_model(output_dimension=3), [batch], max_accuracy_loss=0.01)


def test_a_model_of_other_classes_never_answers_by_their_position(tmp_path):
    data = CompositionalSentiment(num_train=60, num_val=30, num_test=30)
    model = DACT(encoder=TransformerEncoder(42, 2, 8, 2), class_names=["sports", "tech", "world"])
    trainer = Trainer(max_epochs=1, accelerator="cpu", logger=False, enable_checkpointing=False)
    with pytest.raises(ValueError, match="with class_names=None if only names differ"):
        trainer.fit(model, data)


def test_answers_that_are_no_numbers_are_an_error_and_no_class(folder):
    classifier = TextClassifier.from_pretrained(folder)
    torch.nn.init.constant_(next(classifier.model.classifier.parameters()), float("nan"))
    with pytest.raises(ValueError, match="the model's answers are not finite"):
        classifier(["the screen is great"])


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
    layers[0] = "../../payload.onnx"
    write_json(exported / "config.json", config)
    with pytest.raises(ValueError, match="lacks the graph payload.onnx"):
        DACT.from_pretrained(exported)


def test_no_folder_makes_transformers_load_a_kernel(tmp_path, monkeypatch):
    monkeypatch.setattr(
        "transformers.modeling_utils.PreTrainedModel._check_and_adjust_attn_implementation",
        lambda self, wanted, *_, **__: (
            wanted if wanted in (None, "eager", "sdpa") else pytest.fail(f"loads {wanted}")
        ),
    )
    sizes = {"hidden_size": 8, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = BertConfig(vocab_size=50, intermediate_size=8, **sizes)
    teacher, own = tmp_path / "teacher", tmp_path / "own"
    BertForSequenceClassification(config).save_pretrained(teacher)
    DACT(encoder=HuggingFaceEncoder.from_model(BertModel(config))).save_pretrained(own)
    name = "kernels-community/any"
    described = read_json(teacher / "config.json")
    described |= {"attn_implementation": name, "auto_map": {"AutoModel": "evil.Model"}}
    write_json(teacher / "config.json", described)
    assert load_sequence_classifier(str(teacher))[1]
    described = read_json(own / "config.json")
    kernel = {"attribute_map": {"kernel": "_attn_implementation"}, "kernel": name}
    kernel |= {"_attn_implementation": name, "auto_map": {"AutoModel": "evil.Model"}}
    described["encoder"]["model"] |= kernel
    write_json(own / "config.json", described)
    assert DACT.from_pretrained(own).num_layers == 2


def test_loading_a_model_leaves_the_random_generator_of_the_caller(folder):
    torch.manual_seed(0)
    expected = torch.rand(1)
    torch.manual_seed(0)
    DACT.from_pretrained(folder)
    assert torch.rand(1) == expected
