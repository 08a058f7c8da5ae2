"""How the next token is chosen from logits."""

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Key

from jaxlab.errors import ConfigError


@dataclasses.dataclass(frozen=True)
class Sampling:
    """Greedy at ``temperature`` 0; else a draw from the ``top_k`` likeliest within ``top_p``.

    Raises ConfigError for values that mean nothing.
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


def restrict(logits: Float[Array, "B V"], sampling: Sampling) -> Float[Array, "B V"]:
    """Scaled logits with -inf for the tokens that top-k and top-p exclude.

    Top-p keeps the fewest likeliest tokens whose probabilities reach ``top_p`` together, at least
    one; it is applied after top-k.
    """
    logits = logits / sampling.temperature
    if 0 < sampling.top_k < logits.shape[-1]:
        smallest = jax.lax.top_k(logits, sampling.top_k)[0][:, -1:]
        logits = jnp.where(logits < smallest, -jnp.inf, logits)
    if sampling.top_p < 1:
        ordered = jnp.sort(logits, axis=-1, descending=True)
        probabilities = jax.nn.softmax(ordered, axis=-1)
        before = jnp.cumsum(probabilities, axis=-1) - probabilities
        smallest = jnp.min(jnp.where(before < sampling.top_p, ordered, jnp.inf), axis=-1)
        logits = jnp.where(logits < smallest[:, None], -jnp.inf, logits)
    return logits


def sample(
    logits: Float[Array, "B V"], key: Key[Array, ""], sampling: Sampling
) -> Int[Array, " B"]:
    """One token for each row."""
    if sampling.temperature == 0:
        return jnp.argmax(logits, axis=-1).astype(jnp.int32)
    return jax.random.categorical(key, restrict(logits, sampling)).astype(jnp.int32)
