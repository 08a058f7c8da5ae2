"""Training speed of jaxlab's step beside Hugging Face transformers on PyTorch.

    python benchmarks/train_step_cpu.py --json benchmarks/results/train_step_cpu.json
    python benchmarks/train_step_cpu.py --device cuda --preset llama-119m --batch 64 --length 1024 \
        --peak-tflops 989 --json benchmarks/results/train_step_h200.json

Every contestant is a process of its own that starts from the same weights (carried over by
``jaxlab.models.interop``), takes the same warm-up steps and then trains only when it is its turn.
The turns alternate, their order reversed every round, so that a busy machine hurts all alike. Each
step has a batch of its own, drawn from a skewed distribution of tokens, and every step's losses
have to agree. CPU: float32. CUDA: bfloat16 compute over float32 weights (autocast in PyTorch).
"""

import argparse
import contextlib
import dataclasses
import multiprocessing
import os
import statistics
import sys
import tempfile
import time
import traceback
from importlib import util
from pathlib import Path

import numpy as np

from jaxlab.tools.output import machine, script_command, write_json

LEARNING_RATE, B1, B2, EPS, WEIGHT_DECAY, CLIP = 3e-4, 0.9, 0.95, 1e-8, 0.1, 1.0
# float32 sums in another order; bfloat16 keeps 8 bits of every activation.
TOLERANCE = {"cpu": 1e-3, "cuda": 3e-2}
OURS, EAGER, COMPILED = "jaxlab", "transformers eager", "transformers compiled"
PACKAGES = ("jax", "jaxlib", "flax", "optax", "torch", "transformers")


@dataclasses.dataclass(frozen=True)
class Settings:
    """What all contestants share."""

    preset: str
    batch: int
    length: int
    device: str
    weights: str

    def tokens(self, step: int, vocab: int) -> np.ndarray:
        """The text of one step (batch, length): a few tokens are frequent, as in real text."""
        draws = np.random.default_rng(step).zipf(1.2, (self.batch, self.length))
        return ((draws - 1) % vocab).astype(np.int32)


def jaxlab_trainer(settings: Settings):
    """Return a function that trains one step and gives the loss as a device value."""
    import jax

    from jaxlab.config import OptimizerConfig, ScheduleConfig, StageConfig
    from jaxlab.models.decoder import abstract_decoder
    from jaxlab.models.interop import load_llama
    from jaxlab.optim import make_optimizer
    from jaxlab.training.state import start_state
    from jaxlab.training.step import SequenceFormat, compile_train_step

    config, params = load_llama(settings.weights)
    dtype = "float32" if settings.device == "cpu" else "bfloat16"
    config = dataclasses.replace(config, compute_dtype=dtype)
    optimizer = make_optimizer(
        OptimizerConfig(b1=B1, b2=B2, eps=EPS, weight_decay=WEIGHT_DECAY, clip_norm=CLIP),
        StageConfig(
            steps=1_000_000,
            batch_size=settings.batch,
            learning_rate=LEARNING_RATE,
            schedule=ScheduleConfig(name="constant"),
        ),
    )
    step = compile_train_step(
        graphdef=abstract_decoder(config)[0],
        form=SequenceFormat(bos_id=1),
        optimizer=optimizer,
    )
    state = start_state(jax.device_put(params), optimizer, seed=0)
    mask = jax.device_put(np.ones((settings.batch, settings.length), np.float32))

    def train(number: int):
        nonlocal state
        tokens = settings.tokens(number, config.vocab_size)
        state, metrics = step(state, {"tokens": tokens, "loss_mask": mask})
        return metrics["loss"]

    return train


def transformers_trainer(settings: Settings, *, compiled: bool):
    """The same for PyTorch: fused AdamW, SDPA, and on CUDA autocast to bfloat16."""
    import torch
    from torch.nn import functional
    from transformers import LlamaForCausalLM

    torch.set_float32_matmul_precision("high" if settings.device == "cuda" else "highest")
    model = LlamaForCausalLM.from_pretrained(
        settings.weights, attn_implementation="sdpa", dtype=torch.float32
    )
    model.config.use_cache = False
    model.train().to(settings.device)
    matrices = [p for p in model.parameters() if p.ndim >= 2]
    vectors = [p for p in model.parameters() if p.ndim < 2]
    optimizer = torch.optim.AdamW(
        [
            {"params": matrices, "weight_decay": WEIGHT_DECAY},
            {"params": vectors, "weight_decay": 0.0},
        ],
        lr=LEARNING_RATE,
        betas=(B1, B2),
        eps=EPS,
        fused=True,
    )

    def loss_of(inputs, targets):
        logits = model(input_ids=inputs, use_cache=False).logits
        return functional.cross_entropy(logits.float().flatten(0, 1), targets.flatten())

    if compiled:
        loss_of = torch.compile(loss_of)
    autocast = contextlib.nullcontext()
    if settings.device == "cuda":
        autocast = torch.autocast("cuda", dtype=torch.bfloat16)

    def train(number: int):
        tokens = settings.tokens(number, model.config.vocab_size).astype(np.int64)
        inputs = np.concatenate([np.ones_like(tokens[:, :1]), tokens[:, :-1]], axis=1)
        inputs, targets = (torch.from_numpy(x).to(settings.device) for x in (inputs, tokens))
        with autocast:
            loss = loss_of(inputs, targets)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return loss.detach()

    return train


