"""The whole life of an explicit memory in minutes: train, write, read, measure, ask."""

import resource
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jaxlab.config import load_config
from jaxlab.data.facts import RELATIONS, draw_facts, prompt
from jaxlab.data.sources import Document, load_documents, split_documents
from jaxlab.errors import Interrupted
from jaxlab.evaluation.facts import ANSWER_TOKENS, evaluate_facts
from jaxlab.evaluation.perplexity import DocumentScores, gain, score_documents
from jaxlab.inference.engine import Engine
from jaxlab.memory.pipeline import write_bank
from jaxlab.memory.read import MemoryReader
from jaxlab.memory.store import Bank
from jaxlab.models.decoder import parameter_count
from jaxlab.tools.output import print_citations, write_json
from jaxlab.tools.plots import plot_gain, plot_recall
from jaxlab.training.load import LoadedModel, load_model
from jaxlab.training.loop import train
from jaxlab.training.metrics import read_metrics

CONFIG = Path(__file__).parents[2] / "configs" / "demo.yaml"
# The seed of the questions; training draws its facts from the configuration's seed.
FACTS_SEED = 20260
QUESTIONS = 500
# Held-out text that is scored, in bytes: a minute of work.
TEXT_BYTES = 120_000


def run_demo(out: Path, overrides: Sequence[str] = ()) -> dict[str, Any]:
    """Run the demo in ``out``; an interrupted one goes on. Returns what ``report.json`` holds.

    ``overrides`` change its configuration, such as ``optimizer.ire.kappa=1``. Raises Interrupted
    when training was stopped.
    """
    started = time.perf_counter()
    config = load_config(CONFIG, overrides)
    _headline("1/5  training in two stages (warmup without memory, continual with it)")
    result = train(config, out)
    if result.interrupted:
        raise Interrupted(f"step {result.step} is done; the same command goes on from there")
    model = load_model(out)

    _headline(f"2/5  writing a bank of fresh facts (seed {FACTS_SEED}) and asking about them")
    recall = evaluate_facts(model, seed=FACTS_SEED, questions=QUESTIONS, folder=out)
    print(
        f"exact match on {recall.n} questions: {recall.memory:.3f} with memory, "
        f"{recall.off:.3f} without, {recall.shuffled:.3f} with the bank shuffled"
    )

    _headline("3/5  writing the bank of the training documents")
    documents = load_documents(config.data.source, limit_bytes=config.data.limit_bytes)
    training, held_out = split_documents(
        documents, validation_fraction=config.data.validation_fraction, seed=config.data_seed
    )
    written = write_bank(model, training, str(out / "bank"))

    _headline("4/5  scoring held-out text with memory on, off and shuffled (lag 1)")
    text, gains, scores = _score_text(model, out, _some(held_out, TEXT_BYTES))
    plots = [
        plot_recall(recall, out / "facts.png", chance=1 / len(RELATIONS[0].values)),
        plot_gain(gains, scores["off"], scores["on"], out / "text.png"),
    ]

    _headline("5/5  asking one question, with citations")
    _ask(model, out)
    report = {
        "facts": {"memory": recall.memory, "off": recall.off, "shuffled": recall.shuffled},
        "text": text,
        "seconds": round(time.perf_counter() - started, 1),
        "tokens_per_second": _median_speed(out),
        "parameters": parameter_count(model.config.model),
        "bank_bytes": written.bytes,
        "peak_memory_bytes": _peak_memory(),
    }
    write_json(out / "report.json", report)
    print(f"\nplots: {plots[0]}  {plots[1]}\nreport: {out / 'report.json'}")
    return report


def _headline(text: str) -> None:
    print(f"\n== {text}", flush=True)


def _some(documents: list[Document], size: int) -> list[Document]:
    """The first documents that make up ``size`` bytes, none longer than a quarter of it."""
    chosen, total = [], 0
    for document in documents:
        length = len(document.text.encode())
        if length <= size // 4 and total < size:
            chosen.append(document)
            total += length
    return chosen


def _score_text(model: LoadedModel, out: Path, documents: list[Document]):
    bank = Bank.open(str(out / "bank"), identity=model.identity)
    reader = MemoryReader.open(bank, model_embed=model.embed_texts)
    scores = {
        mode: score_documents(model, documents, memory=mode, lag=1, reader=reader)
        for mode in ("on", "off", "plain", "shuffled")
    }
    # "Off" has two readings; the better one is what memory has to beat.
    if scores["plain"].bits_per_byte < scores["off"].bits_per_byte:
        scores["off"] = scores["plain"]
    against_off = gain(scores["off"], scores["on"])
    gains = [
        ("against off", against_off),
        ("against shuffled", gain(scores["shuffled"], scores["on"])),
    ]
    text = {
        "lag": 1,
        "bpb_memory": _bits(scores["on"]),
        "bpb_off": _bits(scores["off"]),
        "bpb_shuffled": _bits(scores["shuffled"]),
        "ci95_gain": [round(against_off.low, 5), round(against_off.high, 5)],
    }
    print(
        f"bits per byte of {len(documents)} documents: {text['bpb_memory']} with memory, "
        f"{text['bpb_off']} without, {text['bpb_shuffled']} shuffled; "
        f"gain {against_off.value:+.5f}, 95 % interval {text['ci95_gain']}"
    )
    return text, gains, scores


def _bits(scores: DocumentScores) -> float:
    return round(scores.bits_per_byte, 5)


def _ask(model: LoadedModel, out: Path) -> None:
    fact = draw_facts(FACTS_SEED, 1)[0]
    bank = Bank.open(str(out / "facts_bank"), identity=model.identity)
    engine = Engine(model, MemoryReader.open(bank, model_embed=model.embed_texts), rows=1)
    question = prompt(fact.question)
    (answer,) = engine.generate([question], max_tokens=ANSWER_TOKENS, stop="\n")
    print(f"{question}{answer.text}\n(the bank says: {fact.statement})")
    print_citations(answer.citations)


def _median_speed(out: Path) -> float:
    """Tokens per second of the continual stage's median step."""
    lines = read_metrics(out)
    speeds = sorted(
        line["tokens_per_second"]
        for line in lines
        if line["stage"] == "continual" and line.get("tokens_per_second")
    )
    return round(speeds[len(speeds) // 2], 1) if speeds else 0.0


def _peak_memory() -> int:
    """Largest resident size of this process so far, in bytes."""
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
