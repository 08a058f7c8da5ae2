"""``jaxlab memory``: write, quantize, search and look after banks."""

import argparse
import dataclasses
import json
import sys
from collections.abc import Callable, Sequence
from typing import Any

from jaxlab.errors import BankError, ConfigError
from jaxlab.tools.output import one_line, write_json

_RUN = "a run, or RUN@STAGE"


def add_commands(
    commands: Any,
    command: Callable[..., argparse.ArgumentParser],
    positive: Callable[[str], int],
    source: str,
) -> None:
    """Add the parsers; ``command(group, name, call, text)`` makes one, ``source`` explains SRC."""
    memory = commands.add_parser("memory", help="memory banks").add_subparsers(
        required=True, metavar="COMMAND"
    )
    text = "write references into a bank; resumable"
    write = command(memory, "write", _write, text, together=True)
    write.add_argument("--run", required=True, metavar="DIR", help=_RUN)
    write.add_argument("--data", required=True, metavar="SRC", help=source)
    write.add_argument("--limit-bytes", type=positive, metavar="N", help="read so much of SRC")
    text = "store texts and embeddings only; each memory is encoded when it is first read"
    write.add_argument("--cold", action="store_true", help=text)
    search = command(memory, "search", _search, "the references nearest to a text")
    search.add_argument("--query", required=True, metavar="TEXT", help="what to look for")
    search.add_argument("--top", type=positive, default=5, metavar="K", help="how many (5)")
    search.add_argument("--source", nargs="+", metavar="S", help="among references of these only")
    search.add_argument("--run", metavar="DIR", help="the run, for a bank embedded by the model")
    stats = command(memory, "stats", _stats, "what a bank holds")
    verify = command(memory, "verify", _verify, "check every file of a bank")
    quantize = command(
        memory,
        "quantize",
        _quantize,
        "a copy of a bank with codes of a few bytes a vector; resumable",
    )
    _quantize_arguments(quantize, positive, source)
    text = "add references that the bank does not have yet"
    append = command(memory, "append", _append, text)
    append.add_argument("--run", required=True, metavar="DIR", help=_RUN)
    append.add_argument("--data", required=True, metavar="SRC", help=source)
    delete = command(memory, "delete", _delete, "delete references")
    delete.add_argument("--rows", type=_rows, default=(), metavar="1,2,...", help="by row")
    delete.add_argument(
        "--source", nargs="+", action="extend", default=[], metavar="S", help="all of"
    )
    text = "give back the room of deleted references and merge small shards; numbers rows anew"
    compact = command(memory, "compact", _compact, text)
    text = "an approximate index for a bank whose embeddings do not fit in RAM"
    index = command(memory, "index", _index, text)
    index.add_argument("--kind", metavar="NAME", help="such as IVF4096,SQ8 (by the bank's size)")
    probes = "lists that a search looks into (a 32nd of them)"
    index.add_argument("--probes", type=positive, metavar="N", help=probes)
    index.add_argument("--run", metavar="DIR", help="the run, for a bank embedded by the model")
    repair = command(memory, "repair", _repair, "make damaged shards again")
    repair.add_argument("--run", metavar="DIR", help=f"to encode damaged memories again: {_RUN}")
    text = "give up shards that cannot be made again"
    repair.add_argument("--set-aside", action="store_true", help=text)
    for each in (write, search, stats, verify, quantize, append, delete, compact, index, repair):
        each.add_argument("--bank", required=True, metavar="BANK", help="a path or a bucket URL")


def _quantize_arguments(quantize, positive: Callable[[str], int], source: str) -> None:
    quantize.add_argument("--out", required=True, metavar="BANK", help="the copy")
    quantize.add_argument("--codec", metavar="NAME", help="(OPQ20_80,Residual2x14,PQ8x10)")
    sample = "vectors to train the codec on (39 for each of its centroids)"
    quantize.add_argument("--sample", type=positive, metavar="N", help=sample)
    quantize.add_argument("--report", metavar="FILE.json", help="what the codec loses")
    quantize.add_argument("--run", metavar="DIR", help=f"for bits per byte in the report: {_RUN}")
    quantize.add_argument("--data", metavar="SRC", help=f"and what to score: {source}")


