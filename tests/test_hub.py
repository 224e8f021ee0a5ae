"""Models on a Hub: published, downloaded, missing, and out of reach."""

import subprocess
import sys

import pandas as pd
import pytest
import torch
import yaml
from huggingface_hub import constants
from transformers import BertConfig, BertModel

from dact import DACT, TextClassifier
from dact.data.examples import Examples
from dact.data.teacher import teacher_probabilities
from dact.data.tokenizers import word_tokenizer
from dact.encoders import HuggingFaceEncoder
from dact.hub import local_folder
from dact.model_card import MARK, card
from tests.commands import environment
from tests.conftest import assert_same_answers, random_batch, tiny_model
from tests.hub_server import TOKEN, serving

NAMES = ["minus", "none", "plus"]
TEXTS = ["the film not very good", "bad", "very very good film", "not bad"]
EARLY = {"accuracy": 0.8125, "macro_f1": 0.75, "mean_exit_layer": 2.25, "texts_per_second": 1234.0}
METRICS = {
    "layers": 4,
    "halting_margin": 0.9,
    "halting_tolerance": 0.0,
    "test": {**EARLY, "full_depth": {**EARLY, "accuracy": 0.82}},
    "baseline": {"layers": 6, "test": {**EARLY, "accuracy": 0.83}},
}


@pytest.fixture
def hub(monkeypatch, tmp_path):
    """A Hub with an empty cache in front of it."""
    with serving() as found:
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        # A protocol of its own, for large files.
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        monkeypatch.setattr(constants, "ENDPOINT", found.url)
        # transformers keeps the client that it made first, with its address.
        monkeypatch.setattr("transformers.utils.hub._hf_api", None, raising=False)
        template = f"{found.url}/{{repo_id}}/resolve/{{revision}}/{{filename}}"
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
        yield found


@pytest.fixture
def classifier():
    words = ["good", "bad", "film", "very", "not", "the"]
    return TextClassifier(tiny_model(vocab=20, class_names=NAMES), word_tokenizer(words))


def test_a_classifier_comes_back_from_the_hub_as_it_was(hub, classifier):
    address = classifier.push_to_hub("me/mine", metrics=METRICS, token=TOKEN)
    assert address.startswith(f"{hub.url}/me/mine/commit/")
    assert_same_answers(TextClassifier.from_pretrained("me/mine")(TEXTS), classifier(TEXTS))
    assert len(hub.repositories["me/mine"]["main"]) == 1, "one commit"
    page = hub.repositories["me/mine"]["main"][0]["README.md"].decode()
    metadata = yaml.safe_load(page.split("---")[1])
    assert (metadata["library_name"], metadata["pipeline_tag"]) == ("dact", "text-classification")
    for expected in (
        'TextClassifier.from_pretrained("me/mine")',
        "`TransformerEncoder`, 4 layers of hidden size 16",
        "Classes (3): `minus`, `none`, `plus`",
        "| early exit | 2.25 | 81.25 % | 0.750 | 1234 |",
        "| all 4 layers of the same model | 4.00 | 82.00 % |",
        "| whole encoder, fine-tuned | 6.00 | 83.00 % |",
        "tolerance 0, margin 1. A text leaves when its class is proven",
        MARK,
    ):
        assert expected in page


