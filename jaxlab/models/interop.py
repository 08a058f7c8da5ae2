"""Hugging Face Llama checkpoints (``config.json`` and safetensors), read and written.

Both sides rotate halves in the rotary embedding, so that weights move without being permuted: a
Hugging Face matrix is (out, in) and one layer's, ours is (layers, in, out) with heads split off.
Memory layers are ordinary layers; ``memory_layers`` is one more key of ``config.json``, which other
programs ignore.
"""

import contextlib
import dataclasses
import json
import math
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxlab import strict_yaml
from jaxlab.config import ModelConfig
from jaxlab.errors import JaxlabError
from jaxlab.models.decoder import abstract_decoder
from jaxlab.typing import PyTree

WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"  # of a checkpoint in several files

# One layer: path in our tree; name behind ``model.layers.<number>.``, and how many of our axes a
# matrix sums over (None: a vector).
_LAYER = {
    ("attention_norm", "scale"): ("input_layernorm.weight", None),
    ("attention", "query"): ("self_attn.q_proj.weight", 1),
    ("attention", "key"): ("self_attn.k_proj.weight", 1),
    ("attention", "value"): ("self_attn.v_proj.weight", 1),
    ("attention", "output"): ("self_attn.o_proj.weight", 2),
    ("mlp_norm", "scale"): ("post_attention_layernorm.weight", None),
    ("mlp", "gate"): ("mlp.gate_proj.weight", 1),
    ("mlp", "up"): ("mlp.up_proj.weight", 1),
    ("mlp", "down"): ("mlp.down_proj.weight", 1),
}
# What has to be so for a Hugging Face Llama to be this decoder; all are the defaults there.
_REQUIRED = {"hidden_act": "silu", "attention_bias": False, "mlp_bias": False}


class InteropError(JaxlabError):
    """A checkpoint of another program cannot be read as this model, or ours not be written."""


