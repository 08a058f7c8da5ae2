"""What runs on the device while sequences are generated: programs over one state.

All shapes are fixed, so that each is compiled once and what a sequence says cannot depend on its
company: one program computes logits, and only how tokens are chosen from them is compiled for what
is asked for. ``rows`` sequences are decoded together, and ``group`` of them at a time get their
memories and read a chunk of their prompts.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int, PyTree, UInt8

from jaxlab.config import MemoryConfig, ModelConfig
from jaxlab.inference.sampling import Choices, choose
from jaxlab.memory.read import decoded
from jaxlab.memory.write import from_stored
from jaxlab.models.attention import KeyValues, Slots
from jaxlab.models.cache import Cache, empty_cache
from jaxlab.models.decoder import Prefix, unstack
from kernels_pallas.memory_dequantize import Codebook


class State(NamedTuple):
    """What stays on the device from call to call, in buffers that are used again.

    layers: the caches of all rows. slots: what each row reads, or None without memory; both with
    tuples of layers.
    """

    layers: tuple[KeyValues, ...]
    slots: Slots | None


class Said(NamedTuple):
    """The tokens of one step, and where they were asked for their log-probabilities.

    logprobs: of the token itself. top, top_logprobs: of the likeliest tokens.
    """

    tokens: Int[Array, " B"]
    logprobs: Float[Array, " B"] | None = None
    top: Int[Array, "B n"] | None = None
    top_logprobs: Float[Array, "B n"] | None = None


@dataclasses.dataclass(frozen=True)
class Programs:
    """The compiled programs of a model; ``start`` is the position of the context's ``<s>``."""

    graphdef: Any
    start: int

    @functools.cached_property
    def load(self) -> Callable[..., State]:
        """(state, rows (G), stored (G r …), valid (G r m), codebook) -> state.

        Gives rows the memories that they read from now on; a row past the last is none. ``stored``
        are memories as the bank holds them, or codes, which the codebook decodes.
        """

        def load(
            state: State,
            rows: Int[Array, " G"],
            stored: Float[Array, "G r L 2 K m H"] | UInt8[Array, "G r L 2 K m W"],
            valid: Bool[Array, "G r m"],
            codebook: Codebook | None,
        ) -> State:
            if codebook is not None:
                stored = decoded(stored, codebook, state.slots.keys[0].dtype)
            fresh = from_stored(stored[:, None], valid[:, None])
            slots = Slots(
                *(
                    tuple(
                        old.at[rows].set(new.astype(old.dtype), mode="drop")
                        for old, new in zip(held, came, strict=True)
                    )
                    for held, came in zip(state.slots[:2], fresh[:2], strict=True)
                ),
                state.slots.valid.at[rows].set(fresh.valid, mode="drop"),
            )
            return state._replace(slots=slots)

        return jax.jit(load, donate_argnums=0)

    @functools.cached_property
    def prefill(self) -> Callable[..., State]:
        """(params, preface, state, rows (G), lengths (G), tokens (G T)) -> state.

        Writes tokens behind the ``lengths`` tokens that rows have, all read with the row's
        memories. Padding behind them is written too, and later overwritten.
        """

        def prefill(params, preface: Prefix | None, state: State, rows, lengths, tokens) -> State:
            def picked(tree):
                return jax.tree.map(lambda leaf: leaf.at[rows].get(mode="clip"), tree)

            _, cache = nnx.merge(self.graphdef, params)(
                tokens,
                preface=preface,
                slots=picked(state.slots),
                cache=Cache(picked(state.layers), lengths),
                start=self.start,
            )
            layers = jax.tree.map(
                lambda held, new: held.at[rows].set(new, mode="drop"), state.layers, cache.layers
            )
            return state._replace(layers=layers)

        return jax.jit(prefill, donate_argnums=2)

    @functools.cached_property
    def decode(self) -> Callable[..., tuple[State, Float[Array, "B V"]]]:
        """(params, preface, state, lengths, given, said) -> (state, logits of the next tokens).

        One token of every row: ``given`` where it is not negative, else what the row ``said`` last,
        is written behind ``lengths`` tokens.
        """

        def decode(
            params,
            preface: Prefix | None,
            state: State,
            lengths: Int[Array, " B"],
            given: Int[Array, " B"],
            said: Int[Array, " B"],
        ):
            decoder = nnx.merge(self.graphdef, params)
            hidden, cache = decoder(
                jnp.where(given >= 0, given, said)[:, None],
                preface=preface,
                slots=state.slots,
                cache=Cache(state.layers, lengths),
                start=self.start,
            )
            return state._replace(layers=cache.layers), decoder.logits(hidden[:, 0])

        return jax.jit(decode, donate_argnums=2)


@functools.partial(jax.jit, static_argnames=("drawn", "limited", "alternatives"))
def say(
    logits: Float[Array, "B V"],
    choices: Choices,
    *,
    drawn: bool,
    limited: bool,
    alternatives: int | None,
) -> Said:
    """The next token of every row, with so many ``alternatives``; None: no log-probabilities.

    ``drawn`` and ``limited`` say what no row asks for, as for :func:`choose`.
    """
    tokens = choose(logits, choices, drawn=drawn, limited=limited)
    if alternatives is None:
        return Said(tokens)
    logprobs = jax.nn.log_softmax(logits, axis=-1)
    own = jnp.take_along_axis(logprobs, tokens[:, None], axis=-1)[:, 0]
    top_logprobs, top = jax.lax.top_k(logprobs, alternatives)
    return Said(tokens, own, top, top_logprobs)


def serving_parameters(graphdef: Any, params: PyTree, dtype: str) -> tuple[Any, PyTree]:
    """Decoder and parameters as inference reads them: unstacked, matrices in the compute dtype.

    The model casts its matrices wherever it uses them, so nothing that it computes changes; but
    decoding reads all of them for every token, and half the bytes take half the time. Arrays of the
    host go to the device here, or they would go there for every token.
    """

    def cast(path, leaf):
        return jnp.asarray(leaf, leaf.dtype if path[-1].key == "scale" else dtype)

    graphdef, params = unstack(graphdef, params)
    return graphdef, jax.tree_util.tree_map_with_path(cast, params)


def empty_state(
    model: ModelConfig, memory: MemoryConfig | None, *, rows: int, length: int
) -> State:
    """A state for sequences of ``length`` tokens; ``memory`` None: without slots."""
    slots = None
    if memory is not None:
        count = memory.references_per_chunk * memory.tokens_kept
        shape = (rows, 1, count, model.kv_heads, model.head_dim)
        keys, values = (
            tuple(jnp.zeros(shape, model.compute_dtype) for _ in range(model.memory_layers))
            for _ in range(2)
        )
        slots = Slots(keys, values, jnp.zeros(shape[:3], bool))
    layers = empty_cache(model, batch=rows, length=length, unstacked=True).layers
    return State(layers, slots)
