"""Llama 1 to 3 and the models that share its class: TinyLlama, CodeLlama, SmolLM2.

Source: transformers `models/llama/modeling_llama.py` and `configuration_llama.py`.
"""

from __future__ import annotations

from typing import Any

from optplan.planner.models.fields import MAX_LAYERS, MAX_VOCABULARY, Fields
from optplan.planner.models.spec import Family, Inventory
from optplan.planner.tensors import Buffer, HeadLayout


def _read(fields: Fields) -> dict[str, Any]:
    hidden_size = fields.integer("hidden_size")
    num_heads = fields.integer("num_attention_heads")
    num_key_value_heads = fields.integer("num_key_value_heads", num_heads)
    fields.divides("num_key_value_heads", num_key_value_heads, "num_attention_heads", num_heads)
    head_dim = fields.integer("head_dim", None)
    if head_dim is None:
        fields.divides("num_attention_heads", num_heads, "hidden_size", hidden_size)
        head_dim = hidden_size // num_heads
    return {
        "hidden_size": hidden_size,
        "intermediate_size": fields.integer("intermediate_size"),
        "num_hidden_layers": fields.integer("num_hidden_layers", high=MAX_LAYERS),
        "num_attention_heads": num_heads,
        "num_key_value_heads": num_key_value_heads,
        "head_dim": head_dim,
        "vocab_size": fields.integer("vocab_size", high=MAX_VOCABULARY),
        "max_position_embeddings": fields.integer("max_position_embeddings", 2048, high=2**30),
        "hidden_act": fields.text("hidden_act", "silu"),
        "attention_bias": fields.boolean("attention_bias", False),
        "mlp_bias": fields.boolean("mlp_bias", False),
        "tie_word_embeddings": fields.boolean("tie_word_embeddings", False),
    }


def _build(config: dict[str, Any]) -> Inventory:
    hidden, head_dim = config["hidden_size"], config["head_dim"]
    inventory = Inventory()
    inventory.embedding("model.embed_tokens", config["vocab_size"], hidden)
    for layer in range(config["num_hidden_layers"]):
        _attention(inventory, f"model.layers.{layer}.self_attn", config)
        _mlp(inventory, f"model.layers.{layer}.mlp", config)
        inventory.rms_norm(f"model.layers.{layer}.input_layernorm", hidden)
        inventory.rms_norm(f"model.layers.{layer}.post_attention_layernorm", hidden)
    inventory.rms_norm("model.norm", hidden)
    tied_to = "model.embed_tokens.weight" if config["tie_word_embeddings"] else None
    inventory.linear("lm_head", hidden, config["vocab_size"], "output_head", tied_to=tied_to)
    for name in ("inv_freq", "original_inv_freq"):
        inventory.buffer(Buffer(f"model.rotary_emb.{name}", (head_dim // 2,)))
    return inventory


def _attention(inventory: Inventory, name: str, config: dict[str, Any]) -> None:
    hidden, head_dim, bias = config["hidden_size"], config["head_dim"], config["attention_bias"]
    num_heads, num_kv = config["num_attention_heads"], config["num_key_value_heads"]
    query = HeadLayout(head_dim, num_query_heads=num_heads)
    key = HeadLayout(head_dim, num_key_heads=num_kv)
    value = HeadLayout(head_dim, num_value_heads=num_kv)
    inventory.linear(f"{name}.q_proj", hidden, num_heads * head_dim, "query", bias=bias, heads=query)
    inventory.linear(f"{name}.k_proj", hidden, num_kv * head_dim, "key", bias=bias, heads=key)
    inventory.linear(f"{name}.v_proj", hidden, num_kv * head_dim, "value", bias=bias, heads=value)
    inventory.linear(f"{name}.o_proj", num_heads * head_dim, hidden, "attention_output", bias=bias)


def _mlp(inventory: Inventory, name: str, config: dict[str, Any]) -> None:
    hidden, width, bias = config["hidden_size"], config["intermediate_size"], config["mlp_bias"]
    inventory.linear(f"{name}.gate_proj", hidden, width, "mlp", bias=bias)
    inventory.linear(f"{name}.up_proj", hidden, width, "mlp", bias=bias)
    inventory.linear(f"{name}.down_proj", width, hidden, "mlp", bias=bias)


FAMILY = Family(model_type="llama", architecture="LlamaForCausalLM", read=_read, build=_build)