def _write_weights(settings: Settings) -> None:
    import jax

    from jaxlab.config import ModelConfig
    from jaxlab.models.decoder import initial_parameters
    from jaxlab.models.interop import save_llama
    from jaxlab.models.presets import PRESETS

    config = ModelConfig(**PRESETS[settings.preset])
    save_llama(config, jax.device_get(initial_parameters(config, 0)), settings.weights)


def _matmul_flops(name: str, device: str) -> float:
    """FLOP/s of a large float32 (CPU) or bfloat16 product in this framework: a practical peak."""
    size = 2048 if device == "cpu" else 8192
    if name == OURS:
        import jax
        import jax.numpy as jnp

        one = jnp.ones((size, size), jnp.float32 if device == "cpu" else jnp.bfloat16)
        product = jax.jit(jnp.matmul)

        def run():
            product(one, one).block_until_ready()
    else:
        import torch

        dtype = torch.float32 if device == "cpu" else torch.bfloat16
        one = torch.ones((size, size), dtype=dtype, device=device)

        def run():
            torch.matmul(one, one)[0, 0].item()

    seconds = []
    for _ in range(6):
        begin = time.perf_counter()
        run()
        seconds.append(time.perf_counter() - begin)
    return 2 * size**3 / min(seconds)


def _contestant(pipe, name: str, settings: Settings, warmup: int) -> None:
    """A process: warm up, then take the steps that the parent asks for, one order at a time."""
    if settings.device == "cpu":
        os.environ["JAX_PLATFORMS"] = "cpu"
    os.environ["XLA_PYTHON_CLIENT_PREALLOCATE"] = "false"  # the other contestant needs room too
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    try:
        if name == OURS:
            train = jaxlab_trainer(settings)
        else:
            train = transformers_trainer(settings, compiled=name == COMPILED)
        done, losses = 0, []
        begin = time.perf_counter()
        while done < warmup:
            losses.append(float(train(done)))
            done += 1
        pipe.send({"losses": losses, "seconds": time.perf_counter() - begin})
        while order := pipe.recv():
            if order == "peak":
                pipe.send(_matmul_flops(name, settings.device))
                continue
            begin = time.perf_counter()
            values = [train(done + i) for i in range(order)]
            losses = [float(value) for value in values]  # waits for the device
            pipe.send({"losses": losses, "seconds": time.perf_counter() - begin})
            done += order
    except EOFError:  # the parent is gone
        pass
    except Exception:
        pipe.send({"error": traceback.format_exc()})


class Contestant:
    """The parent's end of one process, with all it has reported."""

    def __init__(self, name: str, settings: Settings, warmup: int):
        context = multiprocessing.get_context("spawn")
        self.name, (self._pipe, end) = name, context.Pipe()
        self.process = context.Process(
            target=_contestant, args=(end, name, settings, warmup), daemon=True
        )
        self.process.start()
        end.close()
        first = self._receive()
        self.warmup_seconds, self.losses = first["seconds"], first["losses"]
        self.seconds, self.peaks = [], []

    def _receive(self):
        try:
            answer = self._pipe.recv()
        except EOFError:
            raise RuntimeError(f"{self.name}: the process ended") from None
        if isinstance(answer, dict) and "error" in answer:
            raise RuntimeError(f"{self.name}:\n{answer['error']}")
        return answer

    def turn(self, steps: int) -> None:
        """Train so many steps and note how long they took."""
        self._pipe.send(steps)
        answer = self._receive()
        self.seconds.append(answer["seconds"])
        self.losses += answer["losses"]

    def measure_peak(self) -> None:
        """Time a large matrix product."""
        self._pipe.send("peak")
        self.peaks.append(self._receive())

    def close(self) -> None:
        """End the process."""
        self._pipe.close()
        self.process.join(timeout=30)
        self.process.kill()


def _machine(device: str) -> dict:
    found = machine(PACKAGES)
    if device == "cuda":
        import torch

        found["gpu"] = torch.cuda.get_device_name()
    return found


