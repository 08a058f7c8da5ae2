"""Which tokens of a reference are kept: those that receive most attention (Memory³ §3.3).

What receiving means, and how it is computed, is ``kernels_pallas.memory_select``.
"""

import functools

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from jaxlab.sharding.ops import by_device
from kernels_pallas.memory_select import attention_received, memory_select

__all__ = ["attention_received", "gather_tokens", "select_tokens"]


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
    heads, kv_heads = ("batch", None, "heads", None), ("batch", None, "kv_heads", None)
    return by_device(
        functools.partial(memory_select, kept=kept, selection=selection, pooling=pooling),
        {"query": query, "key": key, "valid": valid},
        {"query": heads, "key": kv_heads, "valid": ("batch", None)},
        ("batch", "kv_heads", None),
    )


def gather_tokens(
    rows: Float[Array, "B R K H"], chosen: Int[Array, "B K kept"]
) -> Float[Array, "B kept K H"]:
    """The chosen tokens' rows, each kv head its own."""
    return jnp.take_along_axis(rows, chosen.swapaxes(1, 2)[..., None], axis=1)
