"""Which tokens of a reference are kept as its memory: those that receive most attention."""

from kernels_pallas.memory_select.api import attention_received, memory_select

__all__ = ["attention_received", "memory_select"]
