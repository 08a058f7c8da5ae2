"""The public function: checks its arguments, picks an implementation, calls it."""

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, UInt8

from kernels_pallas import dispatch
from kernels_pallas.memory_dequantize import reference, tpu
from kernels_pallas.memory_dequantize.reference import Codebook

IMPLEMENTATIONS = (
    dispatch.Implementation("tpu", tpu.memory_dequantize, tpu.unsupported),
    # XLA's gathers are good on GPUs and CPUs.
    dispatch.Implementation("xla", reference.memory_dequantize, dispatch.always_supported),
)


def _check_codebook(codebook: Codebook) -> None:
    dims = codebook.rotation.shape[0]
    for name, table in (("level1", codebook.level1), ("level2", codebook.level2)):
        parts, entries, part = table.shape
        if parts * part != dims:
            raise ValueError(
                f"codebook.{name} has {parts} x {part} dims, codebook.rotation {dims}: must agree"
            )
        if entries & (entries - 1):
            raise ValueError(
                f"codebook.{name} has {entries} entries: a power of two, or codes lie outside it"
            )


def _check(codes, codebook, index, dtype) -> None:
    _check_codebook(codebook)
    width = sum(codebook.widths)
    if codes.shape[-1] != width:
        raise ValueError(
            f"codes has {codes.shape[-1]} bytes a vector, the codebook's codes take {width}"
        )
    if dtype not in (jnp.float32, jnp.bfloat16):
        raise ValueError(f"dtype is {dtype}: float32 or bfloat16")
    if index is None or isinstance(index, jax.core.Tracer) or not index.size:
        return
    known = np.asarray(index)
    if known.min() < 0 or known.max() >= codes.shape[0]:
        raise ValueError(
            f"index reaches from {known.min()} to {known.max()}, codes has slots 0 to "
            f"{codes.shape[0] - 1}"
        )


def memory_dequantize(
    codes: UInt8[Array, "slots *entry W"],
    codebook: Codebook,
    *,
    index: Int[Array, "..."] | None = None,
    dtype: jax.typing.DTypeLike = jnp.float32,
    implementation: str | None = None,
) -> Float[Array, "..."]:
    """Vectors from their codes, gathered by slot (Memory³ §3.3, FAISS's two-level codec).

    Args:
      codes: a bank of slots, each a vector's code or an array of codes (layers, K and V, heads).
      codebook: centroids and rotation; see :class:`Codebook`.
      index: which slots, in any shape; None takes all in order. Known indices outside the bank are
        an error; traced ones are clamped into it, so mask such slots where they are read.
      dtype: of the result, float32 or bfloat16; computed in float32.
      implementation: a name of ``IMPLEMENTATIONS``; None picks the fastest that fits.

    Returns:
      (*index, *entry, H): with an index (..., M, K) of single codes, the rows that attention reads.

    Raises:
      ValueError: codes and codebook that do not fit, an index outside the bank; the message names
        the argument and the rule.
      NotImplementedError: the named implementation cannot take these arguments.
    """
    dtype = jnp.dtype(dtype)
    _check(codes, codebook, index, dtype)
    kwargs = dict(index=index, dtype=dtype)
    chosen = dispatch.choose(
        "memory_dequantize", IMPLEMENTATIONS, implementation, (codes, codebook), kwargs
    )
    return chosen.call(codes, codebook, **kwargs)
