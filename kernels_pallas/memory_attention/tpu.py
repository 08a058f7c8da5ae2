"""Memory attention on TPU: layouts around the two kernels, and the rule for gradients."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jax.experimental.pallas import tpu as pltpu

from kernels_pallas import dispatch
from kernels_pallas.blocks import AttentionBlocks, attention_blocks
from kernels_pallas.memory_attention import plan
from kernels_pallas.memory_attention.tpu_backward import backward
from kernels_pallas.memory_attention.tpu_common import Tiling
from kernels_pallas.memory_attention.tpu_forward import forward

_LP_SCHEDULER = {"XLA_TPU_FORCE_LP_LLO_SCHEDULER": True}
_SUBLANES = 16  # rows of a tile of bfloat16


def unsupported(query, key, value, **_) -> str | None:
    """Why the kernels do not take the arguments, or None when they do."""
    if reason := dispatch.only_on("tpu"):
        return reason
    if not query.size:
        return "there is nothing to compute"
    if jax.config.jax_enable_x64:
        return "kernels that are traced with jax_enable_x64 do not compile for TPU"
    if query.dtype not in (jnp.bfloat16, jnp.float32):
        return f"takes bfloat16 and float32, not {query.dtype}"
    if not query.dtype == key.dtype == value.dtype:
        return f"query, key and value differ in dtype: {query.dtype}, {key.dtype}, {value.dtype}"
    return _too_large(query.shape[2] // key.shape[2], key.shape[1], query.shape[3], query.dtype)


def _too_large(group: int, keys: int, head_dim: int, dtype) -> str | None:
    data = attention_blocks(dispatch.target_chip())
    lanes, item = max(128, head_dim), jnp.dtype(dtype).itemsize
    # Keys, values, one of them transposed, doubly buffered, and two sums in float32, of one kv
    # head; queries and outputs of its query heads.
    for what, held in (
        (f"{keys} keys of one head", keys * (6 * item + 8) * lanes),
        (f"{group} query heads to a kv head", 4 * group * data.query * item * lanes),
    ):
        if held > data.vmem_bytes // 2:
            return f"{what} do not fit on chip ({held} of {data.vmem_bytes // 2} bytes)"
    return None


@dataclasses.dataclass(frozen=True)
class _Static:
    """What both directions of one call are compiled with; chosen once, for one kind of chip.

    sizes: the real queries, the queries with their padding, and the real keys. forward_q,
    backward_q and block_k: sizes of blocks; the queries of a backward block share a window of
    slots, in both directions.
    """

    data: AttentionBlocks
    sizes: tuple[int, int, int]
    head_dim: int
    forward_q: int
    backward_q: int
    block_k: int

    @classmethod
    def of(cls, queries: int, keys: int, head_dim: int) -> "_Static":
        """The largest blocks that pad little."""
        data = attention_blocks(dispatch.target_chip())
        forward_q = min(data.query, max(128, 1 << (queries - 1).bit_length()))
        if -queries % forward_q > -queries % data.backward_query:
            forward_q = min(forward_q, data.backward_query)
        padded = -(-queries // forward_q) * forward_q
        backward_q, block_k = min(data.backward_query, forward_q), min(data.key, forward_q)
        return cls(data, (queries, padded, keys), head_dim, forward_q, backward_q, block_k)

    def arguments(self, start, segments, *, backward: bool) -> dict:
        """The arguments of a kernel that do not depend on the arrays' contents, and its table."""
        block_q = self.backward_q if backward else self.forward_q
        side = min(self.data.triangle, self.block_k)
        sizes = self.sizes[0], self.head_dim
        found = plan.visits(start, self.sizes, block_q, self.block_k, segments)
        return {
            "table": jnp.stack(found, axis=-1).reshape(-1),
            "start": start,
            "segments": None if segments is None else tuple(part[:, None] for part in segments),
            "tiling": Tiling(block_q, self.block_k, self.backward_q, side, *sizes),
            "settings": pltpu.CompilerParams(
                dimension_semantics=("parallel", "parallel", "arbitrary"),
                vmem_limit_bytes=self.data.vmem_bytes,
                flags=_LP_SCHEDULER if self.data.lp_scheduler and not backward else None,
            ),
        }


def _across(x):
    return x.swapaxes(-1, -2)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attend(static, query, key, value, window, rest):
    return _attend_forward(static, query, key, value, window, rest)[0]


def _attend_forward(static: _Static, query, key, value, window, rest):
    start, interval, segments = rest
    out, lse = forward(
        query,
        key,
        _across(value),
        None if window is None else (window[0], _across(window[1]), interval),
        **static.arguments(start, segments, backward=False),
    )
    return out, (query, key, value, window, rest, out, lse)


def _attend_backward(static: _Static, saved, grad_out):
    query, key, value, window, rest, out, lse = saved
    start, interval, segments = rest
    delta = jnp.sum(out.astype(jnp.float32) * grad_out.astype(jnp.float32), axis=3)
    grad_query, grad_key, grad_value, *grad_window = backward(
        (query, key, value),
        lse,
        delta,
        _across(grad_out),
        None if window is None else (*window, interval),
        **static.arguments(start, segments, backward=True),
    )
    if window is not None:
        scaled = grad_window[0] * static.head_dim**-0.5, grad_window[1]
        grad_window = tuple(part.astype(window[0].dtype) for part in scaled)
    return _across(grad_query), grad_key, grad_value, grad_window or None, None


_attend.defvjp(_attend_forward, _attend_backward)


def _padded(x, axis: int, multiple: int, mode: str = "constant"):
    widths = [(0, 0)] * x.ndim
    widths[axis] = (0, -x.shape[axis] % multiple)
    return jnp.pad(x, widths, mode=mode)


def memory_attention(
    query, key, value, *, start, preface=None, slots=None, slot_valid=None, grid=None, segments=None
):
    """As :func:`reference.memory_attention`."""
    batch, queries, heads, head_dim = query.shape
    kv_heads, keys = key.shape[2:0:-1]
    static = _Static.of(queries, keys, head_dim)
    start = start.astype(jnp.int32)
    seen = plan.windows(
        start,
        static.sizes[1] // static.backward_q,
        static.backward_q,
        preface=preface,
        slots=slots,
        slot_valid=slot_valid,
        grid=grid,
        dtype=key.dtype,
    )
    # (B, T, K, G, H) -> (B, K, G, T, H), and (B, S, K, H) -> (B, K, S, H); heads padded to tiles.
    grouped = query.reshape(batch, queries, kv_heads, -1, head_dim).transpose(0, 2, 3, 1, 4)
    grouped = _padded(_padded(grouped, 3, static.forward_q), 4, _SUBLANES)
    context = (_padded(x.swapaxes(1, 2), 2, static.block_k) for x in (key, value))
    context = [_padded(x, 3, _SUBLANES) for x in context]
    window = interval = None
    if seen is not None:
        window = tuple(
            _padded(x.transpose(0, 3, 1, 2, 4), 4, _SUBLANES) for x in (seen.keys, seen.values)
        )
        interval = _padded(seen.interval, 2, 8)
    if segments is not None:
        multiples = static.forward_q, static.block_k
        segments = tuple(
            _padded(x.astype(jnp.int32), 1, n, "edge")
            for x, n in zip(segments, multiples, strict=True)
        )
    out = _attend(static, grouped, *context, window, (start, interval, segments))
    return out[:, :, :, :head_dim, :queries].transpose(0, 4, 1, 2, 3).reshape(query.shape)
