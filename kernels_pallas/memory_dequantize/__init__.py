"""Keys and values from the bank's 14-byte codes, gathered by slot."""

from kernels_pallas.memory_dequantize.api import memory_dequantize
from kernels_pallas.memory_dequantize.reference import Codebook, unpack_bits

__all__ = ["Codebook", "memory_dequantize", "unpack_bits"]