@dataclasses.dataclass(frozen=True)
class _Tensor:
    """One tensor of the file and the parameter, or layer of a parameter, that it holds.

    ours: shape in our tree, without the axis of layers.
    inputs: how many leading axes of ``ours`` a matrix sums over; None for what is not transposed.
    """

    name: str
    path: tuple[str | int, ...]
    layer: int | None
    ours: tuple[int, ...]
    inputs: int | None

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape in the file: (out, in) of a matrix."""
        if self.inputs is None:
            return self.ours
        return math.prod(self.ours[self.inputs :]), math.prod(self.ours[: self.inputs])

    def to_ours(self, array: np.ndarray) -> np.ndarray:
        array = array if self.inputs is None else array.T
        return np.ascontiguousarray(array).reshape(self.ours)

    def to_theirs(self, array: np.ndarray) -> np.ndarray:
        array = array if self.inputs is None else array.reshape(self.shape[::-1]).T
        return np.ascontiguousarray(array)


def load_llama(directory: str | os.PathLike) -> tuple[ModelConfig, PyTree]:
    """Read a Llama: its configuration, and float32 parameters as numpy arrays.

    What is not a property of the weights (``compute_dtype``, ``remat``) has its default; change it
    with ``dataclasses.replace``.

    Raises:
      InteropError: a file or tensor is missing, superfluous or of another shape, or the model
        is not a Llama that this decoder can be (biases, scaled rotary embedding, ...).
    """
    directory = Path(directory)
    config = _read_config(directory / "config.json")
    params = _empty(config)
    with contextlib.ExitStack() as stack:
        readers = _readers(directory, stack)
        expected = _tensors(config)
        _check_names(directory, readers, expected, tied=config.tied_embeddings)
        for tensor in expected:
            array = readers[tensor.name](tensor.name)
            if array.shape != tensor.shape:
                raise InteropError(
                    f"{directory}: {tensor.name} has shape {array.shape}, "
                    f"config.json makes it {tensor.shape}"
                )
            into = _leaf(params, tensor.path)
            # Integers (a quantised checkpoint) would pass for weights.
            if not jnp.issubdtype(array.dtype, jnp.floating):
                raise InteropError(
                    f"{directory}: {tensor.name} holds {array.dtype}; "
                    "give the checkpoint in float32, bfloat16 or float16"
                )
            into[... if tensor.layer is None else tensor.layer] = tensor.to_ours(array)
    return config, params


def save_llama(config: ModelConfig, params: PyTree, directory: str | os.PathLike) -> None:
    """Write ``config.json`` and ``model.safetensors`` in float32; transformers can load them.

    Raises:
      InteropError: ``params`` do not have the shapes of ``config``.
    """
    save_file = _safetensors().numpy.save_file
    _check_shapes(params, abstract_decoder(config)[1])
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    arrays = {}
    for tensor in _tensors(config):
        stored = _leaf(params, tensor.path)
        array = np.asarray(stored if tensor.layer is None else stored[tensor.layer], np.float32)
        arrays[tensor.name] = tensor.to_theirs(array)
    # transformers asks for the framework that wrote the file; "pt" means this layout.
    with _replacing(directory / WEIGHTS) as temporary:
        save_file(arrays, temporary, metadata={"format": "pt"})
    with _replacing(directory / "config.json") as temporary:
        temporary.write_text(json.dumps(_their_config(config), indent=2) + "\n", encoding="utf-8")


def _their_config(config: ModelConfig) -> dict[str, Any]:
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": config.vocab_size,
        "hidden_size": config.model_width,
        "intermediate_size": config.ffn_width,
        "num_hidden_layers": config.layers,
        "num_attention_heads": config.heads,
        "num_key_value_heads": config.kv_heads,
        "head_dim": config.head_dim,
        "max_position_embeddings": config.max_context,
        "rms_norm_eps": config.norm_eps,
        # The old and the new place of the base; each version of transformers reads one.
        "rope_theta": config.rope_theta,
        "rope_parameters": {"rope_type": "default", "rope_theta": config.rope_theta},
        "tie_word_embeddings": config.tied_embeddings,
        "memory_layers": config.memory_layers,
        "dtype": "float32",
        "torch_dtype": "float32",
        **_REQUIRED,
    }


def _read_config(path: Path) -> ModelConfig:
    values = _read_json(path)
    if values.get("model_type") != "llama":
        raise InteropError(f"{path}: model_type is {values.get('model_type')!r}, not 'llama'")
    for key, required in _REQUIRED.items():
        if values.get(key, required) != required:
            raise InteropError(
                f"{path}: {key} is {values[key]!r}; this decoder only does {required!r}"
            )
    rope = values.get("rope_parameters") or values.get("rope_scaling") or {}
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind != "default":
        raise InteropError(f"{path}: rotary embedding of type {kind!r}; this decoder has 'default'")
    try:
        heads, width = values["num_attention_heads"], values["hidden_size"]
        head_dim = values.get("head_dim") or width // heads
        return ModelConfig(
            vocab_size=values["vocab_size"],
            layers=values["num_hidden_layers"],
            heads=heads,
            kv_heads=values.get("num_key_value_heads") or heads,
            head_dim=head_dim,
            width=None if width == heads * head_dim else width,
            ffn_width=values["intermediate_size"],
            memory_layers=values.get("memory_layers", 0),
            rope_theta=float(rope.get("rope_theta", values.get("rope_theta", 10000.0))),
            norm_eps=values.get("rms_norm_eps", 1e-6),
            tied_embeddings=values.get("tie_word_embeddings", False),
            max_context=values.get("max_position_embeddings", 2048),
        )
    except KeyError as error:
        raise InteropError(f"{path}: the key {error} is missing") from None
    except strict_yaml.InvalidValue as error:
        raise InteropError(f"{path}: {error}") from None


def _tensors(config: ModelConfig) -> list[_Tensor]:
    """Every tensor of the file, with the shapes that the configuration gives it."""
    shapes = abstract_decoder(config)[1]

    def whole(name: str, path: tuple, *, inputs: int | None = None) -> _Tensor:
        return _Tensor(name, path, None, _leaf(shapes, path).shape, inputs)

    out = [
        whole("model.embed_tokens.weight", ("embedding",)),
        whole("model.norm.weight", ("final_norm", "scale")),
    ]
    if not config.tied_embeddings:
        out.append(whole("lm_head.weight", ("head",), inputs=1))
    number = 0
    for stack in sorted(shapes["stacks"]):
        for layer in range(_leaf(shapes, ("stacks", stack, "mlp", "up")).shape[0]):
            for below, (name, inputs) in _LAYER.items():
                path = ("stacks", stack, *below)
                ours = _leaf(shapes, path).shape[1:]
                out.append(_Tensor(f"model.layers.{number}.{name}", path, layer, ours, inputs))
            number += 1
    return out


def _empty(config: ModelConfig) -> PyTree:
    def arrays(shapes):
        if isinstance(shapes, dict):
            return {key: arrays(value) for key, value in shapes.items()}
        return np.empty(shapes.shape, np.float32)

    return arrays(abstract_decoder(config)[1])


def _leaf(tree: Any, path: tuple[str | int, ...]) -> Any:
    for key in path:
        tree = tree[key]
    return tree


def _check_shapes(params: PyTree, expected: PyTree) -> None:
    """Refuse parameters that are not exactly the configuration's."""

    def shapes(tree):
        leaves = jax.tree_util.tree_leaves_with_path(tree)
        return {jax.tree_util.keystr(path): leaf.shape for path, leaf in leaves}

    ours, needed = shapes(params), shapes(expected)
    for path in sorted(ours.keys() | needed.keys()):
        if ours.get(path) != needed.get(path):
            raise InteropError(
                f"parameter {path} has shape {ours.get(path)}, "
                f"the configuration makes it {needed.get(path)}"
            )


