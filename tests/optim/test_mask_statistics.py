"""What one draw of labels does to the mask, on synthetic curvature (a mean of many terms).

A coordinate of the sampled-label gradient is a mean of many independent terms, hence normal with
variance F/B: one draw ranks F times a chi-squared variable with one degree of freedom.
"""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlab.optim import refresh_flat_mask, scale_flat_directions

COORDINATES = 200_000
DRAW = np.random.default_rng(0)


@jax.jit
def ours(values, gamma):
    """The mask that a refresh makes of a curvature."""
    state = scale_flat_directions(1.0, update_interval=None).init(values)
    return refresh_flat_mask(state, values, gamma).flat_mask


def flat_share_smallest(values: np.ndarray, gamma: float) -> np.ndarray:
    rank = int(gamma * len(values))
    return values <= np.partition(values, rank - 1)[rank - 1]


def curvature(decades: float) -> np.ndarray:
    """The diagonal of a Fisher matrix, log-normal over that many decades."""
    return 10.0 ** (decades * DRAW.standard_normal(COORDINATES))


def drawn_mask(fisher: np.ndarray, gamma: float, draws: int) -> np.ndarray:
    """Mask of the mean over draws of squared sampled-label gradients."""
    chi = np.zeros(COORDINATES)
    for _ in range(draws):
        chi += DRAW.standard_normal(COORDINATES) ** 2
    return np.asarray(ours(jnp.float32(fisher * chi), jnp.float32(gamma)))


@pytest.mark.parametrize(
    "decades, gamma, agree, wrong, wrong_of_20",
    [
        (0.5, 0.6, 0.62, 0.38, 0.10),
        (1.0, 0.6, 0.72, 0.26, 0.05),
        (1.0, 0.8, 0.82, 0.34, 0.08),
        (2.0, 0.6, 0.83, 0.15, 0.03),
        (2.0, 0.99, 0.99, 0.35, 0.08),
    ],
)
def test_two_refreshes_agree_and_call_sharp_flat_as_often_as_said(
    decades, gamma, agree, wrong, wrong_of_20
):
    fisher = curvature(decades)
    sharp = ~flat_share_smallest(fisher, gamma)
    one, other = (drawn_mask(fisher, gamma, 1) for _ in range(2))
    # The table is in whole percents, and of the last row's 2000 sharp coordinates a third is wrong
    # with a standard error of one.
    tolerance = 0.012 if gamma < 0.9 else 0.03
    assert np.mean(one == other) == pytest.approx(agree, abs=0.012)
    assert one[sharp].mean() == pytest.approx(wrong, abs=tolerance)
    assert drawn_mask(fisher, gamma, 20)[sharp].mean() == pytest.approx(wrong_of_20, abs=tolerance)


@pytest.mark.parametrize("gamma", [0.6, 0.9])
def test_a_coordinate_is_flat_with_the_probability_that_its_curvature_sets(gamma):
    """erf(sqrt(tau / 2F)), whose mean over coordinates is gamma to three digits."""
    fisher = curvature(1.0)
    squares = fisher * DRAW.standard_normal(COORDINATES) ** 2
    mask = np.asarray(ours(jnp.float32(squares), jnp.float32(gamma)))
    tau = squares[mask].max()
    chance = np.array([math.erf(math.sqrt(tau / (2 * f))) for f in fisher])
    assert chance.mean() == pytest.approx(gamma, abs=2e-3)
    # And not only in the mean: among coordinates of about equal curvature too.
    for part in np.array_split(np.argsort(fisher), 10):
        assert mask[part].mean() == pytest.approx(chance[part].mean(), abs=0.015)