def _rows(text: str) -> list[int]:
    try:
        return [int(part) for part in text.split(",")]
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} are no row numbers, such as 1,2") from None


def _write(arguments: argparse.Namespace) -> None:
    from jaxlab.data.sources import load_documents
    from jaxlab.memory.pipeline import write_bank
    from jaxlab.sharding.processes import reporter
    from jaxlab.training.load import load_model

    documents = load_documents(arguments.data, limit_bytes=arguments.limit_bytes)
    model = load_model(arguments.run)
    written = write_bank(model, documents, arguments.bank, cold=arguments.cold)
    reporter(print)(json.dumps({"bank": arguments.bank, **dataclasses.asdict(written)}))


def _search(arguments: argparse.Namespace) -> None:
    from jaxlab.memory.read import MemoryReader
    from jaxlab.memory.store import Bank

    bank = Bank.open(arguments.bank)
    _require_sources(bank, arguments.source or ())
    reader = MemoryReader.open(bank, model_embed=_model_embed(arguments))
    hits = reader.search([arguments.query], arguments.top, sources=arguments.source)
    found = [
        pair
        for pair in zip(hits.ids[0].tolist(), hits.scores[0].tolist(), strict=True)
        if pair[0] >= 0
    ]
    if not found:
        print("no reference has anything of the query")
    texts = bank.references([row for row, _ in found])
    for (row, score), stored in zip(found, texts, strict=True):
        print(f"{score:.4f}  [{row}] {stored.source}: {one_line(stored.text)}")


def _require_sources(bank: Any, sources: Sequence[str]) -> None:
    from jaxlab.memory.retrieve import lacking

    if (lacks := lacking(bank, sources)) is not None:
        raise BankError(f"bank {bank.url} has {lacks}")


def _model_embed(arguments: argparse.Namespace):
    if arguments.run is None:
        return None
    from jaxlab.training.load import load_model

    return load_model(arguments.run).embed_texts


def _index(arguments: argparse.Namespace) -> None:
    from jaxlab.memory.indexing import build_index
    from jaxlab.memory.store import Bank

    done = build_index(
        Bank.open(arguments.bank, write=True),
        arguments.kind,
        probes=arguments.probes,
        model_embed=_model_embed(arguments),
    )
    print(json.dumps({"bank": arguments.bank, **dataclasses.asdict(done)}))


def _stats(arguments: argparse.Namespace) -> None:
    from jaxlab.memory.store import Bank

    print(json.dumps(Bank.open(arguments.bank).stats(), indent=2))


def _verify(arguments: argparse.Namespace) -> int:
    from jaxlab.memory.store import Bank

    found = Bank.open(arguments.bank).verify()
    for problem in found.problems:
        print(f"error: {problem}", file=sys.stderr)
    lost = [each for each in found.lost if each.references]
    for each in lost:
        told = "were lost and set aside; `jaxlab memory compact` deletes their files and this note"
        print(f"error: {each} {told}", file=sys.stderr)
    gone = sum(each.references for each in lost)
    state = f"{gone} references lost" if gone else "whole"
    if found.damaged or found.missing:
        state = "damaged"
    elif not found.ok:
        state = "not all of it can be read"
    cures = "".join(f"; {cure}" for cure in dict.fromkeys(each.cure for each in found.findings))
    cold = f", {found.cold} of them cold" if found.cold else ""
    counts = f"{found.shards} shards, {found.references} references{cold}"
    print(f"{arguments.bank}: {state}, {counts}{cures}")
    return 1 if gone or not found.ok else 0


