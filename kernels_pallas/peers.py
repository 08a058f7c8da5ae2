"""Public attention kernels for TPU, compiled like ours: what ours are measured against."""

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp

HEADS, KV_HEADS, HEAD_DIM, QUERIES = 40, 8, 128, 2048


@dataclasses.dataclass(frozen=True)
class Peer:
    """One kernel with its block sizes, (queries, keys, keys computed at once).

    kernel: part of its name. blocks: how many blocks of the causal square it visits, whole and cut.
    """

    source: str
    backward: bool
    blocks: tuple[int, int, int]
    keys_minor: bool = False
    scheduler: bool = True

    @property
    def kernel(self) -> str:
        """What the kernel's name contains."""
        return "dkv" if self.backward else "fwd"

    @property
    def visits(self) -> tuple[int, int]:
        """Blocks of the causal square that are seen whole, and those that the diagonal cuts."""
        rows, columns, _ = self.blocks
        whole = cut = 0
        for low in range(0, QUERIES, rows):
            for first in range(0, QUERIES, columns):
                whole += first + columns - 1 <= low
                cut += low < first + columns - 1 and first <= low + rows - 1
        return whole, cut

    def build(self) -> tuple[Callable, tuple]:
        """The function to compile and the shapes of its arguments.

        Raises:
          ImportError: tokamax is not installed.
        """
        attend = {"jax": _jax_splash, "tokamax": _tokamax_splash}[self.source](self)
        shape = jax.ShapeDtypeStruct((KV_HEADS, QUERIES, HEAD_DIM), jnp.bfloat16)
        query = jax.ShapeDtypeStruct((HEADS, QUERIES, HEAD_DIM), jnp.bfloat16)
        if not self.backward:
            return attend, (query, shape, shape)

        def gradients(*arrays):
            return jax.grad(lambda *x: attend(*x).astype(jnp.float32).sum(), argnums=(0, 1, 2))(
                *arrays
            )

        return gradients, (query, shape, shape)


def _jax_splash(peer: Peer) -> Callable:
    from jax.experimental.pallas.ops.tpu.splash_attention import (
        splash_attention_kernel,
        splash_attention_mask,
    )

    rows, columns, computed = peer.blocks
    sizes = splash_attention_kernel.BlockSizes(
        block_q=rows, block_kv=columns, block_kv_compute=computed
    )
    group = HEADS // KV_HEADS
    mask = splash_attention_mask.MultiHeadMask(
        [splash_attention_mask.CausalMask((QUERIES, QUERIES))] * group
    )
    kernel = splash_attention_kernel.make_splash_mqa_single_device(mask, block_sizes=sizes)

    def attend(query, key, value):
        grouped = query.reshape(KV_HEADS, group, *query.shape[1:])
        return jax.vmap(kernel)(grouped, key, value)

    return attend


def _tokamax_splash(peer: Peer) -> Callable:
    from tokamax._src.ops.experimental.tpu.splash_attention import (
        splash_attention_kernel,
        splash_attention_mask,
    )

    layouts = splash_attention_kernel.QKVLayout
    rows, columns, computed = peer.blocks
    config = splash_attention_kernel.SplashConfig(
        block_q=rows,
        block_kv=columns,
        block_kv_compute=computed,
        block_q_dkv=rows,
        block_kv_dkv=columns,
        block_kv_dkv_compute=computed,
        k_layout=layouts.SEQ_MINOR if peer.keys_minor else layouts.HEAD_DIM_MINOR,
        use_experimental_scheduler=peer.scheduler,
    )
    mask = splash_attention_mask.CausalMask((QUERIES, QUERIES))
    return splash_attention_kernel.make_splash_mha_single_device(mask, config=config)


# The block sizes that were best on some chip, of those that divide 2048 (see the README).
PEERS = (
    Peer("jax", False, (512, 512, 512)),
    Peer("tokamax", False, (512, 512, 512)),
    Peer("tokamax", False, (512, 512, 512), keys_minor=True),
    Peer("tokamax", False, (1024, 1024, 512), keys_minor=True),
    Peer("tokamax", True, (512, 512, 512)),
    Peer("tokamax", True, (512, 512, 512), keys_minor=True),
    Peer("tokamax", True, (1024, 512, 512)),
)
