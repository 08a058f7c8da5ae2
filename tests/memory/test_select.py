"""Laws of token selection: Memory³ §3.3 against loops over heads and tokens."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jaxlab.memory.select import attention_received, gather_tokens, select_tokens
from jaxlab.memory.write import encode_references
from jaxlab.models.decoder import encode_preface
from tests.models.tiny import PREFACE, random_tokens, tiny_decoder, tiny_memory

FORMS = list(itertools.product(["softmax", "exponential"], ["sum", "mean", "max", "first"]))
LENGTHS = [9, 5, 0]


@functools.partial(jax.jit, static_argnames=("kept", "selection", "pooling"))
def run(query, key, valid, *, kept, selection, pooling):
    received = attention_received(query, key, valid, selection=selection, pooling=pooling)
    chosen = select_tokens(query, key, valid, kept=kept, selection=selection, pooling=pooling)
    return received, chosen


def references(*, length=9, kv_heads=2, group=3, head_dim=4, scale=2.0, seed=0):
    draw = np.random.default_rng(seed)
    query = draw.standard_normal((3, length, kv_heads * group, head_dim), np.float32) * scale
    key = draw.standard_normal((3, length, kv_heads, head_dim), np.float32) * scale
    return query, key, np.arange(length) < np.array(LENGTHS)[:, None]


def received_by_loops(query, key, valid, *, selection, pooling):
    """What each token receives in each kv head, as the paper writes it, in float64."""
    batch, length, heads, head_dim = query.shape
    kv_heads = key.shape[2]
    group = heads // kv_heads
    pooled = np.full((batch, kv_heads, length), -np.inf)
    for b, k in itertools.product(range(batch), range(kv_heads)):
        real = np.flatnonzero(valid[b])
        each_head = np.zeros((group, length))
        for g, i in itertools.product(range(group), real):
            scores = [
                np.dot(query[b, i, k * group + g].astype(float), key[b, j, k]) / np.sqrt(head_dim)
                for j in real
            ]
            shares = np.exp(scores)
            if selection == "softmax":
                shares /= shares.sum()
            each_head[g, real] += shares
        if pooling == "first":
            each_head = each_head[:1]
        pool = {"sum": np.sum, "first": np.sum, "mean": np.mean, "max": np.max}[pooling]
        pooled[b, k, real] = pool(each_head, axis=0)[real]
    return pooled


@pytest.mark.parametrize(("selection", "pooling"), FORMS)
def test_selection_equals_loops_over_heads_and_tokens(selection, pooling):
    query, key, valid = references()
    received, chosen = run(query, key, valid, kept=4, selection=selection, pooling=pooling)
    wanted = received_by_loops(query, key, valid, selection=selection, pooling=pooling)
    # The logarithm is returned, and a mean up to the number of heads: the order is what counts.
    logarithm = np.log(wanted[:2], where=wanted[:2] > 0, out=np.full_like(wanted[:2], -np.inf))
    shift = np.log(3) if pooling == "mean" else 0.0
    np.testing.assert_allclose(received[:2], logarithm + shift, rtol=1e-5, atol=1e-5)
    order = np.argsort(-wanted, axis=-1, kind="stable")[..., :4]
    np.testing.assert_array_equal(chosen[:2], order[:2])


@pytest.mark.parametrize("selection", ["softmax", "exponential"])
def test_padding_neither_gives_nor_receives(selection):
    query, key, valid = references()
    poisoned = [np.where(valid[:, :, None, None], part, 50.0) for part in (query, key)]
    for arrays in ((query, key), poisoned):
        received, chosen = run(*arrays, valid, kept=4, selection=selection, pooling="sum")
        assert np.isneginf(received[1, :, 5:]).all() and np.isneginf(received[2]).all()
        assert np.isfinite(received[0]).all() and np.isfinite(received[1, :, :5]).all()
        assert (np.asarray(chosen[1]) < 5).all()
    whole, _ = run(query, key, valid, kept=4, selection=selection, pooling="sum")
    np.testing.assert_allclose(received, whole, rtol=1e-6)


@pytest.mark.parametrize("selection", ["softmax", "exponential"])
def test_ties_go_to_the_lower_index_and_valid_tokens_come_first(selection):
    query, key, valid = references()
    alike = np.zeros_like(key)
    _, chosen = run(query, alike, valid, kept=4, selection=selection, pooling="sum")
    np.testing.assert_array_equal(chosen, np.broadcast_to(np.arange(4), (3, 2, 4)))
    # Fewer valid tokens than are kept: these first, whatever lies behind.
    _, chosen = run(query, key, valid, kept=7, selection=selection, pooling="sum")
    assert (np.sort(chosen[1][:, :5], axis=-1) == np.arange(5)).all()
    assert len(np.unique(chosen[1][0])) == 7


@pytest.mark.parametrize("selection", ["softmax", "exponential"])
def test_scores_beyond_the_range_of_exp_keep_their_order(selection):
    """exp(100) overflows in float32; the logarithm of the sum does not."""
    query, key, valid = references()
    query = np.full_like(query, 20.0)
    step = np.array([3, 8, 1, 6, 0, 7, 2, 5, 4], np.float32)
    key = np.broadcast_to(step[None, :, None, None], key.shape)
    received, chosen = run(query, key, valid, kept=3, selection=selection, pooling="sum")
    assert received[0, 0, 1] > 100 or selection == "softmax"
    assert not np.isnan(received).any()
    # Softmax gives all to one token, and the rest underflow: only the winner is sure.
    sure = 3 if selection == "exponential" else 1
    np.testing.assert_array_equal(chosen[0, :, :sure], [[1, 5, 3][:sure]] * 2)


def test_gathering_takes_each_heads_own_tokens():
    rows = np.random.default_rng(0).standard_normal((3, 9, 2, 4), np.float32)
    chosen = np.array([[[0, 8], [3, 3]], [[1, 2], [4, 0]], [[7, 6], [5, 1]]], np.int32)
    found = jax.jit(gather_tokens)(rows, chosen)
    for n, k, m in np.ndindex(3, 2, 2):
        np.testing.assert_array_equal(found[n, m, k], rows[n, chosen[n, k, m], k])


TOKENS, LENGTHS_WRITTEN = random_tokens(0, 5, 12), jnp.array([12, 9, 12, 4, 2])


@pytest.fixture(scope="module")
def written():
    """The memories of some references behind two different prefaces, by one program."""
    graphdef, params = nnx.split(tiny_decoder())

    @jax.jit
    def write_behind(params, preface_ids):
        decoder = nnx.merge(graphdef, params)
        preface = encode_preface(decoder, preface_ids)
        return encode_references(
            decoder, TOKENS, LENGTHS_WRITTEN, preface=preface, memory=tiny_memory()
        )

    return [write_behind(params, ids) for ids in (PREFACE, PREFACE[::-1] + 20)]


def test_the_preface_takes_no_part_in_the_selection(written):
    """Another preface changes memories only through attention, so never those of the first layer.

    In the second layer it does: the references are encoded behind it.
    """
    ours, theirs = written
    np.testing.assert_array_equal(ours.keys[0], theirs.keys[0])
    np.testing.assert_array_equal(ours.values[0], theirs.values[0])
    assert np.abs(np.asarray(ours.values[1] - theirs.values[1])).max() > 1e-2


def test_tokens_are_chosen_before_rotation_and_kept_after_it(written):
    """The first layer by hand: selection from plain queries and keys, keys at positions P + j."""
    decoder, memories = tiny_decoder(), written[0]
    stack = decoder.stacks[0]
    x = np.asarray(decoder.embedding[...], np.float64)[np.asarray(TOKENS)]
    x /= np.sqrt((x**2).mean(axis=-1, keepdims=True) + decoder.config.norm_eps)
    x *= np.asarray(stack.attention_norm.scale[...])[0]
    weights = (stack.attention.query, stack.attention.key, stack.attention.value)
    query, key, value = (np.einsum("btd,dnh->btnh", x, np.asarray(w[...])[0]) for w in weights)
    valid = np.arange(12) < np.asarray(LENGTHS_WRITTEN)[:, None]
    received = received_by_loops(query, key, valid, selection="exponential", pooling="sum")

    angles = (len(PREFACE) + np.arange(12))[:, None] / 10000 ** (np.arange(4) / 4)
    first, second = key[..., :4], key[..., 4:]
    cos, sin = np.cos(angles)[None, :, None], np.sin(angles)[None, :, None]
    rotated = np.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
    for n, k in np.ndindex(5, 2):
        chosen = np.argsort(-received[n, k], kind="stable")[: min(4, valid[n].sum())]
        for kept, rows in ((memories.keys, rotated), (memories.values, value)):
            np.testing.assert_allclose(
                kept[0, n, : len(chosen), k], rows[n, chosen, k], rtol=1e-4, atol=1e-5
            )
