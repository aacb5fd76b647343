"""Qwen3, dense and mixture of experts: norms on the query and key heads.

Source: transformers `models/qwen3/modeling_qwen3.py`, `models/qwen3_moe/modeling_qwen3_moe.py` and their
configurations.
"""

from __future__ import annotations

from typing import Any

from optplan.planner.models import decoder
from optplan.planner.models.fields import MAX_LAYERS, Fields
from optplan.planner.models.spec import Family, Inventory


def _read(fields: Fields, *, optional_kv_heads: bool = False) -> dict[str, Any]:
    fields = fields.filled(max_position_embeddings=32_768, sliding_window=4096)
    config = decoder.decoder_fields(fields, optional_kv_heads=optional_kv_heads)
    window = decoder.sliding_window(fields, switched=True)
    return {
        **config,
        "attention_bias": fields.boolean("attention_bias", False),
        "sliding_window": window,
        "use_sliding_window": window is not None,
        "rotary_width": decoder.rotary_width(fields, config["head_dim"]),
    }


def _read_dense(fields: Fields) -> dict[str, Any]:
    # A null stands for one key head for each query head; the class default for an absent field suits one size only.
    config = _read(fields.filled(head_dim=128), optional_kv_heads="num_key_value_heads" in fields.raw)
    layer_types = decoder.windowed_layers(fields, config["num_hidden_layers"], config["sliding_window"])
    return {**config, "layer_types": layer_types}


def _read_moe(fields: Fields) -> dict[str, Any]:
    config = _read(fields)
    return {
        **config,
        **decoder.expert_fields(fields),
        "moe_intermediate_size": fields.integer("moe_intermediate_size"),
        "norm_topk_prob": fields.boolean("norm_topk_prob", False),
        "mlp_only_layers": _dense_layers(fields, config["num_hidden_layers"]),
    }


def _dense_layers(fields: Fields, num_layers: int) -> tuple[int, ...]:
    """Layers with an ordinary MLP: those listed, and those between the sparse steps."""
    listed = set(fields.integers("mlp_only_layers", (), high=MAX_LAYERS))
    step = fields.integer("decoder_sparse_step", 1, high=MAX_LAYERS)
    return tuple(layer for layer in range(num_layers) if layer in listed or (layer + 1) % step)


def _build(config: dict[str, Any]) -> Inventory:
    hidden, dense = config["hidden_size"], set(config.get("mlp_only_layers", range(config["num_hidden_layers"])))
    inventory = decoder.embed(config)
    for number, layer in enumerate(decoder.layer_names(config)):
        _attention(inventory, f"{layer}.self_attn", config)
        if number in dense:
            decoder.gated_mlp(inventory, f"{layer}.mlp", hidden, config["intermediate_size"])
        else:
            _mixture(inventory, f"{layer}.mlp", config)
        inventory.rms_norm(f"{layer}.input_layernorm", hidden)
        inventory.rms_norm(f"{layer}.post_attention_layernorm", hidden)
    inventory.rms_norm("model.norm", hidden)
    decoder.output_head(inventory, config)
    decoder.rotary(inventory, config["rotary_width"])
    return inventory


def _attention(inventory: Inventory, name: str, config: dict[str, Any]) -> None:
    bias = config["attention_bias"]
    decoder.attention(inventory, name, config, bias=bias, output_bias=bias)
    inventory.rms_norm(f"{name}.q_norm", config["head_dim"])
    inventory.rms_norm(f"{name}.k_norm", config["head_dim"])


def _mixture(inventory: Inventory, name: str, config: dict[str, Any]) -> None:
    hidden, num_experts = config["hidden_size"], config["num_experts"]
    decoder.experts(inventory, f"{name}.experts", hidden, config["moe_intermediate_size"], num_experts)
    decoder.router(inventory, f"{name}.gate", hidden, num_experts)


FAMILIES = {
    "qwen3": Family(model_type="qwen3", architecture="Qwen3ForCausalLM", read=_read_dense, build=_build),
    "qwen3_moe": Family(model_type="qwen3_moe", architecture="Qwen3MoeForCausalLM", read=_read_moe, build=_build),
}
