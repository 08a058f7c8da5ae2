"""Does the curvature mask of IRE do more than a larger learning rate? Digits at the stability edge.

    python benchmarks/ire_stability_edge.py --rows all \
        --json benchmarks/results/ire_stability_edge.json \
        --plot benchmarks/results/ire_stability_edge.png

Handwritten digits 8x8 of scikit-learn (1280 train, 517 test), a ReLU network 64-256-256-10, SGD
without momentum, batch 64, weight decay 5e-4 added to the gradient, label smoothing 0.1, 100 epochs
at a constant rate; IRE from epoch 30 on, K = 10, its curvature from the current training batch.
Controls, from the same epoch: a random mask of equal density, and the plain rate times 1 + kappa.
Rows ``edge`` have a base rate (``--rate``) at which twice the rate is stable and three times it
diverges; rows ``small`` the rate 0.1, where any larger step lowers the trace, so that a falling
trace alone proves nothing; rows ``sweep`` are the base alone over a grid of rates. ``diverged``
counts seeds that end non-finite or at chance; the means are over the others.
"""

import argparse
import dataclasses
import functools
import sys
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
from sklearn.datasets import load_digits

from jaxlab.optim import ire
from jaxlab.optim.curvature import per_example_root_fisher, random_ranks, sampled_label_gradient
from jaxlab.optim.sam import sam
from jaxlab.tools.output import machine, script_command, write_json

WIDTHS, CLASSES = (64, 256, 256, 10), 10
TRAIN, BATCH, EPOCHS, IRE_EPOCH, INTERVAL = 1280, 64, 100, 30, 10
STEPS = TRAIN // BATCH
DECAY, SMOOTHING, RHO = 5e-4, 0.1, 0.05
CHANCE = 0.2  # accuracy below which a network is said to guess one of ten digits
METRICS = ("fisher_trace", "train_loss", "test_loss", "accuracy")


@dataclasses.dataclass(frozen=True)
class Row:
    """One cell of a table: which base, which mask, how strong."""

    table: str
    rate: float
    mask: str = "all"
    kappa: float = 0.0
    gamma: float = 0.8
    rho: float = 0.0

    @property
    def name(self) -> str:
        """What the printed table calls it."""
        base = "SAM" if self.rho else "SGD"
        if self.mask == "all":
            return f"{base} lr {self.rate:g}" + (f" x {1 + self.kappa:g}" if self.kappa else "")
        return f"{base} {self.mask} mask {self.gamma:g}, kappa {self.kappa:g}"


def edge_rows(rate: float) -> list[Row]:
    """The discriminating regime: a base rate near the edge of stability."""
    make = functools.partial(Row, "edge", rate)
    rows = [make(kappa=kappa) for kappa in (0, 1, 2)]
    rows += [make("random", kappa) for kappa in (1, 2)]
    rows += [make(mask, kappa) for mask in ("single-draw", "per-example") for kappa in (1, 2, 4)]
    masks = ("random", "single-draw", "per-example")
    return rows + [make(mask, kappa, 0.6) for kappa in (4, 8) for mask in masks]


def sweep_rows() -> list[Row]:
    """The base alone: where its edge lies."""
    return [Row("sweep", rate) for rate in (0.2, 0.35, 0.5, 0.7, 1.0, 1.2, 1.4, 2.0, 3.0)]


def small_rows() -> list[Row]:
    """The under-tuned regime: base rate 0.1."""
    kappas = (2, 5, 10)
    rows = [Row("small", 0.1, rho=RHO), Row("small", 0.1)]
    make = functools.partial(Row, "small", 0.1)
    for rho in (RHO, 0.0):
        rows += [make("single-draw", k, g, rho) for g in (0.8, 0.95) for k in kappas]
    rows += [make("random", k, 0.95) for k in kappas]
    return rows + [make(kappa=k) for k in kappas]


