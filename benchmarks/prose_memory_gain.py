"""What reading memory is worth on real text: memory against no memory from one warmup checkpoint.

    python benchmarks/prose_memory_gain.py --source DOCUMENTS.jsonl.xz --out runs/prose \
        --json benchmarks/results/prose_memory_gain.json

Trains configs/memory3_prose.yaml (warmup, then continual with memory) and its control (the same
continual stage without memory, from the same warmup weights, for as many tokens of the same rows),
writes the bank of the training documents with the memory model, and scores the held-out documents
at lag 1 (and lag 0) with the paired bootstrap over documents. Goes on where it was stopped.
"""

import argparse
import dataclasses
import json
from pathlib import Path

from jaxlab.config import load_config
from jaxlab.data.sources import load_documents, split_documents
from jaxlab.evaluation.perplexity import DocumentScores, gain, score_documents
from jaxlab.memory.pipeline import write_bank
from jaxlab.memory.read import MemoryReader
from jaxlab.memory.store import Bank
from jaxlab.models.decoder import parameter_count
from jaxlab.tools.output import machine, script_command, write_json
from jaxlab.tools.plots import plot_gain
from jaxlab.training.load import load_model
from jaxlab.training.loop import train

CONFIG = Path(__file__).parents[1] / "configs" / "memory3_prose.yaml"


def _describe(scores: DocumentScores) -> dict:
    return {
        "bits_per_byte": scores.bits_per_byte,
        "nats_per_token": float(scores.nats.sum() / scores.tokens.sum()),
    }


def _compare(without: DocumentScores, with_memory: DocumentScores) -> dict:
    return {
        "bits_per_byte": dataclasses.asdict(gain(without, with_memory)),
        "nats_per_token": dataclasses.asdict(gain(without, with_memory, per="token")),
    }


def main() -> None:
    """Train, write, score, report."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--source", required=True, help="documents, as for jaxlab train")
    parser.add_argument("--out", required=True, type=Path)
    parser.add_argument("--json", required=True, type=Path)
    parser.add_argument("--set", nargs="+", action="extend", default=[], metavar="KEY=VALUE")
    parser.add_argument("--held-out-bytes", type=int, default=None)
    arguments = parser.parse_args()

    memory_run, control_run = arguments.out / "memory", arguments.out / "control"
    overrides = [f"data.source={json.dumps(arguments.source)}", *arguments.set]
    config = load_config(CONFIG, overrides)
    if train(config, memory_run).interrupted:
        return
    # The control's rows, order and schedule are those of the memory run; only the reading differs.
    without = ["stages.warmup=null", "stages.continual.memory=false"]
    without += [f"init_from={json.dumps(f'{memory_run}@warmup')}"]
    without += [f"tokenizer.path={json.dumps(str(memory_run / 'data' / 'tokenizer.model'))}"]
    control_config = load_config(CONFIG, [*overrides, *without])
    if train(control_config, control_run).interrupted:
        return

    documents = load_documents(config.data.source, limit_bytes=config.data.limit_bytes)
    training, held_out = split_documents(
        documents, validation_fraction=config.data.validation_fraction, seed=config.seed
    )
    if arguments.held_out_bytes:
        held_out = _first(held_out, arguments.held_out_bytes)
    memory, control = load_model(memory_run), load_model(control_run)
    write_bank(memory, training, str(arguments.out / "bank"))
    bank = Bank.open(str(arguments.out / "bank"), identity=memory.identity)
    reader = MemoryReader.open(bank, model_embed=memory.embed_texts)

    def score(model, mode, lag=1):
        print(f"scoring {len(held_out)} documents: {model.config.name}, {mode}, lag {lag}")
        return score_documents(model, held_out, memory=mode, lag=lag, reader=reader)

    scores = {
        "memory lag 1": score(memory, "on"),
        "memory lag 0": score(memory, "on", 0),
        "shuffled lag 1": score(memory, "shuffled"),
        "same model, preface without memories": score(memory, "off"),
        "same model, plain": score(memory, "plain"),
        "control (continued without memory)": score(control, "plain"),
        "warmup checkpoint": score(load_model(f"{memory_run}@warmup"), "plain"),
    }
    best = scores["memory lag 1"]
    names = [name for name in scores if name != "memory lag 1"]
    result = {
        "command": script_command(),
        "machine": machine(),
        "parameters": parameter_count(memory.config.model),
        "tokens": {
            stage: part.steps * part.batch_size * config.data.sequence_length
            for stage, part in config.stages.named().items()
        },
        "documents": len(held_out),
        "bytes": int(best.bytes.sum()),
        "references": len(bank),
        "scores": {name: _describe(value) for name, value in scores.items()},
        "gain_of_memory_lag_1_over": {name: _compare(scores[name], best) for name in names},
    }
    write_json(arguments.json, result)
    print(json.dumps(result, indent=2))
    control_scores = scores["control (continued without memory)"]
    plot_gain(
        [
            ("against the control", gain(control_scores, best)),
            ("against shuffled", gain(scores["shuffled lag 1"], best)),
        ],
        control_scores,
        best,
        arguments.json.with_suffix(".png"),
    )


def _first(documents: list, size: int) -> list:
    chosen, total = [], 0
    for document in documents:
        if total >= size:
            break
        chosen.append(document)
        total += len(document.text.encode())
    return chosen


if __name__ == "__main__":
    main()
