"""Configurations of Llama-like and mixture-of-experts decoders, small and odd: each row bends one thing."""

CASES = [
    (
        "llama",
        {
            "vocab_size": 97, "hidden_size": 48, "intermediate_size": 100, "num_hidden_layers": 2,
            "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64,
        },
    ),
    (
        "llama",
        {
            "vocab_size": 101, "hidden_size": 64, "intermediate_size": 72, "num_hidden_layers": 3,
            "num_attention_heads": 4, "head_dim": 24, "max_position_embeddings": 128, "attention_bias": True,
            "mlp_bias": True, "tie_word_embeddings": True, "rope_parameters": {"rope_type": "linear", "factor": 2.0},
        },
    ),
]  # fmt: skip
