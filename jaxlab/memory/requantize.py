"""A quantized copy of a bank, and what its codec loses.

Memory³ §3.3 and appendix B: keys and values of references drawn from the bank train one codec;
every vector is then stored as its code. Texts, embeddings and all else are copied bit for bit.
"""

import dataclasses
import math
import os
from collections.abc import Callable, Iterator

import numpy as np
from jaxtyping import Bool, Float32, Int

from jaxlab.errors import BankError, ConfigError
from jaxlab.memory.progress import Progress
from jaxlab.memory.quantize import PAPER, Codec, Rate
from jaxlab.memory.rate import unfit
from jaxlab.memory.store import Bank, bank_exists

_READ_AT_ONCE = 64
_MEASURED = 64


@dataclasses.dataclass(frozen=True)
class QuantizeReport:
    """What :func:`quantize_bank` did and lost; see :func:`measure` for the errors."""

    codec: str
    references: int
    resumed_at: int
    bytes_per_reference_raw: int
    bytes_per_reference: int
    relative_l2_keys: float
    relative_l2_values: float
    attention_output_error: float


def quantize_bank(
    source: Bank,
    url: str | os.PathLike[str],
    *,
    codec: str = PAPER,
    sample: int | None = None,
    seed: int = 0,
    rounds: tuple[int, int] | None = None,
    report: Callable[[str], None] = print,
) -> QuantizeReport:
    """Write the quantized copy of ``source`` at ``url``, shard by shard; resumable.

    The codec is trained on ``sample`` vectors (None: as many as FAISS asks for), keys and values of
    all layers and heads together, drawn by ``seed``; ``rounds`` are :meth:`Codec.fit`'s. One that
    was killed goes on with the codec that it stored.

    Raises ConfigError for a codec that does not fit, BankError when ``source`` is quantized itself
    or damaged, and when there is a bank at ``url`` of another codec or of other references.
    """
    if source.codec is not None:
        raise BankError(f"bank {source.url} is quantized already; give the bank that it came from")
    if Rate(codec).dim != source.spec.memory_shape[-1]:
        raise ConfigError(f"bank {source.url}: {unfit(codec, source.spec.memory_shape[-1])}")
    if len(source.cold_rows()):
        raise BankError(
            f"bank {source.url}: {len(source.cold_rows()):,} references have no memory yet; encode"
            " them with `jaxlab memory write` and the same --data first"
        )
    if bank_exists(url):
        made = Bank.open(url)
        _require_begun_from(source, made, codec)
        if len(made.shards) < len(source.shards) or not made.lacks_the_same(source):
            made = Bank.open(url, write=True)
    else:
        enough = Rate(codec).enough
        vectors = sample_vectors(source, sample or enough, seed=seed)
        few = f", fewer than the {enough:,} it should have" if len(vectors) < enough else ""
        report(f"bank {url}: training codec {codec} on {len(vectors):,} vectors{few}")
        made = _create(source, url, Codec.fit(vectors, codec, rounds=rounds))
    begun = made.rows
    progress = Progress(report, f"bank {url}", source.rows, begun=begun)
    for shard in source.shards[len(made.shards) :]:
        rows = np.arange(shard.start, shard.start + shard.count)
        made.add([made.store_copy(source, shard, source.read_any(rows).memories)])
        progress(made.rows)
    if not made.lacks_the_same(source):
        made.lack_the_same(source)
    errors = measure(source, made, seed=seed)
    return QuantizeReport(
        codec=codec,
        references=len(made),
        resumed_at=begun,
        bytes_per_reference_raw=source.spec.bytes_per_reference,
        bytes_per_reference=made.spec.bytes_per_reference,
        **errors,
    )


