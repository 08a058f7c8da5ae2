"""Laws of the exchange with Hugging Face: the same tensors, the same logits, clear refusals."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors
import safetensors.numpy
from flax import nnx

from jaxlab.models.decoder import abstract_decoder
from jaxlab.models.interop import InteropError, load_llama, save_llama
from tests.models.tiny import random_tokens, run, tiny_config

TIED = pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
MEMORY = pytest.mark.parametrize("memory_layers", [0, 2])


def hub_config(**changes):
    """A configuration whose every value survives config.json; heads wider than the width."""
    values = dict(memory_layers=0, rope_theta=500.0, norm_eps=1e-6, max_context=64, width=24)
    return tiny_config(**{"compute_dtype": "bfloat16", **values, **changes})


def parameters(config):
    """Random weights, norms too, so that one in the wrong place is noticed."""
    generator = np.random.default_rng(0)

    def draw(leaf):
        return 0.2 * generator.standard_normal(leaf.shape, np.float32)

    return jax.tree.map(draw, abstract_decoder(config)[1])


def logits(config, params, tokens):
    config = dataclasses.replace(config, compute_dtype="float32")
    return np.asarray(run(nnx.merge(abstract_decoder(config)[0], params), tokens)[0])


def assert_identical(a, b):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    jax.tree.map(lambda x, y: np.testing.assert_array_equal(np.asarray(x), np.asarray(y)), a, b)


@pytest.fixture
def saved(tmp_path):
    config = hub_config()
    save_llama(config, parameters(config), tmp_path)
    return tmp_path


def rewrite(directory, change):
    """Apply ``change`` to the dictionary of the file's tensors."""
    path = directory / "model.safetensors"
    tensors = safetensors.numpy.load_file(path)
    change(tensors)
    safetensors.numpy.save_file(tensors, path)


def edit_config(directory, **changes):
    path = directory / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


@TIED
@MEMORY
@pytest.mark.parametrize("width", [None, 24])
def test_parameters_and_configuration_come_back_bit_equal(tmp_path, tied, memory_layers, width):
    config = hub_config(tied_embeddings=tied, memory_layers=memory_layers, width=width)
    params = parameters(config)
    save_llama(config, params, tmp_path)
    again, loaded = load_llama(tmp_path)
    assert again == config
    assert_identical(loaded, params)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["config.json", "model.safetensors"]


def test_file_holds_exactly_the_names_and_shapes_of_a_hugging_face_llama(saved):
    tensors = safetensors.numpy.load_file(saved / "model.safetensors")
    layer = {
        "input_layernorm": (24,),
        "self_attn.q_proj": (32, 24),
        "self_attn.k_proj": (16, 24),
        "self_attn.v_proj": (16, 24),
        "self_attn.o_proj": (24, 32),
        "post_attention_layernorm": (24,),
        "mlp.gate_proj": (24, 24),
        "mlp.up_proj": (24, 24),
        "mlp.down_proj": (24, 24),
    }
    outside = {"model.embed_tokens": (61, 24), "model.norm": (24,), "lm_head": (61, 24)}
    every = {f"model.layers.{i}.{name}": shape for i in range(4) for name, shape in layer.items()}
    assert {name: array.shape for name, array in tensors.items()} == {
        f"{name}.weight": shape for name, shape in {**outside, **every}.items()
    }


def test_shards_listed_by_an_index_are_read_as_one_checkpoint(saved):
    whole = load_llama(saved)
    tensors = safetensors.numpy.load_file(saved / "model.safetensors")
    names = sorted(tensors)
    shards = {"a.safetensors": names[:7], "b.safetensors": names[7:]}
    for file, part in shards.items():
        safetensors.numpy.save_file({name: tensors[name] for name in part}, saved / file)
    places = {name: file for file, part in shards.items() for name in part}
    (saved / "model.safetensors.index.json").write_text(json.dumps({"weight_map": places}))
    (saved / "model.safetensors").unlink()
    config, params = load_llama(saved)
    assert config == whole[0]
    assert_identical(params, whole[1])


