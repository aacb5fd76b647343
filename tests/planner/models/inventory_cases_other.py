"""Configurations of the other families: GPT-2, BERT, RoBERTa, OPT, GPT-NeoX, BLOOM, Falcon, T5, ViT."""

from typing import Any

CASES: list[tuple[str, dict[str, Any]]] = [
    ("gpt2", {"vocab_size": 97, "n_embd": 48, "n_layer": 2, "n_head": 4, "n_positions": 64}),
    (
        "gpt2",
        {
            "vocab_size": 101, "n_embd": 60, "n_layer": 3, "n_head": 5, "n_inner": 77, "n_positions": 33,
            "tie_word_embeddings": False,
        },
    ),
    (
        "gpt2",
        {
            "vocab_size": 53, "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2,
            "max_position_embeddings": 16, "n_inner": None,
        },
    ),
    (
        "bert",
        {
            "vocab_size": 97, "hidden_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
            "intermediate_size": 100, "max_position_embeddings": 40, "type_vocab_size": 3,
        },
    ),
    (
        "bert",
        {
            "vocab_size": 101, "hidden_size": 64, "num_hidden_layers": 3, "num_attention_heads": 2,
            "intermediate_size": 72, "tie_word_embeddings": False,
        },
    ),
    (
        "roberta",
        {
            "vocab_size": 97, "hidden_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
            "intermediate_size": 100, "max_position_embeddings": 42, "type_vocab_size": 1,
        },
    ),
    (
        "roberta",
        {
            "vocab_size": 101, "hidden_size": 64, "num_hidden_layers": 1, "num_attention_heads": 8,
            "intermediate_size": 72, "tie_word_embeddings": False,
        },
    ),
    (
        "opt",
        {
            "vocab_size": 97, "hidden_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "ffn_dim": 100,
            "max_position_embeddings": 40,
        },
    ),
    (
        # As opt-350m: post-norm, narrow embeddings.
        "opt",
        {
            "vocab_size": 101, "hidden_size": 64, "num_hidden_layers": 3, "num_attention_heads": 2, "ffn_dim": 72,
            "word_embed_proj_dim": 24, "do_layer_norm_before": False,
        },
    ),
    (
        "opt",
        {
            "vocab_size": 89, "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "ffn_dim": 40,
            "enable_bias": False, "layer_norm_elementwise_affine": False, "tie_word_embeddings": False,
        },
    ),
    (
        "opt",
        {
            "vocab_size": 89, "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "ffn_dim": 40,
            "_remove_final_layer_norm": True,
        },
    ),
    (
        "gpt_neox",
        {
            "vocab_size": 97, "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
            "intermediate_size": 100,
        },
    ),
    (
        "gpt_neox",
        {
            "vocab_size": 101, "hidden_size": 120, "num_hidden_layers": 3, "num_attention_heads": 6,
            "intermediate_size": 72, "rotary_pct": 0.5, "attention_bias": False, "tie_word_embeddings": True,
        },
    ),
    (
        "gpt_neox",
        {
            "vocab_size": 101, "hidden_size": 76, "num_hidden_layers": 1, "num_attention_heads": 2,
            "intermediate_size": 72, "rope_parameters": {"rope_type": "default", "partial_rotary_factor": 0.3},
        },
    ),
    (
        "gpt_neox",
        {
            "vocab_size": 101, "hidden_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2,
            "intermediate_size": 72, "rotary_pct": 1.0, "rope_scaling": {"type": "linear", "factor": 2.0},
        },
    ),
    ("bloom", {"vocab_size": 97, "hidden_size": 48, "n_layer": 2, "n_head": 4}),
    (
        # The names of the published bloom-560m file.
        "bloom",
        {"vocab_size": 101, "n_embed": 64, "n_layer": 3, "num_attention_heads": 2, "tie_word_embeddings": False},
    ),
    ("falcon", {"vocab_size": 97, "hidden_size": 40, "num_hidden_layers": 2, "num_attention_heads": 5}),
    (
        # As falcon-7b, whose file states a number of key heads that the class ignores.
        "falcon",
        {
            "vocab_size": 97, "n_embed": 48, "num_hidden_layers": 1, "num_attention_heads": 3, "num_kv_heads": 3,
            "bias": True, "ffn_hidden_size": 70, "tie_word_embeddings": False,
        },
    ),
    (
        # As falcon-40b.
        "falcon",
        {
            "vocab_size": 101, "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 8, "num_kv_heads": 2,
            "new_decoder_architecture": True,
        },
    ),
    (
        # As falcon2-11b: the new decoder with a single norm.
        "falcon",
        {
            "vocab_size": 101, "hidden_size": 64, "num_hidden_layers": 1, "num_attention_heads": 4, "num_kv_heads": 1,
            "new_decoder_architecture": True, "num_ln_in_parallel_attn": 1,
        },
    ),
    (
        # As falcon-rw-1b: ALiBi, biases, every head its own key, attention before the MLP.
        "falcon",
        {
            "vocab_size": 89, "hidden_size": 40, "num_hidden_layers": 1, "num_attention_heads": 4, "alibi": True,
            "bias": True, "multi_query": False, "parallel_attn": False,
        },
    ),
    ("t5", {"vocab_size": 97, "d_model": 48, "d_kv": 8, "d_ff": 100, "num_layers": 2, "num_heads": 4}),
    (
        # As Flan-T5: gated, inner width other than d_model, and a file that asks for an output head of its own in vain.
        "t5",
        {
            "vocab_size": 101, "d_model": 40, "d_kv": 12, "d_ff": 72, "num_layers": 1, "num_decoder_layers": 3,
            "num_heads": 3, "feed_forward_proj": "gated-gelu", "relative_attention_num_buckets": 10,
            "tie_word_embeddings": False,
        },
    ),
    (
        "t5",
        {
            "vocab_size": 89, "d_model": 32, "d_ff": 40, "num_layers": 1, "num_heads": 2,
            "feed_forward_proj": "gated-silu",
        },
    ),
    (
        "vit",
        {
            "hidden_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 100,
            "image_size": 32, "patch_size": 8, "num_labels": 1000,
        },
    ),
    (
        "vit",
        {
            "hidden_size": 64, "num_hidden_layers": 3, "num_attention_heads": 2, "intermediate_size": 72,
            "image_size": [30, 44], "patch_size": [7, 9], "num_channels": 1, "qkv_bias": False,
            "id2label": {"0": "cat", "1": "dog", "2": "owl"},
        },
    ),
    (
        "vit",
        {
            "hidden_size": 30, "num_hidden_layers": 1, "num_attention_heads": 4, "head_dim": 8,
            "intermediate_size": 40, "image_size": 16, "patch_size": 16, "num_labels": 0,
        },
    ),
]  # fmt: skip
