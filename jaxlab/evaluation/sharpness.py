"""How curved a training loss is where training ended: traces and top eigenvalues.

The trace of the Fisher matrix is the measure of the paper of IRE (arXiv 2405.20763, §4 and appendix
C); the Hessian's trace and largest eigenvalues are what its theory is about. Every loss here is

    L(params) = sum over batches of loss_fn(params, *batch), divided by n

so that ``loss_fn`` sums over the predictions of one batch and ``n`` is the number of all of them
(:mod:`jaxlab.evaluation.problems` makes them from runs).
The device holds one batch at a time; gradients and products are added up over batches.
"""

import dataclasses
import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.flatten_util import ravel_pytree
from jaxtyping import Array, PyTree
from scipy.linalg import eigh_tridiagonal

from jaxlab.config import load_config
from jaxlab.errors import CheckpointError, ConfigError
from jaxlab.evaluation.problems import Batches, LossFn, Problem, language_problem
from jaxlab.training.checkpoint import split_location
from jaxlab.training.folder import CONFIG_FILE

ONE_BATCH: Batches = ((),)
# What is looked at if nothing is said.
_TEXT_ROWS, _IMAGES = 64, 512
_TINY = 1e-30
# An error below this share of the value: the draws were the same but for rounding.
_SAME_LABELS = 1e-6


@dataclasses.dataclass(frozen=True)
class Estimate:
    """A mean over random draws and its standard error."""

    value: float
    error: float


@dataclasses.dataclass(frozen=True)
class Spectrum:
    """Eigenvalues, largest first, and for each a bound on its distance to a true eigenvalue."""

    values: list[float]
    residuals: list[float]


@dataclasses.dataclass(frozen=True)
class Sharpness:
    """What :func:`measure_sharpness` finds, for a loss in nats averaged over ``n`` predictions."""

    fisher_trace: float
    fisher_trace_error: float
    hessian_trace: float
    hessian_trace_error: float
    top_eigenvalues: list[float]
    top_eigenvalue_residuals: list[float]
    loss: float
    n: int


def hessian_vector_product(loss_fn: LossFn, params: PyTree, vector: PyTree, *batch: Any) -> PyTree:
    """Hessian of ``loss_fn(params, *batch)`` times a vector, forward over reverse mode."""
    return jax.jvp(jax.grad(lambda p: loss_fn(p, *batch)), (params,), (vector,))[1]


def hessian_trace(
    loss_fn: LossFn,
    params: PyTree,
    key: Array,
    *,
    draws: int,
    batches: Batches = ONE_BATCH,
    n: int = 1,
) -> Estimate:
    """Hutchinson's estimate: the mean of v'Hv over ``draws`` random vectors of signs.

    Raises ValueError for fewer than two draws.
    """
    _require_draws(draws)
    found = []
    for draw in jax.random.split(key, draws):
        signs = _signs(params, draw)
        products = (_product(loss_fn, params, signs, *batch) for batch in batches)
        found.append(float(_dot(signs, _sum(products))) / n)
    return _estimate(found)


def fisher_trace(
    sampled_loss: LossFn,
    params: PyTree,
    key: Array,
    *,
    draws: int,
    batches: Batches = ONE_BATCH,
    n: int = 1,
) -> Estimate:
    """Trace of the Fisher matrix: n |ghat|², the mean over ``draws`` sets of labels.

    ghat is the gradient of the mean of ``sampled_loss(params, key, *batch)`` at labels drawn from
    the model (arXiv 2405.20763, equation 6). In expectation this is the trace of the Gauss-Newton
    matrix of cross-entropy over softmax. Raises ValueError for fewer than two draws.
    """
    _require_draws(draws)
    found = []
    for draw in jax.random.split(key, draws):
        keys = jax.random.split(draw, len(batches))
        parts = zip(keys, batches, strict=True)
        total = _sum(_gradient(sampled_loss, params, k, *batch) for k, batch in parts)
        found.append(float(_dot(total, total)) / n)
    return _estimate(found)


