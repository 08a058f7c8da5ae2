"""What is timed on a GPU, and for how long: as data, so that tests can run the same on a CPU."""

import dataclasses


@dataclasses.dataclass(frozen=True)
class Sizes:
    """Sizes of one run; the defaults are the paper's model and the project's aims.

    attention: queries and head dim of each comparison; tokens: queries of all sequences of a batch.
    codebook_bits: of a half and of a part of the residual. cold_bytes: arrays that decoding reads
    in turn before it comes back to the first, well beyond a GPU's second-level cache; most_caches
    bounds their number. run_seconds: about how long one turn of a contestant should last.
    limit_seconds: no contestant begins after.
    """

    attention: tuple[tuple[int, int], ...] = ((2048, 80), (2048, 128), (8192, 80), (8192, 128))
    tokens: int = 8192
    heads: int = 40
    kv_heads: int = 8
    head_dim: int = 80
    chunk: int = 64
    band: int = 5
    slots: int = 8
    preface: int = 3
    decode_batches: tuple[int, ...] = (1, 32, 256)
    decode_lengths: tuple[int, ...] = (512, 4096)
    decode_slots: int = 40
    cold_bytes: int = 1 << 28
    most_caches: int = 16
    references: int = 64
    reference_tokens: int = 128
    kept: int = 8
    layers: int = 22
    bank_slots: int = 28160
    codebook_bits: tuple[int, int] = (14, 10)
    codebook_parts: int = 8
    copy_bytes: int = 1 << 30
    repetitions: int = 7
    run_seconds: float = 0.02
    limit_seconds: float = 400.0
