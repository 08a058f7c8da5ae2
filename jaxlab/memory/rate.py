"""The names of codecs of stored vectors, and what they say of sizes."""

import functools
import re
from dataclasses import dataclass

from jaxlab.errors import ConfigError

PAPER = "OPQ20_80,Residual2x14,PQ8x10"
_NAME = re.compile(r"OPQ(\d+)_(\d+),Residual2x(\d+),PQ(\d+)x(\d+)")
# k-means of FAISS asks for so many vectors a centroid.
_LEAST = 39
# The rotation is trained with a product quantizer of its own.
ROTATION_BITS = 8


def codec_for(dim: int) -> str | None:
    """A codec of vectors of ``dim`` numbers that few hundred train; None for an odd number.

    Four numbers to a part of the rotation as in the paper's, eight to one of the second level.
    """
    if dim == Rate(PAPER).dim:
        return PAPER
    spaces, parts = (next((dim // n for n in (most, 4, 2) if not dim % n), 0) for most in (4, 8))
    return f"OPQ{spaces}_{dim},Residual2x8,PQ{parts}x8" if parts else None


def unfit(name: str, dim: int) -> str:
    """What to say of a codec that is for vectors of another width."""
    fits = codec_for(dim)
    such = f": choose one whose OPQm_d has d = {dim}, such as {fits}" if fits else ""
    return f"codec {name!r} is for vectors of {Rate(name).dim} numbers, these have {dim}{such}"


@dataclass(frozen=True)
class Rate:
    """What the name of a codec says; raises ConfigError for a name of another kind."""

    name: str

    def __post_init__(self) -> None:
        found = _NAME.fullmatch(self.name)
        if not found:
            raise ConfigError(
                f"codec {self.name!r}: is not of the kind OPQm_d,Residual2xb,PQnxb, such as {PAPER}"
            )
        spaces, dim, _, parts, _ = map(int, found.groups())
        if dim % 2 or dim % spaces or dim % parts:
            raise ConfigError(
                f"codec {self.name!r}: 2, {spaces} and {parts} must all divide its dimension {dim}"
            )

    @functools.cached_property
    def _numbers(self) -> tuple[int, ...]:
        return tuple(map(int, _NAME.fullmatch(self.name).groups()))

    @property
    def dim(self) -> int:
        """Numbers of a vector."""
        return self._numbers[1]

    @property
    def spaces(self) -> int:
        """Parts that the rotation is made for."""
        return self._numbers[0]

    @property
    def bytes(self) -> int:
        """Bytes of a code; each of the two levels begins on a byte of its own."""
        _, _, half_bits, parts, bits = self._numbers
        return -(-2 * half_bits // 8) - (-parts * bits // 8)

    @property
    def least(self) -> int:
        """Vectors that it takes to train every centroid."""
        _, _, half_bits, _, bits = self._numbers
        return 2 ** max(half_bits, bits, ROTATION_BITS)

    @property
    def enough(self) -> int:
        """Vectors that FAISS asks for."""
        return _LEAST * self.least