def test_bfloat16_weights_arrive_as_the_same_numbers_in_float32(saved):
    def narrow(tensors):
        for name in tensors:
            tensors[name] = tensors[name].astype(jnp.bfloat16)

    before = load_llama(saved)[1]
    rewrite(saved, narrow)
    rounded = jax.tree.map(lambda x: x.astype(jnp.bfloat16).astype(np.float32), before)
    assert_identical(load_llama(saved)[1], rounded)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop("model.layers.2.mlp.up_proj.weight"), "layers.2.mlp.up_proj.* missing"),
        (lambda t: t.pop("lm_head.weight"), "lm_head.weight is missing"),
        (
            lambda t: t.update({"model.layers.4.mlp.up_proj.weight": np.ones((24, 24))}),
            "layers.4.mlp.up_proj.weight has no place",
        ),
        (
            lambda t: t.update({"model.norm.weight": np.ones(25, np.float32)}),
            r"model.norm.weight has shape \(25,\), config.json makes it \(24,\)",
        ),
        (
            lambda t: t.update({"model.norm.weight": np.ones(24, np.int8)}),
            "model.norm.weight holds int8",
        ),
    ],
)
def test_odd_tensors_are_named(saved, change, message):
    rewrite(saved, change)
    with pytest.raises(InteropError, match=message):
        load_llama(saved)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "mistral"}, "model_type is 'mistral'"),
        ({"attention_bias": True}, "attention_bias is True"),
        ({"hidden_act": "gelu"}, "hidden_act is 'gelu'"),
        ({"rope_parameters": {"rope_type": "llama3"}}, "rotary embedding of type 'llama3'"),
        ({"num_key_value_heads": 3}, "config.json: kv_heads: heads"),
    ],
)
def test_models_that_are_another_architecture_are_refused(saved, changes, message):
    edit_config(saved, **changes)
    with pytest.raises(InteropError, match=message):
        load_llama(saved)


def test_missing_and_broken_files_are_named(saved):
    (saved / "model.safetensors").write_bytes(b"\x08\x00\x00\x00\x00\x00\x00\x00notjson!")
    with pytest.raises(InteropError, match="model.safetensors cannot be read"):
        load_llama(saved)
    (saved / "model.safetensors").unlink()
    with pytest.raises(InteropError, match="model.safetensors cannot be read"):
        load_llama(saved)
    (saved / "config.json").unlink()
    with pytest.raises(InteropError, match="config.json cannot be read"):
        load_llama(saved)


def test_parameters_of_another_configuration_are_not_written(tmp_path):
    params = parameters(hub_config())
    for changes, message in (
        ({"ffn_width": 32}, r"'mlp'.* has shape \(4, 24, 24\), the config.* \(4, 32, 24\)"),
        ({"vocab_size": 62}, "'embedding'.* has shape"),
        ({"memory_layers": 2}, r"'stacks'.* has shape \(4, .*\), the config.* \(2,"),
        ({"tied_embeddings": True}, "'head'.* has shape .*, the configuration makes it None"),
    ):
        with pytest.raises(InteropError, match=message):
            save_llama(hub_config(**changes), params, tmp_path)
    assert not list(tmp_path.iterdir())


@pytest.fixture
def llama():
    """transformers' own class; it warns about itself while it is imported."""
    pytest.importorskip("torch", reason="the peer of this law is PyTorch's Llama")
    transformers = pytest.importorskip("transformers", reason="the peer is transformers' Llama")
    return transformers.LlamaConfig, transformers.LlamaForCausalLM


def their_logits(model, tokens):
    import torch

    with torch.no_grad():
        return model(torch.from_numpy(np.array(tokens, np.int64))).logits.numpy()


@TIED
@MEMORY
@pytest.mark.filterwarnings("ignore")
def test_transformers_gives_our_logits_with_our_weights(tmp_path, llama, tied, memory_layers):
    config = hub_config(tied_embeddings=tied, memory_layers=memory_layers)
    params = parameters(config)
    save_llama(config, params, tmp_path)
    model, info = llama[1].from_pretrained(tmp_path, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    tokens = random_tokens(5, 2, 20)
    ours = logits(config, params, tokens)
    np.testing.assert_allclose(their_logits(model, tokens), ours, rtol=1e-4, atol=1e-4)


@TIED
@pytest.mark.filterwarnings("ignore")
def test_our_decoder_gives_the_logits_of_a_llama_that_transformers_wrote(tmp_path, llama, tied):
    import torch

    torch.manual_seed(0)
    model = llama[1](
        llama[0](
            vocab_size=61,
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=3,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=64,
            rope_parameters={"rope_type": "default", "rope_theta": 500.0},
            tie_word_embeddings=tied,
            initializer_range=0.2,
        )
    )
    model.save_pretrained(tmp_path)
    config, params = load_llama(tmp_path)
    assert (config.kv_heads, config.rope_theta, config.tied_embeddings) == (2, 500.0, tied)
    tokens = random_tokens(6, 2, 20)
    theirs = their_logits(model, tokens)
    np.testing.assert_allclose(logits(config, params, tokens), theirs, rtol=1e-4, atol=1e-4)
