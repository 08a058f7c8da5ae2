"""The decoder, written once: Llama and Memory³ are configurations of it.

Layers come in two stacks, each one ``lax.scan``: the memory layers (the first ``memory_layers``,
which can read slots) and the plain layers above them (all layers of a Llama). Memory is an
argument, not another class: ``slots=None`` is an ordinary language model.

Positions (Memory³ §3.2, figure 9): with a preface of P tokens, references occupy P ... P+R-1 in
parallel and the context's ``<s>`` stands at P+R; without a preface the context starts at 0.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import AbstractMesh, Mesh
from jaxtyping import Array, Float, Int, PyTree

from jaxlab.config import ModelConfig
from jaxlab.models.attention import (
    Attention,
    JoinedAttention,
    KeyValues,
    ReadingPlan,
    Slots,
    write_into,
)
from jaxlab.models.cache import Cache
from jaxlab.models.layers import JoinedSwiGLU, RMSNorm, SwiGLU, normal
from jaxlab.sharding.rules import constrain, is_spread, parameter_shardings
from kernels_pallas.memory_attention import ChunkGrid

INIT_STD = 0.02


class Prefix(NamedTuple):
    """The preface ``<s>Reference:`` as every layer reads it; constant for given parameters.

    layers: one entry for each stack, keys and values of shape (layers, P, K, H).
    """

    layers: tuple[KeyValues, ...]

    @property
    def length(self) -> int:
        """Number of preface tokens P."""
        return self.layers[0].keys.shape[1]


class Block(nnx.Module):
    """A stack of pre-norm layers; called on one layer's parameters inside a scan."""

    def __init__(self, config: ModelConfig, *, layers: int, rngs: nnx.Rngs):
        width = config.model_width
        std, out_std = INIT_STD, INIT_STD / math.sqrt(2 * config.layers)
        self.attention_norm = RMSNorm(layers=layers, width=width, eps=config.norm_eps)
        self.attention = Attention(
            layers=layers,
            width=width,
            heads=config.heads,
            kv_heads=config.kv_heads,
            head_dim=config.head_dim,
            theta=config.rope_theta,
            std=std,
            out_std=out_std,
            rngs=rngs,
        )
        self.mlp_norm = RMSNorm(layers=layers, width=width, eps=config.norm_eps)
        self.mlp = SwiGLU(
            layers=layers,
            width=width,
            ffn_width=config.ffn_width,
            std=std,
            out_std=out_std,
            rngs=rngs,
        )

    def __call__(
        self,
        x: Float[Array, "B T D"],
        plan: ReadingPlan,
        *,
        preface: KeyValues | None = None,
        slots: KeyValues | None = None,
        cache: KeyValues | None = None,
    ) -> tuple[Float[Array, "B T D"], KeyValues]:
        """One layer; also returns its context keys and values (the updated cache, if given)."""
        query, key, value = self.attention.project(self.attention_norm(x))
        query = self.attention.rotate(query, plan.positions)
        context = KeyValues(self.attention.rotate(key, plan.positions), value)
        read = self.attention.read
        if cache is not None:
            context = write_into(cache, context, plan.index[:, 0])
            read = self.attention.read_cached
        x = x + read(query, context, plan, preface=preface, slots=slots)
        return residual(x + self.mlp(self.mlp_norm(x))), context


