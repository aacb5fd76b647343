"""Phi-1.5 and Phi-2: biases everywhere, one norm a layer, rotation of a part of each head.

Source: transformers `models/phi/modeling_phi.py` and `configuration_phi.py`.
"""

from __future__ import annotations

from typing import Any

from optplan.planner.models import decoder
from optplan.planner.models.fields import Fields
from optplan.planner.models.spec import Family, Inventory


def _read(fields: Fields) -> dict[str, Any]:
    fields = fields.filled(max_position_embeddings=2048, hidden_act="gelu_new", partial_rotary_factor=0.5)
    config = decoder.decoder_fields(fields, optional_kv_heads=True)
    return {
        **config,
        "qk_layernorm": fields.boolean("qk_layernorm", False),
        "resid_pdrop": fields.number("resid_pdrop", 0.0, high=1.0),
        "embd_pdrop": fields.number("embd_pdrop", 0.0, high=1.0),
        "rotary_width": decoder.rotary_width(fields, config["head_dim"], always_partial=True),
    }


def _build(config: dict[str, Any]) -> Inventory:
    hidden, width = config["hidden_size"], config["intermediate_size"]
    inventory = decoder.embed(config)
    for layer in decoder.layer_names(config):
        _attention(inventory, f"{layer}.self_attn", config)
        inventory.linear(f"{layer}.mlp.fc1", hidden, width, "mlp", bias=True)
        inventory.linear(f"{layer}.mlp.fc2", width, hidden, "mlp", bias=True)
        inventory.layer_norm(f"{layer}.input_layernorm", hidden)
    inventory.layer_norm("model.final_layernorm", hidden)
    decoder.output_head(inventory, config, bias=True)
    decoder.rotary(inventory, config["rotary_width"])
    return inventory


def _attention(inventory: Inventory, name: str, config: dict[str, Any]) -> None:
    decoder.attention(inventory, name, config, bias=True, output="dense", output_bias=True)
    if config["qk_layernorm"]:
        width = config["hidden_size"] // config["num_attention_heads"]
        inventory.layer_norm(f"{name}.q_layernorm", width)
        inventory.layer_norm(f"{name}.k_layernorm", width)


FAMILY = Family(model_type="phi", architecture="PhiForCausalLM", read=_read, build=_build)
