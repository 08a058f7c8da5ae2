"""Write a bank and score documents with it, alone or together with other processes.

``python -m tests.sharding.bank_by_all RUN CORPUS BANK`` prints one JSON object, in every process.
"""

import json
import sys

from jaxlab.sharding.multihost import joined


def main(run: str, corpus: str, url: str) -> dict:
    """What was written and the nats of each document, with memory and without."""
    from jaxlab.data.sources import load_documents
    from jaxlab.evaluation.perplexity import score_documents
    from jaxlab.memory.pipeline import write_bank
    from jaxlab.memory.read import MemoryReader
    from jaxlab.memory.store import Bank
    from jaxlab.training.load import load_model

    model, documents = load_model(run), load_documents(corpus)
    lines = []
    # Eleven shards: the last round has a process too many.
    written = write_bank(model, documents[:32], url, shard_references=48, report=lines.append)
    bank = Bank.open(url, identity=model.identity)
    reader = MemoryReader.open(bank, model_embed=model.embed_texts)
    held_out = documents[32:]
    with_memory = score_documents(model, held_out, memory="on", reader=reader)
    without = score_documents(model, held_out, memory="off")
    return {
        "references": written.references,
        "shards": len(bank.shards),
        "sound": bank.verify().ok,
        "on": with_memory.nats.tolist(),
        "off": without.nats.tolist(),
        "said": lines,
    }


if __name__ == "__main__":
    with joined():
        print(json.dumps(main(*sys.argv[1:])))