def residual(x: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
    """The residual stream where it lies: whole rows, so that weights are gathered to them."""
    return constrain(x, "batch", "length", "width")


def remat(body, policy: str):
    """Wrap a scan body so that its backward pass recomputes what ``policy`` does not keep."""
    if policy == "none":
        return body
    policies = {
        "full": jax.checkpoint_policies.nothing_saveable,
        "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
    }
    # The scan already keeps XLA from merging the recomputation with the forward pass.
    return jax.checkpoint(body, policy=policies[policy], prevent_cse=False)


class Decoder(nnx.Module):
    """Embedding, memory layers, plain layers, final norm, output head."""

    def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs):
        self.config = config
        table = (config.vocab_size, config.model_width)
        self.embedding = normal(rngs, table, ("vocab", "embed"), INIT_STD)
        counts = (config.memory_layers, config.layers - config.memory_layers)
        self.stacks = nnx.List([Block(config, layers=n, rngs=rngs) for n in counts if n])
        self.final_norm = RMSNorm(layers=None, width=config.model_width, eps=config.norm_eps)
        if not config.tied_embeddings:
            self.head = normal(rngs, table[::-1], ("embed", "vocab"), INIT_STD)

    @property
    def dtype(self) -> jnp.dtype:
        """The compute dtype; parameters, norms, softmax and losses stay float32."""
        return jnp.dtype(self.config.compute_dtype)

    def embed(self, tokens: Int[Array, "B T"]) -> Float[Array, "B T D"]:
        """Token embeddings in the compute dtype."""
        return residual(jnp.take(self.embedding[...], tokens, axis=0).astype(self.dtype))

    def unembedding(self) -> Float[Array, "D V"]:
        """The output matrix: the embedding transposed when tied."""
        return self.embedding[...].T if self.config.tied_embeddings else self.head[...]

    def logits(self, hidden: Float[Array, "... D"]) -> Float[Array, "... V"]:
        """Next-token logits in float32."""
        weights = self.unembedding().astype(hidden.dtype)
        return jnp.matmul(hidden, weights, preferred_element_type=jnp.float32)

    def __call__(
        self,
        tokens: Int[Array, "B T"],
        *,
        preface: Prefix | None = None,
        slots: Slots | None = None,
        grid: ChunkGrid | None = None,
        cache: Cache | None = None,
        start: int = 0,
        segments: Int[Array, "B T"] | None = None,
    ) -> tuple[Float[Array, "B T D"], Cache]:
        """Final hidden states of the context, and its keys and values by stack.

        Args:
          tokens: context tokens, ``<s>`` first.
          preface: from :func:`encode_preface`; None is the ordinary language model.
          slots: memory of each chunk, read by the memory layers.
          grid: which chunk's slots a token reads; None when there is one group for all.
          cache: keys and values of the tokens before these; new ones are written behind them.
          start: position of context index 0; given by :func:`context_start`.
          segments: numbers of the texts packed in a row, never falling along it: a token sees the
            context of its own text only, whose positions begin at ``start``. Not with a cache.

        Raises:
          ValueError: segments together with a cache.
        """
        if segments is not None and cache is not None:
            raise ValueError("segments pack whole texts: they cannot be continued from a cache")
        batch, length = tokens.shape
        before = jnp.zeros((batch,), jnp.int32) if cache is None else cache.lengths
        index = before[:, None] + jnp.arange(length, dtype=jnp.int32)
        plan = ReadingPlan(
            index=index,
            positions=start + (index if segments is None else index - first_index(segments)),
            segments=segments,
            grid=grid,
            slot_valid=None if slots is None else slots.valid,
        )
        x, written = self.embed(tokens), []
        for number, stack in enumerate(self.stacks):
            reads = slots is not None and number == 0 and self.config.memory_layers > 0
            per_layer = dict(
                preface=None if preface is None else preface.layers[number],
                slots=KeyValues(slots.keys, slots.values) if reads else None,
                cache=None if cache is None else cache.layers[number],
            )
            x, layer_cache = run_stack(stack, x, plan, per_layer, policy=self.config.remat)
            written.append(layer_cache)
        return self.final_norm(x), Cache(tuple(written), before + length)


def _one_by_one(layers: Sequence[Block], x, plan: ReadingPlan, per_layer: dict):
    def of_layer(number):
        return jax.tree.map(
            lambda leaf: leaf[number], per_layer, is_leaf=lambda leaf: type(leaf) is tuple
        )

    written = []
    for number, layer in enumerate(layers):
        x, cache = layer(x, plan, **of_layer(number))
        written.append(cache)
    return x, KeyValues(*zip(*written, strict=True))


