"""One softmax over preface, memory slots and context: training band, prefill and decoding."""

from kernels_pallas.memory_attention.api import memory_attention
from kernels_pallas.memory_attention.reference import ChunkGrid

__all__ = ["ChunkGrid", "memory_attention"]
