"""Traces and eigenvalues against dense matrices."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.flatten_util import ravel_pytree

from jaxlab.errors import ConfigError
from jaxlab.evaluation import sharpness
from jaxlab.evaluation.problems import classification_problem, next_token_problem
from jaxlab.evaluation.sharpness import fisher_trace, hessian_trace, top_eigenvalues
from tests.models.tiny import random_tokens, tiny_config, tiny_decoder

KEY = jax.random.key(0)
EXAMPLES, FEATURES, HIDDEN, CLASSES = 12, 3, 5, 4
DRAW = np.random.default_rng(0)
INPUTS = jnp.asarray(DRAW.standard_normal((EXAMPLES, FEATURES)), jnp.float32)
LABELS = jnp.asarray(DRAW.integers(0, CLASSES, EXAMPLES))
PARAMS = {
    "in": jnp.asarray(DRAW.standard_normal((FEATURES, HIDDEN)), jnp.float32),
    "out": jnp.asarray(DRAW.standard_normal((HIDDEN, CLASSES)), jnp.float32),
}


def logits(params, inputs):
    return jnp.tanh(inputs @ params["in"]) @ params["out"]


def split(*sizes):
    """The examples in batches of some sizes."""
    ends = np.cumsum(sizes)
    return [(INPUTS[e - s : e], LABELS[e - s : e]) for s, e in zip(sizes, ends, strict=True)]


PROBLEM = classification_problem(PARAMS, logits, split(12))
loss, sampled_loss = PROBLEM.loss_fn, PROBLEM.sampled_loss


def dense_hessian(function, params) -> np.ndarray:
    flat, unravel = ravel_pytree(params)
    return np.asarray(jax.jit(jax.hessian(lambda x: function(unravel(x))))(flat), np.float64)


def gauss_newton() -> np.ndarray:
    """Mean over examples of J' (diag(p) - p p') J."""
    flat, unravel = ravel_pytree(PARAMS)
    jacobian = np.asarray(jax.jacobian(lambda x: logits(unravel(x), INPUTS))(flat))
    p = np.asarray(jax.nn.softmax(logits(PARAMS, INPUTS)))
    inner = np.einsum("nc,cd->ncd", p, np.eye(CLASSES)) - np.einsum("nc,nd->ncd", p, p)
    return np.einsum("nci,ncd,ndj->ij", jacobian, inner, jacobian) / EXAMPLES


@pytest.fixture(scope="module")
def hessian():
    def mean_loss(params):
        rows = jax.nn.log_softmax(logits(params, INPUTS))
        return -jnp.mean(rows[jnp.arange(EXAMPLES), LABELS])

    return dense_hessian(mean_loss, PARAMS)


def rotated(eigenvalues, *, seed=0):
    """A quadratic in two leaves with these eigenvalues, and its matrix."""
    size = len(eigenvalues)
    turn, _ = np.linalg.qr(np.random.default_rng(seed).standard_normal((size, size)))
    matrix = jnp.asarray(turn @ np.diag(eigenvalues) @ turn.T, jnp.float32)

    def quadratic(params):
        x = jnp.concatenate([params["a"].ravel(), params["b"]])
        return 0.5 * x @ matrix @ x

    return quadratic, {"a": jnp.ones((2, 3)), "b": jnp.ones(size - 6)}


def test_lanczos_finds_the_eigenvalues_of_a_quadratic():
    values = [9.0, 4.0, 3.9, 1.0, 0.5, -0.1, -2.0, -20.0]
    quadratic, params = rotated(values)
    found = top_eigenvalues(quadratic, params, KEY, count=5, iterations=8)
    np.testing.assert_allclose(found.values, values[:5], rtol=1e-5, atol=2e-5)


def test_more_iterations_than_parameters_and_equal_eigenvalues_bring_no_ghosts():
    values = [5.0, 5.0, 5.0, 2.0, 1.0, 1.0, 0.0, 0.0]
    quadratic, params = rotated(values)
    found = top_eigenvalues(quadratic, params, KEY, count=8, iterations=30)
    np.testing.assert_allclose(found.values, values, rtol=1e-5, atol=2e-5)
    assert max(found.residuals) < 1e-4


def test_an_eigenvalue_lies_within_its_residual_of_a_true_one():
    values = np.linspace(1, 3, 40)
    quadratic, params = rotated(values)
    found = top_eigenvalues(quadratic, params, KEY, count=3, iterations=6)
    for value, residual in zip(found.values, found.residuals, strict=True):
        assert residual > 1e-4 and np.abs(values - value).min() <= residual


def test_signs_give_the_trace_of_a_diagonal_quadratic_without_error():
    scale = jnp.asarray([3.0, -1.0, 0.5])
    found = hessian_trace(lambda x: 0.5 * jnp.sum(scale * x**2), jnp.ones(3), KEY, draws=2)
    assert found == sharpness.Estimate(2.5, 0.0)


def test_the_trace_of_a_rotated_quadratic_is_exact_in_the_mean():
    values = [9.0, 4.0, 3.0, 1.0, 0.5, 0.0, -2.0, -4.0]
    quadratic, params = rotated(values)
    found = hessian_trace(quadratic, params, KEY, draws=150)
    assert abs(found.value - sum(values)) < 3 * found.error
    assert 0.2 < found.error < 1.5


def test_trace_and_eigenvalues_of_a_network_are_those_of_the_dense_hessian(hessian):
    over = dict(batches=split(12), n=EXAMPLES)
    found = hessian_trace(loss, PARAMS, KEY, draws=150, **over)
    assert abs(found.value - np.trace(hessian)) < 4 * found.error < np.trace(hessian)
    found = top_eigenvalues(loss, PARAMS, KEY, count=4, iterations=35, **over)
    expected = np.linalg.eigvalsh(hessian)[::-1][:4]
    np.testing.assert_allclose(found.values, expected, rtol=1e-4)


def test_the_mean_of_sampled_traces_is_the_trace_of_gauss_newton():
    over = dict(batches=split(12), n=EXAMPLES)
    found = fisher_trace(sampled_loss, PARAMS, KEY, draws=300, **over)
    exact = np.trace(gauss_newton())
    assert abs(found.value - exact) < 3 * found.error < 0.2 * exact


def test_the_labels_of_the_data_in_place_of_drawn_ones_are_something_else():
    def true_labels(params, key, inputs, labels):
        return loss(params, inputs, labels)

    found = fisher_trace(true_labels, PARAMS, KEY, draws=2, batches=split(12), n=EXAMPLES)
    assert abs(found.value / np.trace(gauss_newton()) - 1) > 0.3


def test_batches_of_any_size_give_the_same(hessian):
    whole, parts = split(12), split(3, 5, 4)
    traces = [
        hessian_trace(loss, PARAMS, KEY, draws=3, batches=b, n=EXAMPLES).value
        for b in (whole, parts)
    ]
    np.testing.assert_allclose(traces[0], traces[1], rtol=1e-5)
    tops = [
        top_eigenvalues(loss, PARAMS, KEY, count=2, iterations=35, batches=b, n=EXAMPLES).values
        for b in (whole, parts)
    ]
    np.testing.assert_allclose(tops[0], tops[1], rtol=1e-5)
    # Labels are drawn anew in each batch: equal in the mean, over the same number of labels.
    fisher = fisher_trace(sampled_loss, PARAMS, KEY, draws=100, batches=split(4, 4, 4), n=EXAMPLES)
    assert abs(fisher.value - np.trace(gauss_newton())) < 3 * fisher.error


ROWS, LENGTH = 10, 6
SMALL = tiny_config(
    vocab_size=11, layers=1, heads=2, kv_heads=1, head_dim=4, ffn_width=6, memory_layers=0
)


def tokens_and_mask():
    tokens = np.asarray(random_tokens(3, ROWS, LENGTH)) % 11
    return tokens, np.arange(ROWS * LENGTH).reshape(ROWS, LENGTH) < 55


@pytest.fixture(scope="module")
def text():
    """The problem of a tiny decoder in two batches, the last of them partly blank."""
    params = nnx.to_pure_dict(nnx.split(tiny_decoder(SMALL))[1])
    config = dataclasses.replace(SMALL, compute_dtype="bfloat16")
    return next_token_problem(config, params, *tokens_and_mask(), bos_id=1)


@pytest.fixture(scope="module")
def dense_text(text):
    """Mean loss, its Hessian, and of the logits at every place that counts values and Jacobian.

    One softmax over all logits in place of blocks.
    """
    flat, unravel = ravel_pytree(text.params)
    tokens, mask = tokens_and_mask()
    inputs = jnp.asarray(np.concatenate([np.ones((ROWS, 1), np.int32), tokens[:, :-1]], axis=1))
    graphdef = nnx.split(tiny_decoder(SMALL))[0]

    def of_logits(x):
        decoder = nnx.merge(graphdef, unravel(x))
        return decoder.logits(decoder(inputs)[0])[mask]

    def mean_loss(x):
        rows = jax.nn.log_softmax(of_logits(x))
        return -jnp.mean(rows[np.arange(len(rows)), tokens[mask]])

    def columns(function, x, basis):
        return jax.vmap(lambda v: jax.jvp(function, (x,), (v,))[1], out_axes=-1)(basis)

    @jax.jit
    def everything(x, basis):
        hessian = columns(jax.grad(mean_loss), x, basis)
        return mean_loss(x), hessian, of_logits(x), columns(of_logits, x, basis)

    return [np.asarray(x, np.float64) for x in everything(flat, jnp.eye(flat.size))]


def test_a_language_model_is_measured_as_its_dense_matrices_are(text, dense_text):
    value, exact, rows, jacobian = dense_text
    found = sharpness.measure_sharpness(text, draws=24, eigenvalues=3, iterations=40)
    assert (len(text.batches), found.n) == (2, 55)
    assert found.loss == pytest.approx(float(value), rel=1e-5)
    assert abs(found.hessian_trace - np.trace(exact)) < 4 * found.hessian_trace_error
    expected = np.linalg.eigvalsh(exact)[::-1][:3]
    np.testing.assert_allclose(found.top_eigenvalues, expected, rtol=1e-4)
    p = np.exp(rows) / np.exp(rows).sum(-1, keepdims=True)
    centred = jacobian - np.einsum("nc,nci->ni", p, jacobian)[:, None]
    fisher = np.einsum("nc,nci->", p, centred**2) / 55
    assert abs(found.fisher_trace - fisher) < 4 * found.fisher_trace_error < 0.6 * fisher


@pytest.mark.parametrize(
    "settings, message",
    [
        (dict(examples=0), "examples is 0"),
        (dict(draws=1), "draws is 1"),
        (dict(eigenvalues=5, iterations=4), "eigenvalues is 5: it must be 1 to 4"),
    ],
)
def test_settings_that_cannot_be_are_errors_before_anything_is_read(settings, message):
    with pytest.raises(ConfigError, match=message):
        sharpness.evaluate_sharpness("nowhere", **settings)


def test_the_fisher_trace_alone_is_that_of_the_whole_measurement(monkeypatch):
    monkeypatch.setattr(sharpness, "_problem", lambda *_, **__: PROBLEM)
    whole = sharpness.evaluate_sharpness("run", draws=4, iterations=2, seed=3)
    trace, value = sharpness.evaluate_fisher_trace("run", examples=12, draws=4, seed=3)
    assert (trace.value, trace.error) == (whole.fisher_trace, whole.fisher_trace_error)
    assert value == whole.loss
    other, _ = sharpness.evaluate_fisher_trace("run", examples=12, draws=4, seed=4)
    assert other.value != trace.value


def test_each_part_is_announced_and_a_model_that_is_certain_of_everything_is_doubted():
    settings = dict(draws=2, eigenvalues=1, iterations=2)
    lines = []
    sharpness.measure_sharpness(PROBLEM, report=lines.append, **settings)
    assert [line[:3] for line in lines] == ["1/3", "2/3", "3/3"]
    assert "12 predictions" in lines[0]
    certain = dataclasses.replace(PROBLEM, params=jax.tree.map(lambda x: 1e3 * x, PARAMS))
    lines = []
    found = sharpness.measure_sharpness(certain, report=lines.append, **settings)
    assert found.fisher_trace_error == 0 and found.fisher_trace < 1e-9
    assert lines[1].startswith("warning: every draw of labels gave the same trace (")
