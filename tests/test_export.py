"""Exported models: the same classes and exit layers on ONNX Runtime, from folders that are read
like any other."""

import copy
import importlib
import pickle
import re
import shutil
import sys
from pathlib import Path

import pytest
import torch

from dact import DACT, export
from dact.encoders import OnnxEncoder, TransformerEncoder
from tests.conftest import random_batch, scatter_exits, tiny_model
from tests.test_encoders import ALL, encoder_of

MARGIN = 1e-4
# Sums of 8-bit products saturate on x86 processors without VNNI.
CPU = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else "vnni"
EXACT_INT8 = "vnni" in CPU or "avx2" not in CPU


def leads(probabilities):
    """First class less second, [batch]."""
    best = probabilities.topk(2, dim=1).values
    return best[:, 0] - best[:, 1]


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """A small model in a folder `model`, and exported to `onnx`."""
    folder = tmp_path_factory.mktemp("exported")
    tiny_model().save_pretrained(folder / "model")
    report = export(folder / "model", folder / "onnx")
    assert not report.replaced
    assert "calibrate" not in str(report), "nothing was promised"
    return folder


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
    for size in ((33, 24), (1, 1), (5, 60)):
        batch = random_batch(*size, vocab=100)
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
        classes, others = (one.probabilities[sure] for one in (got, expected))
        assert torch.equal(classes.argmax(1), others.argmax(1))
        torch.testing.assert_close(classes, others, atol=1e-4, rtol=0)
    left = {name: batch[name].flip(1) for name in ("input_ids", "attention_mask")}
    if name == "bert":  # which counts positions from the first column
        with pytest.raises(ValueError, match=r"padded on the left.*pad on the right"):
            exported.early_exit(left)
    elif name == "roberta":
        exported.early_exit(left)
    elif name == "albert-groups":  # layers that share their weights share a graph
        graphs = sorted(path.name for path in (tmp_path / "onnx").glob("layer_*"))
        assert graphs == ["layer_1.onnx", "layer_3.onnx"]


def test_only_the_layers_that_the_model_uses_are_exported(tmp_path):
    model = tiny_model(layers=4, num_layers=2)
    model.save_pretrained(tmp_path / "model")
    export(tmp_path / "model", tmp_path / "onnx")
    exported, batch = DACT.from_pretrained(tmp_path / "onnx"), random_batch()
    assert exported.num_layers == exported.encoder.num_layers == 2
    assert torch.equal(exported.early_exit(batch).exit_layer, model.early_exit(batch).exit_layer)


def test_int8_is_smaller_and_close(tmp_path):
    model = tiny_model(encoder=TransformerEncoder(100, 4, 64, 4))
    model.save_pretrained(tmp_path / "model")
    small = export(tmp_path / "model", tmp_path / "int8", quantize="int8")
    weights = (tmp_path / "model" / "model.safetensors").stat().st_size
    assert small.megabytes < 0.4 * weights / 1e6
    assert small.quantized_difference < (0.05 if EXACT_INT8 else 0.15)
    batch = random_batch(200, 24, vocab=100)
    expected = model.full_depth(batch).probabilities.argmax(1)
    got = DACT.from_pretrained(tmp_path / "int8").full_depth(batch).probabilities.argmax(1)
    assert (expected == got).float().mean() > 0.95


def test_int8_keeps_its_levels_next_to_an_outlier(tmp_path):
    """Neither a neuron with large weights nor a token with large values, as BERT's first, must
    spoil the scales of the others."""
    encoder = encoder_of("bert").eval()
    layers = encoder.model.encoder.layer
    layers[0].output.dense.weight.data[:, 3] *= 300
    DACT(encoder=encoder).save_pretrained(tmp_path / "model")
    export(tmp_path / "model", tmp_path / "int8", quantize="int8")
    small = DACT.from_pretrained(tmp_path / "int8").encoder
    mask = torch.ones(4, 6, dtype=torch.int64)
    for layer, token in ((1, 1), (2, 1000)):
        hidden = torch.randn(4, 6, encoder.hidden_size)
        hidden[3] *= token
        with torch.no_grad():
            expected, got = (
                one.layer(layer, hidden, one.context(hidden, mask)) for one in (encoder, small)
            )
        assert (got[:3] - expected[:3]).norm() < 0.005 * expected[:3].norm()


