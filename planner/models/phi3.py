"""Phi-3 and Phi-4: one matrix for query, key and value, one for gate and up.

Source: transformers `models/phi3/modeling_phi3.py` and `configuration_phi3.py`.
"""

from __future__ import annotations

from typing import Any

from optplan.planner.models import decoder
from optplan.planner.models.fields import Fields
from optplan.planner.models.spec import Family, Inventory
from optplan.planner.tensors import HeadLayout


def _read(fields: Fields) -> dict[str, Any]:
    fields = fields.filled(max_position_embeddings=4096)
    config = decoder.decoder_fields(fields, optional_kv_heads=True)
    return {
        **config,
        "sliding_window": decoder.sliding_window(fields),
        "resid_pdrop": fields.number("resid_pdrop", 0.0, high=1.0),
        "rotary_width": _rotary_width(fields, config["head_dim"]),
    }


def _rotary_width(fields: Fields, head_dim: int) -> int:
    """The class knows one scaling, under three names."""
    return decoder.rotary_width(fields, head_dim, always_partial=True, rope_types=("default", "longrope", "su", "yarn"))


def _build(config: dict[str, Any]) -> Inventory:
    hidden, width = config["hidden_size"], config["intermediate_size"]
    inventory = decoder.embed(config)
    for layer in decoder.layer_names(config):
        _attention(inventory, f"{layer}.self_attn", config)
        inventory.linear(f"{layer}.mlp.gate_up_proj", hidden, 2 * width, "mlp")
        inventory.linear(f"{layer}.mlp.down_proj", width, hidden, "mlp")
        inventory.rms_norm(f"{layer}.input_layernorm", hidden)
        inventory.rms_norm(f"{layer}.post_attention_layernorm", hidden)
    inventory.rms_norm("model.norm", hidden)
    decoder.output_head(inventory, config)
    decoder.rotary(inventory, config["rotary_width"])
    return inventory


def _attention(inventory: Inventory, name: str, config: dict[str, Any]) -> None:
    hidden, head_dim = config["hidden_size"], config["head_dim"]
    num_heads, num_kv = config["num_attention_heads"], config["num_key_value_heads"]
    heads = HeadLayout(head_dim, num_query_heads=num_heads, num_key_heads=num_kv, num_value_heads=num_kv)
    inventory.linear(f"{name}.o_proj", num_heads * head_dim, hidden, "attention_output")
    inventory.linear(f"{name}.qkv_proj", hidden, (num_heads + 2 * num_kv) * head_dim, "fused_qkv", heads=heads)


FAMILY = Family(model_type="phi3", architecture="Phi3ForCausalLM", read=_read, build=_build)