def _readers(
    directory: Path, stack: contextlib.ExitStack
) -> dict[str, Callable[[str], np.ndarray]]:
    """For each tensor name, the function that reads it; the files are mapped, not loaded."""
    safetensors = _safetensors()
    if (directory / WEIGHTS).exists() or not (directory / INDEX).exists():
        names = [WEIGHTS]
    else:
        names = sorted(set(_read_json(directory / INDEX)["weight_map"].values()))
    readers = {}
    for name in names:
        try:
            file = stack.enter_context(safetensors.safe_open(directory / name, framework="numpy"))
        except (OSError, safetensors.SafetensorError) as error:
            raise InteropError(f"{directory / name} cannot be read: {error}") from None
        readers |= dict.fromkeys(file.keys(), file.get_tensor)
    return readers


def _check_names(directory: Path, readers, expected: list[_Tensor], *, tied: bool) -> None:
    # Files of old versions carry the rotary frequencies, and tied heads may be written twice.
    ignored = {name for name in readers if name.endswith("rotary_emb.inv_freq")}
    if tied:
        ignored.add("lm_head.weight")
    names = {tensor.name for tensor in expected}
    for problem, found in (
        ("is missing", names - readers.keys()),
        ("has no place in this model", readers.keys() - names - ignored),
    ):
        if found:
            more = f" (and {len(found) - 1} more)" if len(found) > 1 else ""
            raise InteropError(f"{directory}: tensor {min(found)} {problem}{more}")


def _read_json(path: Path) -> dict[str, Any]:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InteropError(f"{path} cannot be read: {error}") from None


@contextlib.contextmanager
def _replacing(path: Path) -> Iterator[Path]:
    """A temporary name that becomes ``path`` when all went well and is removed when not."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        yield temporary
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def _safetensors():
    try:
        import safetensors.numpy
    except ImportError:
        raise InteropError(
            "Hugging Face files need the package safetensors: pip install safetensors"
        ) from None
    return safetensors
