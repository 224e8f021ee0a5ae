"""TextClassifier: whatever a program hands in, from however many threads."""

import copy
import pickle
import threading
import warnings
from concurrent.futures import ThreadPoolExecutor

import pandas
import pytest
import torch
from transformers import BertConfig, BertModel

from dact import DACT, TextClassifier
from dact.calibration.temperature import temper
from dact.data.tokenizers import word_tokenizer
from dact.encoders import HuggingFaceEncoder
from tests.conftest import assert_same_answers, tiny_model

WORDS = ["good", "bad", "film", "very", "not", "the"]
TEXTS = ["the film not very good", "bad", "very very good film", "not bad"] * 10
NAMES = ["minus", "none", "plus"]


@pytest.fixture
def tokenizer():
    return word_tokenizer(WORDS)


@pytest.fixture
def classifier(tokenizer):
    return TextClassifier(tiny_model(vocab=20, class_names=NAMES), tokenizer, batch_size=7)


def test_a_prediction_has_the_probabilities_of_all_classes(classifier):
    cold = classifier(TEXTS)
    for prediction in cold:
        assert list(prediction.probabilities) == NAMES
        assert sum(prediction.probabilities.values()) == pytest.approx(1, abs=1e-5)
        assert prediction.score == prediction.probabilities[prediction.label]
        assert prediction.score == max(prediction.probabilities.values())
    assert len({prediction.exit_layer for prediction in cold}) > 1
    classifier.model.temperatures = [3.0, 0.5, 1.0, 2.0]
    for before, after in zip(cold, classifier(TEXTS), strict=True):
        assert (before.label, before.exit_layer) == (after.label, after.exit_layer)
        row = torch.tensor([[*before.probabilities.values()]])
        tempered = temper(row, torch.tensor([before.exit_layer]), classifier.model.temperatures)
        assert [*after.probabilities.values()] == pytest.approx(tempered[0].tolist(), abs=1e-5)
    one = classifier("not bad")
    assert one == classifier(["not bad"])[0] == classifier.predict("not bad")


def answers(predictions):
    return [(prediction.label, prediction.exit_layer) for prediction in predictions]


def test_many_threads_get_the_answers_of_one(classifier, tokenizer):
    texts = [
        [f"{' '.join(WORDS[: 1 + number % 6])} " * (1 + number % 5)] * (1 + number % 9)
        for number in range(64)
    ]
    expected = [classifier(some) for some in texts]
    before = threading.active_count()
    # The second one shares model and tokenizer with the first.
    both = [classifier, TextClassifier(classifier.model, tokenizer, batch_size=7)]
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(lambda number: both[number % 2](texts[number]), range(64)))
    assert [answers(some) for some in found] == [answers(some) for some in expected]
    assert threading.active_count() == before, "no thread stays behind"


def bert(**options):
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = BertConfig(vocab_size=20, intermediate_size=32, **sizes, **options)
    return HuggingFaceEncoder.from_model(BertModel(config))


def test_a_classifier_survives_pickling(tokenizer):
    one = TextClassifier(tiny_model(encoder=bert(), class_names=NAMES), tokenizer)
    assert_same_answers(pickle.loads(pickle.dumps(one))(TEXTS), one(TEXTS))


def test_texts_longer_than_the_encoder_are_cut(tokenizer):
    def state():
        backend = tokenizer.backend_tokenizer.to_str()
        return copy.deepcopy(tokenizer.init_kwargs), tokenizer.model_max_length, backend

    before = state()
    model = DACT(encoder=bert(max_position_embeddings=8), class_names=NAMES)
    classifier = TextClassifier(model, tokenizer)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = classifier(["good film " * 50, "good film good film good film good"])
    # Of both, [CLS] and the first seven words.
    assert found[0].probabilities == pytest.approx(found[1].probabilities, abs=1e-5)
    assert state() == before, "the caller's tokenizer stays as it is"


