"""Problems with known flat directions, on which the theory of IRE can be checked to the digit.

The loss (1 + u²) v²/2 of arXiv 2405.20763, section 2: its minima are the line v = 0, along which
the sharpness is 1 + u². There u is flat and v is sharp, so that the mask is exact; u falls only
while v is not 0. What is measured is how far u falls, which IRE speeds up 1 + kappa times, and how
large v stays, which IRE must not change.
"""

import functools
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float

from jaxlab.config import save_yaml
from jaxlab.optim import average_sam, refresh_flat_mask, sam, scale_flat_directions
from jaxlab.tools.output import machine, write_json
from jaxlab.tools.plots import plot_collapse, plot_paths
from jaxlab.training.folder import CONFIG_FILE, refuse_other_workload
from jaxlab.training.loop import TrainResult
from jaxlab.workloads.flat_toys_config import FlatToysConfig

KAPPAS = (0.0, 90.0, 900.0, 9000.0)
SMALL_STEP_KAPPAS = (0.0, 1.0, 4.0, 9.0, 19.0)
# How far log u is to fall in the runs that measure a rate.
FALL = 0.5
FILES = ("flat_toys.json", "flat_toys_paths.png", "flat_toys_falls.png")
# What a step sees of the loss, for the reader.
SAMPLES = {"one": "one sample", "two": "two samples", "noise": "noisy gradient"}
SEEDS = 128
NOISE = 0.3

Params = dict[str, Array]
Loss = Callable[[Params, Array], Float[Array, ""]]


class Setting(NamedTuple):
    """A run that measures a rate: ``per_step`` is the predicted fall of log u with kappa 0."""

    rule: str
    problem: str
    eta: float
    rho: float
    kappas: tuple[float, ...]
    per_step: float


SETTINGS = (
    # Theorem 5.5: eta rho²/p with p = 2 coordinates. Theorem 5.6: eta rho².
    Setting("average_sam", "one", 0.05, 0.05, (0.0, 1.0, 4.0, 20.0), 0.05 * 0.05**2 / 2),
    Setting("average_sam", "one", 0.1, 0.1, (0.0, 1.0, 4.0, 10.0), 0.1 * 0.1**2 / 2),
    Setting("sam", "one", 0.01, 0.05, (0.0, 1.0, 4.0, 20.0), 0.01 * 0.05**2),
    Setting("sam", "one", 0.05, 0.1, (0.0, 1.0, 4.0, 10.0), 0.05 * 0.1**2),
    # Half the sum of the samples' sharpness is what falls: its derivative is 4u/2.
    Setting("sam", "two", 0.02, 0.05, (0.0, 4.0, 20.0), 2 * 0.02 * 0.05**2),
    # Appendix B with the variance of its process, eta sigma²/2.
    Setting("sgd", "noise", 0.02, 0.0, (0.0, 4.0, 20.0), 0.02**2 * NOISE**2 / 2),
)


def one_sample(params: Params, key: Array) -> Float[Array, ""]:
    """(1 + u²) v²/2."""
    return (1 + params["u"] ** 2) * params["v"][0] ** 2 / 2


def two_samples(params: Params, key: Array) -> Float[Array, ""]:
    """One of the samples (1 + u²) v_0²/2 and (1 + 3u²) v_1²/2, drawn anew each step."""
    losses = (1 + jnp.array([1.0, 3.0]) * params["u"] ** 2) * params["v"] ** 2 / 2
    return losses[jax.random.randint(key, (), 0, 2)]


def noisy_sample(params: Params, key: Array) -> Float[Array, ""]:
    """The one sample with gradient noise of covariance sigma² H in the sharp direction."""
    height = jnp.sqrt(1 + jax.lax.stop_gradient(params["u"]) ** 2)
    push = NOISE * height * jax.random.rademacher(key, (), params["v"].dtype)
    return one_sample(params, key) + push * params["v"][0]


