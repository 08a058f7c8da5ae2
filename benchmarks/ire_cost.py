"""What IRE costs beside AdamW, step by step in one process, and what a share of the batch loses.

    python benchmarks/ire_cost.py --json benchmarks/results/ire_cost.json [--run RUN]

Times are of the very training step, refresh and no refresh told apart and put together for one
refresh in ten steps. With ``--run`` (a trained language model) it also measures, at that run's
weights, how far masks of smaller shares of the batch agree with the full one's (spec of the
estimator: each mask is a random draw, so two masks of the full batch do not agree either).
"""

import argparse
import itertools
import statistics
import sys
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, PyTree

from jaxlab.config import IREConfig, ModelConfig, OptimizerConfig, ScheduleConfig, StageConfig
from jaxlab.models.decoder import abstract_decoder, initial_parameters, parameter_count
from jaxlab.models.presets import PRESETS
from jaxlab.optim import make_optimizer, refresh_flat_mask, scale_flat_directions
from jaxlab.optim.flat_mask import flat_states
from jaxlab.tools.output import machine, script_command, write_json
from jaxlab.training.curvature import batch_curvature
from jaxlab.training.state import start_state
from jaxlab.training.step import SequenceFormat, train_step

INTERVAL = 10  # the paper's
KAPPA, GAMMA = 4.0, 0.6
FORM = SequenceFormat(bos_id=1)


class Contestant:
    """A compiled training step with its state; every second step of one with IRE refreshes."""

    def __init__(self, model: ModelConfig, batch: dict, share: float | None):
        ire = None
        if share is not None:
            ire = IREConfig(kappa=KAPPA, gamma=GAMMA, update_interval=2, batch_share=share)
        stage = StageConfig(
            steps=1_000_000,
            batch_size=len(batch["tokens"]),
            learning_rate=1e-4,
            schedule=ScheduleConfig(name="constant"),
        )
        optimizer = make_optimizer(OptimizerConfig(ire=ire), stage)
        parts = {"graphdef": abstract_decoder(model)[0], "form": FORM}
        curvature = ire and batch_curvature(ire, **parts)
        self.state = start_state(initial_parameters(model, 0), optimizer, seed=0)
        self.share, self.batch, self.plain, self.refresh = share, batch, [], []

        def step(state, batch):
            return train_step(state, batch, optimizer=optimizer, curvature=curvature, **parts)

        lowered = jax.jit(step, donate_argnums=0).lower(self.state, batch)
        self.step = lowered.compile()
        self.temporary_bytes = self.step.memory_analysis().temp_size_in_bytes
        self.turn(record=False)

    def turn(self, *, record: bool = True) -> None:
        """Two steps; the first of them refreshes."""
        for times in (self.refresh, self.plain):
            begin = time.perf_counter()
            self.state, numbers = self.step(self.state, self.batch)
            jax.block_until_ready((self.state, numbers))
            if record:
                times.append(time.perf_counter() - begin)

    @property
    def amortised(self) -> float:
        """Seconds a step with one refresh in ten, from medians."""
        if self.share is None:
            return statistics.median(self.plain + self.refresh)
        rest = statistics.median(self.plain) * (INTERVAL - 1)
        return (statistics.median(self.refresh) + rest) / INTERVAL

    def state_bytes(self) -> int:
        """Bytes of what IRE adds to the optimizer's state."""
        return sum(leaf.nbytes for leaf in jax.tree.leaves(flat_states(self.state.opt_state)))


def measure_cost(args: argparse.Namespace) -> dict:
    """Time AdamW and AdamW with IRE in turns."""
    dtype = "float32" if jax.default_backend() == "cpu" else "bfloat16"
    model = ModelConfig(**{**PRESETS[args.preset], "compute_dtype": dtype})
    draw = np.random.default_rng(0).zipf(1.2, (args.batch, args.length))
    batch = jax.device_put(
        {
            "tokens": ((draw - 1) % model.vocab_size).astype(np.int32),
            "loss_mask": np.ones((args.batch, args.length), np.float32),
        }
    )
    everyone = []
    for share in (None, *args.shares):
        print(f"compiling {'AdamW' if share is None else f'IRE, share {share}'}", file=sys.stderr)
        everyone.append(Contestant(model, batch, share))
    for number in range(args.turns):
        for each in everyone[:: 1 if number % 2 == 0 else -1]:
            each.turn()
    base, size = everyone[0], parameter_count(model)
    rows = []
    for each in everyone[1:]:
        rows.append(
            {
                "batch_share": each.share,
                "step_seconds": statistics.median(each.plain),
                "refresh_step_seconds": statistics.median(each.refresh),
                "amortised_ratio": each.amortised / base.amortised,
                "ratio_without_refresh": statistics.median(each.plain) / base.amortised,
                "all_seconds": {"plain": each.plain, "refresh": each.refresh},
                "state_bytes_per_parameter": each.state_bytes() / size,
                "temporary_bytes": each.temporary_bytes,
                "temporary_bytes_over_base": each.temporary_bytes / base.temporary_bytes,
            }
        )
    return {
        "preset": args.preset,
        "batch": args.batch,
        "length": args.length,
        "update_interval": INTERVAL,
        "base_seconds": base.amortised,
        "base_all_seconds": base.plain + base.refresh,
        "base_temporary_bytes": base.temporary_bytes,
        "rows": rows,
    }


