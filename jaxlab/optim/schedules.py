"""Learning rate over the steps of one stage."""

import jax.numpy as jnp
import optax

from jaxlab.config import StageConfig


def make_schedule(stage: StageConfig) -> optax.Schedule:
    """The stage's learning rate as a function of the step, counted from 0.

    Warmup reaches the peak in its last step, so that no step has rate 0; a decay would arrive at
    ``final_fraction`` one step after the stage.

    * ``warmup-stable-decay``: linear up, constant, linear down over the last ``decay_fraction`` of
      the stage (MiniCPM, arXiv 2404.06395, §4).
    * ``warmup-cosine``: linear up, then half a cosine down over the rest of the stage.
    * ``constant``: the peak throughout.
    """
    config, steps, peak = stage.schedule, stage.steps, stage.learning_rate
    if config.name == "constant":
        return optax.constant_schedule(peak)
    if config.name == "warmup-cosine":
        start = config.warmup_steps
    else:
        start = steps - config.decay_steps(steps)

    def schedule(step):
        step = jnp.asarray(step, jnp.float32)
        up = jnp.minimum(1.0, (step + 1) / max(config.warmup_steps, 1))
        progress = jnp.clip((step - start) / max(steps - start, 1), 0.0, 1.0)
        if config.name == "warmup-cosine":
            progress = 0.5 * (1 - jnp.cos(jnp.pi * progress))
        return peak * up * (1 - (1 - config.final_fraction) * progress)

    return schedule
