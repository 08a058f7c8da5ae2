"""Recall of facts that exist only in the bank: exact match, with memory, without, and shuffled."""

import dataclasses
import tempfile
from collections.abc import Callable
from pathlib import Path

import numpy as np

from jaxlab.data.facts import Fact, draw_facts, prompt
from jaxlab.data.sources import Document
from jaxlab.inference.engine import Engine, Generation
from jaxlab.memory.pipeline import write_bank
from jaxlab.memory.read import MemoryReader
from jaxlab.memory.store import Bank
from jaxlab.training.load import LoadedModel

# Room for an answer of any length that occurs.
ANSWER_TOKENS = 32
_ROWS = 32


@dataclasses.dataclass(frozen=True)
class Recall:
    """Share of questions answered exactly, and how often retrieval brought the statement."""

    memory: float
    off: float
    shuffled: float
    n: int
    retrieved: float


def evaluate_facts(
    model: LoadedModel,
    *,
    seed: int,
    questions: int = 500,
    bank_facts: int = 1500,
    folder: str | Path | None = None,
    report: Callable[[str], None] = print,
) -> Recall:
    """Write a bank of fresh facts, ask about some of them, compare sentences letter by letter.

    The bank goes to ``folder`` (kept) or to a temporary one. ``seed`` must not be one that training
    saw; the facts of different seeds share words but no person's name by design.
    """
    model.require_memory()
    facts = draw_facts(seed, max(bank_facts, questions))
    chosen = np.random.default_rng([seed, 1]).permutation(len(facts))[:questions]
    asked = [facts[number] for number in sorted(chosen)]
    with tempfile.TemporaryDirectory() as scratch:
        url = str(Path(folder or scratch) / "facts_bank")
        documents = [
            Document(id=f"facts:{seed}/{number}", text=fact.statement)
            for number, fact in enumerate(facts)
        ]
        write_bank(model, documents, url, report=report)
        reader = MemoryReader.open(
            Bank.open(url, identity=model.identity), model_embed=model.embed_texts
        )
        engine = Engine(model, reader, rows=_ROWS)
        with_memory, shuffled, off = (
            _answers(engine, asked, memory=mode) for mode in ("on", "shuffled", "off")
        )
    plain = _answers(Engine(model, rows=_ROWS), asked)
    return Recall(
        memory=_share(asked, with_memory),
        # Of the two readings of "without memory" the better one.
        off=max(_share(asked, off), _share(asked, plain)),
        shuffled=_share(asked, shuffled),
        n=len(asked),
        retrieved=float(
            np.mean(
                [
                    any(fact.statement == citation.text for citation in answer.citations)
                    for fact, answer in zip(asked, with_memory, strict=True)
                ]
            )
        ),
    )


def _answers(engine: Engine, asked: list[Fact], memory: str = "on") -> list[Generation]:
    prompts = [prompt(fact.question) for fact in asked]
    return engine.generate(prompts, max_tokens=ANSWER_TOKENS, stop="\n", memory=memory)


def _share(asked: list[Fact], answers: list[Generation]) -> float:
    right = [a.text.strip() == f.answer for f, a in zip(asked, answers, strict=True)]
    return float(np.mean(right))
