"""Exported models: the same classes and exit layers on ONNX Runtime, from folders that are read
like any other."""

import copy
import importlib
import pickle
import re
import sys

import pytest
import torch

from dact import DACT, TextClassifier, calibrate, export
from dact.data import CompositionalSentiment
from dact.encoders import OnnxEncoder, TransformerEncoder
from tests.conftest import random_batch, scatter_exits, tiny_model
from tests.test_encoders import ALL, encoder_of

MARGIN = 1e-4


def leads(probabilities):
    """First class less second, [batch]."""
    best = probabilities.topk(2, dim=1).values
    return best[:, 0] - best[:, 1]


def saved(folder, **arguments):
    """A folder with a small model of the built-in encoder, whose exits scatter."""
    model = tiny_model(**arguments)
    model.save_pretrained(folder)
    return model


def fitted_folder(folder):
    """A folder as a fit leaves it, tokenizer included."""
    data = CompositionalSentiment(num_train=10, num_val=300, num_test=40)
    model = tiny_model(vocab=data.vocab_size, class_names=data.class_names)
    model.save_pretrained(folder)
    data.tokenizer.save_pretrained(folder)
    return data


@pytest.mark.parametrize("name", ALL)
def test_every_family_gives_the_classes_and_exit_layers_of_pytorch(name, tmp_path):
    encoder = encoder_of(name)
    model = scatter_exits(
        DACT(encoder=encoder, confidence_reads="state", halting_margin=0.5).eval()
    )
    model.save_pretrained(tmp_path / "model")
    export(tmp_path / "model", tmp_path / "onnx")
    exported = DACT.from_pretrained(tmp_path / "onnx")
    assert isinstance(exported.encoder, OnnxEncoder)
    assert not list(exported.encoder.parameters())
    for batch in (
        random_batch(33, 24, vocab=100),
        random_batch(1, 1, vocab=100),
        random_batch(5, 60, vocab=100),
    ):
        expected, got = model.early_exit(batch), exported.early_exit(batch)
        full = model.full_depth(batch)
        # Outside a margin of 1e-4 in the class and in the layers' own leads, which the dial
        # compares with 0.5.
        near = (
            leads(full.layer_probabilities.flatten(0, 1)).view(len(full.h), -1) - 0.5
        ).abs().amin(dim=1) < MARGIN
        sure = (leads(expected.probabilities) > MARGIN) & ~near
        assert sure.float().mean() > 0.8
        assert torch.equal(got.exit_layer[sure], expected.exit_layer[sure])
        assert torch.equal(
            got.probabilities.argmax(1)[sure], expected.probabilities.argmax(1)[sure]
        )
        torch.testing.assert_close(
            got.probabilities[sure], expected.probabilities[sure], atol=1e-4, rtol=0
        )


def test_only_the_layers_that_the_model_uses_are_exported(tmp_path):
    model = saved(tmp_path / "model", layers=4, num_layers=2)
    export(tmp_path / "model", tmp_path / "onnx")
    exported, batch = DACT.from_pretrained(tmp_path / "onnx"), random_batch()
    assert exported.num_layers == exported.encoder.num_layers == 2
    assert torch.equal(exported.early_exit(batch).exit_layer, model.early_exit(batch).exit_layer)


def test_layers_that_share_their_weights_share_a_graph(tmp_path):
    DACT(encoder=encoder_of("albert-groups")).save_pretrained(tmp_path / "model")
    export(tmp_path / "model", tmp_path / "onnx")
    assert sorted(path.name for path in (tmp_path / "onnx").glob("layer_*")) == [
        "layer_1.onnx",
        "layer_3.onnx",
    ]


def test_the_text_classifier_reads_an_exported_folder_like_any_other(tmp_path):
    data = fitted_folder(tmp_path / "model")
    export(tmp_path / "model", tmp_path / "onnx")
    plain, exported = (
        TextClassifier.from_pretrained(tmp_path / name) for name in ("model", "onnx")
    )
    texts = data.examples("test").texts
    expected, got = plain(texts), exported(texts)
    assert [(one.label, one.exit_layer) for one in got] == [
        (one.label, one.exit_layer) for one in expected
    ]
    assert [one.score for one in got] == pytest.approx([one.score for one in expected], abs=1e-4)


