"""Llama 1 to 3 and the models that share its class: TinyLlama, CodeLlama, SmolLM2.

Source: transformers `models/llama/modeling_llama.py` and `configuration_llama.py`.
"""

from __future__ import annotations

from typing import Any

from optplan.planner.models import decoder
from optplan.planner.models.fields import Fields
from optplan.planner.models.spec import Family, Inventory


def _read(fields: Fields) -> dict[str, Any]:
    fields = fields.filled(max_position_embeddings=2048)
    config = decoder.decoder_fields(fields, optional_kv_heads=True)
    decoder.heads_divide_hidden(fields, config)
    return {
        **config,
        "attention_bias": fields.boolean("attention_bias", False),
        "mlp_bias": fields.boolean("mlp_bias", False),
        "rotary_width": decoder.rotary_width(fields, config["head_dim"]),
    }


def _build(config: dict[str, Any]) -> Inventory:
    hidden, bias = config["hidden_size"], config["attention_bias"]
    inventory = decoder.embed(config)
    for layer in decoder.layer_names(config):
        decoder.attention(inventory, f"{layer}.self_attn", config, bias=bias, output_bias=bias)
        decoder.gated_mlp(inventory, f"{layer}.mlp", hidden, config["intermediate_size"], bias=config["mlp_bias"])
        inventory.rms_norm(f"{layer}.input_layernorm", hidden)
        inventory.rms_norm(f"{layer}.post_attention_layernorm", hidden)
    inventory.rms_norm("model.norm", hidden)
    decoder.output_head(inventory, config)
    decoder.rotary(inventory, config["rotary_width"])
    return inventory


FAMILY = Family(model_type="llama", architecture="LlamaForCausalLM", read=_read, build=_build)
