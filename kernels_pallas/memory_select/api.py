"""The public functions: check their arguments, pick an implementation, call it."""

import jax
from jaxtyping import Array, Bool, Float, Int

from kernels_pallas import dispatch
from kernels_pallas.memory_select import gpu, reference, tpu

# Axes written ``_`` are those of the query; :func:`_check` says so in words where they are not.
SELECTIONS = ("exponential", "softmax")
POOLINGS = ("sum", "mean", "max", "first")

RECEIVED = (
    dispatch.Implementation("tpu", tpu.attention_received, tpu.unsupported),
    dispatch.Implementation("gpu", gpu.attention_received, gpu.unsupported),
    dispatch.Implementation("xla", reference.attention_received, dispatch.always_supported),
)
SELECT = (
    dispatch.Implementation("tpu", tpu.memory_select, tpu.unsupported),
    dispatch.Implementation("gpu", gpu.memory_select, gpu.unsupported),
    dispatch.Implementation("xla", reference.memory_select, dispatch.always_supported),
)


def _check(query, key, valid, selection, pooling) -> None:
    heads, kv_heads = query.shape[2], key.shape[2]
    if heads % kv_heads:
        raise ValueError(
            f"query has {heads} heads and key has {kv_heads}: query heads must be a multiple"
        )
    shape = (*query.shape[:2], kv_heads, query.shape[3])
    if key.shape != shape:
        raise ValueError(f"key has shape {key.shape}, the query needs {shape}: B R K H")
    if valid.shape != query.shape[:2]:
        raise ValueError(f"valid has shape {valid.shape}, the query needs {query.shape[:2]}: B R")
    if selection not in SELECTIONS:
        raise ValueError(f"selection is {selection!r}: one of {SELECTIONS}")
    if pooling not in POOLINGS:
        raise ValueError(f"pooling is {pooling!r}: one of {POOLINGS}")


def attention_received(
    query: Float[Array, "B R N H"],
    key: Float[Array, "_ _ K _"],
    valid: Bool[Array, "_ _"],
    *,
    selection: str = "exponential",
    pooling: str = "sum",
    implementation: str | None = None,
) -> Float[Array, "B K R"]:
    """How much attention each reference token receives, by kv head: a logarithm, in float32.

    ``selection="softmax"`` is the paper's definition, the sum over givers i of softmax_j(s_ij);
    ``"exponential"`` is the form of its runs, the sum of exp(s_ij), returned as its logarithm (same
    order, no overflow). The query heads that share a kv head are pooled: ``sum`` adds what their
    tokens receive (so does ``mean``: it orders tokens alike), ``max`` takes the largest over heads,
    ``first`` takes one head.

    Invalid tokens get -inf. Queries and keys are those before rotation. No gradient passes.

    Raises:
      ValueError: shapes that do not fit together, an unknown form; the message names the rule.
      NotImplementedError: the named implementation cannot take these arguments.
    """
    _check(query, key, valid, selection, pooling)
    kwargs = dict(selection=selection, pooling=pooling)
    args = (*jax.lax.stop_gradient((query, key)), valid)
    chosen = dispatch.choose("attention_received", RECEIVED, implementation, args, kwargs)
    return chosen.call(*args, **kwargs)


def memory_select(
    query: Float[Array, "B R N H"],
    key: Float[Array, "_ _ K _"],
    valid: Bool[Array, "_ _"],
    *,
    kept: int = 8,
    selection: str = "exponential",
    pooling: str = "sum",
    implementation: str | None = None,
) -> Int[Array, "B K kept"]:
    """Indices of the ``kept`` tokens that receive most, by kv head (Memory³ §3.3), best first.

    Ties go to the lower index. Where fewer tokens are valid, these come first and the rest, again
    by index, are to be masked by the caller. Indices are not differentiable: gradients pass
    through what is gathered with them. Forms as in :func:`attention_received`.

    Raises:
      ValueError: shapes that do not fit together, an unknown form, more tokens kept than there are;
        the message names the argument and the rule.
      NotImplementedError: the named implementation cannot take these arguments.
    """
    _check(query, key, valid, selection, pooling)
    if not 0 < kept <= query.shape[1]:
        raise ValueError(f"kept is {kept}: references of {query.shape[1]} tokens keep 1 to as many")
    kwargs = dict(kept=kept, selection=selection, pooling=pooling)
    args = (*jax.lax.stop_gradient((query, key)), valid)
    chosen = dispatch.choose("memory_select", SELECT, implementation, args, kwargs)
    return chosen.call(*args, **kwargs)
