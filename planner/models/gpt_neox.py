"""GPT-NeoX and Pythia: query, key and value in one matrix, grouped by head; rotary positions on part of each head.

Source: transformers `models/gpt_neox/modeling_gpt_neox.py` and `configuration_gpt_neox.py`.
"""

from __future__ import annotations

from typing import Any

from optplan.planner.models.fields import MAX_LAYERS, MAX_VOCABULARY, Fields
from optplan.planner.models.spec import Family, Inventory
from optplan.planner.tensors import Buffer, HeadLayout


def _read(fields: Fields) -> dict[str, Any]:
    hidden_size = fields.integer("hidden_size")
    num_heads = fields.integer("num_attention_heads")
    fields.divides("num_attention_heads", num_heads, "hidden_size", hidden_size)
    return {
        "hidden_size": hidden_size,
        "intermediate_size": fields.integer("intermediate_size"),
        "num_hidden_layers": fields.integer("num_hidden_layers", high=MAX_LAYERS),
        "num_attention_heads": num_heads,
        "vocab_size": fields.integer("vocab_size", high=MAX_VOCABULARY),
        "max_position_embeddings": fields.integer("max_position_embeddings", 2048, high=2**30),
        "rotary_pct": _rotary_share(fields),
        "hidden_act": fields.text("hidden_act", "gelu"),
        "hidden_dropout": fields.number("hidden_dropout", 0.0, high=1.0),
        "attention_dropout": fields.number("attention_dropout", 0.0, high=1.0),
        "use_parallel_residual": fields.boolean("use_parallel_residual", True),
        "attention_bias": fields.boolean("attention_bias", True),
        "tie_word_embeddings": fields.boolean("tie_word_embeddings", False),
    }


def _rotary_share(fields: Fields) -> float:
    """Share of each head that is rotated; newer files keep it among the rope parameters."""
    outer: float = fields.number("rotary_pct", 0.25, high=1.0)
    name = "rope_scaling" if fields.mapping("rope_scaling") else "rope_parameters"
    share: float = fields.section(name).number("partial_rotary_factor", outer, high=1.0)
    return share


def _build(config: dict[str, Any]) -> Inventory:
    hidden, vocab_size = config["hidden_size"], config["vocab_size"]
    inventory = Inventory()
    inventory.embedding("gpt_neox.embed_in", vocab_size, hidden)
    for layer in range(config["num_hidden_layers"]):
        _layer(inventory, f"gpt_neox.layers.{layer}", config)
    inventory.layer_norm("gpt_neox.final_layer_norm", hidden)
    tied_to = "gpt_neox.embed_in.weight" if config["tie_word_embeddings"] else None
    inventory.linear("lm_head", hidden, vocab_size, "output_head", tied_to=tied_to)
    # An odd number of rotated elements is rounded up to pairs.
    rotary_dim = int(hidden // config["num_attention_heads"] * config["rotary_pct"])
    for name in ("inv_freq", "original_inv_freq"):
        inventory.buffer(Buffer(f"gpt_neox.rotary_emb.{name}", ((rotary_dim + 1) // 2,)))
    return inventory


def _layer(inventory: Inventory, name: str, config: dict[str, Any]) -> None:
    hidden, width, num_heads = config["hidden_size"], config["intermediate_size"], config["num_attention_heads"]
    bias = config["attention_bias"]
    heads = HeadLayout(hidden // num_heads, num_heads, num_heads, num_heads, interleaved=True)
    inventory.layer_norm(f"{name}.input_layernorm", hidden)
    inventory.layer_norm(f"{name}.post_attention_layernorm", hidden)
    inventory.linear(f"{name}.attention.query_key_value", hidden, 3 * hidden, "fused_qkv", bias=bias, heads=heads)
    inventory.linear(f"{name}.attention.dense", hidden, hidden, "attention_output", bias=bias)
    inventory.linear(f"{name}.mlp.dense_h_to_4h", hidden, width, "mlp", bias=True)
    inventory.linear(f"{name}.mlp.dense_4h_to_h", width, hidden, "mlp", bias=True)


FAMILY = Family(model_type="gpt_neox", architecture="GPTNeoXForCausalLM", read=_read, build=_build)
