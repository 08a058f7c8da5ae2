"""Meshes that can be and that cannot, and where each parameter of the papers' models lies."""

import json
import re
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import AbstractMesh, PartitionSpec

from jaxlab.config import IREConfig, MeshConfig, ModelConfig, OptimizerConfig, StageConfig
from jaxlab.errors import ConfigError
from jaxlab.models.decoder import abstract_decoder
from jaxlab.models.presets import PRESETS
from jaxlab.optim.factory import make_optimizer
from jaxlab.sharding.mesh import AXES, check_batch_fits, check_model_fits, make_mesh, mesh_sizes
from jaxlab.sharding.ops import cut_axes
from jaxlab.sharding.rules import constrain, spec
from jaxlab.training.state import abstract_state

GOLDEN = Path(__file__).parents[1] / "golden" / "sharding"
MESHES = {
    "memory3-2b": (1, 2, 128, 1),
    "memory3-0.9b": (1, 1, 64, 4),
    "llama-229m": (2, 1, 32, 4),
}


def mesh_of(sizes) -> AbstractMesh:
    return AbstractMesh(sizes, AXES)


@pytest.mark.parametrize(
    ("settings", "devices", "sizes"),
    [
        ({}, 8, (1, 1, 8, 1)),
        ({}, 1, (1, 1, 1, 1)),
        ({"tensor": 2}, 8, (1, 1, 4, 2)),
        ({"replica": 2, "data": 2, "fsdp": 2, "tensor": -1}, 16, (2, 2, 2, 2)),
        ({"fsdp": 4, "tensor": 2}, 8, (1, 1, 4, 2)),
    ],
)
def test_the_axis_without_a_size_takes_what_the_others_leave(settings, devices, sizes):
    assert mesh_sizes(MeshConfig(**settings), devices) == sizes


@pytest.mark.parametrize("settings", [{"tensor": 3}, {"fsdp": 4}, {"replica": 16}])
def test_a_mesh_that_does_not_divide_the_devices_names_its_sizes(settings):
    with pytest.raises(ConfigError, match=r"^mesh: replica .*does not divide 8 devices"):
        mesh_sizes(MeshConfig(**settings), 8)


@pytest.mark.parametrize(
    ("settings", "cure"),
    [
        ({"tensor": 3}, r"those but the -1 must multiply to a divisor of 8, and are 3$"),
        ({"fsdp": 4}, r"the four must multiply to 8; set one to -1"),
    ],
)
def test_who_has_set_a_size_free_is_not_told_to(settings, cure):
    with pytest.raises(ConfigError, match=cure):
        mesh_sizes(MeshConfig(**settings), 8)


def test_only_one_axis_may_be_free_and_none_is_empty():
    for settings in ({"data": -1}, {"tensor": 0}):
        with pytest.raises(Exception, match="-1"):
            MeshConfig(**settings)


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        (
            (1, 1, 1, 16),
            r"^mesh.tensor: 16 does not divide model.heads \(40\); .* 16 devices .*: 1, 2, 4, 8$",
        ),
        ((1, 1, 1, 20), r"^mesh.tensor: 20 does not divide model.kv_heads \(8\); .*: 1, 2, 4$"),
        (
            (1, 1, 256, 1),
            r"^mesh.fsdp: 256 does not divide model.width \(3200\); of what divides 256 devices "
            r"these do: 1, 2, 4, 8, 16, 32, 64, 128; such as mesh.data=2 mesh.fsdp=128$",
        ),
    ],
)
def test_a_mesh_that_does_not_divide_the_model_says_what_would(sizes, message):
    with pytest.raises(ConfigError, match=message):
        check_model_fits(mesh_of(sizes), ModelConfig(**PRESETS["memory3-2b"]))


