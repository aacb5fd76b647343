"""Falcon: the first decoder (7B, one key and value head), the new one (40B, groups) and the older ones with ALiBi.

Source: transformers `models/falcon/modeling_falcon.py` and `configuration_falcon.py`.
"""

from __future__ import annotations

from typing import Any

from optplan.planner.errors import ConfigError
from optplan.planner.models.fields import MAX_LAYERS, MAX_VOCABULARY, Fields
from optplan.planner.models.spec import Family, Inventory
from optplan.planner.tensors import Buffer, HeadLayout


def _read(fields: Fields) -> dict[str, Any]:
    width_name = fields.one_of("hidden_size", "n_embed")
    hidden_size, num_heads = fields.integer(width_name), fields.integer("num_attention_heads")
    fields.divides("num_attention_heads", num_heads, width_name, hidden_size)
    if hidden_size // num_heads % 2:
        raise ConfigError(
            f"{fields.where}: a head must have an even width to be rotated, got {hidden_size // num_heads} "
            f"('{width_name}' / 'num_attention_heads')"
        )
    new_decoder = fields.boolean("new_decoder_architecture", False)
    multi_query = fields.boolean("multi_query", True)
    return {
        "hidden_size": hidden_size,
        "ffn_hidden_size": fields.integer("ffn_hidden_size", 4 * hidden_size),
        "num_hidden_layers": fields.integer("num_hidden_layers", high=MAX_LAYERS),
        "num_attention_heads": num_heads,
        "num_kv_heads": _num_kv_heads(fields, num_heads, new_decoder=new_decoder, multi_query=multi_query),
        "vocab_size": fields.integer("vocab_size", high=MAX_VOCABULARY),
        "max_position_embeddings": fields.integer("max_position_embeddings", 2048, high=2**30),
        "new_decoder_architecture": new_decoder,
        "multi_query": multi_query,
        "parallel_attn": fields.boolean("parallel_attn", True),
        "num_ln_in_parallel_attn": fields.integer("num_ln_in_parallel_attn", 2 if new_decoder else 1, high=2),
        "alibi": fields.boolean("alibi", False),
        "bias": fields.boolean("bias", False),
        "activation": fields.text("activation", "gelu"),
        "hidden_dropout": fields.number("hidden_dropout", 0.0, high=1.0),
        "attention_dropout": fields.number("attention_dropout", 0.0, high=1.0),
        "tie_word_embeddings": fields.boolean("tie_word_embeddings", True),
    }


def _num_kv_heads(fields: Fields, num_heads: int, *, new_decoder: bool, multi_query: bool) -> int:
    """Key heads that the matrix holds; only the new decoder heeds the field: falcon-7b's file says 71 and has one."""
    if not new_decoder:
        return 1 if multi_query else num_heads
    num_kv_heads: int = fields.integer("num_kv_heads", num_heads)
    fields.divides("num_kv_heads", num_kv_heads, "num_attention_heads", num_heads)
    return num_kv_heads


def _build(config: dict[str, Any]) -> Inventory:
    hidden, vocab_size = config["hidden_size"], config["vocab_size"]
    inventory = Inventory()
    inventory.embedding("transformer.word_embeddings", vocab_size, hidden)
    for layer in range(config["num_hidden_layers"]):
        _attention(inventory, f"transformer.h.{layer}.self_attention", config)
        _mlp(inventory, f"transformer.h.{layer}.mlp", config)
        for norm in _norms(config):
            inventory.layer_norm(f"transformer.h.{layer}.{norm}", hidden)
    inventory.layer_norm("transformer.ln_f", hidden)
    tied_to = "transformer.word_embeddings.weight" if config["tie_word_embeddings"] else None
    inventory.linear("lm_head", hidden, vocab_size, "output_head", tied_to=tied_to)
    head_dim = hidden // config["num_attention_heads"]
    # The class makes the rotary frequencies even where ALiBi takes their place.
    for name in ("inv_freq", "original_inv_freq"):
        inventory.buffer(Buffer(f"transformer.rotary_emb.{name}", (head_dim // 2,)))
    return inventory


def _attention(inventory: Inventory, name: str, config: dict[str, Any]) -> None:
    hidden, bias = config["hidden_size"], config["bias"]
    num_heads, num_kv = config["num_attention_heads"], config["num_kv_heads"]
    head_dim = hidden // num_heads
    # With one shared key and value head the queries come first; otherwise each key and value follows its queries.
    interleaved = config["new_decoder_architecture"] or not config["multi_query"]
    heads = HeadLayout(head_dim, num_heads, num_kv, num_kv, interleaved=interleaved)
    width = (num_heads + 2 * num_kv) * head_dim
    inventory.linear(f"{name}.query_key_value", hidden, width, "fused_qkv", bias=bias, heads=heads)
    inventory.linear(f"{name}.dense", hidden, hidden, "attention_output", bias=bias)


def _mlp(inventory: Inventory, name: str, config: dict[str, Any]) -> None:
    hidden, width, bias = config["hidden_size"], config["ffn_hidden_size"], config["bias"]
    inventory.linear(f"{name}.dense_h_to_4h", hidden, width, "mlp", bias=bias)
    inventory.linear(f"{name}.dense_4h_to_h", width, hidden, "mlp", bias=bias)


def _norms(config: dict[str, Any]) -> tuple[str, ...]:
    if not config["parallel_attn"]:
        return ("post_attention_layernorm", "input_layernorm")
    return ("ln_attn", "ln_mlp") if config["num_ln_in_parallel_attn"] == 2 else ("input_layernorm",)


FAMILY = Family(model_type="falcon", architecture="FalconForCausalLM", read=_read, build=_build)
