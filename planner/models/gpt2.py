"""GPT-2, whose projections are `Conv1D` (weights lie `[in, out]`) and whose query, key and value are one matrix.

Source: transformers `models/gpt2/modeling_gpt2.py` and `configuration_gpt2.py`.
"""

from __future__ import annotations

from typing import Any

from optplan.planner.models.fields import MAX_LAYERS, MAX_VOCABULARY, Fields
from optplan.planner.models.spec import Family, Inventory
from optplan.planner.tensors import HeadLayout


def _read(fields: Fields) -> dict[str, Any]:
    width_name, heads_name = fields.one_of("n_embd", "hidden_size"), fields.one_of("n_head", "num_attention_heads")
    hidden_size, num_heads = fields.integer(width_name), fields.integer(heads_name)
    fields.divides(heads_name, num_heads, width_name, hidden_size)
    fields.refuse("add_cross_attention", "cross-attention is not modelled")
    return {
        "n_embd": hidden_size,
        "n_layer": fields.integer(fields.one_of("n_layer", "num_hidden_layers"), high=MAX_LAYERS),
        "n_head": num_heads,
        "n_inner": fields.integer("n_inner", 4 * hidden_size),
        "n_positions": fields.integer(fields.one_of("n_positions", "max_position_embeddings"), 1024, high=2**30),
        "vocab_size": fields.integer("vocab_size", high=MAX_VOCABULARY),
        "activation_function": fields.text("activation_function", "gelu_new"),
        "embd_pdrop": fields.number("embd_pdrop", 0.1, high=1.0),
        "attn_pdrop": fields.number("attn_pdrop", 0.1, high=1.0),
        "resid_pdrop": fields.number("resid_pdrop", 0.1, high=1.0),
        "reorder_and_upcast_attn": fields.boolean("reorder_and_upcast_attn", False),
        "tie_word_embeddings": fields.boolean("tie_word_embeddings", True),
    }


def _build(config: dict[str, Any]) -> Inventory:
    hidden, num_heads = config["n_embd"], config["n_head"]
    heads = HeadLayout(
        hidden // num_heads, num_query_heads=num_heads, num_key_heads=num_heads, num_value_heads=num_heads
    )
    inventory = Inventory()
    inventory.embedding("transformer.wte", config["vocab_size"], hidden)
    inventory.embedding("transformer.wpe", config["n_positions"], hidden, "position_embedding")
    for layer in range(config["n_layer"]):
        block = f"transformer.h.{layer}"
        inventory.layer_norm(f"{block}.ln_1", hidden)
        inventory.conv1d(f"{block}.attn.c_attn", hidden, 3 * hidden, "fused_qkv", heads=heads)
        inventory.conv1d(f"{block}.attn.c_proj", hidden, hidden, "attention_output")
        inventory.layer_norm(f"{block}.ln_2", hidden)
        inventory.conv1d(f"{block}.mlp.c_fc", hidden, config["n_inner"], "mlp")
        inventory.conv1d(f"{block}.mlp.c_proj", config["n_inner"], hidden, "mlp")
    inventory.layer_norm("transformer.ln_f", hidden)
    tied_to = "transformer.wte.weight" if config["tie_word_embeddings"] else None
    inventory.linear("lm_head", hidden, config["vocab_size"], "output_head", tied_to=tied_to)
    return inventory


FAMILY = Family(model_type="gpt2", architecture="GPT2LMHeadModel", read=_read, build=_build, max_seq_len="n_positions")