def masks(curvature, params: PyTree, batches: list[dict], keys: Array) -> list[np.ndarray]:
    """A mask for each key, each of a batch of its own, as one flat array."""
    inner = scale_flat_directions(KAPPA, GAMMA, update_interval=None)
    state = inner.init(params)

    @jax.jit
    def mask(key, batch):
        found = refresh_flat_mask(state, curvature(params, key, batch), GAMMA)
        return jax.tree.leaves(found.flat_mask)

    return [
        np.concatenate([np.asarray(leaf).ravel() for leaf in mask(key, batch)])
        for key, batch in zip(keys, batches, strict=True)
    ]


def measure_agreement(args: argparse.Namespace) -> dict:
    """How masks of shares of the batch agree with each other and with a mean of many draws."""
    from jaxlab.training.corpus import prepare_corpus
    from jaxlab.training.load import load_model

    model = load_model(args.run)
    rows = prepare_corpus(model.config, Path(args.run), report=lambda _: None).rows
    size = next(iter(model.config.stages.named().values())).batch_size
    order = np.random.default_rng(0).permutation(len(rows.tokens))
    batches = [
        {"tokens": rows.tokens[part], "loss_mask": rows.mask[part].astype(np.float32)}
        for part in order[: size * args.references].reshape(args.references, size)
    ]
    form = SequenceFormat(bos_id=model.tokenizer.bos_id)
    parts = {"graphdef": model.graphdef, "form": form}
    keys = jax.random.split(jax.random.key(1), args.references)
    params = jax.device_put(model.params)
    truth = _true_mask(batch_curvature(IREConfig(kappa=1.0), **parts), params, batches, keys)
    out = []
    for count, share in distinct_rows(args.agreement_shares, size).items():
        config = IREConfig(kappa=KAPPA, gamma=GAMMA, batch_share=share)
        found = masks(
            batch_curvature(config, **parts), params, batches[:8], jax.random.split(keys[0], 8)
        )
        pairs = list(itertools.combinations(found, 2))
        out.append(
            {
                "batch_share": share,
                "rows": count,
                "two_refreshes_agree": float(np.mean([np.mean(a == b) for a, b in pairs])),
                "agrees_with_many_draws": float(np.mean([np.mean(m == truth) for m in found])),
                "sharp_called_flat": float(np.mean([np.mean(m[~truth]) for m in found])),
            }
        )
    tokens = size * rows.tokens.shape[1]
    return {"gamma": GAMMA, "tokens_a_step": tokens, "many_draws": args.references, "rows": out}


def distinct_rows(shares: list[float], size: int) -> dict[int, float]:
    """Rows that shares of a batch come to, none twice: small shares of a small batch are one row.

    Each with the largest share that gives it.
    """
    largest = {max(1, round(share * size)): share for share in sorted(shares)}
    return dict(sorted(largest.items(), reverse=True))


def _true_mask(curvature, params: PyTree, batches: list[dict], keys: Array) -> np.ndarray:
    """The mask of the mean of squares over many draws, each on a batch of its own."""

    @jax.jit
    def add(total, key, batch):
        found = curvature(params, key, batch)
        return jax.tree.map(lambda t, g: t + g * g, total, found)

    total = jax.tree.map(jnp.zeros_like, params)
    for key, batch in zip(keys, batches, strict=True):
        total = add(total, key, batch)
    state = scale_flat_directions(KAPPA, GAMMA, update_interval=None).init(params)
    mask = refresh_flat_mask(state, total, GAMMA).flat_mask
    return np.concatenate([np.asarray(leaf).ravel() for leaf in jax.tree.leaves(mask)])


def _print(report: dict) -> None:
    cost = report["cost"]
    print(
        f"{cost['preset']}, {cost['batch']} x {cost['length']}: AdamW {cost['base_seconds']:.3f} s"
    )
    for row in cost["rows"]:
        print(
            f"IRE, share {row['batch_share']:<6} step {row['step_seconds']:.3f} s, with refresh "
            f"{row['refresh_step_seconds']:.3f} s; amortised ratio {row['amortised_ratio']:.3f}; "
            f"{row['state_bytes_per_parameter']:.3f} bytes a parameter; temporary memory "
            f"{row['temporary_bytes_over_base']:.2f} of the base's"
        )
    for row in report.get("agreement", {}).get("rows", []):
        print(
            f"share {row['batch_share']:<7} two refreshes agree on "
            f"{row['two_refreshes_agree']:.3f}, with {report['agreement']['many_draws']} draws on "
            f"{row['agrees_with_many_draws']:.3f}; sharp called flat {row['sharp_called_flat']:.3f}"
        )


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--preset", default="llama-60m", choices=sorted(PRESETS))
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--shares", type=float, nargs="+", default=[1.0, 0.25])
    parser.add_argument("--turns", type=int, default=5)
    parser.add_argument("--run", help="a trained run, for the agreement of masks")
    parser.add_argument(
        "--agreement-shares", type=float, nargs="+", default=[1.0, 0.5, 0.25, 0.125]
    )
    parser.add_argument("--references", type=int, default=64, help="draws that stand for the truth")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    report = {"machine": machine(), "command": script_command()}
    report["cost"] = measure_cost(args)
    if args.run:
        report["agreement"] = measure_agreement(args)
    _print(report)
    if args.json:
        write_json(args.json, report)


if __name__ == "__main__":
    main()
