"""Which tokens of a reference are kept: those that receive most attention (Memory³ §3.3).

The weights are taken without causal mask and without position encoding, so that every token has an
equal chance; the preface and padding take no part, neither as giver nor as receiver.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int


def attention_received(
    query: Float[Array, "B R N H"],
    key: Float[Array, "B R K H"],
    valid: Bool[Array, "B R"],
    *,
    selection: str,
    pooling: str,
) -> Float[Array, "B K R"]:
    """How much attention each reference token receives, by kv head, in float32.

    ``selection="softmax"`` is the paper's definition, the sum over givers i of softmax_j(s_ij);
    ``"exponential"`` is the form of its runs, the sum of exp(s_ij), returned as its logarithm (same
    order, no overflow). The query heads that share a kv head are pooled: ``sum`` adds what their
    tokens receive, ``mean`` and ``max`` pool over heads, ``first`` takes one head.

    Invalid tokens get -inf. Queries and keys are those before rotation.
    """
    batch, length, heads, head_dim = query.shape
    kv_heads = key.shape[2]
    grouped = query.reshape(batch, length, kv_heads, heads // kv_heads, head_dim)
    if pooling == "first":
        grouped = grouped[:, :, :, :1]
    scores = jnp.einsum("bikgh,bjkh->bkgij", grouped, key, preferred_element_type=jnp.float32)
    scores = scores * head_dim**-0.5
    receivers, givers = valid[:, None, None, None, :], valid[:, None, None, :, None]
    if selection == "softmax":
        shares = jax.nn.softmax(scores, axis=-1, where=receivers)
        received = jnp.log(jnp.sum(shares, axis=-2, where=givers))
    else:
        received = jax.nn.logsumexp(jnp.where(givers, scores, -jnp.inf), axis=-2)
    # Sum and mean over heads order the tokens alike.
    pool = jnp.max if pooling == "max" else jax.nn.logsumexp
    pooled = pool(received, axis=2)
    return jnp.where(valid[:, None, :], pooled, -jnp.inf)


def select_tokens(
    query: Float[Array, "B R N H"],
    key: Float[Array, "B R K H"],
    valid: Bool[Array, "B R"],
    *,
    kept: int,
    selection: str = "exponential",
    pooling: str = "sum",
) -> Int[Array, "B K kept"]:
    """Indices of the ``kept`` tokens that receive most, by kv head; ties go to the lower index.

    Where fewer tokens are valid, the valid ones come first and the rest are to be masked by the
    caller. Indices are not differentiable: gradients pass through what is gathered with them.
    """
    received = attention_received(query, key, valid, selection=selection, pooling=pooling)
    return jax.lax.top_k(jax.lax.stop_gradient(received), kept)[1]


def gather_tokens(
    rows: Float[Array, "B R K H"], chosen: Int[Array, "B K kept"]
) -> Float[Array, "B kept K H"]:
    """The chosen tokens' rows, each kv head its own."""
    return jnp.take_along_axis(rows, chosen.swapaxes(1, 2)[..., None], axis=1)