def top_eigenvalues(
    loss_fn: LossFn,
    params: PyTree,
    key: Array,
    *,
    count: int,
    iterations: int,
    batches: Batches = ONE_BATCH,
    n: int = 1,
) -> Spectrum:
    """The algebraically largest eigenvalues of the Hessian, by Lanczos from a random start.

    Every new vector is made orthogonal to all before it, twice, so that no eigenvalue comes back
    as a ghost; ``iterations`` vectors as long as the parameters are kept. An eigenvalue of the
    Krylov space lies within its residual of one of the Hessian's. Raises ValueError unless
    1 <= count <= iterations.
    """
    if not 1 <= count <= iterations:
        raise ValueError(f"count is {count} of {iterations} iterations: ask for 1 to all of them")
    flat, unravel = ravel_pytree(params)
    steps = min(iterations, flat.size)

    def product(vector: Array) -> Array:
        vector = unravel(vector)
        total = _sum(_product(loss_fn, params, vector, *batch) for batch in batches)
        return ravel_pytree(total)[0].astype(jnp.float32) / n

    diagonal, off = _lanczos(product, key, size=flat.size, steps=steps)
    values, vectors = eigh_tridiagonal(diagonal, off[:-1])
    order = np.argsort(values)[::-1][:count]
    return Spectrum(
        values=[float(values[i]) for i in order],
        residuals=[float(abs(off[-1] * vectors[-1, i])) for i in order],
    )


def _lanczos(
    product: Callable[[Array], Array], key: Array, *, size: int, steps: int
) -> tuple[np.ndarray, np.ndarray]:
    """Diagonal and off-diagonal of the tridiagonal matrix; the last of these is left over."""
    diagonal, off = np.zeros(steps), np.zeros(steps)
    basis = jnp.zeros((steps, size), jnp.float32)
    keys = jax.random.split(key, steps + 1)
    vector = _fresh(basis, keys[0])
    for step in range(steps):
        row, image = jnp.asarray(step), product(vector)
        basis, vector, (alpha, beta) = _advance(basis, vector, image, row)
        diagonal[step], off[step] = float(alpha), float(beta)
        scale = max(np.abs(diagonal[: step + 1]).max(), off[: step + 1].max())
        if off[step] <= 1e-6 * scale:
            # The Krylov space is exhausted: what is left of the space is found from a new start.
            off[step], vector = 0.0, _fresh(basis, keys[step + 1])
    return diagonal, off


@functools.partial(jax.jit, donate_argnums=0)
def _advance(
    basis: Array, vector: Array, image: Array, row: Array
) -> tuple[Array, Array, tuple[Array, Array]]:
    """The basis with one more vector, the next vector, and both numbers of the recurrence."""
    basis = basis.at[row].set(vector)
    rest = _orthogonal(basis, image)
    beta = jnp.linalg.norm(rest)
    return basis, rest / jnp.maximum(beta, _TINY), (jnp.vdot(vector, image), beta)


@jax.jit
def _fresh(basis: Array, key: Array) -> Array:
    """A random direction orthogonal to the basis, nothing where there is none."""
    rest = _orthogonal(basis, jax.random.normal(key, basis.shape[1:], jnp.float32))
    return rest / jnp.maximum(jnp.linalg.norm(rest), _TINY)


def _orthogonal(basis: Array, vector: Array) -> Array:
    """A vector less its part in the span of the rows (those of zeros count for nothing)."""
    for _ in range(2):
        vector = vector - (basis @ vector) @ basis
    return vector


@functools.partial(jax.jit, static_argnums=0)
def _product(loss_fn: LossFn, params: PyTree, vector: PyTree, *batch: Any) -> PyTree:
    return hessian_vector_product(loss_fn, params, vector, *batch)


@functools.partial(jax.jit, static_argnums=0)
def _gradient(loss_fn: LossFn, params: PyTree, *inputs: Any) -> PyTree:
    return jax.grad(loss_fn)(params, *inputs)


@functools.partial(jax.jit, static_argnums=0)
def _value(loss_fn: LossFn, params: PyTree, *batch: Any) -> Array:
    return loss_fn(params, *batch)


@jax.jit
def _signs(params: PyTree, key: Array) -> PyTree:
    # One draw for all leaves: a draw for each takes XLA seconds to compile.
    flat, unravel = ravel_pytree(params)
    return unravel(jax.random.rademacher(key, flat.shape, flat.dtype))


@jax.jit
def _dot(left: PyTree, right: PyTree) -> Array:
    parts = jax.tree.map(
        lambda a, b: jnp.vdot(a, b, preferred_element_type=jnp.float32), left, right
    )
    return sum(jax.tree.leaves(parts))


def _sum(trees: Any) -> PyTree:
    return functools.reduce(lambda a, b: jax.tree.map(jnp.add, a, b), trees)


def _require_draws(draws: int) -> None:
    if draws < 2:
        raise ValueError(f"draws is {draws}: a standard error needs at least 2")


def _estimate(found: list[float]) -> Estimate:
    return Estimate(float(np.mean(found)), float(np.std(found, ddof=1) / np.sqrt(len(found))))