@functools.cache
def digits() -> dict[str, np.ndarray]:
    """Pixels in [0, 1] and labels, split at random, always alike."""
    images, labels = load_digits(return_X_y=True)
    order = np.random.default_rng(0).permutation(len(labels))
    images, labels = images[order].astype(np.float32) / 16, labels[order].astype(np.int32)
    parts = {"train": slice(TRAIN), "test": slice(TRAIN, None)}
    return {
        f"{kind}_{name}": values[part]
        for name, part in parts.items()
        for kind, values in (("x", images), ("y", labels))
    }


def initial(key: jax.Array) -> list[dict[str, jax.Array]]:
    """Weights of variance 1 / inputs, biases of zero."""
    keys = jax.random.split(key, len(WIDTHS) - 1)
    return [
        {"w": jax.random.normal(k, (m, n)) * np.sqrt(1 / m), "b": jnp.zeros(n)}
        for k, m, n in zip(keys, WIDTHS[:-1], WIDTHS[1:], strict=True)
    ]


def logits(params, x):
    """The network's output."""
    for layer in params[:-1]:
        x = jax.nn.relu(x @ layer["w"] + layer["b"])
    return x @ params[-1]["w"] + params[-1]["b"]


def loss(params, x, y, *, smoothing: float = SMOOTHING):
    """Mean cross-entropy in nats at smoothed labels."""
    targets = optax.smooth_labels(jax.nn.one_hot(y, CLASSES), smoothing)
    return jnp.mean(optax.softmax_cross_entropy(logits(params, x), targets))


def exact_fisher_trace(params, x):
    """Mean over examples of E|grad -log p(y)|² over the model's own labels, without sampling.

    The gradient of a layer's matrix is an outer product, so its square is |input|² |delta|², and
    the bias adds |delta|²; the ten possible deltas p - e_y are carried back through the layers.
    """
    inputs = [x]
    for layer in params[:-1]:
        inputs.append(jax.nn.relu(inputs[-1] @ layer["w"] + layer["b"]))
    p = jax.nn.softmax(inputs[-1] @ params[-1]["w"] + params[-1]["b"])
    deltas = p[:, None] - jnp.eye(CLASSES)
    total = 0.0
    for layer, before in zip(reversed(params), reversed(inputs), strict=True):
        square = jnp.sum(p * jnp.sum(deltas**2, axis=-1), axis=-1)
        total += jnp.mean(square * (1 + jnp.sum(before**2, axis=-1)))
        deltas = (deltas @ layer["w"].T) * (before > 0)[:, None]
    return total


def curvature(mask: str, x):
    """``f(params, key)`` that ranks coordinates on a batch; ``random`` is the control."""
    if mask == "single-draw":
        return lambda params, key: sampled_label_gradient(logits, params, key, x)
    if mask == "per-example":
        return lambda params, key: per_example_root_fisher(logits, params, key, x)

    return random_ranks


def optimizer(mask: str, ascends: bool, *, rate, kappa, gamma):
    """SGD with decay in the gradient, SAM around it if it ascends, IRE around that.

    The mask ``all`` is the control without IRE: the rate times 1 + kappa from the same step on.
    """
    first = IRE_EPOCH * STEPS
    boost = kappa if mask == "all" else 0.0
    schedule = lambda step: rate * jnp.where(step < first, 1, 1 + boost)  # noqa: E731
    base = optax.chain(optax.add_decayed_weights(DECAY), optax.sgd(schedule))
    base = sam(base, RHO) if ascends else base
    if mask == "all":
        return optax.with_extra_args_support(base)
    return ire(base, kappa, gamma, update_interval=INTERVAL, start_step=first)


