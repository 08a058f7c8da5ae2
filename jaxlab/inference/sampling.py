"""How the next token of each sequence is chosen from its logits."""

import dataclasses
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, UInt32

from jaxlab.errors import ConfigError

# Colder is greedy: logits divided by less may be no float32, nor is the temperature itself.
_COLDEST = 1e-6


@dataclasses.dataclass(frozen=True)
class Sampling:
    """Greedy at ``temperature`` 0; else a draw from the ``top_k`` likeliest within ``top_p``.

    Below 1e-6 it is greedy as well. The draw of a token depends on ``seed`` and on how many the
    sequence has said, on nothing else. Raises ConfigError for values that mean nothing.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        if not 0 <= self.temperature < float("inf"):
            raise ConfigError(f"temperature is {self.temperature}: give 0 (greedy) or more")
        if self.top_k < 0:
            raise ConfigError(f"top_k is {self.top_k}: give 0 (no limit) or a number of tokens")
        if not 0 < self.top_p <= 1:
            raise ConfigError(f"top_p is {self.top_p}: give a share above 0 and at most 1")

    @property
    def limited(self) -> bool:
        """Whether tokens are excluded, which takes a sort of all of them."""
        return self.temperature > 0 and (self.top_k > 0 or self.top_p < 1)


class Choices(NamedTuple):
    """What the sequences of a batch ask for, and how many tokens each has said."""

    temperature: Float[Array, " B"]
    top_k: Int[Array, " B"]
    top_p: Float[Array, " B"]
    seed: UInt32[Array, " B"]
    said: Int[Array, " B"]

    @classmethod
    def of(cls, samplings: Sequence[Sampling], said: Sequence[int]) -> "Choices":
        """As arrays on the host."""
        temperatures = [one.temperature for one in samplings]
        return cls(
            np.array([t if t >= _COLDEST else 0 for t in temperatures], np.float32),
            np.array([min(one.top_k, 2**31 - 1) for one in samplings], np.int32),
            np.array([one.top_p for one in samplings], np.float32),
            np.array([one.seed % 2**32 for one in samplings], np.uint32),
            np.array(said, np.int32),
        )


def restrict(logits: Float[Array, "B V"], choices: Choices) -> Float[Array, "B V"]:
    """Logits with -inf for the tokens that top-k and top-p exclude.

    Top-p keeps the fewest likeliest tokens whose probabilities, at the sequence's temperature and
    after top-k, reach ``top_p`` together, at least one.
    """
    size = logits.shape[-1]
    ordered = jnp.sort(logits, axis=-1, descending=True)
    top_k = jnp.where(choices.top_k > 0, jnp.minimum(choices.top_k, size), size)[:, None]
    inside = jnp.arange(size) < top_k
    scaled = jnp.where(inside, ordered / _warm(choices)[:, None], -jnp.inf)
    probabilities = jax.nn.softmax(scaled, axis=-1)
    before = jnp.cumsum(probabilities, axis=-1) - probabilities
    kept = inside & ((before < choices.top_p[:, None]) | (choices.top_p[:, None] >= 1))
    smallest = jnp.min(jnp.where(kept, ordered, jnp.inf), axis=-1, keepdims=True)
    return jnp.where(logits < smallest, -jnp.inf, logits)


def choose(
    logits: Float[Array, "B V"], choices: Choices, *, drawn: bool, limited: bool
) -> Int[Array, " B"]:
    """One token for each sequence.

    ``drawn`` and ``limited`` say whether any of them has a temperature, and limits: what none asks
    for costs nothing. They change no sequence's token.
    """
    likeliest = jnp.argmax(logits, axis=-1).astype(jnp.int32)
    if not drawn:
        return likeliest
    if limited:
        logits = restrict(logits, choices)

    def draw(seed, said, row):
        return jax.random.categorical(jax.random.fold_in(jax.random.key(seed), said), row)

    tokens = jax.vmap(draw)(choices.seed, choices.said, logits / _warm(choices)[:, None])
    return jnp.where(choices.temperature > 0, tokens, likeliest).astype(jnp.int32)


def _warm(choices: Choices) -> Float[Array, " B"]:
    """The temperatures, and 1 for the greedy, which do not use it."""
    return jnp.where(choices.temperature > 0, choices.temperature, 1.0)
