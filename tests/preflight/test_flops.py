"""FLOPs counted from the traced program against counts by hand."""

import jax
import jax.numpy as jnp
import pytest

from jaxlab.preflight.flops import count

A, B = jnp.zeros((3, 4, 5)), jnp.zeros((3, 5, 7))
ONCE = 2 * 3 * 4 * 5 * 7


def product(a, b):
    return jnp.einsum("bij,bjk->bik", a, b)


def total(function, *arguments, rare=1.0):
    return count(jax.jit(function).trace(*arguments), rare=rare).total


def test_a_product_counts_two_for_every_multiply_add():
    assert total(product, A, B) == ONCE


def test_the_backward_pass_of_a_product_is_two_products():
    squared = jax.value_and_grad(lambda a, b: (product(a, b) ** 2).sum(), (0, 1))
    assert total(squared, A, B) == 3 * ONCE


def test_a_scan_counts_every_round_and_what_is_made_again_counts_again():
    square = jnp.zeros((6, 6))
    once = 2 * 6**3

    def layers(x, remat):
        layer = lambda x, _: (jnp.sin(x @ square), None)  # noqa: E731
        layer = jax.checkpoint(layer) if remat else layer
        return jax.lax.scan(layer, x, length=9)[0].sum()

    x = jnp.ones((6, 6))
    assert total(lambda x: layers(x, False), x) == 9 * once
    assert total(jax.grad(lambda x: layers(x, False)), x) == 2 * 9 * once
    assert total(jax.grad(lambda x: layers(x, True)), x) == 3 * 9 * once


def test_of_branches_the_dearest_runs_rarely():
    def step(which, a, b):
        return jax.lax.cond(which, lambda: product(a, b), lambda: jnp.zeros((3, 4, 7)))

    found = count(jax.jit(step).trace(True, A, B), rare=0.1)
    assert found.total == pytest.approx(0.1 * ONCE) and found.most == ONCE


def test_a_convolution_counts_its_window():
    image, kernel = jnp.zeros((2, 3, 8, 8)), jnp.zeros((5, 3, 3, 3))
    found = total(lambda x, k: jax.lax.conv(x, k, (1, 1), "SAME"), image, kernel)
    assert found == 2 * 2 * 5 * 8 * 8 * 3 * 3 * 3


def test_the_count_of_a_small_model_is_the_compilers_when_its_layers_are_unrolled():
    from flax import nnx

    from tests.models.tiny import random_tokens, tiny_config, tiny_decoder

    graphdef, params = nnx.split(tiny_decoder(tiny_config(layers=1, memory_layers=0)))

    def loss(params, tokens):
        decoder = nnx.merge(graphdef, params)
        return (decoder(tokens)[0] @ decoder.unembedding()).sum()

    tokens = random_tokens(0, 2, 16)
    ours = total(jax.grad(loss), params, tokens)
    theirs = jax.jit(jax.grad(loss)).lower(params, tokens).compile().cost_analysis()["flops"]
    # The compiler counts work on single elements as well.
    assert 0.7 * theirs < ours < theirs
