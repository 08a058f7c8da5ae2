"""What the tests of sharding need to know, found out in a process with eight devices.

Prints one JSON object: the name of each statement, and what speaks against it (nothing, if it
holds).
"""

import json
import os
from collections.abc import Callable

from tests.eight_devices import ENVIRONMENT

os.environ |= ENVIRONMENT

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from jaxlab.optim import average_sam, ire, refresh_flat_mask, sam, scale_flat_directions

SPECS = {"b": P("y"), "s": P(), "w": P("x", "y")}
SHAPES = {"b": (64,), "s": (), "w": (24, 16)}
GAMMA = 0.6


def draw(seed: int) -> dict:
    """Values of bfloat16, so that many are tied."""
    generator = np.random.default_rng(seed)
    values = {n: generator.standard_normal(s).astype(jnp.bfloat16) for n, s in SHAPES.items()}
    return {n: jnp.asarray(x, jnp.float32) for n, x in values.items()}


def spread(tree: dict, kind: AxisType) -> dict:
    mesh = jax.make_mesh((4, 2), ("x", "y"), axis_types=(kind, kind))
    return {n: jax.device_put(x, NamedSharding(mesh, SPECS[n])) for n, x in tree.items()}


def refreshed(curvature: dict, **settings) -> tuple:
    """The compiled refresh of a mask, and the state, for parameters that lie like a curvature."""
    optimizer = scale_flat_directions(1.0, GAMMA, update_interval=None, **settings)
    state = jax.jit(optimizer.init)(curvature)
    refresh = jax.jit(lambda state, tree: refresh_flat_mask(state, tree, GAMMA, **settings))
    return refresh.lower(state, curvature).compile(), state


def sharded_equals_replicated(**settings) -> str:
    """Mask, threshold and shares, to the bit."""
    found = []
    for tree in (draw(0), spread(draw(0), AxisType.Auto)):
        compiled, state = refreshed(tree, **settings)
        found.append(jax.tree.map(np.asarray, compiled(state, tree)))
    same = jax.tree.map(lambda a, b: a.tobytes() == b.tobytes(), *found)
    return "" if all(jax.tree.leaves(same)) else str(same)


def no_gather() -> str:
    text = refreshed(spread(draw(0), AxisType.Auto))[0].as_text()
    names = ("all-gather", "all-to-all", "collective-permute")
    bad = [name for name in names if name in text]
    if "all-reduce" not in text:
        bad.append("no all-reduce: is anything sharded?")
    return ", ".join(bad)


def mask_lies_like_parameters() -> str:
    curvature = spread(draw(0), AxisType.Auto)
    compiled, state = refreshed(curvature)
    mask = compiled(state, curvature).flat_mask
    bad = [
        n
        for n in SPECS
        if not mask[n].sharding.is_equivalent_to(curvature[n].sharding, mask[n].ndim)
    ]
    return ", ".join(bad)


def explicit_mesh(make: Callable[[], optax.GradientTransformationExtraArgs]) -> str:
    """Types, sharding included, before and after an update on a mesh with explicit axes."""
    params = spread(draw(0), AxisType.Explicit)
    optimizer, bad = make(), []

    def step(params, state):
        grad = lambda p: jax.tree.map(lambda x: 2 * x, p)  # noqa: E731
        updates, after = optimizer.update(
            grad(params), state, params, curvature_fn=lambda p, key: grad(p), grad_fn=grad
        )
        for name, old, new in (("params", params, updates), ("state", state, after)):
            same = jax.tree.map(lambda a, b: jax.typeof(a) == jax.typeof(b), old, new)
            if not all(jax.tree.leaves(same)):
                bad.append(f"{name}: {same}")
        return after

    with jax.set_mesh(params["w"].sharding.mesh):
        jax.block_until_ready(jax.jit(step)(params, jax.jit(optimizer.init)(params)))
    return ", ".join(bad)


def shard_map_equals_replicated(**settings) -> str:
    """Each shard with a part of every leaf; the whole threshold, on the parts the whole mask."""
    tree = {n: x for n, x in draw(0).items() if n != "s"}
    axes = ("x", "y")
    optimizer = ire(optax.sgd(0.1), 1.0, GAMMA, update_interval=1, **settings)
    within = ire(optax.sgd(0.1), 1.0, GAMMA, update_interval=1, axis_name=axes, **settings)

    def step(optimizer, tree):
        updates, state = optimizer.update(tree, optimizer.init(tree), tree, curvature=tree)
        state = state[1]
        return updates, state.flat_mask, (state.flat_threshold, state.flat_fraction)

    mesh = jax.make_mesh((4, 2), axes, axis_types=(AxisType.Auto, AxisType.Auto))
    specs = {"b": P(axes), "w": P("x", "y")}
    split = jax.shard_map(
        lambda tree: step(within, tree), mesh=mesh, in_specs=(specs,), out_specs=(specs, specs, P())
    )
    ways = (jax.jit(split), lambda tree: step(optimizer, tree))
    found = [jax.tree.map(np.asarray, way(tree)) for way in ways]
    same = jax.tree.map(lambda a, b: a.tobytes() == b.tobytes(), *found)
    return "" if all(jax.tree.leaves(same)) else str(same)


LAWS = {
    "shard_map": lambda: shard_map_equals_replicated(),
    "shard_map_rank_zeros": lambda: shard_map_equals_replicated(rank_zeros=False),
    "shard_map_average": lambda: shard_map_equals_replicated(curvature_decay=0.5, scope="tensor"),
    "global": lambda: sharded_equals_replicated(),
    "tensor": lambda: sharded_equals_replicated(scope="tensor"),
    "rank_zeros": lambda: sharded_equals_replicated(rank_zeros=False),
    "no_gather": no_gather,
    "lies_alike": mask_lies_like_parameters,
    "explicit_ire": lambda: explicit_mesh(lambda: ire(optax.adamw(0.1), 1.0, GAMMA)),
    "explicit_average": lambda: explicit_mesh(
        lambda: ire(optax.sgd(0.1), 1.0, GAMMA, scope="tensor", curvature_decay=0.5)
    ),
    "explicit_sam": lambda: explicit_mesh(lambda: sam(optax.sgd(0.1), 0.1)),
    "explicit_average_sam": lambda: explicit_mesh(lambda: average_sam(optax.sgd(0.1), 0.1)),
}


def main() -> None:
    """Every statement, also when one before it breaks."""
    found = {}
    for name, law in LAWS.items():
        try:
            found[name] = law()
        except Exception as error:
            found[name] = f"{type(error).__name__}: {error}"
    print(json.dumps(found))


if __name__ == "__main__":
    main()