def unstack(graphdef: nnx.GraphDef, params: PyTree) -> tuple[nnx.GraphDef, PyTree]:
    """The same decoder with the parameters of each layer in arrays of their own.

    For inference: a scan copies each layer's weights and cache out of the stacked arrays, which on
    a CPU takes 2 to 4 times as long as the products themselves. What is multiplied with the same
    input lies in one array, too: fewer and larger products. Not for training.
    """
    decoder = nnx.merge(graphdef, params)
    for place, stack in enumerate(decoder.stacks):
        layer, stacked = nnx.split(stack)
        count = jax.tree.leaves(stacked)[0].shape[0]
        parts = [jax.tree.map(lambda leaf, n=n: leaf[n], stacked) for n in range(count)]
        decoder.stacks[place] = nnx.List([_joined(nnx.merge(layer, part)) for part in parts])
    graphdef, state = nnx.split(decoder)
    return graphdef, nnx.to_pure_dict(state)


def _joined(layer: Block) -> Block:
    layer.attention, layer.mlp = JoinedAttention(layer.attention), JoinedSwiGLU(layer.mlp)
    return layer


def first_index(segments: Int[Array, "B T"]) -> Int[Array, "B T"]:
    """For each token the index at which its segment begins."""
    index = jnp.arange(segments.shape[1], dtype=jnp.int32)
    begins = jnp.pad(segments[:, 1:] != segments[:, :-1], ((0, 0), (1, 0)), constant_values=True)
    return jax.lax.cummax(jnp.where(begins, index, 0), axis=1)


def run_stack(
    stack: Block | Sequence[Block], x, plan: ReadingPlan, per_layer: dict, *, policy: str
):
    """Scan one stack; ``per_layer`` holds what is read layer by layer (leading axis: layers).

    Of a decoder from :func:`unstack` the layers run one by one, and what each reads may be given
    as a tuple of layers instead of a stacked array; what they write is.
    """
    if isinstance(stack, nnx.List):
        return _one_by_one(stack, x, plan, per_layer)
    graphdef, params = nnx.split(stack)

    def body(x, layer):
        params, reads = layer
        return nnx.merge(graphdef, params)(x, plan, **reads)

    return jax.lax.scan(remat(body, policy), x, (params, per_layer))


def context_start(preface_length: int, reference_length: int) -> int:
    """Position of the context's ``<s>`` behind the preface and the references' shared interval."""
    return preface_length + reference_length


def encode_preface(decoder: Decoder, preface_ids: Int[Array, " P"]) -> Prefix:
    """Keys and values of ``<s>Reference:`` in every layer (nothing stands before it)."""
    _, cache = decoder(preface_ids[None])
    return Prefix(tuple(KeyValues(part.keys[:, 0], part.values[:, 0]) for part in cache.layers))


def abstract_decoder(
    config: ModelConfig, mesh: Mesh | AbstractMesh | None = None
) -> tuple[nnx.GraphDef, dict]:
    """Graph definition and parameter shapes (a nested dict): nothing is allocated.

    With a mesh of several devices the shapes have their shardings.
    """
    # Under a mesh Flax takes the logical names for axes of it.
    with jax.sharding.use_abstract_mesh(AbstractMesh((), ())):
        module = nnx.eval_shape(lambda: Decoder(config, rngs=nnx.Rngs(0)))
    graphdef, state = nnx.split(module)
    params = nnx.to_pure_dict(state)
    if is_spread(mesh):
        shardings = parameter_shardings(mesh, state)
        params = jax.tree.map(lambda x, s: x.update(sharding=s), params, shardings)
    return graphdef, params


def initial_parameters(config: ModelConfig, seed: int, mesh: Mesh | None = None) -> dict:
    """Fresh float32 parameters as a nested dict, made by one compiled program.

    On a mesh of several devices every device makes its own shards: no host holds the model.

    The generator is ``rbg``: with the default one XLA takes minutes to compile the draws on a CPU.
    """

    def make(key):
        decoder = Decoder(config, rngs=nnx.Rngs(params=key))
        return nnx.to_pure_dict(nnx.split(decoder)[1])

    shardings = None
    if is_spread(mesh):
        shardings = jax.tree.map(lambda x: x.sharding, abstract_decoder(config, mesh)[1])
    return jax.jit(make, out_shardings=shardings)(jax.random.key(seed, impl="rbg"))


def parameter_count(config: ModelConfig, *, embeddings: bool = True) -> int:
    """Parameters of the model, counted from shapes: nothing is allocated."""
    _, shapes = abstract_decoder(config)
    if not embeddings:
        shapes.pop("embedding")
        shapes.pop("head", None)
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(shapes))
