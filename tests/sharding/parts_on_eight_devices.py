"""The loss, its gradients and the draws on eight virtual devices, against those without a mesh.

``python -m tests.sharding.parts_on_eight_devices`` prints one JSON object: the largest differences,
how many collectives the compiled gradient of the loss holds, and what of the training state lies
elsewhere after a step.
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

from jaxlab.config import (
    DataConfig,
    ExperimentConfig,
    IREConfig,
    MeshConfig,
    OptimizerConfig,
    StageConfig,
    StagesConfig,
    TokenizerConfig,
)
from jaxlab.models.decoder import initial_parameters
from jaxlab.sharding.mesh import make_mesh
from jaxlab.sharding.rules import spec
from jaxlab.training import losses
from jaxlab.training.program import TrainProgram
from jaxlab.training.state import start_state
from jaxlab.training.step import SequenceFormat
from tests.models.tiny import PREFACE, tiny_config, tiny_memory

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
        found[name]["moved"] = _moved(mesh)
    return found


def _moved(mesh) -> list[str]:
    """Leaves of the training state that lie elsewhere after a step, which then compiles again."""
    heads = mesh.shape["tensor"]
    config = ExperimentConfig(
        name="tiny",
        # One layer of each kind: XLA moves parts of it as it would of more.
        model=tiny_config(vocab_size=128, heads=heads, kv_heads=heads, layers=2, memory_layers=1),
        memory=tiny_memory(),
        tokenizer=TokenizerConfig(vocab_size=128),
        data=DataConfig(source="installed-docs", sequence_length=128, facts_fraction=0.0),
        optimizer=OptimizerConfig(ire=IREConfig(kappa=1.0, curvature_decay=0.5)),
        stages=StagesConfig(
            continual=StageConfig(steps=2, batch_size=8, learning_rate=1e-3, memory=True)
        ),
    )
    form = SequenceFormat(bos_id=1, preface_ids=tuple(PREFACE.tolist()), memory=config.memory)
    program = TrainProgram(config, "continual", mesh, form)
    with jax.set_mesh(mesh):
        params = initial_parameters(config.model, 0, mesh)
        state = start_state(params, program.optimizer, seed=0, mesh=mesh)
        before = [leaf.sharding for leaf in jax.tree.leaves(state)]
        batch = {
            name: jax.device_put(np.ones(shape.shape, shape.dtype), shape.sharding)
            for name, shape in program.batch.items()
        }
        after = jax.tree.leaves_with_path(program.step(state, batch)[0])
    return [
        jax.tree_util.keystr(path)
        for lay, (path, leaf) in zip(before, after, strict=True)
        if not lay.is_equivalent_to(leaf.sharding, leaf.ndim)
    ]


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
