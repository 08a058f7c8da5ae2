"""Times of every op on a GPU, in one run, beside other implementations and the copy bandwidth."""

import math
import platform as host
import shutil
import subprocess
import sys
import time
from collections.abc import Callable

import jax
import jax.numpy as jnp

from kernels_pallas import dispatch, memory_decode, memory_dequantize, memory_select
from kernels_pallas.gpu_attention import attention_row, normal
from kernels_pallas.gpu_sizes import Sizes
from kernels_pallas.memory_decode import api as decode_api
from kernels_pallas.memory_dequantize import api as dequantize_api
from kernels_pallas.memory_select import api as select_api
from kernels_pallas.timing import Contestant, Plan, Timer, compare, contest, error_text

# For the length of a turn only: bytes a second and what starting an op costs.
_GUESSED_BYTES, _GUESSED_START = 1.5e12, 2e-5
_COPIES = 10


class NoGPUError(ValueError):
    """There is no GPU to time anything on."""


def gpu_report(
    log: Callable[[str], None],
    sizes: Sizes = Sizes(),  # noqa: B008, it is frozen
    platform: str = "gpu",
    torch_device: str = "cuda",
) -> dict:
    """Times of all ops; a contestant that raises is recorded with its error and nothing stops.

    Raises:
      NoGPUError: jax runs on something else here.
    """
    if jax.default_backend() != platform:
        raise NoGPUError(
            f"timing needs a GPU and jax runs on {jax.default_backend()} here: "
            "--static v5e v5p v6e gives figures without one"
        )
    begin = time.perf_counter()
    plan = Plan(sizes.repetitions, sizes.run_seconds, begin + sizes.limit_seconds)
    machine = _machine()
    log(f"{machine['device']}, jax {machine['jax']}, driver {machine['driver']}")
    copy = contest({"copy": lambda: _copy_timer(sizes, plan)}, plan)["copy"]
    bandwidth = 2 * sizes.copy_bytes / copy["seconds"] if "seconds" in copy else None
    log(f"copy, bytes read and written a second: {bandwidth or copy['error']}")

    rows = []
    for make in _row_makers(sizes, plan, torch_device, bandwidth):
        try:
            rows.append(make())
        except Exception as error:  # such as no memory for the inputs: the other rows matter
            rows.append({"error": error_text(error)})
        log(_line(rows[-1]))
    return {
        "machine": machine,
        "copy": {**copy, "bytes_per_second": bandwidth},
        "aims": aims(rows),
        "rows": rows,
        "seconds": time.perf_counter() - begin,
    }


def _row_makers(sizes: Sizes, plan: Plan, torch_device: str, bandwidth: float | None):
    """Decoding is last: its kernel is the only one of our own, and a fault would end the run."""
    for queries, head_dim in sizes.attention:
        for backward in (False, True):
            yield lambda shape=(queries, head_dim, backward): attention_row(
                sizes, *shape, plan, torch_device
            )
    yield lambda: _select_row(sizes, plan)
    yield lambda: _dequantize_row(sizes, plan)
    for batch in sizes.decode_batches:
        for length in sizes.decode_lengths:
            yield lambda shape=(batch, length): _decode_row(sizes, *shape, plan, bandwidth)


