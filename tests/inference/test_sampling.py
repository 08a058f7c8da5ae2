"""Laws of choosing a token."""

import functools

import jax
import numpy as np
import pytest

from jaxlab.errors import ConfigError
from jaxlab.inference.sampling import Choices, Sampling, choose, restrict

LOGITS = np.random.default_rng(0).standard_normal((5, 12)).astype(np.float32) * 2
SAMPLINGS = [
    Sampling(temperature=1.0, top_k=3),
    Sampling(temperature=0.7, top_p=0.6),
    Sampling(temperature=1.5, top_k=6, top_p=0.5),
    Sampling(temperature=1.0, top_p=1e-6),
    Sampling(temperature=2.0, top_k=99),
]
chosen = jax.jit(choose, static_argnames=("drawn", "limited"))


def choices_of(samplings, said=None):
    return Choices.of(samplings, said or [0] * len(samplings))


def allowed_by_definition(logits, sampling):
    """The tokens that may be drawn from one row: likeliest first, one by one."""
    scaled = logits.astype(np.float64) / sampling.temperature
    order = list(np.argsort(-scaled, kind="stable"))[: sampling.top_k or None]
    weights = np.exp(scaled[order] - scaled.max())
    weights /= weights.sum()
    count = int(np.searchsorted(np.cumsum(weights), sampling.top_p)) + 1
    return set(order[:count] if sampling.top_p < 1 else order)


def test_each_sequence_keeps_what_its_own_top_k_and_top_p_keep_by_definition():
    found = np.asarray(jax.jit(restrict)(LOGITS, choices_of(SAMPLINGS)))
    for row, logits, sampling in zip(found, LOGITS, SAMPLINGS, strict=True):
        kept = np.flatnonzero(np.isfinite(row))
        assert set(kept.tolist()) == allowed_by_definition(logits, sampling)
        np.testing.assert_array_equal(row[kept], logits[kept])


def test_temperature_zero_takes_the_largest_whatever_the_limits_and_the_company():
    samplings = [Sampling(top_k=2, top_p=0.5, seed=n) for n in range(4)]
    samplings += [Sampling(temperature=1.0)]
    for drawn, limited in ((True, True), (True, False), (False, False)):
        tokens = chosen(LOGITS, choices_of(samplings), drawn=drawn, limited=limited)
        np.testing.assert_array_equal(tokens[:4], LOGITS[:4].argmax(axis=1))
        assert tokens.dtype == np.int32


@pytest.mark.parametrize("temperature", [1e-6, 1e-7, 1e-37, 1.2e-38, 1e-39, 1e-44, 1e-300])
def test_the_colder_the_surer_down_to_the_likeliest(temperature):
    """Also where the temperature, or a logit divided by it, is no number of 32 bits."""
    samplings = [Sampling(temperature=temperature, top_p=0.9, seed=n) for n in range(5)]
    for limited in (True, False):
        tokens = chosen(LOGITS * 10, choices_of(samplings), drawn=True, limited=limited)
        np.testing.assert_array_equal(tokens, LOGITS.argmax(axis=1))


def test_draws_follow_the_restricted_distribution_at_the_temperature():
    count = 4000
    samplings = [Sampling(temperature=2.0, top_k=3, seed=7)] * count
    logits = np.tile(LOGITS[:1], (count, 1))
    draw = functools.partial(chosen, logits, drawn=True, limited=True)
    tokens = np.asarray(draw(choices_of(samplings, list(range(count)))))
    top = np.argsort(-LOGITS[0])[:3]
    wanted = np.exp(LOGITS[0][top] / 2) / np.exp(LOGITS[0][top] / 2).sum()
    shares = np.bincount(tokens, minlength=12) / count
    np.testing.assert_allclose(shares[top], wanted, atol=0.03)
    assert shares[top].sum() == pytest.approx(1)


def test_a_draw_depends_on_seed_and_place_alone():
    """Not on the row, on the other rows or on whether they have limits."""
    sampling = Sampling(temperature=1.5, seed=2**40 + 5)
    row = LOGITS[:1]

    def alone(said, seed=sampling.seed):
        one = Sampling(temperature=1.5, seed=seed)
        return int(chosen(row, choices_of([one], [said]), drawn=True, limited=False)[0])

    said = list(range(8))
    for place in (0, 3):
        logits = np.concatenate([LOGITS[:place], row, LOGITS[place + 1 :]])
        for number in said:
            samplings = [*SAMPLINGS[:place], sampling, *SAMPLINGS[place + 1 :]]
            choices = choices_of(samplings, [9 if n != place else number for n in range(5)])
            assert int(chosen(logits, choices, drawn=True, limited=True)[place]) == alone(number)
    assert len({alone(number) for number in said}) > 1
    assert [alone(number, seed=6) for number in said] != [alone(number) for number in said]


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