PROBLEMS: dict[str, tuple[Loss, int]] = {
    "one": (one_sample, 1),
    "two": (two_samples, 2),
    "noise": (noisy_sample, 1),
}
RULES = {
    "sgd": lambda eta, rho, seed: optax.sgd(eta),
    "sam": lambda eta, rho, seed: sam(optax.sgd(eta), rho),
    "average_sam": lambda eta, rho, seed: average_sam(optax.sgd(eta), rho, seed=seed),
}


def _begin(rule: optax.GradientTransformation, kappa: Array, start: Params) -> tuple:
    """Chain and state with the exact mask: u is flat, v is sharp."""
    optimizer = optax.chain(rule, scale_flat_directions(kappa, 0.5, update_interval=None))
    sharpness = {"u": jnp.zeros_like(start["u"]), "v": jnp.ones_like(start["v"])}
    return optimizer, refresh_flat_mask(optimizer.init(start), sharpness, 0.5)


def _step(optimizer: Any, loss: Loss, params: Params, state: Any, key: Array) -> tuple:
    """One step on one draw of the sample."""
    gradient = jax.grad(lambda p: loss(p, key))
    updates, state = optimizer.update(gradient(params), state, params, grad_fn=gradient)
    return optax.apply_updates(params, updates), state


@functools.partial(jax.jit, static_argnames="steps")
def descend(
    kappa: Float[Array, ""], eta: Float[Array, ""], start: Float[Array, "2"], *, steps: int
) -> Float[Array, "{steps} 2"]:
    """Gradient descent with IRE on the one sample: (u, v) after each step."""
    params = {"u": start[0], "v": start[1:]}
    optimizer, state = _begin(optax.sgd(eta), kappa, params)
    key = jax.random.key(0)

    def body(carry: tuple, _: None) -> tuple:
        params, state = _step(optimizer, one_sample, *carry, key)
        return (params, state), jnp.append(params["u"], params["v"])

    return jax.lax.scan(body, (params, state), None, length=steps)[1]


