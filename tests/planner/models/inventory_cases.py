"""Configurations of Llama-like and mixture-of-experts decoders, small and odd: each row bends one thing."""

from __future__ import annotations

from typing import Any

SIZES: dict[str, Any] = {
    "vocab_size": 97, "hidden_size": 48, "intermediate_size": 100, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64,
}  # fmt: skip
WIDE: dict[str, Any] = {
    "vocab_size": 101, "hidden_size": 64, "intermediate_size": 72, "num_hidden_layers": 3,
    "num_attention_heads": 4, "num_key_value_heads": 1, "head_dim": 24, "max_position_embeddings": 128,
}  # fmt: skip
SKEWED = {**WIDE, "hidden_size": 66}
"""The heads do not divide the hidden size, which is of no consequence once `head_dim` is given."""
PHI3 = {**SIZES, "pad_token_id": 0}
FULL_HEADS = {**SIZES, "num_key_value_heads": 4}
TIED = {"tie_word_embeddings": True}
UNTIED = {"tie_word_embeddings": False}
LONGROPE = {"type": "longrope", "short_factor": [1.0] * 6, "long_factor": [2.0] * 6}
PARTIAL_LINEAR = {"rope_type": "linear", "factor": 2.0, "partial_rotary_factor": 0.4}
LLAMA3_ROPE = {
    "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}  # fmt: skip
EXPERTS = {"num_experts": 6, "num_experts_per_tok": 2}
LOCAL_EXPERTS = {"num_local_experts": 5, "num_experts_per_tok": 1}

CASES: list[tuple[str, dict[str, Any]]] = [
    ("llama", SIZES),
    ("llama", {**{k: v for k, v in SIZES.items() if k != "num_key_value_heads"}, **TIED}),
    ("llama", {**WIDE, **TIED, "attention_bias": True, "mlp_bias": True, "rope_parameters": PARTIAL_LINEAR}),
    ("llama", {**SIZES, "rope_scaling": LLAMA3_ROPE, "rope_theta": 5e5}),
    ("llama", {**SIZES, "attention_bias": True, "head_dim": None, "num_key_value_heads": None}),
    ("mistral", SIZES),
    ("mistral", {**SKEWED, **TIED, "sliding_window": None}),
    ("mistral", {**FULL_HEADS, "sliding_window": 16}),
    ("mixtral", {**SIZES, **LOCAL_EXPERTS}),
    ("mixtral", {**WIDE, **TIED, **EXPERTS, "sliding_window": 16}),
    ("qwen2", SIZES),
    ("qwen2", {**WIDE, **TIED, "use_sliding_window": True, "sliding_window": 16, "max_window_layers": 1}),
    ("qwen2", {**FULL_HEADS, "num_key_value_heads": None, "rope_scaling": {"type": "yarn", "factor": 4.0}}),
    ("qwen3", {**SIZES, **TIED}),
    ("qwen3", {**SKEWED, "attention_bias": True}),
    ("qwen3", {**FULL_HEADS, "head_dim": 128, "use_sliding_window": True, "max_window_layers": 1}),
    ("qwen3_moe", {**SIZES, **EXPERTS, "moe_intermediate_size": 20}),
    ("qwen3_moe", {**WIDE, **TIED, **LOCAL_EXPERTS, "moe_intermediate_size": 28, "attention_bias": True}),
    (
        "qwen3_moe",
        {**WIDE, **EXPERTS, "num_hidden_layers": 6, "moe_intermediate_size": 20, "decoder_sparse_step": 2,
         "mlp_only_layers": [3]},
    ),
    ("gemma", {**SIZES, "head_dim": 32}),
    ("gemma", {**SKEWED, **UNTIED, "attention_bias": True, "hidden_act": "gelu_new"}),
    ("gemma", FULL_HEADS),
    ("gemma2", {**SIZES, "head_dim": 32}),
    ("gemma2", {**WIDE, **UNTIED, "attention_bias": True, "sliding_window": 16}),
    ("gemma3_text", {**SIZES, "head_dim": 32}),
    ("gemma3_text", {**WIDE, "num_hidden_layers": 7, "sliding_window_pattern": 3, "rope_scaling": PARTIAL_LINEAR}),
    (
        "gemma3_text",
        {**WIDE, **UNTIED, "attention_bias": True,
         "layer_types": ["full_attention", "sliding_attention", "full_attention"]},
    ),
    ("gemma3_text", {"hidden_size": 40, "intermediate_size": 30, "num_hidden_layers": 6}),
    ("gemma3_text", {**WIDE, "num_hidden_layers": 1, "layer_types": ["full_attention"]}),
    ("phi", {**FULL_HEADS, "partial_rotary_factor": 0.4, "qk_layernorm": True}),
    ("phi", {**SIZES, **TIED}),
    ("phi", {**WIDE, "rope_parameters": {"rope_type": "default", "partial_rotary_factor": 0.25}}),
    ("phi3", PHI3),
    ("phi3", {**PHI3, **TIED, "num_key_value_heads": None, "rope_scaling": LONGROPE}),
    ("phi3", {**WIDE, "pad_token_id": 0, "partial_rotary_factor": 0.75, "sliding_window": 16}),
    ("phi3", {**PHI3, "rope_scaling": {**LONGROPE, "type": "su", "original_max_position_embeddings": 32}}),
    ("olmo2", SIZES),
    ("olmo2", {**SKEWED, **TIED, "attention_bias": True}),
    ("olmoe", {**SIZES, **EXPERTS}),
    ("olmoe", {**SKEWED, **TIED, **EXPERTS, "attention_bias": True, "clip_qkv": 8.0}),
    ("starcoder2", SIZES),
    ("starcoder2", {**WIDE, **UNTIED, "use_bias": False, "sliding_window": 16}),
]  # fmt: skip