def test_a_model_of_dact_on_the_hub_is_an_encoder_and_a_teacher(hub):
    words = word_tokenizer(["good", "bad"])
    shape = {"hidden_size": 8, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = BertConfig(vocab_size=len(words), intermediate_size=16, **shape)
    bert = HuggingFaceEncoder.from_model(BertModel(config))
    taught = TextClassifier(DACT(encoder=bert, class_names=NAMES), words)
    taught.push_to_hub("me/bert", token=TOKEN)
    encoder = HuggingFaceEncoder("me/bert")
    batch = random_batch(vocab=len(words))
    torch.testing.assert_close(encoder.eval()(batch), bert.eval()(batch))
    train = Examples(["good", "bad bad"], labels=[0, 2])
    answers = teacher_probabilities("me/bert", train, NAMES, 16, torch.device("cpu"))
    assert answers.shape == (2, 3)


def test_a_model_of_a_private_repository_needs_the_token(hub):
    model = tiny_model()
    model.push_to_hub("me/secret", private=True, token=TOKEN)
    with pytest.raises(FileNotFoundError, match="me/secret"):
        DACT.from_pretrained("me/secret", token=False)
    loaded = DACT.from_pretrained("me/secret", token=TOKEN, halting_margin=0.5)
    assert loaded.halting_margin == 0.5
    batch = random_batch()
    torch.testing.assert_close(loaded(batch).probabilities, model(batch).probabilities)


def test_a_revision_is_a_branch_or_a_commit(hub):
    first, second = tiny_model(class_names=["a", "b", "c"]), tiny_model(class_names=["x", "y", "z"])
    address = first.push_to_hub("me/two", token=TOKEN)
    second.push_to_hub("me/two", revision="next", token=TOKEN)
    second.push_to_hub("me/two", token=TOKEN)
    for revision, names in ((address.rsplit("/", 1)[-1], "abc"), ("next", "xyz"), (None, "xyz")):
        assert DACT.from_pretrained("me/two", revision=revision).class_names == [*names]
    with pytest.raises(FileNotFoundError, match="(?s)me/two.*Revision Not Found"):
        DACT.from_pretrained("me/two", revision="absent")


def test_the_cache_answers_without_a_network(hub, classifier, monkeypatch):
    classifier.push_to_hub("me/mine", token=TOKEN)
    expected = TextClassifier.from_pretrained("me/mine")(TEXTS)
    before = len(hub.requests)
    found = TextClassifier.from_pretrained("me/mine", local_files_only=True)(TEXTS)
    assert_same_answers(found, expected)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert_same_answers(TextClassifier.from_pretrained("me/mine")(TEXTS), expected)
    assert len(hub.requests) == before
    with pytest.raises(FileNotFoundError, match="nobody/nothing"):
        TextClassifier.from_pretrained("nobody/nothing")


def test_only_data_is_downloaded(hub):
    tiny_model().push_to_hub("me/mine", token=TOKEN)
    hub.repositories["me/mine"]["main"].append(dict.fromkeys(("a.pkl", "a.py", "a.ckpt"), b"no"))
    names = {path.name for path in local_folder("me/mine").iterdir()}
    assert names == {"config.json", "model.safetensors"}


def test_a_folder_comes_before_the_hub(hub, tmp_path, monkeypatch):
    tiny_model().save_pretrained(tmp_path / "me" / "mine")
    monkeypatch.chdir(tmp_path)
    DACT.from_pretrained("me/mine")
    with pytest.raises(FileNotFoundError, match=r"there is no me/other/config\.json"):
        DACT.from_pretrained("./me/other")
    assert hub.requests == []


def test_commands_take_a_hub_id(hub, classifier, tmp_path, dact_here):
    classifier.push_to_hub("me/mine", token=TOKEN)
    classifier.push_to_hub("me/mine", token=TOKEN, revision="next")
    (tmp_path / "new.csv").write_text("\n".join(["text", *TEXTS]))
    predict = ["predict", "--data.predict_file", "new.csv", "--output", "answers.csv", "--model"]
    for address in ("me/mine", "me/mine@next"):
        status, text = dact_here(*predict, address, cwd=tmp_path)
        assert status == 0, text
        found = pd.read_csv(tmp_path / "answers.csv")["label"].tolist()
        assert found == [one.label for one in classifier(TEXTS)]
    status, text = dact_here(*predict, "me/absent", cwd=tmp_path)
    assert (status, text.count("\n")) == (1, 1), text
    assert "me/absent" in text


def test_a_card_that_was_written_by_hand_is_kept(hub, tmp_path):
    model = tiny_model()
    model.push_to_hub("me/mine", token=TOKEN)
    hub.repositories["me/mine"]["main"].append({"README.md": b"my own words"})
    model.push_to_hub("me/mine", token=TOKEN)
    assert "README.md" not in hub.repositories["me/mine"]["main"][-1]
    model.save_pretrained(tmp_path)
    model.halting_margin = 0.25
    model.save_pretrained(tmp_path)
    assert "margin 0.25" in (tmp_path / "README.md").read_text(), "dact's card is up to date"
    (tmp_path / "README.md").write_text("my own words")
    model.save_pretrained(tmp_path)
    assert (tmp_path / "README.md").read_text() == "my own words"


@pytest.mark.slow
def test_the_environment_variables_of_the_hub_hold(hub, classifier, tmp_path):
    """Another process knows the Hub by HF_ENDPOINT and its token by HF_TOKEN."""
    classifier.save_pretrained(tmp_path / "model")
    code = (
        "import sys, dact\n"
        "found = dact.TextClassifier.from_pretrained(sys.argv[1])\n"
        "found.push_to_hub('mine', private=True)\n"
        "print(dact.TextClassifier.from_pretrained('me/mine')('not bad').label)"
    )
    known = {"HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path / "home"), "HF_TOKEN": TOKEN}
    env = environment(**known, HF_HUB_DISABLE_XET="1", HF_HUB_OFFLINE="0")
    command = [sys.executable, "-c", code, str(tmp_path / "model")]
    streams = {"stdout": subprocess.PIPE, "text": True, "timeout": 200, "check": True}
    said = subprocess.run(command, env=env, **streams).stdout
    assert said.strip() == classifier("not bad").label
    assert hub.private == {"me/mine"}


@pytest.mark.parametrize("estimate", [False, True])
def test_a_card_tells_a_promise_from_an_estimate(estimate):
    model = tiny_model()
    promise = {"dial": "halting_margin", "confidence": 0.95, "max_accuracy_loss": 0.01}
    model.halting_margin = 0.5
    model.calibration = {"halting": "exact", "halting_tolerance": 0.0, "halting_margin": 0.5}
    model.calibration |= {"promise": promise, "estimate": estimate, "examples": 300}
    model.calibration |= {"accuracy": 0.8, "full_depth_accuracy": 0.81}
    model.calibration |= {"agreement": 0.9, "mean_exit_layer": 2.5}
    text = card(model)
    assert "at most 1 point of accuracy" in text
    assert "on the 300 examples that set it: accuracy 80.00 % (all 4 layers 81.00 %)" in text
    assert ("with confidence 0.95" in text) != estimate
    model.halting_margin = 0.25
    assert "300 examples" not in card(model), "the promise belongs to another rule"