def test_the_mesh_that_is_proposed_fits():
    model = ModelConfig(**PRESETS["memory3-2b"])
    with pytest.raises(ConfigError) as found:
        check_model_fits(mesh_of((1, 2, 512, 1)), model)
    proposed = str(found.value).partition("such as ")[2]
    sizes = {key: int(n) for key, n in re.findall(r"mesh\.(\w+)=(\d+)", proposed)}
    check_model_fits(mesh_of(mesh_sizes(MeshConfig(**sizes), 1024)), model)


def test_rows_that_do_not_spread_are_an_error_that_names_the_stage():
    check_batch_fits(mesh_of((1, 2, 4, 2)), "stages.warmup.batch_size", 16)
    with pytest.raises(ConfigError, match=r"^stages.warmup.batch_size: .* 12 rows .* 8 groups"):
        check_batch_fits(mesh_of((1, 2, 4, 2)), "stages.warmup.batch_size", 12)


@pytest.mark.parametrize("preset", MESHES)
def test_every_parameter_lies_where_the_golden_file_says(preset, update_golden):
    _, params = abstract_decoder(ModelConfig(**PRESETS[preset]), mesh_of(MESHES[preset]))
    found = {
        jax.tree_util.keystr(path, simple=True, separator="."): {
            "shape": list(leaf.shape),
            "spec": json.loads(json.dumps(tuple(leaf.sharding.spec))),
            "on a device": list(leaf.sharding.shard_shape(leaf.shape)),
        }
        for path, leaf in jax.tree.leaves_with_path(params)
    }
    golden = {"mesh": dict(zip(AXES, MESHES[preset], strict=True)), "parameters": found}
    path = GOLDEN / f"{preset}.json"
    if update_golden:
        path.parent.mkdir(exist_ok=True)
        path.write_text(json.dumps(golden, indent=1) + "\n")
    assert json.loads(path.read_text()) == golden


def test_the_optimizer_and_the_flat_mask_lie_as_the_parameters_do():
    config = ModelConfig(**PRESETS["llama-229m"])
    ire = OptimizerConfig(ire=IREConfig(kappa=1.0, curvature_decay=0.5))
    optimizer = make_optimizer(ire, StageConfig(steps=10, batch_size=8, learning_rate=1e-3))
    state = abstract_state(config, optimizer, seed=0, mesh=mesh_of(MESHES["llama-229m"]))
    params = abstract_decoder(config, mesh_of(MESHES["llama-229m"]))[1]
    lies = jax.tree.map(lambda x: x.sharding.spec, params)
    adam, flat = state.opt_state[1][0], state.opt_state[-1]
    for like in (state.params, adam.mu, adam.nu, flat.flat_mask, flat.curvature_average):
        assert jax.tree.map(lambda x: x.sharding.spec, like) == lies
    assert state.step.sharding.spec == flat.count.sharding.spec == PartitionSpec()


def test_rows_are_spread_over_all_axes_but_tensor():
    assert spec("batch", None) == PartitionSpec(("replica", "data", "fsdp"), None)


def test_without_a_mesh_of_several_devices_nothing_is_constrained():
    x = jnp.ones((3, 2, 2))
    assert constrain(x, "batch", "length", "width") is x
    assert cut_axes(batch=4, vocab=4) == {"batch": (), "vocab": ()}
    with jax.set_mesh(make_mesh(MeshConfig(), jax.devices()[:1])):
        assert constrain(x, "batch", "length", "width") is x


def test_names_that_share_an_axis_of_the_mesh_are_cut_together_or_not_at_all():
    mesh = AbstractMesh((2, 1, 2, 4), AXES)
    with jax.sharding.use_abstract_mesh(mesh):
        rows = ("replica", "data", "fsdp")
        assert cut_axes(batch=8, heads=8, kv_heads=4) == {
            "batch": rows,
            "heads": ("tensor",),
            "kv_heads": ("tensor",),
        }
        assert cut_axes(batch=2, heads=8, kv_heads=2) == {"batch": (), "heads": (), "kv_heads": ()}