def test_int8_is_smaller_and_close(tmp_path):
    model = tiny_model(encoder=TransformerEncoder(100, 4, 64, 4))
    model.save_pretrained(tmp_path / "model")
    plain = export(tmp_path / "model", tmp_path / "onnx")
    small = export(tmp_path / "model", tmp_path / "int8", quantize="int8")
    assert small.megabytes < 0.4 * plain.megabytes
    assert small.quantized_difference < 0.05
    batch = random_batch(200, 24, vocab=100)
    expected = model.full_depth(batch).probabilities.argmax(1)
    got = DACT.from_pretrained(tmp_path / "int8").full_depth(batch).probabilities.argmax(1)
    assert (expected == got).float().mean() > 0.95
    layer = (tmp_path / "int8" / "layer_1.onnx").read_bytes()
    assert b"MatMulInteger" in layer


@pytest.mark.parametrize(("weight", "token"), [(300, 1), (1, 1000)])
def test_int8_keeps_its_levels_next_to_an_outlier(tmp_path, weight, token):
    """Neither a neuron with large weights nor a token with large values, as BERT's first, must
    spoil the scales of the others."""
    encoder = encoder_of("bert").eval()
    encoder.model.encoder.layer[0].output.dense.weight.data[:, 3] *= weight
    DACT(encoder=encoder).save_pretrained(tmp_path / "model")
    export(tmp_path / "model", tmp_path / "int8", quantize="int8")
    small = DACT.from_pretrained(tmp_path / "int8").encoder
    hidden, mask = torch.randn(4, 6, encoder.hidden_size), torch.ones(4, 6, dtype=torch.int64)
    hidden[3] *= token
    with torch.no_grad():
        expected, got = (
            one.layer(1, hidden, one.context(hidden, mask)) for one in (encoder, small)
        )
    assert (got[:3] - expected[:3]).norm() < 0.005 * expected[:3].norm()


@pytest.mark.slow
def test_int8_serves_every_family(tmp_path):
    for name in ALL:
        # The first token, since the mean is exported in the test of every family.
        model = scatter_exits(
            DACT(encoder=encoder_of(name, pooling="first"), confidence_reads="state").eval()
        )
        model.save_pretrained(tmp_path / name)
        assert (
            export(tmp_path / name, tmp_path / f"{name}-int8", quantize="int8").quantized_difference
            < 0.1
        )
        assert b"MatMulInteger" in (tmp_path / f"{name}-int8" / "layer_1.onnx").read_bytes()


def test_left_padding_is_refused_where_pytorch_refuses_it(tmp_path):
    batch = random_batch(5, 12, vocab=100)
    batch["attention_mask"][0, 4:] = 0
    left = {name: batch[name].flip(1) for name in ("input_ids", "attention_mask")}
    for name in ("bert", "roberta"):
        DACT(encoder=encoder_of(name)).save_pretrained(tmp_path / name)
        export(tmp_path / name, tmp_path / f"{name}-onnx")
        exported = DACT.from_pretrained(tmp_path / f"{name}-onnx")
        exported.early_exit(batch)
        if name == "bert":  # RoBERTa counts positions from the first token
            with pytest.raises(ValueError, match=r"padded on the left.*pad on the right"):
                exported.early_exit(left)
        else:
            exported.early_exit(left)


def test_the_dial_stays_the_promise_is_dropped_and_can_be_renewed_on_the_exported_folder(tmp_path):
    data = fitted_folder(tmp_path / "model")
    data.setup("validate")
    model = DACT.from_pretrained(tmp_path / "model")
    calibrate(model, data, min_agreement=0.5, dial="halting_margin")
    assert model.calibration is not None
    assert model.halting_margin < 1
    model.save_pretrained(tmp_path / "model")
    report = export(tmp_path / "model", tmp_path / "onnx", quantize="int8")
    assert report.promise_dropped
    assert "dact calibrate" in str(report)
    exported = DACT.from_pretrained(tmp_path / "onnx")
    assert exported.calibration is None
    assert exported.halting_margin == model.halting_margin
    calibrate(exported, data, min_agreement=0.5, dial="halting_margin")
    exported.save_pretrained(tmp_path / "onnx")
    again = DACT.from_pretrained(tmp_path / "onnx")
    assert again.calibration == exported.calibration
    assert again.halting_margin == exported.halting_margin < 1