def measure_sharpness(
    problem: Problem,
    *,
    draws: int,
    eigenvalues: int,
    iterations: int,
    seed: int = 0,
    report: Callable[[str], None] = lambda _: None,
) -> Sharpness:
    """Both traces from ``draws`` draws each, and the ``eigenvalues`` largest of the Hessian.

    ``report`` is told what is being worked on.
    """
    labels, signs, start = jax.random.split(jax.random.key(seed), 3)
    params, batches, n = problem.params, problem.batches, problem.n
    over = dict(batches=batches, draws=draws, n=n)
    report(f"1/3  trace of the Fisher matrix over {n} predictions, {draws} draws of labels")
    fisher = fisher_trace(problem.sampled_loss, params, labels, **over)
    if doubt := _doubt(fisher):
        report(doubt)
    report(f"2/3  trace of the Hessian, {draws} draws of signs")
    hessian = hessian_trace(problem.loss_fn, params, signs, **over)
    report(f"3/3  top eigenvalues, {iterations} products with the Hessian")
    spectrum = top_eigenvalues(
        problem.loss_fn,
        params,
        start,
        count=eigenvalues,
        iterations=iterations,
        batches=batches,
        n=n,
    )
    return Sharpness(
        fisher_trace=fisher.value,
        fisher_trace_error=fisher.error,
        hessian_trace=hessian.value,
        hessian_trace_error=hessian.error,
        top_eigenvalues=spectrum.values,
        top_eigenvalue_residuals=spectrum.residuals,
        loss=mean_loss(problem),
        n=n,
    )


def _doubt(fisher: Estimate) -> str | None:
    """Why a trace that looks exact is not to be trusted."""
    if fisher.error > _SAME_LABELS * fisher.value:
        return None
    return (
        f"warning: every draw of labels gave the same trace ({fisher.value:.3g}): the model is "
        "certain of each answer, as one that has diverged often is, and the trace then says "
        "nothing of the curvature; look at the loss"
    )


def mean_loss(problem: Problem) -> float:
    """The loss at the problem's parameters, nats a prediction."""
    values = (_value(problem.loss_fn, problem.params, *batch) for batch in problem.batches)
    return sum(map(float, values)) / problem.n


def evaluate_fisher_trace(
    run: str | Path, *, examples: int, draws: int, seed: int = 0
) -> tuple[Estimate, float]:
    """Trace of the Fisher matrix of a run, and the loss there: a fraction of the time of all.

    Examples, draws and errors are those of :func:`evaluate_sharpness`.
    """
    problem = _problem(run, examples=examples, report=lambda _: None)
    labels, _, _ = jax.random.split(jax.random.key(seed), 3)
    over = dict(batches=problem.batches, n=problem.n)
    found = fisher_trace(problem.sampled_loss, problem.params, labels, draws=draws, **over)
    return found, mean_loss(problem)


def evaluate_sharpness(
    run: str | Path,
    *,
    examples: int | None = None,
    draws: int = 8,
    eigenvalues: int = 1,
    iterations: int = 20,
    seed: int = 0,
    report: Callable[[str], None] = print,
) -> Sharpness:
    """Sharpness of the training loss of a run (``DIR`` or ``DIR@stage``), text or images.

    ``examples`` training rows (64) or images (512), spread over all of them, in float32; text is
    read without memory, images with the trained batch statistics and not augmented.
    Raises ConfigError for settings that cannot be, CheckpointError and DataError for the run.
    """
    if examples is not None and examples < 1:
        raise ConfigError(f"examples is {examples}: it must be at least 1")
    if draws < 2:
        raise ConfigError(f"draws is {draws}: a standard error needs at least 2")
    if not 1 <= eigenvalues <= iterations:
        raise ConfigError(
            f"eigenvalues is {eigenvalues}: it must be 1 to {iterations}, the iterations"
        )
    problem = _problem(run, examples=examples, report=report)
    return measure_sharpness(
        problem,
        draws=draws,
        eigenvalues=eigenvalues,
        iterations=iterations,
        seed=seed,
        report=report,
    )


def _problem(run: str | Path, *, examples: int | None, report: Callable[[str], None]) -> Problem:
    """The loss of a run, text or images."""
    written = Path(split_location(run)[0]) / CONFIG_FILE
    workload = load_config(written).workload if written.is_file() else None
    if workload == "flat-toys":
        raise CheckpointError(f"{run}: is a run of flat-toys, which trains no model; give another")
    if workload == "vision":
        from jaxlab.workloads.vision import vision_problem

        return vision_problem(run, examples=examples or _IMAGES, warn=report)
    return language_problem(run, examples=examples or _TEXT_ROWS, report=report)