def sample_vectors(bank: Bank, count: int, *, seed: int) -> Float32[np.ndarray, "n H"]:
    """About ``count`` keys and values of slots that hold a token, or all where there are fewer."""
    generator = np.random.default_rng(seed)
    in_one = math.prod(bank.spec.memory_shape[:-1])
    # Four times as many references as would do: a few tokens of each, and room for empty slots.
    rows = _some_rows(bank, 4 * -(-count // in_one), generator)
    share, found = count / max(len(rows), 1), []
    for memories, valid in _blocks(bank, rows):
        vectors = np.moveaxis(memories, 4, 1)[valid].reshape(-1, memories.shape[-1])
        wanted = min(len(vectors), math.ceil(share * len(memories)))
        found.append(vectors[generator.choice(len(vectors), wanted, replace=False)])
    return np.concatenate(found)[:count] if found else np.zeros((0, bank.spec.memory_shape[-1]))


def measure(source: Bank, quantized: Bank, *, seed: int = 0) -> dict[str, float]:
    """What the codec changes in the memories of some references, drawn by ``seed``.

    ``relative_l2_keys`` and ``relative_l2_values``: length of the change over the length.
    ``attention_output_error``: the same of the softmax-weighted sum of values, over the slots of as
    many references as a chunk reads. Its queries are keys of other references at the same layer and
    head: the bank holds no queries, and keys have their place and rotation, if not their scale.
    """
    rows = _some_rows(source, _MEASURED, np.random.default_rng(seed))
    per_chunk = source.spec.references_per_chunk
    rows = rows[: max(len(rows) // per_chunk, 1) * per_chunk]
    if not len(rows):
        return dict.fromkeys(_ERRORS, 0.0)
    found = source.read(rows)
    exact = found.memories.astype(np.float32)
    changed = quantized.codec.decode(quantized.read(rows).memories)
    valid = np.arange(exact.shape[4]) < found.kept[:, None]
    keys, values = (
        _relative(*(np.moveaxis(m[:, :, part], 3, 1)[valid] for m in (exact, changed)))
        for part in (0, 1)
    )
    outputs = (
        _attention(exact, exact, valid, per_chunk),
        _attention(exact, changed, valid, per_chunk),
    )
    return dict(zip(_ERRORS, (keys, values, _relative(*outputs)), strict=True))


_ERRORS = ("relative_l2_keys", "relative_l2_values", "attention_output_error")


def _relative(exact: np.ndarray, changed: np.ndarray) -> float:
    length = float(np.linalg.norm(exact))
    return float(np.linalg.norm(changed - exact)) / length if length else 0.0


def _attention(asking: np.ndarray, read: np.ndarray, valid: np.ndarray, group: int) -> np.ndarray:
    """Outputs of the valid queries: the keys of each group ask the slots of the group before."""

    def slots(memories):  # (groups, layers, K, group x m, H)
        group_of = memories.reshape(-1, min(group, len(memories)), *memories.shape[1:])
        joined = np.moveaxis(group_of, 1, 3)
        return joined.reshape(*joined.shape[:3], -1, joined.shape[-1])

    queries = np.roll(slots(asking[:, :, 0]), 1, axis=0)
    keys, values = slots(read[:, :, 0]), slots(read[:, :, 1])
    there = valid.reshape(len(keys), 1, 1, -1)
    logits = queries @ np.swapaxes(keys, -1, -2) / math.sqrt(keys.shape[-1])
    logits = np.where(there[..., None, :], logits, -np.inf)
    weights = np.exp(logits - np.maximum(logits.max(-1, keepdims=True), -1e30))
    outputs = weights @ values / np.maximum(weights.sum(-1, keepdims=True), 1e-30)
    return outputs * np.roll(there, 1, axis=0)[..., None]


def _some_rows(bank: Bank, count: int, generator: np.random.Generator) -> Int[np.ndarray, " n"]:
    alive = bank.alive()
    living = np.arange(bank.rows) if alive is None else np.flatnonzero(alive)
    return np.sort(generator.permutation(living)[:count])


def _blocks(bank: Bank, rows: np.ndarray) -> Iterator[tuple[np.ndarray, Bool[np.ndarray, "n m"]]]:
    """Memories of rows in float32, some at a time, and which of their slots hold a token."""
    for start in range(0, len(rows), _READ_AT_ONCE):
        found = bank.read(rows[start : start + _READ_AT_ONCE])
        valid = np.arange(found.memories.shape[4]) < found.kept[:, None]
        yield found.memories.astype(np.float32), valid


def _create(source: Bank, url: str | os.PathLike[str], codec: Codec) -> Bank:
    return Bank.create(
        url,
        spec=dataclasses.replace(source.spec, codec=codec.rate.name),
        embedder_state=source.embedder_state(),
        codec_state=codec.to_bytes(),
    )


def _require_begun_from(source: Bank, made: Bank, codec: str) -> None:
    if made.spec.codec != codec:
        raise BankError(
            f"bank {made.url} was begun with codec {made.spec.codec}; go on with that one, or"
            " choose another --out"
        )

    def told(bank, count):
        shards = bank.shards[:count]
        same = ("embeddings/", "references.jsonl", "kept/")
        return [
            {path: file for path, file in shard.files.items() if path.startswith(same)}
            for shard in shards
        ]

    count = len(made.shards)
    if dataclasses.replace(made.spec, codec=None) != source.spec or told(made, count) != told(
        source, count
    ):
        raise BankError(
            f"bank {made.url} was begun from another bank than {source.url}; choose another --out"
        )