def test_pairs_are_read_as_the_data_reads_them(classifier, tokenizer):
    first, second = ["good film", "bad"], ["very good", "the film"]
    encoding = tokenizer(first, second, padding=True, return_tensors="pt")
    expected = classifier.model.early_exit(dict(encoding)).probabilities
    pairs = [[*pair] for pair in zip(first, second, strict=True)]
    found = classifier([tuple(pair) for pair in pairs])
    rows = torch.tensor([list(prediction.probabilities.values()) for prediction in found])
    torch.testing.assert_close(rows, expected, atol=1e-5, rtol=1e-4)
    assert list(classifier.stream(iter(pairs))) == found


def test_a_text_without_an_answer_says_why_and_leaves_the_others_alone(classifier):
    texts = ["good", "", " \n", None, 3, "half \ud800", ("good",), ("good", ""), ["bad", "film"]]
    found = classifier(texts)
    assert [one.reason and one.label is None for one in found] == [None, *[True] * 7, None]
    assert found[1].reason == "empty text"
    assert (found[1].score, found[1].exit_layer, found[1].probabilities) == (None, None, {})
    assert list(classifier.stream(texts)) == found
    assert_same_answers([found[0]], classifier(["good"]))
    assert_same_answers([found[-1]], classifier([("bad", "film")]))


def test_a_table_is_refused_since_its_columns_would_be_the_texts(classifier):
    table = pandas.DataFrame({"text": ["good"]})
    for call in (classifier, lambda texts: list(classifier.stream(texts))):
        with pytest.raises(TypeError, match="DataFrame"):
            call(table)
        with pytest.raises(TypeError, match="expected a sequence of texts, got a NoneType"):
            call(None)


def test_half_precision_leaves_the_weights_alone(tokenizer):
    model = tiny_model(vocab=20, class_names=NAMES)
    exact = TextClassifier(model, tokenizer)(TEXTS)
    seen = []
    model.encoder.layers[0].register_forward_hook(
        lambda module, inputs, output: seen.append(torch.is_autocast_enabled("cpu"))
    )
    half = TextClassifier(model, tokenizer, dtype="bfloat16", device="cpu")(TEXTS)
    assert all(seen) and seen
    assert sum(one.label == other.label for one, other in zip(exact, half, strict=True)) >= 36
    assert half != exact
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    with pytest.raises(ValueError, match="dtype must be one of float32, bfloat16, float16, got i"):
        TextClassifier(model, tokenizer, dtype="int8")
    with pytest.raises(ValueError, match="batch_size must be 1 or more, got 0"):
        TextClassifier(model, tokenizer, batch_size=0)


def test_a_tokenizer_of_another_encoder_is_refused_at_once():
    many = word_tokenizer([f"word{number}" for number in range(100)])
    with pytest.raises(ValueError, match="tokenizer has 103 token ids, but the encoder only 20"):
        TextClassifier(tiny_model(vocab=20, class_names=NAMES), many)


def test_a_folder_gives_a_classifier_that_knows_its_settings(classifier, tokenizer, tmp_path):
    classifier.model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    by_name = TextClassifier(classifier.model, str(tmp_path))
    assert_same_answers(by_name(TEXTS), classifier(TEXTS))
    options = {"batch_size": 3, "device": "cpu", "dtype": "float32", "halting": "never"}
    again = TextClassifier.from_pretrained(tmp_path, **options)
    assert (again.batch_size, again.dtype, again.model.halting) == (3, torch.float32, "never")
    assert {prediction.exit_layer for prediction in again(TEXTS)} == {4}
    half = TextClassifier.from_pretrained(tmp_path, dtype="bfloat16")
    assert {parameter.dtype for parameter in half.model.encoder.parameters()} == {torch.bfloat16}
    pairs = zip(half(TEXTS), classifier(TEXTS), strict=True)
    assert sum(one.label == other.label for one, other in pairs) >= 36
    assert again.tokenizer.get_vocab() == tokenizer.get_vocab()
