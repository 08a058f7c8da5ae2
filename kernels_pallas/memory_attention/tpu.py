"""Memory attention on TPU: layouts around the two kernels, and the rule for gradients."""

import functools

import jax
import jax.numpy as jnp
from jax.experimental.pallas import tpu as pltpu

from kernels_pallas import dispatch
from kernels_pallas.blocks import attention_blocks
from kernels_pallas.memory_attention import plan
from kernels_pallas.memory_attention.tpu_backward import backward
from kernels_pallas.memory_attention.tpu_forward import Tiling, forward

_SUBLANES = 16  # rows of a tile of bfloat16


def unsupported(query, key, value, **_) -> str | None:
    """Why the kernels do not take the arguments, or None when they do."""
    if reason := dispatch.only_on("tpu"):
        return reason
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


def _block_sizes(queries: int) -> tuple[int, int, int]:
    """Blocks of queries for forward and backward and of keys: the largest that pad little.

    The queries of a backward block share a window of slots, in both directions.
    """
    data = attention_blocks(dispatch.target_chip())
    rows = max(128, 1 << (queries - 1).bit_length())
    forward_rows = min(data.query, rows)
    if -queries % forward_rows > -queries % data.backward_query:
        forward_rows = min(forward_rows, data.backward_query)
    return forward_rows, min(data.backward_query, forward_rows), min(data.key, forward_rows)


def _across(x):
    return x.swapaxes(-1, -2)


def _settings(*, lp_scheduler: bool):
    return pltpu.CompilerParams(
        dimension_semantics=("parallel", "parallel", "arbitrary"),
        vmem_limit_bytes=attention_blocks(dispatch.target_chip()).vmem_bytes,
        flags={"XLA_TPU_FORCE_LP_LLO_SCHEDULER": True} if lp_scheduler else None,
    )


def _tiling(block_q: int, block_k: int, unit: int, queries: int, head_dim: int) -> Tiling:
    side = min(attention_blocks(dispatch.target_chip()).triangle, block_k)
    return Tiling(block_q, block_k, unit, side, queries, head_dim)


def _table(start, sizes: tuple[int, int, int], block_q: int, block_k: int, segments):
    """Numbers of plan.Visits in a row, for scalar memory."""
    found = plan.visits(start, sizes, block_q, block_k, segments)
    return jnp.stack(found, axis=-1).reshape(-1)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attend(static, query, key, value, window, rest):
    return _attend_forward(static, query, key, value, window, rest)[0]


def _attend_forward(static, query, key, value, window, rest):
    (block_q, unit, block_k), sizes, head_dim = static
    start, interval, segments = rest
    across = None if window is None else (window[0], _across(window[1]), interval)
    out, lse = forward(
        _table(start, sizes, block_q, block_k, segments),
        start,
        query,
        key,
        _across(value),
        across,
        _rows(segments),
        tiling=_tiling(block_q, block_k, unit, sizes[0], head_dim),
        settings=_settings(lp_scheduler=attention_blocks(dispatch.target_chip()).lp_scheduler),
    )
    return out, (query, key, value, window, rest, out, lse)


def _attend_backward(static, saved, grad_out):
    (_, block_q, block_k), sizes, head_dim = static
    query, key, value, window, rest, out, lse = saved
    start, interval, segments = rest
    delta = jnp.sum(out.astype(jnp.float32) * grad_out.astype(jnp.float32), axis=3)
    grad_query, grad_key, grad_value, *grad_window = backward(
        _table(start, sizes, block_q, block_k, segments),
        start,
        (query, key, value),
        lse,
        delta,
        _across(grad_out),
        None if window is None else (*window, interval),
        _rows(segments),
        tiling=_tiling(block_q, block_k, block_q, sizes[0], head_dim),
        settings=_settings(lp_scheduler=False),
    )
    if window is not None:
        scaled = grad_window[0] * head_dim**-0.5, grad_window[1]
        grad_window = tuple(part.astype(window[0].dtype) for part in scaled)
    return _across(grad_query), grad_key, grad_value, grad_window or None, None


_attend.defvjp(_attend_forward, _attend_backward)


def _rows(segments):
    """Segment numbers with the axis of one row that blocks need."""
    return None if segments is None else tuple(part[:, None] for part in segments)


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
    blocks = _block_sizes(queries)
    unit = blocks[1]
    padded = -(-queries // blocks[0]) * blocks[0]
    seen = plan.windows(
        start,
        padded // unit,
        unit,
        preface=preface,
        slots=slots,
        slot_valid=slot_valid,
        grid=grid,
        dtype=key.dtype,
    )
    # (B, T, K, G, H) -> (B, K, G, T, H), and (B, S, K, H) -> (B, K, S, H); heads padded to tiles.
    grouped = query.reshape(batch, queries, kv_heads, -1, head_dim).transpose(0, 2, 3, 1, 4)
    grouped = _padded(_padded(grouped, 3, blocks[0]), 4, _SUBLANES)
    context = [_padded(_padded(x.swapaxes(1, 2), 2, blocks[2]), 3, _SUBLANES) for x in (key, value)]
    window = interval = None
    if seen is not None:
        window = tuple(
            _padded(x.transpose(0, 3, 1, 2, 4), 4, _SUBLANES) for x in (seen.keys, seen.values)
        )
        interval = _padded(seen.interval, 2, 8)
    if segments is not None:
        sizes = (blocks[0], blocks[2])
        segments = tuple(_padded(x, 1, n, "edge") for x, n in zip(segments, sizes, strict=True))
    static = (blocks, (queries, padded, keys), head_dim)
    out = _attend(static, grouped, *context, window, (start, interval, segments))
    return out[:, :, :, :head_dim, :queries].transpose(0, 4, 1, 2, 3).reshape(query.shape)
