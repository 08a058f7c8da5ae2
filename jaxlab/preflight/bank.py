"""What a bank of so many references will take: bytes, files, index, hours to write, bandwidth."""

import dataclasses
import math

from jaxlab.config import MemoryConfig, ModelConfig
from jaxlab.errors import ConfigError
from jaxlab.memory.cost import knowledge_cost
from jaxlab.memory.pipeline import SHARD_REFERENCES
from jaxlab.preflight.chips import Topology

# The paper's vector quantizer, for vectors of 80 numbers (Memory³, §3.3 and appendix B): two
# codebooks of 2^14 entries and eight of 2^10, 108 bits.
CODEC, CODEC_WIDTH, CODEC_BYTES = "OPQ20_80,Residual2x14,PQ8x10", 80, 14
# A search index that stores every vector whole, and one that keeps a code of 64 bytes and a number.
EXACT_BYTES, CODED_BYTES = 4, 64 + 8
# What exact search is still good for; beyond, its index would fill the memory of a host.
EXACT_LIMIT = 10_000_000


@dataclasses.dataclass(frozen=True)
class BankEstimate:
    """Bytes, seconds and bytes a second.

    quantized_*: None where the codec does not fit the model's heads. index: exact or ivf-pq.
    read_*: of one host that decodes so many tokens a second and reads every memory from the bank.
    """

    references: int
    reference_bytes: int
    quantized_reference_bytes: int | None
    bytes: int
    quantized_bytes: int | None
    codec: str | None
    shards: int
    index: str
    index_bytes: int
    write_flops: float
    write_seconds: float | None
    write_chips: int | None
    write_mfu: float
    tokens_per_second: float
    read_bytes_per_second: float
    quantized_read_bytes_per_second: float | None


def estimate_bank(
    model: ModelConfig,
    memory: MemoryConfig,
    *,
    references: int,
    dimension: int,
    tokens_per_second: float,
    where: Topology | None = None,
    mfu: float = 0.4,
) -> BankEstimate:
    """Of full references (Memory³, §3.3); ``dimension`` is of the vectors that are searched.

    The time to write supposes ``mfu``, the share of the chips' peak. Raises ConfigError for a model
    without memory.
    """
    if not model.memory_layers:
        raise ConfigError("model.memory_layers is 0: such a model writes no bank")
    vectors = model.memory_layers * 2 * model.kv_heads * memory.tokens_kept
    item = 2 if model.compute_dtype == "bfloat16" else 4
    raw = vectors * model.head_dim * item
    coded = vectors * CODEC_BYTES if model.head_dim == CODEC_WIDTH else None
    exact = references <= EXACT_LIMIT
    flops = (
        references
        * knowledge_cost(model, memory, training_length=memory.reference_length).memory_write
    )
    reads = memory.references_per_chunk * tokens_per_second / memory.chunk_length
    return BankEstimate(
        references=references,
        reference_bytes=raw,
        quantized_reference_bytes=coded,
        bytes=references * raw,
        quantized_bytes=coded and references * coded,
        codec=coded and CODEC,
        shards=math.ceil(references / SHARD_REFERENCES),
        index="exact" if exact else "ivf-pq",
        index_bytes=references * (dimension * EXACT_BYTES if exact else CODED_BYTES),
        write_flops=flops,
        write_seconds=where and flops / (where.chips * where.chip.flops * mfu),
        write_chips=where and where.chips,
        write_mfu=mfu,
        tokens_per_second=tokens_per_second,
        read_bytes_per_second=reads * raw,
        quantized_read_bytes_per_second=coded and reads * coded,
    )


def in_words(found: BankEstimate) -> list[str]:
    """The estimate in lines for people."""
    tib = 2.0**40
    lines = [
        f"{found.references:,} references of {found.reference_bytes:,} bytes: "
        f"{found.bytes / tib:.3g} TiB in {found.shards:,} shards"
    ]
    if found.codec:
        lines.append(
            f"quantized ({found.codec}): {found.quantized_reference_bytes:,} bytes a reference, "
            f"{found.quantized_bytes / tib:.3g} TiB"
        )
    lines.append(f"index, {found.index}: {found.index_bytes / 2**30:,.3g} GiB")
    if found.write_seconds is not None:
        lines.append(
            f"writing: {found.write_flops:.3g} FLOPs, {found.write_seconds / 3600:,.3g} hours on "
            f"{found.write_chips} chips at {found.write_mfu:.0%} of their peak"
        )
    read = f"decoding {found.tokens_per_second:,.0f} tokens a second reads "
    read += f"{found.read_bytes_per_second / 2**20:,.4g} MiB a second"
    if found.codec:
        read += f", quantized {found.quantized_read_bytes_per_second / 2**20:,.4g}"
    return [*lines, read + ", less what a cache holds"]