@pytest.mark.slow
@pytest.mark.parametrize("name", ["albert-groups", "deberta-v2", "modernbert"])
def test_int8_serves_families_of_other_layers(name, tmp_path):
    # The first token, since the mean is exported in the test of every family.
    model = DACT(encoder=encoder_of(name, pooling="first"), confidence_reads="state").eval()
    scatter_exits(model).save_pretrained(tmp_path / "model")
    report = export(tmp_path / "model", tmp_path / "int8", quantize="int8")
    assert report.quantized_difference < 0.1
    assert b"MatMulInteger" in (tmp_path / "int8" / "layer_1.onnx").read_bytes()


def test_an_exported_model_can_be_saved_elsewhere_copied_and_pickled(exported, tmp_path):
    model, batch = DACT.from_pretrained(exported / "onnx"), random_batch()
    expected = model.early_exit(batch).probabilities
    model.save_pretrained(tmp_path)
    copies = copy.deepcopy(model), pickle.loads(pickle.dumps(model))
    for one in (DACT.from_pretrained(tmp_path), *copies):
        assert torch.equal(one.early_exit(batch).probabilities, expected)


def test_steps_side_by_side_give_the_answers_of_one_after_the_other(exported):
    model, batch = DACT.from_pretrained(exported / "onnx"), random_batch(100)
    model.step_tokens = 100
    alone, alone_full = model.early_exit(batch), model.full_depth(batch)
    torch.set_num_threads(3)  # steps of 100 tokens are more than a dozen at each layer
    beside, beside_full = model.early_exit(batch), model.full_depth(batch)
    torch.testing.assert_close(beside.probabilities, alone.probabilities)
    torch.testing.assert_close(beside_full.h, alone_full.h)
    assert torch.equal(beside.exit_layer, alone.exit_layer)


def test_export_replaces_an_earlier_export_and_nothing_else(exported, tmp_path):
    shutil.copytree(exported / "onnx", tmp_path / "onnx")
    (tmp_path / "onnx" / "layer_2.onnx").unlink()
    with pytest.raises(ValueError, match=r"layer_2.onnx"):
        DACT.from_pretrained(tmp_path / "onnx")
    again = export(exported / "model", tmp_path / "onnx")
    assert again.replaced
    assert "replaced" in str(again)
    DACT.from_pretrained(tmp_path / "onnx")
    (tmp_path / "precious").mkdir()
    (tmp_path / "precious" / "thesis.txt").write_text("all of it")
    for output in (tmp_path / "precious", exported / "model"):
        with pytest.raises(ValueError, match=output.name):
            export(exported / "model", output)
    assert (tmp_path / "precious" / "thesis.txt").read_text() == "all of it"


class Own(TransformerEncoder):
    pass


@pytest.mark.parametrize(
    ("name", "quantize", "error", "message"),
    [
        ("onnx", None, ValueError, "exported already"),
        ("model", "int4", ValueError, "int4"),
        ("nothing", None, FileNotFoundError, "nothing"),
        ("own", None, ValueError, "not one of dact's own"),
    ],
)
def test_what_cannot_be_exported_is_refused(exported, tmp_path, name, quantize, error, message):
    DACT(encoder=Own(50, 2, 8, 2)).save_pretrained(exported / "own")
    with pytest.raises(error, match=message):
        export(exported / name, tmp_path / "again", quantize=quantize)
    assert not (tmp_path / "again").exists()


@pytest.mark.parametrize("fault", [0.1, torch.nan])
def test_a_graph_that_differs_from_pytorch_leaves_no_folder(exported, tmp_path, monkeypatch, fault):
    plain = TransformerEncoder.layer

    def layer(*given):  # as if tracing got it wrong: the traced run and the ordinary run differ
        return plain(*given) + (fault if torch.jit.is_tracing() else 0.0)

    monkeypatch.setattr(TransformerEncoder, "layer", layer)
    with pytest.raises(ValueError, match=r"differs from PyTorch"):
        export(exported / "model", tmp_path / "onnx")
    assert not (tmp_path / "onnx").exists()


def test_without_the_extra_the_error_names_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    monkeypatch.delitem(sys.modules, "dact.encoders.onnx", raising=False)
    with pytest.raises(ImportError, match=re.escape("pip install 'dact[onnx]'")):
        importlib.import_module("dact.encoders.onnx")
