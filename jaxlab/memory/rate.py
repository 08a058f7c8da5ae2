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
