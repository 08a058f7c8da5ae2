"""A bank of a million references: written, quantized, indexed, searched and read.

    python benchmarks/bank_scale.py --run runs/demo --data prose --out /tmp/scale \
        --json benchmarks/results/bank_scale.json

For 10,000, 100,000 and 1,000,000 references: bytes, references a second of each step, and the time
of searching for questions that the bank has no answer to, and of loading references from all over
it, one chunk at a time, with RAM of the process that does it. Files just written may lie in the
page cache. Text is real as far as it goes (``--data`` and the documentation of installed packages)
and generated facts behind it. Every step is resumable and runs in a process of its own.
"""

import argparse
import dataclasses
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import numpy as np

from jaxlab.tools.output import machine, percentiles, script_command, write_json

SIZES = (10_000, 100_000, 1_000_000)
CODEC = "OPQ8_32,Residual2x10,PQ8x8"
PACKAGES = ("jax", "jaxlib", "faiss-cpu", "tensorstore")
_FACTS_AT_ONCE = 50_000
_FIT = 30_000
_CACHE = 64 << 20


def _documents(data: str, model, count: int):
    """Documents that make ``count`` references or a few more, real ones first."""
    from jaxlab.data.facts import draw_facts
    from jaxlab.data.references import References
    from jaxlab.data.sources import Document, load_documents

    length = model.config.memory.reference_length
    out, have = [], 0
    for source in (data, "installed-docs"):
        documents = load_documents(source)
        sizes = [
            -(-len(ids) // length)
            for ids in model.tokenizer.encode_batch([one.text for one in documents])
        ]
        for document, size in zip(documents, sizes, strict=True):
            if have < count and size:
                out.append(document)
                have += size
    seed = 1000
    while have < count:
        facts = draw_facts(seed, min(_FACTS_AT_ONCE, count - have))
        made = [Document(f"facts:{seed}/{n}", fact.statement) for n, fact in enumerate(facts)]
        have += len(References.build(made, model.tokenizer, length=length))
        out += made
        seed += 1
    return out


def _write(args, size: int) -> dict:
    from jaxlab.data.references import References
    from jaxlab.memory.lsa import LsaEmbedder
    from jaxlab.memory.pipeline import write_bank
    from jaxlab.training.load import load_model

    model = load_model(args.run)
    documents = _documents(args.data, model, size)
    length = model.config.memory.reference_length
    some = documents[:: max(1, len(documents) // _FIT)]
    embedder = LsaEmbedder.fit(References.build(some, model.tokenizer, length=length).texts[:_FIT])
    begin = time.perf_counter()
    done = write_bank(
        model, documents, str(args.out / f"raw{size}"), embedder=embedder, shard_references=4096
    )
    seconds = time.perf_counter() - begin
    new = done.references - done.resumed_at
    return {"references": done.references, "bytes": done.bytes, "seconds": seconds,
            "references_per_second": new / seconds}  # fmt: skip


def _quantize(args, size: int) -> dict:
    from jaxlab.memory.requantize import quantize_bank
    from jaxlab.memory.store import Bank

    begin = time.perf_counter()
    done = quantize_bank(
        Bank.open(args.out / f"raw{size}"), args.out / f"quantized{size}", codec=CODEC
    )
    seconds = time.perf_counter() - begin
    new = done.references - done.resumed_at
    return {**dataclasses.asdict(done), "seconds": seconds, "references_per_second": new / seconds,
            "bytes": Bank.open(args.out / f"quantized{size}").stats()["bytes"]}  # fmt: skip


def _index(args, size: int) -> dict:
    from jaxlab.memory.approximate import FLAT, index_name
    from jaxlab.memory.indexing import build_index
    from jaxlab.memory.store import Bank

    bank = Bank.open(args.out / f"quantized{size}", write=True)
    name = index_name(bank.rows, bank.spec.embedding_dim)
    lists = 1 << round(np.log2(4 * np.sqrt(bank.rows)))
    name = name if name != FLAT else f"IVF{min(lists, bank.rows // 64)},SQ8"
    return dataclasses.asdict(build_index(bank, name))


def _read(args, size: int) -> dict:
    """Search for questions about nobody in the bank, and load what may be anywhere in it."""
    import psutil

    from jaxlab.data.facts import draw_facts
    from jaxlab.memory.read import MemoryReader
    from jaxlab.memory.store import Bank

    memory = psutil.Process().memory_info
    before = memory().rss
    bank = Bank.open(args.out / f"quantized{size}")
    reader = MemoryReader.open(bank, cache_bytes=_CACHE)
    opened = memory().rss
    queries = [fact.question for fact in draw_facts(7, 1000)]
    draws = np.random.default_rng(0)
    searches, loads, texts = [], [], []
    for query in queries:
        begin = time.perf_counter()
        hits = reader.search([query])
        searches.append(time.perf_counter() - begin)
        # Not what was found: questions that are alike find the same, which the cache then has.
        ids = draws.choice(bank.rows, reader.per_chunk, replace=False)
        begin = time.perf_counter()
        reader.fetch(ids)
        loads.append(time.perf_counter() - begin)
        begin = time.perf_counter()
        bank.references(hits.ids[0])
        texts.append(time.perf_counter() - begin)
    return {
        "search_seconds": percentiles(searches),
        "load_seconds": percentiles(loads),
        "text_seconds": percentiles(texts),
        "rss_bytes_opened": opened - before,
        "rss_bytes_after": memory().rss - before,
        "cache_bytes": _CACHE,
    }


STEPS = {"write": _write, "quantize": _quantize, "index": _index, "read": _read}


def _whole(args) -> dict:
    results = {}
    for size in args.sizes:
        results[str(size)] = {}
        for step in STEPS:
            file = args.out / f"{step}{size}.json"
            if not file.exists():
                command = [sys.executable, __file__, *sys.argv[1:], "--step", step]
                subprocess.run([*command, "--sizes", str(size)], check=True)
            results[str(size)][step] = json.loads(file.read_text())
    return results


def main() -> int:
    """Do the steps that are not done yet, print, write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--run", required=True)
    parser.add_argument("--data", required=True, help="real text, as for jaxlab memory write")
    parser.add_argument("--out", type=Path, required=True, help="where the banks go: 20 GB")
    parser.add_argument("--sizes", type=int, nargs="+", default=SIZES)
    parser.add_argument("--step", choices=STEPS, help=argparse.SUPPRESS)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    os.environ["JAX_PLATFORMS"] = "cpu"
    args.out.mkdir(parents=True, exist_ok=True)
    if args.step:
        (size,) = args.sizes
        write_json(args.out / f"{args.step}{size}.json", STEPS[args.step](args, size))
        return 0
    report = {
        "machine": machine(PACKAGES),
        "command": script_command(),
        "codec": CODEC,
        "results": _whole(args),
    }
    print(json.dumps(report["results"], indent=1))
    if args.json:
        write_json(args.json, report)
    return 0


if __name__ == "__main__":
    sys.exit(main())
