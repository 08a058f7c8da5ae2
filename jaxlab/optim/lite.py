"""LITE on Muon: larger steps along the flat singular directions of each matrix (arXiv 2602.22681).

IRE's idea where the base mixes coordinates. The sharp subspace of a layer's matrix is spanned by
the largest singular directions of its momentum M, found without a decomposition: the polar factor
U of M and that of M/theta - U agree on the directions with singular values above theta and cancel
on the others, so that half their sum is a factor P of the projector P P' on the sharp inputs.
"""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import optax.contrib
from jaxtyping import Array, Float, PyTree

from jaxlab.optim.blocks import ADAMW_RMS, MATRICES, matrix_axes, step_name
from jaxlab.optim.flat_mask import Scalar

# Five rounds of Muon's quintic, which lift small singular values, and two of the quintic that
# converges to 1 (15/8, -10/8, 3/8): Muon's alone leave 0.7 to 1.2, too coarse for a projector.
POLAR_COEFFICIENTS = ((3.4445, -4.7750, 2.0315),) * 5 + ((1.875, -1.25, 0.375),) * 2
# How fast the threshold follows the number of sharp directions.
_UP, _DOWN = 1.05, 0.95
_ROUNDS = {"ns_steps": len(POLAR_COEFFICIENTS)}


class LiteMuonState(NamedTuple):
    """Muon's momentum, the state of decay and rate, and each matrix's threshold.

    ``sharp_ratio`` is the threshold as a share of the momentum's Frobenius norm, one for each
    matrix of a stack.
    """

    muon: optax.contrib.MuonState
    rate: PyTree
    sharp_ratio: PyTree


def lite_muon(
    learning_rate: optax.ScalarOrSchedule,
    others: optax.GradientTransformation,
    *,
    flat_gain: Scalar = 2.0,
    sharp_share: float = 0.1,
    beta: float = 0.95,
    weight_decay: float = 0.1,
) -> optax.GradientTransformationExtraArgs:
    """Muon with its whole step, decay included, ``flat_gain`` times as large on flat directions.

    The matrices of a decoder's layers take this rule and the rest takes ``others``, such as
    ``optax.adamw``. Without the paper's damping terms (its beta_1 = beta_2 = 0).

    Args:
      flat_gain: chi of the paper, at least 1; a number or a schedule of the step. The paper ramps
        it up from 1 over the first half of a run.
      sharp_share: share of a matrix's singular directions that is sharp, in (0, 1).
      beta: decay of the momentum, in Nesterov's form.

    Raises ValueError for settings that cannot be.
    """
    if isinstance(flat_gain, int | float) and flat_gain < 1:
        raise ValueError(f"flat_gain is {flat_gain}: it must be at least 1")
    if not 0 < sharp_share < 1:
        raise ValueError(f"sharp_share is {sharp_share}: it is a share in (0, 1)")
    matrices = _lite_matrices(
        learning_rate, flat_gain, sharp_share=sharp_share, beta=beta, weight_decay=weight_decay
    )

    def labels(params: PyTree) -> PyTree:
        return jax.tree_util.tree_map_with_path(
            lambda path, _: "matrix" if step_name(path[-1]) in MATRICES else "other", params
        )

    return optax.partition({"matrix": matrices, "other": others}, labels)


