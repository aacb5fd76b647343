"""BLOOM: no position embedding (ALiBi), a norm on the embedding, query, key and value in one matrix grouped by head.

Source: transformers `models/bloom/modeling_bloom.py` and `configuration_bloom.py`.
"""

from __future__ import annotations

from typing import Any

from optplan.planner.models.fields import MAX_LAYERS, MAX_VOCABULARY, Fields
from optplan.planner.models.spec import Family, Inventory
from optplan.planner.tensors import HeadLayout


def _read(fields: Fields) -> dict[str, Any]:
    width_name, heads_name = fields.one_of("hidden_size", "n_embed"), fields.one_of("n_head", "num_attention_heads")
    hidden_size, num_heads = fields.integer(width_name), fields.integer(heads_name)
    fields.divides(heads_name, num_heads, width_name, hidden_size)
    return {
        "hidden_size": hidden_size,
        "n_layer": fields.integer(fields.one_of("n_layer", "num_hidden_layers"), high=MAX_LAYERS),
        "n_head": num_heads,
        "vocab_size": fields.integer("vocab_size", high=MAX_VOCABULARY),
        # ALiBi has no longest sequence; the published files state the one trained with, which the class ignores.
        "seq_length": fields.integer("seq_length", 2048, high=2**30),
        "hidden_dropout": fields.number("hidden_dropout", 0.0, high=1.0),
        "attention_dropout": fields.number("attention_dropout", 0.0, high=1.0),
        "tie_word_embeddings": fields.boolean("tie_word_embeddings", True),
    }


def _build(config: dict[str, Any]) -> Inventory:
    hidden, vocab_size = config["hidden_size"], config["vocab_size"]
    inventory = Inventory()
    inventory.embedding("transformer.word_embeddings", vocab_size, hidden)
    inventory.layer_norm("transformer.word_embeddings_layernorm", hidden)
    for layer in range(config["n_layer"]):
        _layer(inventory, f"transformer.h.{layer}", hidden, config["n_head"])
    inventory.layer_norm("transformer.ln_f", hidden)
    tied_to = "transformer.word_embeddings.weight" if config["tie_word_embeddings"] else None
    inventory.linear("lm_head", hidden, vocab_size, "output_head", tied_to=tied_to)
    return inventory


def _layer(inventory: Inventory, name: str, hidden: int, num_heads: int) -> None:
    heads = HeadLayout(hidden // num_heads, num_heads, num_heads, num_heads, interleaved=True)
    attention = f"{name}.self_attention"
    inventory.layer_norm(f"{name}.input_layernorm", hidden)
    inventory.linear(f"{attention}.query_key_value", hidden, 3 * hidden, "fused_qkv", bias=True, heads=heads)
    inventory.linear(f"{attention}.dense", hidden, hidden, "attention_output", bias=True)
    inventory.layer_norm(f"{name}.post_attention_layernorm", hidden)
    inventory.linear(f"{name}.mlp.dense_h_to_4h", hidden, 4 * hidden, "mlp", bias=True)
    inventory.linear(f"{name}.mlp.dense_4h_to_h", 4 * hidden, hidden, "mlp", bias=True)


FAMILY = Family(model_type="bloom", architecture="BloomForCausalLM", read=_read, build=_build, max_seq_len="seq_length")
