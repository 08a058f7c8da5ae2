"""References as text before the prompt: what explicit memory is compared with (RAG).

The same model, the same bank and the same search, but what was found is read by every layer as part
of the context (Memory³ §7.5: one retrieval, by the last 64 tokens, five references at the start).
"""

from jaxlab.data.tokenizer import REFERENCE_PREFACE, Tokenizer
from jaxlab.inference.requests import Citation
from jaxlab.memory.read import MemoryReader

_END = "\n"


def most_tokens(reader: MemoryReader, tokenizer: Tokenizer) -> int:
    """The tokens that references add to a prompt at most."""
    around = len(tokenizer.encode(REFERENCE_PREFACE)) + len(tokenizer.encode(_END))
    return reader.per_chunk * (reader.bank.spec.reference_length + around)


def augment(
    reader: MemoryReader, tokenizer: Tokenizer, prompt: list[int]
) -> tuple[list[int], tuple[Citation, ...]]:
    """The prompt behind the references that its end retrieves, the nearest last; and these."""
    hits = reader.search([tokenizer.decode(prompt[-reader.bank.spec.chunk_length :])])
    found = [hit for hit in hits.ids[0].tolist() if hit >= 0]
    texts = reader.bank.references(found)
    length = reader.bank.spec.reference_length
    before: list[int] = []
    for reference in reversed(texts):
        before += tokenizer.encode(REFERENCE_PREFACE)
        # As its memory was written: the text of one cut inside a character has more tokens.
        before += (reference.ids or tokenizer.encode(reference.text))[:length]
        before += tokenizer.encode(_END)
    scores = hits.scores[0].tolist()
    cited = (
        Citation(0, hit, score, reference.source, reference.text)
        for hit, score, reference in zip(found, scores, texts, strict=False)
    )
    return before + prompt, tuple(cited)