def _report(contestants: list[Contestant], settings: Settings, args: argparse.Namespace) -> dict:
    from jaxlab.config import ModelConfig
    from jaxlab.models.presets import PRESETS
    from jaxlab.training.metrics import train_flops_per_token

    model = ModelConfig(**PRESETS[settings.preset])
    flops = train_flops_per_token(
        model, vocab_size=model.vocab_size, sequence_length=settings.length
    )
    tokens = settings.batch * settings.length * args.steps
    stated = args.peak_tflops and args.peak_tflops * 1e12
    results, ours = {}, contestants[0]
    for each in contestants:
        speed = tokens / statistics.median(each.seconds)
        ratios = [theirs / mine for theirs, mine in zip(each.seconds, ours.seconds, strict=True)]
        results[each.name] = {
            "tokens_per_second": speed,
            "flops_per_second": speed * flops,
            "matmul_flops_per_second": max(each.peaks),
            "mfu": speed * flops / stated if stated else None,
            "seconds_per_turn": each.seconds,
            "warmup_seconds": each.warmup_seconds,
            "losses": each.losses,
            "jaxlab_speed_over_this": {
                "median": statistics.median(ratios),
                "min": min(ratios),
                "max": max(ratios),
            },
            "largest_loss_difference": max(
                abs(a - b) for a, b in zip(each.losses, ours.losses, strict=True)
            ),
        }
    return {
        "machine": _machine(settings.device),
        "command": script_command(),
        "preset": settings.preset,
        "batch": settings.batch,
        "length": settings.length,
        "steps_per_turn": args.steps,
        "flops_per_token": flops,
        "stated_peak_flops": stated,
        "results": results,
    }


def _print(report: dict) -> None:
    for key, value in report["machine"].items():
        print(f"{key:14} {value}")
    print(f"{report['preset']}, batch {report['batch']} x {report['length']}")
    head = ("tokens/s", "GFLOP/s", "matmul GFLOP/s", "MFU", "jaxlab / it (min .. max)", "loss")
    print(f"{'':24}{head[0]:>10}{head[1]:>10}{head[2]:>16}{head[3]:>8}{head[4]:>26}{head[5]:>10}")
    for name, row in report["results"].items():
        ratio, mfu = row["jaxlab_speed_over_this"], row["mfu"]
        span = f"{ratio['median']:.3f} ({ratio['min']:.3f} .. {ratio['max']:.3f})"
        print(
            f"{name:24}{row['tokens_per_second']:10.0f}{row['flops_per_second'] / 1e9:10.0f}"
            f"{row['matmul_flops_per_second'] / 1e9:16.0f}"
            f"{'-' if mfu is None else format(mfu, '.1%'):>8}{span:>26}{row['losses'][-1]:10.5f}"
        )


def _run(args: argparse.Namespace) -> dict:
    names = [OURS, *([EAGER] if "eager" in args.peers else [])]
    names += [COMPILED] if "compiled" in args.peers else []
    with tempfile.TemporaryDirectory() as weights:
        settings = Settings(args.preset, args.batch, args.length, args.device, weights)
        writer = multiprocessing.get_context("spawn").Process(
            target=_write_weights, args=(settings,)
        )
        writer.start()
        writer.join()
        contestants = []
        try:
            for name in names:
                print(f"warming up {name} ...", file=sys.stderr, flush=True)
                contestants.append(Contestant(name, settings, args.warmup))
            for number in range(args.turns):
                for each in contestants[:: 1 if number % 2 == 0 else -1]:
                    each.turn(args.steps)
                    each.measure_peak()
            return _report(contestants, settings, args)
        finally:
            for each in contestants:
                each.close()


def main() -> int:
    """Measure, print, write; 1 when the losses differ."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--preset", default="llama-60m")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--peers", nargs="+", choices=("eager", "compiled"))
    parser.add_argument("--warmup", type=int, default=2, help="steps before the first turn")
    parser.add_argument("--turns", type=int, default=6)
    parser.add_argument("--steps", type=int, help="steps of one turn (CPU 1, CUDA 20)")
    parser.add_argument("--peak-tflops", type=float, help="what MFU is a share of, 1e12 FLOP/s")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    args.peers = args.peers or ["eager", "compiled"]
    args.steps = args.steps or {"cpu": 1, "cuda": 20}[args.device]
    if not (util.find_spec("torch") and util.find_spec("transformers")):
        print("the peer is not installed; pip install torch transformers")
        return 0
    report = _run(args)
    _print(report)
    if args.json:
        write_json(args.json, report)
    worst = max(row["largest_loss_difference"] for row in report["results"].values())
    print(f"largest difference of a step's loss: {worst:.1e}")
    return int(worst > TOLERANCE[args.device])


if __name__ == "__main__":
    sys.exit(main())
