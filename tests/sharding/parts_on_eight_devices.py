"""The loss, its gradients and the draws on eight virtual devices, against those without a mesh.

``python -m tests.sharding.parts_on_eight_devices`` prints one JSON object: the largest differences,
and how many collectives the compiled gradient of the loss holds.
"""

import json
import os
import re

from tests.eight_devices import ENVIRONMENT

os.environ |= ENVIRONMENT

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding

from jaxlab.config import MeshConfig
from jaxlab.sharding.mesh import make_mesh
from jaxlab.sharding.rules import spec
from jaxlab.training import losses

MESHES = {
    "replica 2 x fsdp 2 x tensor 2": MeshConfig(replica=2, fsdp=2, tensor=2),
    "data 2 x fsdp 4": MeshConfig(data=2, fsdp=4),
    "tensor 8": MeshConfig(fsdp=1, tensor=8),
}


def everything(hidden, weights, targets, mask, key):
    """Loss, gradients, log-probabilities and draws."""
    loss, gradients = jax.value_and_grad(losses.cross_entropy_sum, argnums=(0, 1))(
        hidden, weights, targets, mask
    )
    scores = losses.token_log_probabilities(hidden, weights, targets)
    return {
        "loss": loss,
        "hidden gradient": gradients[0],
        "weights gradient": gradients[1],
        "scores": scores,
        "draws": losses.sampled_targets(hidden, weights, key),
    }


def main() -> dict:
    """For each mesh the largest difference of each result, and the collectives."""
    # Many blocks, so that there is a loop.
    losses.BLOCK_LOGITS, losses.BLOCK_POSITIONS = 256, {"cpu": 256}
    keys = jax.random.split(jax.random.key(0), 4)
    hidden = jax.random.normal(keys[0], (8, 512, 16))
    weights = jax.random.normal(keys[1], (16, 1024))
    targets = jax.random.randint(keys[2], (8, 512), 0, 1024)
    mask = (jnp.arange(512) % 5 > 0) * jnp.ones((8, 1))
    alone = jax.device_get(jax.jit(everything)(hidden, weights, targets, mask, keys[3]))
    found = {}
    for name, config in MESHES.items():
        mesh = make_mesh(config)
        with jax.set_mesh(mesh):
            rows = NamedSharding(mesh, spec("batch"))
            cut = NamedSharding(mesh, spec("embed", "vocab"))
            given = (
                *jax.device_put((hidden, weights, targets, mask), (rows, cut, rows, rows)),
                keys[3],
            )
            together = jax.device_get(jax.jit(everything)(*given))
            gradient = jax.jit(jax.grad(losses.cross_entropy_sum, argnums=(0, 1)))
            text = gradient.lower(*given[:4]).compile().as_text()
        found[name] = {
            key: float(np.max(np.abs(alone[key] - together[key])) / np.max(np.abs(alone[key])))
            for key in alone
        }
        found[name]["reductions in loops"] = _reductions_in_loops(text)
    return found


def _reductions_in_loops(text: str) -> int:
    """Reductions of gradients of the head, which has 16 rows, within the bodies of loops."""
    bodies = set(re.findall(r"body=%([\w.-]+)", text))
    count, inside = 0, False
    for line in text.splitlines():
        if named := re.match(r"%([\w.-]+) .*{$", line):
            inside = named[1] in bodies
        reduces = re.search(r"\[16,\d+\]\S* (all-reduce|reduce-scatter)\(", line)
        count += inside and reduces is not None
    return count


if __name__ == "__main__":
    print(json.dumps(main()))
