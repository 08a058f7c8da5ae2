"""Named model shapes. Values are the papers'; a configuration's own keys override them."""

from typing import Any

# Memory³ §3.4: 44 blocks, 40 query and 8 key-value heads of 80, feed-forward as wide as the model,
# the first half of the layers reads memory; appendix A: vocabulary padded to 60416.
_MEMORY3_2B = dict(
    vocab_size=60416,
    layers=44,
    heads=40,
    kv_heads=8,
    head_dim=80,
    ffn_width=3200,
    memory_layers=22,
    remat="full",
)

# Memory³ figure 11, the ablation model.
_MEMORY3_0_9B = dict(
    vocab_size=60416,
    layers=40,
    heads=32,
    kv_heads=8,
    head_dim=64,
    ffn_width=2048,
    memory_layers=20,
    remat="full",
)

# In the proportions of the larger ones, with their heads of 80: what a CPU can serve.
_MEMORY3_60M = dict(
    vocab_size=16384,
    layers=16,
    heads=8,
    kv_heads=2,
    head_dim=80,
    ffn_width=1280,
    memory_layers=8,
)

# IRE (arXiv 2405.20763) section 5: three Llama sizes over GPT-2's 50,257 tokens, padded to 50304.
# The paper's 60M model is 410 wide with 10 heads; a head of 41 cannot be rotated in halves, so ours
# has heads of 42.
_LLAMA_60M = dict(
    vocab_size=50304,
    layers=16,
    heads=10,
    kv_heads=10,
    head_dim=42,
    ffn_width=1680,
    tied_embeddings=True,
)

# 6 layers, 12 heads, width 768; the feed-forward width is the one that gives the paper's 119 M.
_LLAMA_119M = dict(
    vocab_size=50304,
    layers=6,
    heads=12,
    kv_heads=12,
    head_dim=64,
    ffn_width=2048,
)

_LLAMA_229M = dict(
    vocab_size=50304,
    layers=16,
    heads=12,
    kv_heads=12,
    head_dim=64,
    ffn_width=3072,
)

PRESETS: dict[str, dict[str, Any]] = {
    "memory3-2b": _MEMORY3_2B,
    "memory3-0.9b": _MEMORY3_0_9B,
    "memory3-60m": _MEMORY3_60M,
    "llama-60m": _LLAMA_60M,
    "llama-119m": _LLAMA_119M,
    "llama-229m": _LLAMA_229M,
}