@functools.partial(jax.jit, static_argnames=("rule", "problem"))
def _fall(
    eta: Array, rho: Array, kappa: Array, steps: Array, seeds: Array, *, rule: str, problem: str
) -> tuple[Array, Array, Array]:
    """Last u, and over the second half the mean square and the maximum of v, for each seed."""
    loss, samples = PROBLEMS[problem]

    def one(seed: Array) -> tuple[Array, Array, Array]:
        params = {"u": jnp.ones_like(eta), "v": jnp.full(samples, eta * rho)}
        optimizer, state = _begin(RULES[rule](eta, rho, seed), kappa, params)
        key = jax.random.key(seed + SEEDS)

        def body(number: Array, carry: tuple) -> tuple:
            params, state, square, largest = carry
            params, state = _step(optimizer, loss, params, state, jax.random.fold_in(key, number))
            late, v = number >= steps // 2, params["v"]
            square = square + late * jnp.mean(v**2)
            return params, state, square, jnp.maximum(largest, late * jnp.max(jnp.abs(v)))

        zero = jnp.zeros_like(eta)
        params, _, square, largest = jax.lax.fori_loop(0, steps, body, (params, state, zero, zero))
        return params["u"], square / (steps - steps // 2), largest

    return jax.vmap(one)(seeds)


def measure_falls(setting: Setting) -> list[dict[str, Any]]:
    """For each kappa, where u is after the steps in which log u should fall by ``FALL``.

    The steps shrink with 1 + kappa. ``v_rms`` and ``v_max`` are of the second half of the run.
    """
    random = setting.rule == "average_sam" or setting.problem != "one"
    rows = []
    with jax.enable_x64(True):
        seeds = jnp.arange(SEEDS if random else 1)
        for kappa in setting.kappas:
            steps = int(FALL / (setting.per_step * (1 + kappa)))
            numbers = (jnp.float64(x) for x in (setting.eta, setting.rho, kappa))
            u, square, largest = _fall(
                *numbers, jnp.int32(steps), seeds, rule=setting.rule, problem=setting.problem
            )
            rows.append(
                {
                    **{name: getattr(setting, name) for name in ("rule", "problem", "eta", "rho")},
                    "kappa": kappa,
                    "steps": steps,
                    "seeds": len(seeds),
                    "u": float(u.mean()),
                    "u_std": float(u.std()),
                    "v_rms": float(jnp.sqrt(square.mean())),
                    "v_max": float(largest.max()),
                }
            )
    return rows


def small_step_end(kappa: float, u: float, v: float) -> float:
    """Where the flow from (u, v) ends: ln u + u²/2 - (1 + kappa) v²/2 is conserved."""
    target = math.log(u) + u**2 / 2 - (1 + kappa) * v**2 / 2
    low, high = 0.0, u
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if math.log(middle) + middle**2 / 2 < target else (low, middle)
    return high


def trajectories(eta: float, start: tuple[float, float], kappas: tuple, steps: int) -> np.ndarray:
    """(u, v) of gradient descent before the first step and after each: kappas x steps + 1 x 2."""
    with jax.enable_x64(True):
        begin = jnp.asarray(start, jnp.float64)
        run = [descend(jnp.float64(k), jnp.float64(eta), begin, steps=steps) for k in kappas]
        return np.stack([np.concatenate([begin[None], path]) for path in run])


def run_flat_toys(out: Path) -> dict[str, Any]:
    """Run all problems; writes ``flat_toys.json`` and two plots to ``out``, returns the former."""
    out.mkdir(parents=True, exist_ok=True)
    paths = trajectories(1.0, (1.0, 0.01), KAPPAS, steps=5000)
    too_large = trajectories(2.0, (1.0, 0.01), (0.0,), steps=5000)
    small = trajectories(1e-3, (1.0, 0.5), SMALL_STEP_KAPPAS, steps=20_000)
    falls = [row for setting in SETTINGS for row in measure_falls(setting)]
    result = {
        "descent": [
            {"kappa": k, "first": p[1:3].tolist(), "u": p[-1, 0], "trace": 1 + p[-1, 0] ** 2}
            for k, p in zip(KAPPAS, paths, strict=True)
        ],
        "learning_rate_2_is_finite": bool(np.isfinite(too_large).all()),
        "small_steps": [
            {"kappa": k, "u": p[-1, 0], "conserved": small_step_end(k, 1.0, 0.5)}
            for k, p in zip(SMALL_STEP_KAPPAS, small, strict=True)
        ],
        "falls": falls,
        "expected_fall": math.exp(-FALL),
        "machine": machine(),
    }
    table, picture_of_paths, picture_of_falls = (out / name for name in FILES)
    write_json(table, result)
    plot_paths(dict(zip(KAPPAS, paths, strict=True)), picture_of_paths)
    named = [{**row, "problem": SAMPLES[row["problem"]]} for row in falls]
    plot_collapse(named, picture_of_falls, fall=FALL)
    return result


def train_flat_toys(
    config: FlatToysConfig, run: str | Path, *, report: Callable[[str], None] = print
) -> TrainResult:
    """Run all problems into the directory ``run`` and tell what came out.

    Raises CheckpointError for a directory that holds a run of another workload.
    """
    run = Path(run)
    refuse_other_workload(config, run)
    result = run_flat_toys(run)
    save_yaml(config, run / CONFIG_FILE)
    for row in result["descent"]:
        report(f"kappa {row['kappa']:<6g} u {row['u']:.6f}  trace {row['trace']:.6f}")
    report(
        f"predicted: u = exp(-{FALL}) = {result['expected_fall']:.4f} where log u was to fall by "
        f"{FALL}, in steps that shrink with 1 + kappa"
    )
    for row in result["falls"]:
        report(
            f"{row['rule']:<12} {SAMPLES[row['problem']]:<14} eta {row['eta']:<5g} "
            f"rho {row['rho']:<5g} kappa {row['kappa']:<4g} {row['steps']:>7} steps  "
            f"u {row['u']:.4f}"
        )
    report("wrote " + "  ".join(str(run / name) for name in FILES))
    return TrainResult(0, config.workload, False, None)