def test_an_exported_model_can_be_saved_elsewhere_copied_and_pickled(tmp_path):
    saved(tmp_path / "model")
    export(tmp_path / "model", tmp_path / "onnx")
    exported, batch = DACT.from_pretrained(tmp_path / "onnx"), random_batch()
    expected = exported.early_exit(batch).probabilities
    exported.save_pretrained(tmp_path / "elsewhere")
    for one in (
        DACT.from_pretrained(tmp_path / "elsewhere"),
        copy.deepcopy(exported),
        pickle.loads(pickle.dumps(exported)),
    ):
        assert torch.equal(one.early_exit(batch).probabilities, expected)


def test_steps_side_by_side_give_the_answers_of_one_after_the_other(tmp_path):
    saved(tmp_path / "model")
    export(tmp_path / "model", tmp_path / "onnx")
    model, batch = DACT.from_pretrained(tmp_path / "onnx"), random_batch(100)
    model.step_tokens = 100
    alone, alone_full = model.early_exit(batch), model.full_depth(batch)
    torch.set_num_threads(3)  # steps of 100 tokens are more than a dozen at each layer
    beside, beside_full = model.early_exit(batch), model.full_depth(batch)
    torch.testing.assert_close(beside.probabilities, alone.probabilities)
    torch.testing.assert_close(beside_full.h, alone_full.h)
    assert torch.equal(beside.exit_layer, alone.exit_layer)


def test_export_replaces_an_earlier_export_and_nothing_else(tmp_path):
    saved(tmp_path / "model")
    first = export(tmp_path / "model", tmp_path / "onnx")
    assert "calibrate" not in str(first), "nothing was promised"
    again = export(tmp_path / "model", tmp_path / "onnx", quantize="int8")
    assert (first.replaced, again.replaced) == (False, True)
    assert "replaced" in str(again)
    (tmp_path / "precious").mkdir()
    (tmp_path / "precious" / "thesis.txt").write_text("all of it")
    for output in (tmp_path / "precious", tmp_path / "model"):
        with pytest.raises(ValueError, match=output.name):
            export(tmp_path / "model", output)
    assert (tmp_path / "precious" / "thesis.txt").read_text() == "all of it"


def test_what_cannot_be_exported_is_refused(tmp_path):
    class Own(TransformerEncoder):
        pass

    saved(tmp_path / "model")
    export(tmp_path / "model", tmp_path / "onnx")
    (tmp_path / "onnx" / "layer_2.onnx").unlink()
    with pytest.raises(ValueError, match=r"layer_2.onnx"):
        DACT.from_pretrained(tmp_path / "onnx")
    export(tmp_path / "model", tmp_path / "onnx")
    DACT(encoder=Own(50, 2, 8, 2)).save_pretrained(tmp_path / "own")
    for folder, quantize, error, message in (
        ("onnx", None, ValueError, "exported already"),
        ("model", "int4", ValueError, "int4"),
        ("nothing", None, FileNotFoundError, "nothing"),
        ("own", None, ValueError, "not one of dact's own"),
    ):
        with pytest.raises(error, match=message):
            export(tmp_path / folder, tmp_path / "again", quantize=quantize)
    assert not (tmp_path / "again").exists()


@pytest.mark.parametrize("fault", [0.1, torch.nan])
def test_a_graph_that_differs_from_pytorch_leaves_no_folder(tmp_path, monkeypatch, fault):
    saved(tmp_path / "model")
    plain = TransformerEncoder.layer
    # As an encoder would that tracing gets wrong: the traced run and the ordinary run differ.
    monkeypatch.setattr(
        TransformerEncoder,
        "layer",
        lambda self, n, hidden, context: (
            plain(self, n, hidden, context) + (fault if torch.jit.is_tracing() else 0.0)
        ),
    )
    with pytest.raises(ValueError, match=r"differs from PyTorch"):
        export(tmp_path / "model", tmp_path / "onnx")
    assert not (tmp_path / "onnx").exists()


def test_without_the_extra_the_error_names_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    monkeypatch.delitem(sys.modules, "dact.encoders.onnx", raising=False)
    with pytest.raises(ImportError, match=re.escape("pip install 'dact[onnx]'")):
        importlib.import_module("dact.encoders.onnx")
