"""Mixtral: Mistral's attention with a mixture of experts in every layer.

Source: transformers `models/mixtral/modeling_mixtral.py` and `configuration_mixtral.py`.
"""

from __future__ import annotations

from typing import Any

from optplan.planner.models import decoder
from optplan.planner.models.fields import Fields
from optplan.planner.models.spec import Family, Inventory


def _read(fields: Fields) -> dict[str, Any]:
    fields = fields.filled(max_position_embeddings=131_072)
    config = decoder.decoder_fields(fields)
    return {
        **config,
        **decoder.expert_fields(fields),
        "sliding_window": decoder.sliding_window(fields),
        "rotary_width": decoder.rotary_width(fields, config["head_dim"]),
    }


def _build(config: dict[str, Any]) -> Inventory:
    hidden, width, num_experts = config["hidden_size"], config["intermediate_size"], config["num_experts"]
    inventory = decoder.embed(config)
    for layer in decoder.layer_names(config):
        decoder.attention(inventory, f"{layer}.self_attn", config)
        decoder.router(inventory, f"{layer}.mlp.gate", hidden, num_experts)
        decoder.experts(inventory, f"{layer}.mlp.experts", hidden, width, num_experts)
        inventory.rms_norm(f"{layer}.input_layernorm", hidden)
        inventory.rms_norm(f"{layer}.post_attention_layernorm", hidden)
    inventory.rms_norm("model.norm", hidden)
    decoder.output_head(inventory, config)
    decoder.rotary(inventory, config["rotary_width"])
    return inventory


FAMILY = Family(model_type="mixtral", architecture="MixtralForCausalLM", read=_read, build=_build)
