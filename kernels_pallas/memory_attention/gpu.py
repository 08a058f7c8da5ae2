"""Memory attention on a GPU: cuDNN's causal attention, merged with the memory part by log-sum-exp.

Two softmaxes over disjoint keys make one: each output counts by its share of the sum of exponents.
cuDNN gives the sum but not its gradient, which the rule below gets from a second call.
"""

import functools

import jax
import jax.numpy as jnp

from kernels_pallas import dispatch
from kernels_pallas.memory_attention import plan

_UNIT = 512  # queries whose scores of slots are held at once
_CAUSAL = "cudnn"  # the implementation of the causal part; tests take xla


def unsupported(query, key, value, *, segments=None, **_) -> str | None:
    """Why this implementation does not take the arguments, or None when it does."""
    if reason := dispatch.only_on("gpu"):
        return reason
    if not query.size:
        return "there is nothing to compute"
    if segments is not None:
        return "cuDNN has no segments here"
    if query.shape[1] != key.shape[1]:
        return "queries that continue a cache have no place in cuDNN's causal mask"
    if query.dtype not in (jnp.bfloat16, jnp.float16):
        return f"cuDNN takes bfloat16 and float16, not {query.dtype}"
    if query.shape[3] > 128 or query.shape[3] % 8:
        return f"cuDNN takes heads of up to 128, a multiple of 8, not {query.shape[3]}"
    return None


def _attend(query, key, value, **kwargs):
    return jax.nn.dot_product_attention(
        query, key, value, is_causal=True, implementation=_CAUSAL, **kwargs
    )


@jax.custom_vjp
def _causal(query, key, value):
    """Causal attention and the log of its sum of exponents (B, T, N)."""
    out, lse = _attend(query, key, value, return_residual=True)
    return out, lse.astype(jnp.float32)


def _causal_forward(query, key, value):
    return _causal(query, key, value), (query, key, value)


def _causal_backward(saved, gradients):
    query, key, value = saved
    grad_out, grad_lse = gradients
    _, pull = jax.vjp(_attend, query, key, value)
    grad_query, grad_key, grad_value = pull(grad_out)
    # d lse / d logit is the weight: towards the query the weighed mean of the keys, towards the
    # keys what values would get from an output whose gradient is the query.
    mean, pull = jax.vjp(lambda values: _attend(query, key, values), key)
    scaled = grad_lse[..., None] * query.shape[3] ** -0.5
    grad_query += (scaled * mean.astype(jnp.float32)).astype(query.dtype)
    grad_key += pull((scaled * query.astype(jnp.float32)).astype(query.dtype))[0]
    return grad_query, grad_key, grad_value


_causal.defvjp(_causal_forward, _causal_backward)


@functools.partial(jax.checkpoint, prevent_cse=False)
def _one_window(arrays):
    """Attention of a unit of queries over its window, and the log of its sum of exponents."""
    query, keys, values, interval, index = arrays
    batch, unit, heads, head_dim = query.shape
    grouped = query.reshape(batch, unit, keys.shape[2], -1, head_dim)
    logits = jnp.einsum("btkgh,bwkh->btkgw", grouped, keys, preferred_element_type=jnp.float32) * (
        head_dim**-0.5
    )
    at = index[..., None]
    seen = (at >= interval[:, None, 0]) & (at < interval[:, None, 1])
    logits = jnp.where(seen[:, :, None, None], logits, -1e30)
    lse = jax.nn.logsumexp(logits, axis=-1)
    weights = jnp.exp(logits - lse[..., None]).astype(values.dtype)
    out = jnp.einsum("btkgw,bwkh->btkgh", weights, values, preferred_element_type=jnp.float32)
    return out.reshape(query.shape), lse.reshape(batch, unit, heads)


def _memory_part(query, seen: plan.Windows, index, unit: int):
    """The same for all queries (B, T, N, H), a unit at a time."""
    batch, queries, heads, head_dim = query.shape
    padded = -(-queries // unit) * unit

    def units(x, mode):
        widths = [(0, 0), (0, padded - queries)] + [(0, 0)] * (x.ndim - 2)
        x = jnp.pad(x, widths, mode=mode)
        return x.reshape(batch, -1, unit, *x.shape[2:]).swapaxes(0, 1)

    windows = (part.swapaxes(0, 1) for part in seen)
    out, lse = jax.lax.map(_one_window, (units(query, "constant"), *windows, units(index, "edge")))
    out = out.swapaxes(0, 1).reshape(batch, padded, heads, head_dim)
    return out[:, :queries], lse.swapaxes(0, 1).reshape(batch, padded, heads)[:, :queries]


def memory_attention(
    query, key, value, *, start, preface=None, slots=None, slot_valid=None, grid=None, segments=None
):
    """As :func:`reference.memory_attention`."""
    queries = query.shape[1]
    unit = min(_UNIT, queries)
    seen = plan.windows(
        start,
        -(-queries // unit),
        unit,
        preface=preface,
        slots=slots,
        slot_valid=slot_valid,
        grid=grid,
        dtype=key.dtype,
    )
    if seen is None:
        return _attend(query, key, value)
    out, lse = _causal(query, key, value)
    index = start[:, None] + jnp.arange(queries, dtype=start.dtype)
    read, read_lse = _memory_part(query, seen, index, unit)
    share = jax.nn.sigmoid(read_lse - lse)[..., None]
    merged = out.astype(jnp.float32) * (1 - share) + read * share
    return merged.astype(query.dtype)
