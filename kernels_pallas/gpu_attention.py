"""Memory attention on a GPU beside cuDNN and PyTorch, which do causal attention on as many keys.

FLOPs count visible pairs of query and key only: 4 H a pair and query head going forward (two
products), 10 H backward (five). Without memory, equal numbers of keys come from a longer row: where
each of T queries sees E keys beside its context, causal attention over T + E has as many pairs,
to within E². Backward is timed without the forward pass that precedes it.
"""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp

from kernels_pallas import dispatch
from kernels_pallas.gpu_sizes import Sizes
from kernels_pallas.memory_attention import ChunkGrid, api, memory_attention
from kernels_pallas.timing import Contestant, Plan, Timer, compare

# For the length of a turn only.
_GUESSED_FLOPS = 3e14


def normal(seed: int, *shape: int) -> jax.Array:
    """Random numbers of unit variance in bfloat16, from the generator that compiles fastest."""
    return jax.random.normal(jax.random.key(seed, impl="rbg"), shape, jnp.bfloat16)


def visible_pairs(sizes: Sizes, queries: int) -> int:
    """Pairs of query and key for one sequence and head: context, preface and the band's slots."""
    grid = ChunkGrid(sizes.chunk, sizes.band)
    chunks = int(grid.visible(jnp.arange(queries)[None], queries // sizes.chunk).sum())
    return causal_pairs(queries) + queries * sizes.preface + chunks * sizes.slots


def causal_pairs(length: int) -> int:
    """Pairs under the diagonal and on it."""
    return length * (length + 1) // 2


def _inputs(sizes: Sizes, batch: int, queries: int, head_dim: int) -> tuple[dict, dict]:
    """What has gradients, and what has none."""
    memory = (batch, queries // sizes.chunk, sizes.slots, sizes.kv_heads, head_dim)
    preface = (sizes.preface, sizes.kv_heads, head_dim)
    moving = _causal_inputs(sizes, batch, queries, head_dim) | {
        "preface": (normal(3, *preface), normal(4, *preface)),
        "slots": (normal(5, *memory), normal(6, *memory)),
    }
    fixed = {
        "start": jnp.zeros((batch,), jnp.int32),
        "slot_valid": jnp.ones(memory[:3], jnp.bool_),
    }
    return moving, fixed


def _causal_inputs(sizes: Sizes, batch: int, length: int, head_dim: int) -> dict:
    return {
        "query": normal(0, batch, length, sizes.heads, head_dim),
        "key": normal(1, batch, length, sizes.kv_heads, head_dim),
        "value": normal(2, batch, length, sizes.kv_heads, head_dim),
    }


def _cudnn(moving: dict, _: dict) -> jax.Array:
    return jax.nn.dot_product_attention(**moving, is_causal=True, implementation="cudnn")


def _contestant(function: Callable, moving: dict, fixed: dict, backward: bool) -> Contestant:
    """Forward: each output is the next query. Backward: each query's gradient the next output's."""
    query = moving["query"]

    def pulled(moving, fixed):
        return jax.vjp(lambda moving: function(moving, fixed), moving)

    def gradients(moving, fixed, gradient):
        return pulled(moving, fixed)[1](gradient)[0]

    def step_forward(arrays, query):
        moving, fixed = arrays
        return function(moving | {"query": query}, fixed), ()

    def step_backward(pull, gradient):
        grads = dict(pull(gradient)[0])
        return grads.pop("query"), grads

    if backward:
        return Contestant(
            gradients,
            (moving, fixed, query),
            lambda: (step_backward, [jax.jit(pulled)(moving, fixed)[1]] * 2, query),
        )
    return Contestant(
        function, (moving, fixed), lambda: (step_forward, [(moving, fixed)] * 2, query)
    )


def torch_timer(
    sizes: Sizes, shape: tuple[int, int, int], backward: bool, plan: Plan, guess: float, device: str
) -> Timer:
    """PyTorch's own attention (flash or cuDNN), causal over ``shape``: batch, length, head dim.

    Raises:
      ImportError: PyTorch is not installed.
      RuntimeError: it has no such device.
    """
    import torch
    from torch.nn import attention, functional

    if device == "cuda" and not torch.cuda.is_available():
        raise RuntimeError("this PyTorch has no CUDA here: pip install torch with CUDA")
    batch, length, head_dim = shape
    counts = sizes.heads, sizes.kv_heads, sizes.kv_heads
    query, key, value = (
        torch.randn(
            (batch, count, length, head_dim),
            dtype=torch.bfloat16,
            device=device,
            requires_grad=backward,
        )
        for count in counts
    )
    kinds = [attention.SDPBackend.FLASH_ATTENTION, attention.SDPBackend.CUDNN_ATTENTION]
    attend = functools.partial(
        functional.scaled_dot_product_attention, is_causal=True, enable_gqa=True
    )
    operations = plan.operations(guess)
    wait = torch.cuda.synchronize if device == "cuda" else (lambda: None)

    def timer() -> float:
        with attention.sdpa_kernel(kinds):
            out = attend(query, key, value)
            gradient = out.detach()
            wait()
            begin = plan.clock()
            for _ in range(operations):
                if backward:
                    torch.autograd.grad(out, (query, key, value), gradient, retain_graph=True)
                else:
                    attend(query, key, value)
            wait()
        return (plan.clock() - begin) / operations

    return timer


def attention_row(
    sizes: Sizes, queries: int, head_dim: int, backward: bool, plan: Plan, torch_device: str
) -> dict:
    """All contestants at one shape and in one direction."""
    batch = max(1, sizes.tokens // queries)
    longer = queries + sizes.preface + sizes.slots * sizes.band
    grid = ChunkGrid(sizes.chunk, sizes.band)
    moving, fixed = _inputs(sizes, batch, queries, head_dim)

    def ours(implementation):
        def attend(moving, fixed):
            return memory_attention(**moving, **fixed, grid=grid, implementation=implementation)

        return _contestant(attend, moving, fixed, backward)

    def cudnn(length):
        return _contestant(_cudnn, _causal_inputs(sizes, batch, length, head_dim), {}, backward)

    pair = batch * sizes.heads * head_dim * (10 if backward else 4)
    flops = {"ours": pair * visible_pairs(sizes, queries)}
    flops |= {"xla": flops["ours"], "cudnn": pair * causal_pairs(longer)}
    flops |= {"torch": flops["cudnn"], "cudnn, context only": pair * causal_pairs(queries)}
    guess = flops["ours"] / _GUESSED_FLOPS
    torch = functools.partial(
        torch_timer, sizes, (batch, longer, head_dim), backward, plan, guess, torch_device
    )
    found = compare(
        {
            "cudnn": cudnn(longer),
            "cudnn, context only": cudnn(queries),
            "xla": ours("xla"),
            "ours": ours(None),
        },
        plan,
        guess,
        {"torch": torch},
    )
    for name, row in found.items():
        if "seconds" in row:
            row["tflops"] = flops[name] / row["seconds"] / 1e12
    arrays = (moving.pop("query"), moving.pop("key"), moving.pop("value"))
    chosen = dispatch.choose(
        "memory_attention", api.IMPLEMENTATIONS, None, arrays, moving | fixed | {"grid": grid}
    )
    return {
        "op": "memory_attention",
        "direction": "backward" if backward else "forward",
        "batch": batch,
        "queries": queries,
        "keys of cudnn and torch": longer,
        "head_dim": head_dim,
        "implementation": chosen.name,
        "contestants": found,
        **_ratios(found),
    }


def _ratios(found: dict[str, dict]) -> dict[str, float]:
    """Our speed over the others', and their temporary memory over ours; what raised has none."""
    ours, ratios = found["ours"], {}
    for name, row in found.items():
        if name != "ours" and "tflops" in row and "tflops" in ours:
            ratios[f"speed over {name}"] = ours["tflops"] / row["tflops"]
    if "temporary_bytes" in ours and "temporary_bytes" in found["xla"]:
        least = max(1, ours["temporary_bytes"])
        ratios["temporary memory of xla over ours"] = found["xla"]["temporary_bytes"] / least
    return ratios
