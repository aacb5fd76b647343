"""OLMo 2: norms after each block, and on all query and all key neurons at once.

Source: transformers `models/olmo2/modeling_olmo2.py` and `configuration_olmo2.py`.
"""

from __future__ import annotations

from typing import Any

from optplan.planner.models import decoder
from optplan.planner.models.fields import Fields
from optplan.planner.models.spec import Family, Inventory


def _read(fields: Fields) -> dict[str, Any]:
    fields = fields.filled(max_position_embeddings=2048)
    config = decoder.decoder_fields(fields, optional_kv_heads=True)
    return {
        **config,
        "attention_bias": fields.boolean("attention_bias", False),
        "rotary_width": decoder.rotary_width(fields, config["head_dim"]),
    }


def _build(config: dict[str, Any]) -> Inventory:
    hidden = config["hidden_size"]
    inventory = decoder.embed(config)
    for layer in decoder.layer_names(config):
        _attention(inventory, f"{layer}.self_attn", config)
        decoder.gated_mlp(inventory, f"{layer}.mlp", hidden, config["intermediate_size"])
        inventory.rms_norm(f"{layer}.post_attention_layernorm", hidden)
        inventory.rms_norm(f"{layer}.post_feedforward_layernorm", hidden)
    inventory.rms_norm("model.norm", hidden)
    decoder.output_head(inventory, config)
    decoder.rotary(inventory, config["rotary_width"])
    return inventory


def _attention(inventory: Inventory, name: str, config: dict[str, Any]) -> None:
    bias, head_dim = config["attention_bias"], config["head_dim"]
    decoder.attention(inventory, name, config, bias=bias, output_bias=bias)
    inventory.rms_norm(f"{name}.q_norm", config["num_attention_heads"] * head_dim)
    inventory.rms_norm(f"{name}.k_norm", config["num_key_value_heads"] * head_dim)


FAMILY = Family(model_type="olmo2", architecture="Olmo2ForCausalLM", read=_read, build=_build)