@functools.partial(jax.jit, static_argnames=("mask", "ascends"))
def train(mask: str, ascends: bool, data, rate, kappa, gamma, seed) -> dict[str, jax.Array]:
    """A whole training and its metrics; rates and strengths are traced: one program for each mask.

    Not batched over seeds: there the refresh would be taken at every step, as ``lax.cond`` becomes
    a choice between two results.
    """
    chain = optimizer(mask, ascends, rate=rate, kappa=kappa, gamma=gamma)
    start, order, ranks = jax.random.split(jax.random.key(seed), 3)
    params = initial(start)

    def step(carry, rows):
        params, state = carry
        x, y = data["x_train"][rows], data["y_train"][rows]
        rank = curvature(mask, x)
        updates, state = chain.update(
            jax.grad(loss)(params, x, y),
            state,
            params,
            grad_fn=lambda p: jax.grad(loss)(p, x, y),
            curvature_fn=lambda p, key: rank(p, jax.random.fold_in(ranks, jax.random.bits(key))),
        )
        return (optax.apply_updates(params, updates), state), None

    def epoch(carry, key):
        rows = jax.random.permutation(key, TRAIN).reshape(STEPS, BATCH)
        return jax.lax.scan(step, carry, rows)

    carry = (params, chain.init(params))
    (params, _), _ = jax.lax.scan(epoch, carry, jax.random.split(order, EPOCHS))
    x, y = data["x_test"], data["y_test"]
    return {
        "fisher_trace": exact_fisher_trace(params, data["x_train"]),
        "train_loss": loss(params, data["x_train"], data["y_train"]),
        "test_loss": loss(params, x, y, smoothing=0.0),
        "accuracy": jnp.mean(jnp.argmax(logits(params, x), axis=-1) == y),
    }


def measure(row: Row, seeds: int) -> dict:
    """Metrics of every seed, their mean and standard deviation, and how many diverged."""
    begin = time.perf_counter()
    data, ascends, settings = digits(), row.rho > 0, (row.rate, float(row.kappa), row.gamma)
    runs = [
        jax.device_get(train(row.mask, ascends, data, *settings, seed)) for seed in range(seeds)
    ]
    out = {"name": row.name, **dataclasses.asdict(row)}
    values = {key: [float(run[key]) for run in runs] for key in METRICS}
    finite = np.all([np.isfinite(values[key]) for key in METRICS], axis=0)
    good = finite & (np.array(values["accuracy"]) > CHANCE)
    out["diverged"] = int(seeds - good.sum())
    for key in METRICS:
        kept = np.array(values[key])[good]
        out[key] = {
            "mean": float(kept.mean()) if len(kept) else None,
            "std": float(kept.std(ddof=1)) if len(kept) > 1 else None,
            "seeds": [v if np.isfinite(v) else None for v in values[key]],
        }
    return out | {"seconds": time.perf_counter() - begin}


def accept(cells: list[dict]) -> dict[str, bool]:
    """The acceptance: controls diverge where the curvature masks are stable and flatter."""
    edge = [cell for cell in cells if cell["table"] == "edge"]
    found = {(cell["mask"], cell["kappa"]): cell for cell in edge if cell["gamma"] == 0.8}
    if not found:
        return {}
    base = found["all", 0]
    checks = {"the base is stable": base["diverged"] == 0}
    for control in ("all", "random"):
        cell = found[control, 2]
        checks[f"{cell['name'].removeprefix('SGD ')} diverges"] = cell["diverged"] > 0
    for mask in ("single-draw", "per-example"):
        cell = found[mask, 2]
        stable = cell["diverged"] == 0
        below = stable and cell["fisher_trace"]["mean"] < base["fisher_trace"]["mean"]
        checks[f"{mask} mask 0.8, kappa 2 is stable"] = stable
        checks[f"{mask} mask 0.8, kappa 2 lowers the trace"] = bool(below)
    return checks


def show(cell: dict) -> None:
    """One line of the table."""
    line = f"{cell['name']:36}"
    for key, form in zip(METRICS, (".1f", ".4f", ".4f", ".4f"), strict=True):
        mean, std = cell[key]["mean"], cell[key]["std"]
        text = "-" if mean is None else f"{mean:{form}}"
        line += f"{text + ('' if std is None else f' ± {std:{form}}'):>18}"
    print(f"{line}{cell['diverged']:>9}{cell['seconds']:>7.0f} s", flush=True)


