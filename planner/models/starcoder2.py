"""StarCoder2: layer norms, biases and a plain two-matrix MLP.

Source: transformers `models/starcoder2/modeling_starcoder2.py` and `configuration_starcoder2.py`.
"""

from __future__ import annotations

from typing import Any

from optplan.planner.models import decoder
from optplan.planner.models.fields import Fields
from optplan.planner.models.spec import Family, Inventory


def _read(fields: Fields) -> dict[str, Any]:
    fields = fields.filled(max_position_embeddings=4096, hidden_act="gelu_pytorch_tanh", tie_word_embeddings=True)
    config = decoder.decoder_fields(fields)
    return {
        **config,
        "use_bias": fields.boolean("use_bias", True),
        "residual_dropout": fields.number("residual_dropout", 0.0, high=1.0),
        "embedding_dropout": fields.number("embedding_dropout", 0.0, high=1.0),
        "sliding_window": decoder.sliding_window(fields),
        "rotary_width": decoder.rotary_width(fields, config["head_dim"]),
    }


def _build(config: dict[str, Any]) -> Inventory:
    hidden, width, bias = config["hidden_size"], config["intermediate_size"], config["use_bias"]
    inventory = decoder.embed(config)
    for layer in decoder.layer_names(config):
        decoder.attention(inventory, f"{layer}.self_attn", config, bias=bias, output_bias=bias)
        inventory.linear(f"{layer}.mlp.c_fc", hidden, width, "mlp", bias=bias)
        inventory.linear(f"{layer}.mlp.c_proj", width, hidden, "mlp", bias=bias)
        inventory.layer_norm(f"{layer}.input_layernorm", hidden)
        inventory.layer_norm(f"{layer}.post_attention_layernorm", hidden)
    inventory.layer_norm("model.norm", hidden)
    decoder.output_head(inventory, config)
    decoder.rotary(inventory, config["rotary_width"])
    return inventory


FAMILY = Family(model_type="starcoder2", architecture="Starcoder2ForCausalLM", read=_read, build=_build)