def _quantize(arguments: argparse.Namespace) -> None:
    if (arguments.run is None) != (arguments.data is None) or (
        arguments.run is not None and arguments.report is None
    ):
        raise ConfigError("--run and --data go together, with --report FILE: give all or none")
    from jaxlab.memory.quantize import PAPER
    from jaxlab.memory.requantize import quantize_bank
    from jaxlab.memory.store import Bank

    source = Bank.open(arguments.bank)
    codec = arguments.codec or PAPER
    done = quantize_bank(source, arguments.out, codec=codec, sample=arguments.sample)
    result = dataclasses.asdict(done)
    if arguments.run is not None:
        result |= _bits_per_byte(arguments)
    if arguments.report:
        write_json(arguments.report, result)
    print(json.dumps(result))


def _append(arguments: argparse.Namespace) -> None:
    from jaxlab.data.sources import load_documents
    from jaxlab.memory.pipeline import append_to_bank
    from jaxlab.training.load import load_model

    documents = load_documents(arguments.data)
    added = len(append_to_bank(load_model(arguments.run), documents, arguments.bank))
    print(json.dumps({"bank": arguments.bank, "added": added}))


def _delete(arguments: argparse.Namespace) -> None:
    if not arguments.rows and not arguments.source:
        raise ConfigError("nothing to delete: give --rows or --source")
    from jaxlab.memory.store import Bank

    bank = Bank.open(arguments.bank, write=True)
    _require_sources(bank, arguments.source)
    gone = bank.delete(rows=arguments.rows, sources=arguments.source)
    print(json.dumps({"bank": arguments.bank, "deleted": gone, "references": len(bank)}))


def _compact(arguments: argparse.Namespace) -> None:
    from jaxlab.memory.store import Bank

    bank = Bank.open(arguments.bank, write=True)
    index = bank.index_record
    written = bank.compact()
    if bank.index_record != index:
        _tell_index_gone(arguments.bank, index)
    result = {"shards_written": written, "shards": len(bank.shards), "references": len(bank)}
    print(json.dumps({"bank": arguments.bank, **result}))


def _tell_index_gone(bank: str, index: Any) -> None:
    again = f"`jaxlab memory index --kind {index.name} --probes {index.probes}`"
    told = f"its index was of other rows and is gone; make it again with {again}"
    print(f"bank {bank}: {told}, or of a kind that suits the rows left", file=sys.stderr)


def _repair(arguments: argparse.Namespace) -> int:
    from jaxlab.memory.store import Bank

    given, identity = {}, None
    if arguments.run is not None:
        from jaxlab.memory.pipeline import reference_encoder
        from jaxlab.training.load import load_model

        model = load_model(arguments.run)
        identity = model.identity
        given = {"encode": reference_encoder(model), "model_embed": model.embed_texts}
    bank = Bank.open(arguments.bank, identity=identity, write=True)
    index = bank.index_record
    done = bank.repair(set_aside=arguments.set_aside, **given)
    for line in (*(f"lost: {each}" for each in done.lost), *done.problems):
        print(f"error: {line}", file=sys.stderr)
    if done.index_gone:
        _tell_index_gone(arguments.bank, index)
    print(json.dumps({"bank": arguments.bank, **dataclasses.asdict(done)}))
    return 1 if done.lost or done.problems else 0


def _bits_per_byte(arguments: argparse.Namespace) -> dict[str, float]:
    """Bits per byte of --data with either bank."""
    from jaxlab.data.sources import load_documents
    from jaxlab.evaluation.perplexity import score_documents
    from jaxlab.memory.read import MemoryReader
    from jaxlab.memory.store import Bank
    from jaxlab.training.load import load_model

    model, documents = load_model(arguments.run), load_documents(arguments.data)
    found = []
    for url in (arguments.bank, arguments.out):
        bank = Bank.open(url, identity=model.identity)
        reader = MemoryReader.open(bank, model_embed=model.embed_texts)
        scores = score_documents(model, documents, memory="on", reader=reader)
        found.append(scores.bits_per_byte)
    raw, quantized = found
    return {"bpb_raw": raw, "bpb_quantized": quantized, "bpb_change": quantized - raw}
