"""The definition over a few references at a time: for GPUs, where XLA fuses each product's rest.

The scores of the paper's 40 heads take 2.5 MiB a reference in float32: those of a few hundred
references fill memory, those of a few stay in a GPU's second-level cache.
"""

import jax

from kernels_pallas import dispatch
from kernels_pallas.memory_select import reference

# Scores held at a time: 32 MiB in float32, of the 50 MiB of an H100's cache.
BLOCK_SCORES = 8 * 2**20


def unsupported(query, key, valid, **_) -> str | None:
    """Why this implementation does not take the arguments, or None when it does."""
    reason = dispatch.only_on("gpu")
    if reason is not None:
        return reason
    if references_per_block(query) >= query.shape[0]:
        return "the scores of all references fit in cache"
    return None


def references_per_block(query) -> int:
    """How many references' scores are held at a time."""
    return max(1, BLOCK_SCORES // (query.shape[1] ** 2 * query.shape[2]))


def _blocked(function, query, key, valid, **form):
    def one(arrays):
        return function(*(x[None] for x in arrays), **form)[0]

    return jax.lax.map(one, (query, key, valid), batch_size=references_per_block(query))


def attention_received(query, key, valid, **form):
    """As :func:`reference.attention_received`, block after block."""
    return _blocked(reference.attention_received, query, key, valid, **form)


def memory_select(query, key, valid, **form):
    """As :func:`reference.memory_select`, block after block."""
    return _blocked(reference.memory_select, query, key, valid, **form)
