"""The codec of stored keys and values: FAISS trains and encodes, JAX decodes.

Memory³ (arXiv 2407.01178, §3.3 and appendix B): ``OPQ20_80,Residual2x14,PQ8x10`` makes 14 bytes of
a vector of 80 numbers, 8.75 % of its bfloat16. A rotation, two halves with 14 bits each, and what
they leave in eight parts of 10 bits. Other rates and dimensions go by the same kind of name. One
codec serves all layers, heads, keys and values (spec, open point 9).
"""

import functools
from typing import Any

import faiss
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, Float32, UInt8

from jaxlab.errors import BankError, ConfigError
from jaxlab.memory.rate import PAPER, ROTATION_BITS, Rate, unfit
from kernels_pallas.memory_dequantize import Codebook

__all__ = ["PAPER", "Codec", "Rate"]


class Codec:
    """A trained codec. Made by :meth:`fit` or :meth:`from_bytes`."""

    def __init__(self, rate: Rate, index: Any):
        self.rate, self._index = rate, index

    @classmethod
    def fit(
        cls,
        vectors: Float[np.ndarray, "n H"],
        name: str = PAPER,
        *,
        rounds: tuple[int, int] | None = None,
    ) -> "Codec":
        """Train on keys and values drawn from a bank. Deterministic.

        ``rounds`` are those of the rotation's training (outer, and k-means within); None: FAISS's
        own (50, 4), which take minutes for the paper's codec. Raises ConfigError for an unknown
        name, for vectors of another dimension and for too few of them.
        """
        rate = Rate(name)
        if vectors.ndim != 2 or vectors.shape[1] != rate.dim:
            raise ConfigError(unfit(name, vectors.shape[-1]))
        if len(vectors) < rate.least:
            raise ConfigError(
                f"codec {name!r} is trained on {rate.least:,} vectors or more, here are "
                f"{len(vectors):,}: write more references or choose a codec of fewer bits"
            )
        index = faiss.index_factory(rate.dim, name)
        rotation = faiss.downcast_VectorTransform(index.chain.at(0))
        if rounds is not None:
            rotation.niter, rotation.niter_pq = rounds
        # Its own, so that it can be kept quiet; it lives as long as the training.
        within = rotation.pq = faiss.ProductQuantizer(rate.dim, rate.spaces, ROTATION_BITS)
        levels = faiss.downcast_index(index.index)
        halves = faiss.downcast_index(levels.q1.quantizer).pq
        # FAISS warns of few vectors for each of hundreds of trainings; whoever calls says it once.
        for clustering in (within, halves, levels.q1, levels.pq):
            clustering.cp.min_points_per_centroid = 1
        index.train(np.ascontiguousarray(vectors, np.float32))
        rotation.pq = None
        return cls(rate, index)

    def encode(self, vectors: Float[np.ndarray, "*n H"]) -> UInt8[np.ndarray, "*n W"]:
        """Codes of vectors."""
        flat = np.ascontiguousarray(vectors, np.float32).reshape(-1, self.rate.dim)
        return self._index.sa_encode(flat).reshape(*vectors.shape[:-1], self.rate.bytes)

    def decode(self, codes: UInt8[np.ndarray, "*n W"]) -> Float32[np.ndarray, "*n H"]:
        """Vectors of codes, on the host; on a device :attr:`codebook` decodes."""
        flat = np.ascontiguousarray(codes).reshape(-1, self.rate.bytes)
        return self._index.sa_decode(flat).reshape(*codes.shape[:-1], self.rate.dim)

    @functools.cached_property
    def codebook(self) -> Codebook:
        """What ``kernels_pallas.memory_dequantize`` decodes with."""
        rotation = faiss.downcast_VectorTransform(self._index.chain.at(0))
        levels = faiss.downcast_index(self._index.index)
        halves = faiss.downcast_index(levels.q1.quantizer).pq
        matrix = faiss.vector_to_array(rotation.A).reshape(rotation.d_out, rotation.d_in)
        return Codebook(*map(jnp.asarray, (_centroids(halves), _centroids(levels.pq), matrix)))

    def to_bytes(self) -> bytes:
        """All of it, for :meth:`from_bytes`."""
        return faiss.serialize_index(self._index).tobytes()

    @classmethod
    def from_bytes(cls, name: str, state: bytes) -> "Codec":
        """A stored codec. Raises BankError for what is none of that name."""
        rate = Rate(name)
        try:
            index = faiss.deserialize_index(np.frombuffer(state, np.uint8))
            fits = index.is_trained and (index.d, index.sa_code_size()) == (rate.dim, rate.bytes)
        except (RuntimeError, AssertionError) as error:
            reason = str(error).strip().splitlines()[-1][:200]
            raise BankError(f"codec {name}: cannot be read ({reason})") from None
        if not fits:
            raise BankError(f"codec {name}: what is stored is another codec")
        return cls(rate, index)


def _centroids(quantizer: Any) -> Float32[np.ndarray, "parts entries part"]:
    shape = quantizer.M, quantizer.ksub, quantizer.dsub
    return faiss.vector_to_array(quantizer.centroids).reshape(shape)
