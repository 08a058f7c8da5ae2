"""What a piece of knowledge costs as parameters, as explicit memory and as text in the context.

Memory³ §1 equation 1 and appendix A: a format is worth its write cost plus the read cost times the
number of uses, so each format is the cheapest for some range of uses. A multiply-add counts as two
FLOPs; norms, embeddings and rotations are left out, as in the paper.
"""

import dataclasses

from jaxlab.config import MemoryConfig, ModelConfig


@dataclasses.dataclass(frozen=True)
class KnowledgeCost:
    """FLOPs for one reference: writing it once, reading it in one chunk.

    The read cost of parameters and the write cost of text are zero.
    """

    parameters_write: float
    memory_write: float
    memory_read: float
    text_read: float

    @property
    def uses(self) -> tuple[float, float]:
        """Explicit memory is the cheapest format between these two numbers of uses."""
        fewest = self.memory_write / (self.text_read - self.memory_read)
        most = (self.parameters_write - self.memory_write) / self.memory_read
        return fewest, most


def knowledge_cost(
    model: ModelConfig, memory: MemoryConfig, *, training_length: int
) -> KnowledgeCost:
    """The cost of one full reference for a model (appendix A.1 to A.3).

    ``training_length`` is the length in tokens of the sequences that would teach the reference to
    the parameters: one step, backward twice the forward. The cost of text is a lower bound: one
    chunk reads the reference, which itself attends to nothing else.
    """
    length, chunk, kept = memory.reference_length, memory.chunk_length, memory.tokens_kept
    width = model.heads * model.head_dim
    projections = length * 2 * width * (width + model.head_dim * model.kv_heads)
    feed_forward = length * 3 * width * model.ffn_width

    def attention(keys: float) -> float:
        """Scores and weighted sum of a reference's queries over so many keys each."""
        return 2 * length * keys * width

    # Every layer over a share of a long sequence, half of it visible on average, and the head.
    layer = projections + feed_forward + attention(training_length / 2)
    training = model.layers * layer + length * model.vocab_size * width
    # Writing ends with the keys and values of the last memory layer, before its feed-forward part;
    # choosing the tokens takes one more product of queries and keys, without the causal mask.
    selection = length * length * width
    writing = model.memory_layers * (projections + attention(length / 2) + selection)
    writing += (model.memory_layers - 1) * feed_forward
    reading = model.memory_layers * 2 * chunk * kept * width
    text = model.layers * (projections + attention(length / 2 + chunk))
    text += (model.layers - 1) * feed_forward
    return KnowledgeCost(3 * 2.0 * training, 2.0 * writing, 2.0 * reading, 2.0 * text)
