"""OPT: pre-norm decoders with learned positions, and the 350M one, post-norm with narrower embeddings.

Source: transformers `models/opt/modeling_opt.py` and `configuration_opt.py`.
"""

from __future__ import annotations

from typing import Any

from optplan.planner.models.fields import MAX_LAYERS, MAX_VOCABULARY, Fields
from optplan.planner.models.spec import Family, Inventory, separate_heads

_POSITION_OFFSET = 2
"""Rows of the position embedding before the first position, kept from fairseq's padding index."""


def _read(fields: Fields) -> dict[str, Any]:
    hidden_size = fields.integer("hidden_size")
    num_heads = fields.integer("num_attention_heads")
    fields.divides("num_attention_heads", num_heads, "hidden_size", hidden_size)
    return {
        "hidden_size": hidden_size,
        "ffn_dim": fields.integer("ffn_dim"),
        "num_hidden_layers": fields.integer("num_hidden_layers", high=MAX_LAYERS),
        "num_attention_heads": num_heads,
        "word_embed_proj_dim": fields.integer("word_embed_proj_dim", hidden_size),
        "vocab_size": fields.integer("vocab_size", high=MAX_VOCABULARY),
        "max_position_embeddings": fields.integer("max_position_embeddings", 2048, high=2**30),
        "activation_function": fields.text("activation_function", "relu"),
        "dropout": fields.number("dropout", 0.1, high=1.0),
        "attention_dropout": fields.number("attention_dropout", 0.0, high=1.0),
        "do_layer_norm_before": fields.boolean("do_layer_norm_before", True),
        "_remove_final_layer_norm": fields.boolean("_remove_final_layer_norm", False),
        "enable_bias": fields.boolean("enable_bias", True),
        "layer_norm_elementwise_affine": fields.boolean("layer_norm_elementwise_affine", True),
        "tie_word_embeddings": fields.boolean("tie_word_embeddings", True),
    }


def _build(config: dict[str, Any]) -> Inventory:
    hidden, vocab_size, narrow = config["hidden_size"], config["vocab_size"], config["word_embed_proj_dim"]
    inventory = Inventory()
    inventory.embedding("model.decoder.embed_tokens", vocab_size, narrow)
    num_positions = config["max_position_embeddings"] + _POSITION_OFFSET
    inventory.embedding("model.decoder.embed_positions", num_positions, hidden, "position_embedding")
    if narrow != hidden:
        inventory.linear("model.decoder.project_out", hidden, narrow, "other")
        inventory.linear("model.decoder.project_in", narrow, hidden, "other")
    if config["do_layer_norm_before"] and not config["_remove_final_layer_norm"]:
        _norm(inventory, "model.decoder.final_layer_norm", config)
    for layer in range(config["num_hidden_layers"]):
        _layer(inventory, f"model.decoder.layers.{layer}", config)
    tied_to = "model.decoder.embed_tokens.weight" if config["tie_word_embeddings"] else None
    inventory.linear("lm_head", narrow, vocab_size, "output_head", tied_to=tied_to)
    return inventory


def _layer(inventory: Inventory, name: str, config: dict[str, Any]) -> None:
    hidden, width, bias = config["hidden_size"], config["ffn_dim"], config["enable_bias"]
    layouts = separate_heads(hidden // config["num_attention_heads"], config["num_attention_heads"])
    attention = f"{name}.self_attn"
    inventory.linear(f"{attention}.k_proj", hidden, hidden, "key", bias=bias, heads=layouts["key"])
    inventory.linear(f"{attention}.v_proj", hidden, hidden, "value", bias=bias, heads=layouts["value"])
    inventory.linear(f"{attention}.q_proj", hidden, hidden, "query", bias=bias, heads=layouts["query"])
    inventory.linear(f"{attention}.out_proj", hidden, hidden, "attention_output", bias=bias)
    _norm(inventory, f"{name}.self_attn_layer_norm", config)
    inventory.linear(f"{name}.fc1", hidden, width, "mlp", bias=bias)
    inventory.linear(f"{name}.fc2", width, hidden, "mlp", bias=bias)
    _norm(inventory, f"{name}.final_layer_norm", config)


def _norm(inventory: Inventory, name: str, config: dict[str, Any]) -> None:
    if config["layer_norm_elementwise_affine"]:
        inventory.layer_norm(name, config["hidden_size"])


FAMILY = Family(model_type="opt", architecture="OPTForCausalLM", read=_read, build=_build)
