"""The definition of token selection in plain JAX, to which every kernel is held.

Memory³ (arXiv 2407.01178), section 3.3: a reference keeps, for each kv head, the tokens that
receive most attention. The weights are taken without causal mask and without position encoding, so
that every token has an equal chance; the preface and padding take no part, neither as giver nor as
receiver.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

# Ranks: a valid token that receives nothing (the softmax underflows) still precedes invalid ones.
LEAST_VALID, INVALID = -1e38, -2e38


def attention_received(
    query: Float[Array, "B R N H"],
    key: Float[Array, "B R K H"],
    valid: Bool[Array, "B R"],
    *,
    selection: str,
    pooling: str,
) -> Float[Array, "B K R"]:
    """The logarithm of the attention that each token receives, by kv head; -inf where invalid."""
    batch, length, heads, head_dim = query.shape
    kv_heads = key.shape[2]
    grouped = query.reshape(batch, length, kv_heads, heads // kv_heads, head_dim)
    if pooling == "first":
        grouped = grouped[:, :, :, :1]
    scores = jnp.einsum(
        "bikgh,bjkh->bkgij",
        grouped,
        key,
        precision=jax.lax.Precision.HIGHEST,
        preferred_element_type=jnp.float32,
    )
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


def memory_select(
    query: Float[Array, "B R N H"],
    key: Float[Array, "B R K H"],
    valid: Bool[Array, "B R"],
    *,
    kept: int,
    selection: str,
    pooling: str,
) -> Int[Array, "B K kept"]:
    """The ``kept`` tokens that receive most: valid ones first, ties by the lower index."""
    received = attention_received(query, key, valid, selection=selection, pooling=pooling)
    rank = jnp.where(valid[:, None, :], jnp.maximum(received, LEAST_VALID), INVALID)
    return jax.lax.top_k(rank, kept)[1]
