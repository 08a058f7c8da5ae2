"""One query per sequence over preface, memory slots and a ragged cache, in one softmax."""

from kernels_pallas.memory_decode.api import memory_decode

__all__ = ["memory_decode"]