def plot(cells: list[dict], path: Path) -> None:
    """Trace against training loss at the edge; trace against kappa at the small rate."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 4.2), layout="constrained")
    left, right = figure.subplots(1, 2)
    colours = {"all": "#3b4252", "random": "#c26a3d", "single-draw": "#4c78a8"}
    colours["per-example"] = "#2a7f62"
    labels = {"all": "no mask: the rate", "random": "random mask"}
    for mask, colour in colours.items():
        for cell in cells:
            if (cell["table"], cell["mask"], cell["diverged"]) != ("edge", mask, 0):
                continue
            point = cell["train_loss"]["mean"], cell["fisher_trace"]["mean"]
            left.errorbar(
                *point,
                yerr=cell["fisher_trace"]["std"],
                fmt="o" if cell["gamma"] == 0.8 or mask == "all" else "s",
                markersize=4 + 1.2 * cell["kappa"],
                color=colour,
                alpha=0.7,
                label=labels.get(mask, f"mask of curvature, {mask}"),
            )
    handles, names = left.get_legend_handles_labels()
    once = dict(zip(names, handles, strict=True))
    left.legend(once.values(), once.keys(), frameon=False, fontsize=7, loc="upper right")
    left.set(xlabel="training loss (nats)", ylabel="trace of the Fisher matrix")
    left.set_title(
        "near the edge, no seed diverging\n(size: kappa; circle gamma 0.8, square 0.6)", fontsize=9
    )
    small = [c for c in cells if c["table"] == "small"]
    lines: dict[str, list] = {}
    for cell in small:
        base = "SAM" if cell["rho"] else "SGD"
        name = f"{base} {cell['mask']} {cell['gamma']:g}"
        if cell["mask"] == "all":
            name = f"{base} larger rate"
        lines.setdefault(name, []).append((cell["kappa"], cell["fisher_trace"]["mean"]))
    for name, points in lines.items():
        start = [p for key, (p, *_) in lines.items() if key == f"{name[:3]} larger rate"]
        if len(points) == 1:
            continue  # no row but the base itself
        x, y = zip(*sorted({*points, *start}), strict=True)
        right.plot(x, y, "o-", markersize=3, label=name)
    if lines:
        right.legend(frameon=False, fontsize=7)
    right.set(xlabel="kappa", ylabel="trace of the Fisher matrix")
    right.set_title("rate 0.1: anything larger lowers the trace", fontsize=9)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)


def main() -> int:
    """Measure, print, write; 1 when the acceptance fails."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", choices=("edge", "small", "sweep", "all"), default="all")
    parser.add_argument("--rate", type=float, default=0.5, help="base rate of the rows edge")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--plot", type=Path)
    args = parser.parse_args()
    tables = {"edge": edge_rows(args.rate), "small": small_rows(), "sweep": sweep_rows()}
    rows = [row for name, part in tables.items() if args.rows in (name, "all") for row in part]
    print(f"{'':36}" + "".join(f"{key:>18}" for key in METRICS) + f"{'diverged':>9}")
    cells = []
    for row in rows:
        cells.append(measure(row, args.seeds))
        show(cells[-1])
    checks = accept(cells)
    for check, holds in checks.items():
        print(f"{'pass' if holds else 'FAIL'}  {check}")
    if args.json:
        report = {
            "machine": machine(("jax", "jaxlib", "optax", "scikit-learn")),
            "command": script_command(),
            "seeds": args.seeds,
            "acceptance": checks,
            "rows": cells,
        }
        write_json(args.json, report)
    if args.plot:
        plot(cells, args.plot)
    return int(not all(checks.values()))


if __name__ == "__main__":
    sys.exit(main())
