"""Qwen2 and Qwen2.5: biases on query, key and value alone.

Source: transformers `models/qwen2/modeling_qwen2.py` and `configuration_qwen2.py`.
"""

from __future__ import annotations

from typing import Any

from optplan.planner.models import decoder
from optplan.planner.models.fields import Fields
from optplan.planner.models.spec import Family, Inventory


def _read(fields: Fields) -> dict[str, Any]:
    fields = fields.filled(max_position_embeddings=32_768, sliding_window=4096)
    # The class default suits one size only, but a null stands for one head for each query head.
    config = decoder.decoder_fields(fields, optional_kv_heads="num_key_value_heads" in fields.raw)
    window = decoder.sliding_window(fields, switched=True)
    return {
        **config,
        "sliding_window": window,
        "use_sliding_window": window is not None,
        "layer_types": decoder.windowed_layers(fields, config["num_hidden_layers"], window),
        "rotary_width": decoder.rotary_width(fields, config["head_dim"]),
    }


def _build(config: dict[str, Any]) -> Inventory:
    hidden = config["hidden_size"]
    inventory = decoder.embed(config)
    for layer in decoder.layer_names(config):
        decoder.attention(inventory, f"{layer}.self_attn", config, bias=True)
        decoder.gated_mlp(inventory, f"{layer}.mlp", hidden, config["intermediate_size"])
        inventory.rms_norm(f"{layer}.input_layernorm", hidden)
        inventory.rms_norm(f"{layer}.post_attention_layernorm", hidden)
    inventory.rms_norm("model.norm", hidden)
    decoder.output_head(inventory, config)
    decoder.rotary(inventory, config["rotary_width"])
    return inventory


FAMILY = Family(model_type="qwen2", architecture="Qwen2ForCausalLM", read=_read, build=_build)
