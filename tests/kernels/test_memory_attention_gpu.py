"""The GPU form of memory attention: its merge and its gradients, with the causal part in XLA."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kernels_pallas import dispatch
from kernels_pallas.memory_attention import ChunkGrid, gpu, memory_attention
from tests.kernels.test_memory_attention import arrays
from tests.kernels.test_memory_attention_tpu import value_and_gradients

GRID = ChunkGrid(2, 2)


@pytest.mark.parametrize(
    ("shape", "grid"),
    [
        (dict(queries=6, chunks=3, slots=3), GRID),
        (dict(queries=5, chunks=1, slots=4, preface=0, kv_heads=1, group=3), None),
        (dict(queries=1), None),
        (dict(queries=4, preface=0), None),
    ],
    ids=["band", "one group", "preface", "plain"],
)
def test_two_softmaxes_merged_equal_one_in_value_and_gradient(shape, grid, monkeypatch):
    monkeypatch.setattr(gpu, "_CAUSAL", "xla")
    monkeypatch.setattr(gpu, "_UNIT", 4)
    monkeypatch.setattr(gpu, "unsupported", None)
    given = arrays(**shape)
    given["start"][:] = 0
    wanted = value_and_gradients(given, grid, "xla")
    monkeypatch.setattr(
        "kernels_pallas.memory_attention.api.IMPLEMENTATIONS",
        (dispatch.Implementation("gpu", gpu.memory_attention, dispatch.always_supported),),
    )
    found = value_and_gradients(given, grid, "gpu")
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), found, wanted)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"segments": True}, "no segments"),
        ({"keys": 9}, "continue a cache"),
        ({"dtype": jnp.float32}, "not float32"),
        ({"head_dim": 132}, "not 132"),
    ],
)
def test_what_cudnn_does_not_take_is_refused_with_the_reason(changes, reason):
    dtype, head_dim = changes.get("dtype", jnp.bfloat16), changes.get("head_dim", 16)
    query = jax.ShapeDtypeStruct((1, 4, 2, head_dim), dtype)
    key = jax.ShapeDtypeStruct((1, changes.get("keys", 4), 1, head_dim), dtype)
    row = jax.ShapeDtypeStruct((1, 4), jnp.int32)
    segments = (row, row) if "segments" in changes else None

    def call(query, key, start, segments):
        return memory_attention(
            query, key, key, start=start, segments=segments, implementation="gpu"
        )

    start = jax.ShapeDtypeStruct((1,), jnp.int32)
    with dispatch.lowering_for("gpu"), pytest.raises(NotImplementedError, match=reason):
        jax.eval_shape(call, query, key, start, segments)
    with pytest.raises(NotImplementedError, match="the target is cpu"):
        jax.eval_shape(call, query, key, start, segments)
