"""Contents of small banks, and a bank made of them, that the tests of the store share."""

from pathlib import Path

import ml_dtypes
import numpy as np

from jaxlab.memory.header import Shard
from jaxlab.memory.store import Bank, BankIdentity, BankSpec, StoredReference

SHAPE = (2, 2, 2, 3, 4)
DIM = 5
IDENTITY = BankIdentity(model_hash="m0del", tokenizer_hash="t0ken", config_hash="c0nfig")
SPEC = BankSpec(
    identity=IDENTITY, memory_shape=SHAPE, embedder="model", embedding_dim=DIM, preface=(1, 7)
)


def contents(n: int, *, seed: int = 0, dtype: str = "bfloat16", shape=SHAPE) -> tuple:
    """Memories of random bits (NaNs and -0.0 among them) and all that goes with them."""
    rng = np.random.default_rng(seed)
    kind = np.dtype(ml_dtypes.bfloat16 if dtype == "bfloat16" else dtype)
    raw = rng.integers(0, 256, (n, *shape[:-1], shape[-1] * kind.itemsize), dtype=np.uint8)
    references = [StoredReference(f"text {seed}/{i}", f"source {seed}", i % 9) for i in range(n)]
    kept = rng.integers(0, shape[3] + 1, n).astype(np.int32)
    return raw.view(kind), kept, rng.standard_normal((n, DIM)).astype(np.float32), references


def bits(array: np.ndarray) -> bytes:
    return np.ascontiguousarray(array).tobytes()


def written(url, *, counts=(3, 2), context=None) -> Bank:
    bank = Bank.create(url, spec=SPEC, context=context)
    for seed, n in enumerate(counts):
        bank.append(*contents(n, seed=seed))
    return bank


def files_of(root: Path) -> list[str]:
    return sorted(str(p.relative_to(root)) for p in root.rglob("*") if p.is_file())


def told(bank: Bank) -> list[tuple]:
    """All that a bank says of its living references, in order."""
    alive = bank.alive()
    rows = np.arange(bank.rows) if alive is None else np.flatnonzero(alive)
    found, embeddings = bank.read(rows), bank.embeddings()
    texts = bank.references(rows)
    return [
        (bits(memory), int(kept), bool(cold), bits(embeddings[row]), text)
        for row, memory, kept, cold, text in zip(rows, *found, texts, strict=True)
    ]


def flip(path: Path) -> bytes:
    """Change a bit in the middle of a file; what it held."""
    content = path.read_bytes()
    middle = len(content) // 2
    path.write_bytes(content[:middle] + bytes([content[middle] ^ 4]) + content[middle + 1 :])
    return content


def part_of(folder: Path, shard: Shard, kind: str) -> Path:
    """The first file of a kind in a shard."""
    folder = folder / "shards" / shard.name
    return folder / next(path for path in files_of(folder) if kind in path)