def _copy_timer(sizes: Sizes, plan: Plan) -> Timer:
    copy = jax.jit(jnp.copy)
    array = jnp.zeros((sizes.copy_bytes // 4,), jnp.float32)

    def timer() -> float:
        begin, last = plan.clock(), array
        for _ in range(_COPIES):
            last = copy(last)
        last.block_until_ready()
        return (plan.clock() - begin) / _COPIES

    return timer


def _bytes_of(tree) -> int:
    return sum(leaf.nbytes for leaf in jax.tree.leaves(tree))


def _decode_inputs(sizes: Sizes, batch: int, length: int, seed: int) -> dict:
    width = sizes.kv_heads * sizes.head_dim
    cache = (batch, length, width)
    pairs = {"preface": (sizes.preface, width), "slots": (batch, sizes.decode_slots, width)}
    return {
        "key": normal(seed, *cache),
        "value": normal(seed + 1, *cache),
        **{name: (normal(seed, *shape), normal(seed + 1, *shape)) for name, shape in pairs.items()},
        "slot_valid": jnp.ones((batch, sizes.decode_slots, sizes.kv_heads), jnp.bool_),
        "lengths": jnp.full((batch,), length, jnp.int32),
    }


def _decode_row(sizes: Sizes, batch: int, length: int, plan: Plan, bandwidth: float | None) -> dict:
    """Caches are full, and several are read in turn, so that they come from memory."""
    first = _decode_inputs(sizes, batch, length, 0)
    count = min(max(2, math.ceil(sizes.cold_bytes / _bytes_of(first))), sizes.most_caches)
    caches = [first] + [_decode_inputs(sizes, batch, length, 2 * n) for n in range(1, count)]
    query = normal(9, batch, sizes.heads, sizes.head_dim)

    def bare(cache):
        return {name: cache[name] for name in ("key", "value", "preface", "lengths")}

    def contestant(given, implementation):
        def decode(cache, query):
            return memory_decode.memory_decode(query, **cache, implementation=implementation)

        step = jax.jit(lambda cache, query: (decode(cache, query), ()))
        return Contestant(decode, (given[0], query), lambda: (step, given, query))

    without = [bare(cache) for cache in caches]
    names = {"ours": None, "xla": "xla"}
    contestants = {name: contestant(caches, which) for name, which in names.items()}
    contestants |= {
        f"{name}, no slots": contestant(without, which) for name, which in names.items()
    }
    floors = {"": _bytes_of((caches[0], query, query))}
    floors[", no slots"] = _bytes_of((without[0], query, query))
    found = compare(contestants, plan, floors[""] / _GUESSED_BYTES + _GUESSED_START)
    for name, row in found.items():
        if "seconds" in row:
            row["floor_bytes"] = floors[", no slots" if "no slots" in name else ""]
            row["bytes_per_second"] = row["floor_bytes"] / row["seconds"]
            if bandwidth:
                row["share of copy bandwidth"] = row["bytes_per_second"] / bandwidth
    key_value = first.pop("key"), first.pop("value")
    chosen = dispatch.choose(
        "memory_decode", decode_api.IMPLEMENTATIONS, None, (query, *key_value), first
    )
    row = {
        "op": "memory_decode",
        "batch": batch,
        "length": length,
        "caches in turn": count,
        "bytes in turn": count * floors[""],
        "implementation": chosen.name,
        "contestants": found,
    }
    if all("seconds" in found[name] for name in ("ours", "ours, no slots")):
        row["time added by slots"] = (
            found["ours"]["seconds"] / found["ours, no slots"]["seconds"] - 1
        )
    return row


def _with_references(row: dict, references: int) -> dict:
    for contestant in row["contestants"].values():
        if "seconds" in contestant:
            contestant["references_per_second"] = references / contestant["seconds"]
    return row


def _select_row(sizes: Sizes, plan: Plan) -> dict:
    shape = sizes.references, sizes.reference_tokens
    inputs = [
        (
            normal(seed, *shape, sizes.heads, sizes.head_dim),
            normal(seed + 1, *shape, sizes.kv_heads, sizes.head_dim),
        )
        for seed in (0, 2)
    ]
    valid = jnp.ones(shape, jnp.bool_)

    def contestant(implementation):
        def select(arrays, valid):
            return memory_select.memory_select(
                *arrays, valid, kept=sizes.kept, implementation=implementation
            )

        def step(arrays, valid):
            found = select(arrays, valid)
            # Never true, which the compiler does not know.
            return valid | (found[:, 0, :1] < 0), found

        return Contestant(select, (inputs[0], valid), lambda: (step, inputs, valid))

    chosen = dispatch.choose(
        "memory_select", select_api.SELECT, None, (*inputs[0], valid), {"kept": sizes.kept}
    )
    found = compare({"ours": contestant(None), "xla": contestant("xla")}, plan, 5e-4)
    row = {"op": "memory_select", "references": sizes.references, "implementation": chosen.name}
    return _with_references({**row, "contestants": found}, sizes.references)


def _dequantize_row(sizes: Sizes, plan: Plan) -> dict:
    """A reference is the codes of its keys and values, in all layers and kv heads."""
    dims, parts = sizes.head_dim, sizes.codebook_parts
    entries = [1 << bits for bits in sizes.codebook_bits]
    tables = (2, entries[0], dims // 2), (parts, entries[1], dims // parts), (dims, dims)
    codebook = memory_dequantize.Codebook(
        *(normal(at, *shape).astype(jnp.float32) for at, shape in enumerate(tables))
    )
    bank = sizes.bank_slots, sum(codebook.widths)
    banks = [(jax.random.bits(jax.random.key(seed), bank, jnp.uint8), codebook) for seed in (0, 1)]
    shape = sizes.references, 2 * sizes.layers, sizes.kept, sizes.kv_heads
    index = jax.random.randint(jax.random.key(2), shape, 0, sizes.bank_slots, jnp.int32)

    def contestant(implementation):
        def dequantize(bank, index):
            return memory_dequantize.memory_dequantize(
                *bank, index=index, dtype=jnp.bfloat16, implementation=implementation
            )

        def step(bank, index):
            vectors = dequantize(bank, index)
            # Never added, which the compiler does not know.
            return index + (vectors.reshape(-1)[0] > 1e30).astype(jnp.int32), vectors

        return Contestant(dequantize, (banks[0], index), lambda: (step, banks, index))

    kwargs = {"index": index, "dtype": jnp.dtype(jnp.bfloat16)}
    chosen = dispatch.choose(
        "memory_dequantize", dequantize_api.IMPLEMENTATIONS, None, banks[0], kwargs
    )
    found = compare({"ours": contestant(None), "xla": contestant("xla")}, plan, 3e-4)
    row = {"op": "memory_dequantize", "references": sizes.references}
    row |= {"implementation": chosen.name, "contestants": found}
    return _with_references(row, sizes.references)


def aims(rows: list[dict]) -> list[dict]:
    """What the project aims at, the figure of every row that has one, and whether it is reached."""
    found = []

    def aim(row: dict, what: str, value: float | None, least: float, *, most: bool = False) -> None:
        if value is not None:
            where = {
                k: row[k]
                for k in ("direction", "queries", "batch", "head_dim", "length")
                if k in row
            }
            reached = value <= least if most else value >= least
            found.append({"what": what, **where, "value": value, "aim": least, "reached": reached})

    for row in rows:
        if row.get("op") == "memory_attention":
            least = 0.85 if row["direction"] == "forward" else 0.75
            aim(row, "speed over cudnn", row.get("speed over cudnn"), least)
            name = "temporary memory of xla over ours"
            aim(row, name, row.get(name), 5.0)
        elif row.get("op") == "memory_decode":
            name = "share of copy bandwidth"
            aim(row, name, row["contestants"]["ours"].get(name), 0.8)
            name = "time added by slots"
            aim(row, name, row.get(name), 0.03, most=True)
    return found


def _line(row: dict) -> str:
    """A row in one line, errors included: all that is left should the run end early."""
    if "error" in row:
        return row["error"]
    where = ", ".join(f"{k} {v}" for k, v in row.items() if k not in ("op", "contestants"))
    parts = []
    for name, found in row["contestants"].items():
        if "error" in found:
            parts.append(f"{name}: {' '.join(found['error'].split())[:100]}")
        else:
            spread = f"{found['min'] * 1e6:.1f} to {found['max'] * 1e6:.1f}"
            parts.append(f"{name}: {found['seconds'] * 1e6:.1f} us ({spread})")
    return f"{row['op']}, {where}: " + "; ".join(parts)


def _machine() -> dict:
    device = jax.devices()[0]
    driver = "unknown"
    if shutil.which("nvidia-smi"):
        asked = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
        ended = subprocess.run(asked, capture_output=True, text=True, timeout=30, check=False)
        driver = (ended.stdout.split() or [driver])[0]
    return {
        "device": device.device_kind,
        "devices": jax.device_count(),
        "platform": jax.default_backend(),
        "driver": driver,
        "jax": jax.__version__,
        "jaxlib": jax.lib.__version__,
        "python": sys.version.split()[0],
        "host": host.platform(),
    }
