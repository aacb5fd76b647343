"""Mistral 7B and its class.

Source: transformers `models/mistral/modeling_mistral.py` and `configuration_mistral.py`.
"""

from __future__ import annotations

from typing import Any

from optplan.planner.models import decoder
from optplan.planner.models.fields import Fields
from optplan.planner.models.spec import Family, Inventory


def _read(fields: Fields) -> dict[str, Any]:
    fields = fields.filled(max_position_embeddings=131_072, sliding_window=4096)
    config = decoder.decoder_fields(fields)
    return {
        **config,
        "sliding_window": decoder.sliding_window(fields),
        "rotary_width": decoder.rotary_width(fields, config["head_dim"]),
    }


def _build(config: dict[str, Any]) -> Inventory:
    hidden = config["hidden_size"]
    inventory = decoder.embed(config)
    for layer in decoder.layer_names(config):
        decoder.attention(inventory, f"{layer}.self_attn", config)
        decoder.gated_mlp(inventory, f"{layer}.mlp", hidden, config["intermediate_size"])
        inventory.rms_norm(f"{layer}.input_layernorm", hidden)
        inventory.rms_norm(f"{layer}.post_attention_layernorm", hidden)
    inventory.rms_norm("model.norm", hidden)
    decoder.output_head(inventory, config)
    decoder.rotary(inventory, config["rotary_width"])
    return inventory


FAMILY = Family(model_type="mistral", architecture="MistralForCausalLM", read=_read, build=_build)
