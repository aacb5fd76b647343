"""OLMoE: a mixture of experts in every layer, norms on all query and all key neurons at once.

Source: transformers `models/olmoe/modeling_olmoe.py` and `configuration_olmoe.py`.
"""

from __future__ import annotations

from typing import Any

from optplan.planner.models import decoder
from optplan.planner.models.fields import Fields
from optplan.planner.models.spec import Family, Inventory


def _read(fields: Fields) -> dict[str, Any]:
    fields = fields.filled(max_position_embeddings=4096)
    config = decoder.decoder_fields(fields, optional_kv_heads=True)
    return {
        **config,
        **decoder.expert_fields(fields),
        "attention_bias": fields.boolean("attention_bias", False),
        "clip_qkv": fields.number("clip_qkv", None),
        "norm_topk_prob": fields.boolean("norm_topk_prob", False),
        "rotary_width": decoder.rotary_width(fields, config["head_dim"]),
    }


def _build(config: dict[str, Any]) -> Inventory:
    hidden, width, num_experts = config["hidden_size"], config["intermediate_size"], config["num_experts"]
    inventory = decoder.embed(config)
    for layer in decoder.layer_names(config):
        _attention(inventory, f"{layer}.self_attn", config)
        decoder.router(inventory, f"{layer}.mlp.gate", hidden, num_experts)
        decoder.experts(inventory, f"{layer}.mlp.experts", hidden, width, num_experts)
        inventory.rms_norm(f"{layer}.input_layernorm", hidden)
        inventory.rms_norm(f"{layer}.post_attention_layernorm", hidden)
    inventory.rms_norm("model.norm", hidden)
    decoder.output_head(inventory, config)
    decoder.rotary(inventory, config["rotary_width"])
    return inventory


def _attention(inventory: Inventory, name: str, config: dict[str, Any]) -> None:
    """The norms are sized by the hidden size, even where `head_dim` says otherwise."""
    hidden, bias = config["hidden_size"], config["attention_bias"]
    decoder.attention(inventory, name, config, bias=bias, output_bias=bias)
    inventory.rms_norm(f"{name}.q_norm", hidden)
    inventory.rms_norm(f"{name}.k_norm", hidden // config["num_attention_heads"] * config["num_key_value_heads"])


FAMILY = Family(model_type="olmoe", architecture="OlmoeForCausalLM", read=_read, build=_build)
