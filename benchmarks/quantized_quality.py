"""What a codec costs in quality: recall of facts and bits per byte, quantized beside raw.

    python benchmarks/quantized_quality.py --run runs/demo --data DOCUMENTS --json FILE

For each codec the bank of the demo's facts and the bank of its text are quantized, and the same
questions and documents are asked and scored with both. Intervals over questions (paired, normal)
and over documents (paired bootstrap).
"""

import argparse
import dataclasses
import sys
import tempfile
from pathlib import Path

import numpy as np

from jaxlab.data.facts import draw_facts, prompt
from jaxlab.data.sources import load_documents
from jaxlab.evaluation.facts import ANSWER_TOKENS
from jaxlab.evaluation.perplexity import gain, score_documents
from jaxlab.inference.engine import Engine
from jaxlab.memory.library import open_reader
from jaxlab.memory.requantize import quantize_bank
from jaxlab.memory.store import Bank
from jaxlab.tools.output import machine, script_command, write_json
from jaxlab.training.load import load_model
from jaxlab.workloads.demo import FACTS_SEED

CODECS = ("OPQ8_32,Residual2x10,PQ8x8", "OPQ8_32,Residual2x8,PQ8x8", "OPQ8_32,Residual2x8,PQ4x8")
PACKAGES = ("jax", "faiss-cpu")


def _right(model, url: str, questions: int) -> np.ndarray:
    """Whether each question is answered letter for letter."""
    engine = Engine(model, open_reader(model, url), rows=32)
    facts = draw_facts(FACTS_SEED, questions)
    asked = [prompt(fact.question) for fact in facts]
    answers = engine.generate(asked, max_tokens=ANSWER_TOKENS, stop="\n")
    return np.array([a.text.strip() == f.answer for a, f in zip(answers, facts, strict=True)])


def _scores(model, url: str, documents):
    return score_documents(model, documents, memory="on", lag=1, reader=open_reader(model, url))


def main() -> int:
    """Quantize, ask, score, write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--run", required=True, help="what `jaxlab demo` left")
    parser.add_argument("--data", required=True, help="text to score")
    parser.add_argument("--limit-bytes", type=int, default=60_000)
    parser.add_argument("--questions", type=int, default=1000)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    model = load_model(args.run)
    documents = load_documents(args.data, limit_bytes=args.limit_bytes)
    facts, text = (str(Path(args.run) / name) for name in ("facts_bank", "bank"))
    right, scores = _right(model, facts, args.questions), _scores(model, text, documents)
    results = {}
    for codec in CODECS:
        with tempfile.TemporaryDirectory() as folder:
            lost = quantize_bank(Bank.open(facts), f"{folder}/facts", codec=codec)
            quantize_bank(Bank.open(text), f"{folder}/text", codec=codec)
            theirs = _right(model, f"{folder}/facts", args.questions)
            scored = _scores(model, f"{folder}/text", documents)
        change = theirs.astype(float) - right
        against = gain(scored, scores)
        results[codec] = {
            **dataclasses.asdict(lost),
            "recall": float(theirs.mean()),
            "recall_change": float(change.mean()),
            "recall_change_error95": 1.96 * float(change.std() / len(change) ** 0.5),
            "bpb": scored.bits_per_byte,
            "bpb_change": against.value,
            "bpb_change_interval95": [against.low, against.high],
        }
        print(codec, results[codec], flush=True)
    report = {
        "machine": machine(PACKAGES),
        "command": script_command(),
        "raw": {"recall": float(right.mean()), "bpb": scores.bits_per_byte},
        "questions": args.questions,
        "documents": len(documents),
        "results": results,
    }
    if args.json:
        write_json(args.json, report)
    return 0


if __name__ == "__main__":
    sys.exit(main())
