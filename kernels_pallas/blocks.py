"""Block sizes and compiler settings per kind of chip, as data."""

import dataclasses


@dataclasses.dataclass(frozen=True)
class AttentionBlocks:
    """How memory attention is cut on a TPU.

    query, key: rows of queries and keys that are held at once; backward_query: of queries, for the
    gradients; triangle: side of the squares that a causal diagonal is cut into; lp_scheduler:
    whether the compiler is asked for its experimental scheduler, going forward.
    """

    query: int = 1024
    key: int = 512
    triangle: int = 128
    backward_query: int = 512
    lp_scheduler: bool = True
    vmem_bytes: int = 100 << 20


_ATTENTION = {
    "v5e": AttentionBlocks(),
    "v5p": AttentionBlocks(vmem_bytes=56 << 20),
    "v6e": AttentionBlocks(triangle=256, lp_scheduler=False),
}
# What jax calls the chips.
_KINDS = {"v5 lite": "v5e", "v5litepod": "v5e", "v5": "v5p", "v6 lite": "v6e", "v6": "v6e"}


def short_name(device_kind: str) -> str:
    """v5e, v5p or v6e for a kind of chip in any of its spellings; "" for others."""
    kind = device_kind.lower().removeprefix("tpu ").strip()
    return kind if kind in _ATTENTION else _KINDS.get(kind, "")


def attention_blocks(device_kind: str) -> AttentionBlocks:
    """Block sizes for a kind of TPU; those of v5e where nothing was measured."""
    return _ATTENTION.get(short_name(device_kind), _ATTENTION["v5e"])
