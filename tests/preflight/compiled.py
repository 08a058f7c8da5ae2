"""Programs compiled by the TPU compiler, in a process that asks it before JAX is imported.

``python -m tests.preflight.compiled`` prints one JSON object: for a stack of layers on eight chips,
once as a loop and once written out, what is counted of it.
"""

import json
import os

from kernels_pallas.without_tpu import ENVIRONMENT

os.environ |= ENVIRONMENT

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding

from jaxlab.config import MeshConfig
from jaxlab.preflight import flops, hlo
from jaxlab.preflight.chips import devices, topology
from jaxlab.preflight.collectives import collectives
from jaxlab.preflight.traffic import compiled_flops
from jaxlab.sharding.mesh import make_mesh
from jaxlab.sharding.rules import constrain, spec

LAYERS, WIDTH, ROWS, LENGTH = 5, 1024, 16, 256


def counted(unroll: bool, gradients: bool) -> dict:
    """FLOPs and collectives of a loss, or of its gradients; weights and rows cut by ``fsdp``."""
    mesh = make_mesh(MeshConfig(fsdp=8), devices(topology("v5e-8")))

    def loss(weights, x):
        def layer(x, weight):
            x = constrain(x, "batch", None, None)
            return jnp.tanh(x @ weight.astype(jnp.bfloat16)), None

        return jax.lax.scan(layer, x, weights, unroll=unroll)[0].sum()

    def shape(sizes, dtype, *names):
        return jax.ShapeDtypeStruct(sizes, dtype, sharding=NamedSharding(mesh, spec(*names)))

    weights = shape((LAYERS, WIDTH, WIDTH), jnp.float32, None, "embed", None)
    rows = shape((ROWS, LENGTH, WIDTH), jnp.bfloat16, "batch", None, None)
    with jax.set_mesh(mesh):
        traced = jax.jit(jax.value_and_grad(loss, (0, 1)) if gradients else loss).trace(
            weights, rows
        )
        module = hlo.parse(traced.lower().compile().as_text())
    gathered = [one for one in collectives(module, dict(mesh.shape)) if one.axes == "fsdp"]
    return {
        "traced": flops.count(traced).total,
        "compiled": 8 * compiled_flops(module),
        "sent": sum(one.sent for one in gathered),
        "loops": sum(run.computation.name != module.entry for run in hlo.runs(module)),
    }


if __name__ == "__main__":
    ways = [(unroll, gradients) for gradients in (False, True) for unroll in (False, True)]
    print(json.dumps([counted(*way) for way in ways]))