def _lite_matrices(
    learning_rate: optax.ScalarOrSchedule,
    flat_gain: Scalar,
    *,
    sharp_share: float,
    beta: float,
    weight_decay: float,
) -> optax.GradientTransformation:
    muon = optax.contrib.scale_by_muon(
        POLAR_COEFFICIENTS, beta=beta, weight_dimension_numbers=matrix_axes, **_ROUNDS
    )
    rate = optax.chain(
        optax.add_decayed_weights(weight_decay), optax.scale_by_learning_rate(learning_rate)
    )

    def init(params: PyTree) -> LiteMuonState:
        ratio = jax.tree.map(
            lambda x, axes: jnp.full(len(x), min(_sides(x, axes)) ** -0.5, jnp.float32),
            params,
            matrix_axes(params),
        )
        return LiteMuonState(muon.init(params), rate.init(params), ratio)

    def update(
        updates: PyTree, state: LiteMuonState, params: PyTree | None = None
    ) -> tuple[PyTree, LiteMuonState]:
        gain = flat_gain(state.muon.count) if callable(flat_gain) else flat_gain
        axes = matrix_axes(updates)
        polar, muon_state = muon.update(updates, state.muon)
        steps = jax.tree.map(lambda u, a: u * (ADAMW_RMS * max(_sides(u, a)) ** 0.5), polar, axes)
        steps, rate_state = rate.update(steps, state.rate, params)

        def one(step: Array, momentum: Array, polar: Array, ratio: Array, axes) -> tuple:
            factor, ratio = sharp_factor(
                _matrices(momentum, axes), _matrices(polar, axes), ratio, sharp_share
            )
            flat = flat_part(_matrices(step, axes), factor).reshape(step.shape)
            return step + ((gain - 1) * flat).astype(step.dtype), ratio

        momenta = _nesterov(updates, muon_state, beta)
        both = jax.tree.map(one, steps, momenta, polar, state.sharp_ratio, axes)
        shape = jax.tree.structure(updates)
        steps, ratio = jax.tree.transpose(shape, jax.tree.structure((0, 0)), both)
        return steps, LiteMuonState(muon_state, rate_state, ratio)

    return optax.GradientTransformation(init, update)


def sharp_factor(
    momentum: Float[Array, "L inputs outputs"],
    polar: Float[Array, "L inputs outputs"],
    ratio: Float[Array, " L"],
    sharp_share: float,
) -> tuple[Float[Array, "L inputs outputs"], Float[Array, " L"]]:
    """Factor P of each matrix's projector on its sharp directions, and the threshold's next ratio.

    Singular values of P are 1 where those of the momentum exceed ``ratio`` times its norm, else 0.
    The ratio is steered so that their number becomes floor(sharp_share * rank) + 1.
    """
    norm = jnp.linalg.norm(momentum, axis=(1, 2), keepdims=True)
    theta = ratio[:, None, None] * norm + jnp.finfo(jnp.float32).tiny
    factor = (polar + _polar(momentum / theta - polar)) / 2
    rank = min(momentum.shape[1:])
    wanted = min(int(sharp_share * rank) + 1, rank - 1)
    too_many = jnp.linalg.norm(factor, axis=(1, 2)) > wanted**0.5
    return factor, jnp.minimum(1.0, ratio * jnp.where(too_many, _UP, _DOWN))


def flat_part(
    matrices: Float[Array, "L inputs outputs"], factor: Float[Array, "L inputs outputs"]
) -> Float[Array, "L inputs outputs"]:
    """(I - P P') X: what is left of each matrix without its sharp input directions."""
    inside = jnp.einsum("lio,ljo,ljk->lik", factor, factor, matrices)
    return matrices - inside


def _polar(matrices: Float[Array, "L inputs outputs"]) -> Float[Array, "L inputs outputs"]:
    """U V' of each matrix U S V': Muon without its momentum."""
    axes = optax.contrib.MuonDimensionNumbers(1, 2)
    plain = optax.contrib.scale_by_muon(
        POLAR_COEFFICIENTS, beta=0.0, nesterov=False, weight_dimension_numbers=axes, **_ROUNDS
    )
    return plain.update(matrices, plain.init(matrices))[0]


def _nesterov(updates: PyTree, state: optax.contrib.MuonState, beta: float) -> PyTree:
    """The momentum whose polar factor Muon has taken."""
    ahead = optax.tree.bias_correction(state.mu, beta, optax.safe_increment(state.count))
    now = optax.tree.bias_correction(updates, beta, state.count)
    return jax.tree.map(lambda m, g: beta * m + (1 - beta) * g, ahead, now)


def _sides(leaf: Array, axes: optax.contrib.MuonDimensionNumbers) -> tuple[int, int]:
    """Numbers of inputs and outputs of each matrix in a stack."""
    inputs, outputs = (
        math.prod(leaf.shape[axis] for axis in np.atleast_1d(side))
        for side in (axes.reduction_axis, axes.output_axis)
    )
    return inputs, outputs


def _matrices(
    leaf: Array, axes: optax.contrib.MuonDimensionNumbers
) -> Float[Array, "L inputs outputs"]:
    # In every stack the layer comes first, then the inputs, then the outputs.
    return leaf.reshape(len(leaf), *_sides(leaf, axes)).astype(jnp.float32)
