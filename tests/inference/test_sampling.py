"""Laws of choosing a token."""

import functools

import jax
import numpy as np
import pytest

from jaxlab.errors import ConfigError
from jaxlab.inference.sampling import Sampling, restrict, sample

LOGITS = np.random.default_rng(0).standard_normal((5, 12)).astype(np.float32) * 2
restricted = jax.jit(restrict, static_argnames="sampling")
drawn = jax.jit(sample, static_argnames="sampling")


def allowed_by_definition(logits, *, temperature, top_k, top_p):
    """The tokens that may be drawn from one row: likeliest first, one by one."""
    scaled = logits.astype(np.float64) / temperature
    order = list(np.argsort(-scaled, kind="stable"))[: top_k or None]
    weights = np.exp(scaled[order] - scaled.max())
    weights /= weights.sum()
    count = int(np.searchsorted(np.cumsum(weights), top_p)) + 1 if top_p < 1 else len(order)
    return set(order[:count])


@pytest.mark.parametrize(
    ("temperature", "top_k", "top_p"), [(1.0, 3, 1.0), (0.7, 0, 0.6), (1.5, 6, 0.5), (1.0, 0, 1e-6)]
)
def test_top_k_and_top_p_keep_what_their_definition_keeps(temperature, top_k, top_p):
    sampling = Sampling(temperature=temperature, top_k=top_k, top_p=top_p)
    found = np.asarray(restricted(LOGITS, sampling=sampling))
    for row, logits in zip(found, LOGITS, strict=True):
        kept = set(np.flatnonzero(np.isfinite(row)).tolist())
        assert kept == allowed_by_definition(
            logits, temperature=temperature, top_k=top_k, top_p=top_p
        )
        np.testing.assert_allclose(row[list(kept)], logits[list(kept)] / temperature, rtol=1e-6)


def test_a_limit_wider_than_the_vocabulary_limits_nothing():
    assert np.isfinite(restricted(LOGITS, sampling=Sampling(temperature=1.0, top_k=99))).all()


def test_temperature_zero_takes_the_largest_whatever_the_limits():
    for key in (0, 1):
        tokens = drawn(LOGITS, jax.random.key(key), sampling=Sampling(top_k=2, top_p=0.5))
        np.testing.assert_array_equal(tokens, LOGITS.argmax(axis=1))
        assert tokens.dtype == np.int32


def test_draws_follow_the_restricted_distribution_and_depend_on_the_key_alone():
    sampling = Sampling(temperature=1.0, top_k=3)
    logits = np.tile(LOGITS[:1], (4000, 1))
    draw = functools.partial(drawn, logits, sampling=sampling)
    tokens = np.asarray(draw(jax.random.key(0)))
    np.testing.assert_array_equal(tokens, draw(jax.random.key(0)))
    assert (tokens != np.asarray(draw(jax.random.key(1)))).any()
    top = np.argsort(-LOGITS[0])[:3]
    wanted = np.exp(LOGITS[0][top]) / np.exp(LOGITS[0][top]).sum()
    shares = np.bincount(tokens, minlength=12) / len(tokens)
    np.testing.assert_allclose(shares[top], wanted, atol=0.03)
    assert shares[top].sum() == pytest.approx(1)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (dict(temperature=-1.0), "temperature is -1.0"),
        (dict(temperature=float("nan")), "temperature is nan"),
        (dict(temperature=float("inf")), "temperature is inf"),
        (dict(top_k=-1), "top_k is -1"),
        (dict(top_p=0.0), "top_p is 0.0"),
        (dict(top_p=1.5), "top_p is 1.5"),
    ],
)
def test_values_that_mean_nothing_are_errors(values, message):
    with pytest.raises(ConfigError, match=message):
        Sampling(**values)
