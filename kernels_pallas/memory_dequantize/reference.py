"""The definition of decoding in plain JAX, to which every kernel is held.

Memory³ (arXiv 2407.01178), section 3.3 and appendix B: FAISS's ``OPQ20_80,Residual2x14,PQ8x10``. A
vector of 80 numbers becomes 14 bytes: two halves coded by 14 bits each (4 bytes), what is left of
them by eight parts of 10 bits (10 bytes); both levels lie in rotated coordinates. Here for any
dimension, number of parts and bits of that family.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, UInt8


class Codebook(NamedTuple):
    """What decoding needs: the centroids of both levels and the rotation back.

    level1: entries of each half; level2: entries of each part of the residual. Entries count a
    power of two, so that no code lies outside. rotation: decoded rows are multiplied by it from the
    right (FAISS's matrix A as it stands: A turns columns forth, so it turns rows back).
    """

    level1: Float[Array, "2 E half"]
    level2: Float[Array, "parts e part"]
    rotation: Float[Array, "H H"]

    @property
    def bits(self) -> tuple[int, int]:
        """Bits of a code of each level."""
        return self.level1.shape[1].bit_length() - 1, self.level2.shape[1].bit_length() - 1

    @property
    def widths(self) -> tuple[int, int]:
        """Bytes of the codes of each level: each begins on a byte of its own."""
        counts = 2, self.level2.shape[0]
        return tuple(-(-n * bits // 8) for n, bits in zip(counts, self.bits, strict=True))


def unpack_bits(packed: UInt8[Array, "*n W"], count: int, bits: int) -> Int[Array, "*n count"]:
    """``count`` numbers of ``bits`` bits each, packed from the lowest bit of the first byte on."""
    numbers, last = [], packed.shape[-1] - 1
    for first in range(0, count * bits, bits):
        number = jnp.zeros(packed.shape[:-1], jnp.int32)
        for byte in range(first // 8, min((first + bits - 1) // 8, last) + 1):
            here = packed[..., byte].astype(jnp.int32)
            shift = 8 * byte - first
            number |= here << shift if shift >= 0 else here >> -shift
        numbers.append(number & ((1 << bits) - 1))
    return jnp.stack(numbers, axis=-1)


def gather_codes(
    codes: UInt8[Array, "slots *entry W"], index: Int[Array, "*chosen"] | None
) -> UInt8[Array, "..."]:
    """The chosen slots' codes, in order; an index outside is clamped (it was checked if known)."""
    return codes if index is None else jnp.take(codes, index, axis=0, mode="clip")


def split_codes(
    codes: UInt8[Array, "*n W"], codebook: Codebook
) -> tuple[Int[Array, "*n 2"], Int[Array, "*n parts"]]:
    """Entries of both levels that the codes name."""
    width, _ = codebook.widths
    first, second = codebook.bits
    halves = unpack_bits(codes[..., :width], 2, first)
    return halves, unpack_bits(codes[..., width:], codebook.level2.shape[0], second)


def memory_dequantize(
    codes: UInt8[Array, "slots *entry W"],
    codebook: Codebook,
    *,
    index: Int[Array, "*chosen"] | None,
    dtype: jnp.dtype,
) -> Float[Array, "..."]:
    """Look both levels up, add, rotate back, in float32; rounded to ``dtype`` at the end."""
    halves, parts = split_codes(gather_codes(codes, index), codebook)

    def look_up(table, entries):
        found = [table[m][entries[..., m]] for m in range(table.shape[0])]
        return jnp.concatenate(found, axis=-1).astype(jnp.float32)

    rotated = look_up(codebook.level1, halves) + look_up(codebook.level2, parts)
    rotation = codebook.rotation.astype(jnp.float32)
    return jnp.matmul(rotated, rotation, precision=jax.lax.Precision.HIGHEST).astype(dtype)
