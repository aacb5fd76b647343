"""Gemma 1, 2 and 3 (text): a scaled, tied embedding; from 2 on, norms on both sides of each block.

Source: transformers `models/gemma/modeling_gemma.py`, `models/gemma2/modeling_gemma2.py`,
`models/gemma3/modeling_gemma3.py` and their configurations.
"""

from __future__ import annotations

from functools import partial
from typing import Any

from optplan.planner.models import decoder
from optplan.planner.models.decoder import FULL, SLIDING
from optplan.planner.models.fields import Fields
from optplan.planner.models.spec import Family, Inventory
from optplan.planner.tensors import Buffer

_NORMS = ("input_layernorm", "post_attention_layernorm")
_LATER_NORMS = (*_NORMS, "pre_feedforward_layernorm", "post_feedforward_layernorm")


def _read(fields: Fields) -> dict[str, Any]:
    return {
        **decoder.decoder_fields(fields.filled(head_dim=256, tie_word_embeddings=True)),
        "attention_bias": fields.boolean("attention_bias", False),
    }


def _read_gemma1(fields: Fields) -> dict[str, Any]:
    config = _read(fields.filled(max_position_embeddings=8192, hidden_act="gelu_pytorch_tanh"))
    # The first published files say `gelu` and mean its tanh approximation, and the class reads them so.
    activation = "gelu_pytorch_tanh" if config["hidden_act"] == "gelu" else config["hidden_act"]
    widths = {"": decoder.rotary_width(fields, config["head_dim"])}
    return {**config, "hidden_act": activation, "rotary_widths": widths}


def _read_later(fields: Fields) -> dict[str, Any]:
    """What Gemma 2 and 3 add: windows on some layers, capped scores and logits; the activation has another name."""
    activation = fields.text("hidden_activation", "gelu_pytorch_tanh")
    config = _read(Fields({**fields.raw, "hidden_act": activation}, where=fields.where))
    decoder.heads_divide_hidden(fields, config)
    return {
        **config,
        "sliding_window": decoder.sliding_window(fields.filled(sliding_window=4096)),
        "attn_logit_softcapping": fields.number("attn_logit_softcapping", None),
        "final_logit_softcapping": fields.number("final_logit_softcapping", None),
    }


def _read_gemma2(fields: Fields) -> dict[str, Any]:
    fields = fields.filled(max_position_embeddings=8192, attn_logit_softcapping=50.0, final_logit_softcapping=30.0)
    config = _read_later(fields)
    return {
        **config,
        "layer_types": _layer_types(fields, config["num_hidden_layers"], 2),
        "rotary_widths": {"": decoder.rotary_width(fields, config["head_dim"])},
    }


def _read_gemma3(fields: Fields) -> dict[str, Any]:
    """Published files leave out the vocabulary and the heads where they equal the class defaults."""
    fields = fields.filled(
        vocab_size=262_208, num_attention_heads=8, num_key_value_heads=4, max_position_embeddings=131_072
    )
    config = _read_later(fields)
    pattern = fields.integer("sliding_window_pattern", 6)
    layer_types = _layer_types(fields, config["num_hidden_layers"], pattern)
    widths = {f"{kind}_": _gemma3_table(fields, kind, config["head_dim"]) for kind in sorted(set(layer_types))}
    return {**config, "layer_types": layer_types, "rotary_widths": widths}


def _layer_types(fields: Fields, num_layers: int, pattern: int) -> tuple[str, ...]:
    """Attention of each layer; unless listed, every `pattern`-th sees the whole sequence, the others a window."""
    regular = tuple(SLIDING if (layer + 1) % pattern else FULL for layer in range(num_layers))
    types: tuple[str, ...] = fields.names("layer_types", regular, allowed=(SLIDING, FULL), length=num_layers)
    return types


def _gemma3_table(fields: Fields, kind: str, head_dim: int) -> int:
    """Frequencies in one kind's table: `rope_parameters` by kind, or the older `rope_scaling` of the full layers."""
    rope = fields.section("rope_parameters").section(kind)
    if kind == FULL and fields.mapping("rope_scaling"):
        rope = fields.section("rope_scaling").filled(**rope.raw)
    return decoder.table_width(rope.filled(partial_rotary_factor=decoder.partial_factor(fields)), head_dim)


def _build(config: dict[str, Any], *, norms: tuple[str, ...], qk_norm: bool) -> Inventory:
    inventory = decoder.embed(config)
    # The scale is made in the model's dtype, unlike the rotary tables.
    inventory.buffer(Buffer(f"{decoder.EMBEDDING}.embed_scale", (), dtype=None))
    for layer in decoder.layer_names(config):
        _layer(inventory, layer, config, norms=norms, qk_norm=qk_norm)
    inventory.rms_norm("model.norm", config["hidden_size"])
    decoder.output_head(inventory, config)
    for prefix, width in config["rotary_widths"].items():
        decoder.rotary(inventory, width, prefix=prefix)
    return inventory


def _layer(inventory: Inventory, layer: str, config: dict[str, Any], *, norms: tuple[str, ...], qk_norm: bool) -> None:
    hidden, bias = config["hidden_size"], config["attention_bias"]
    decoder.attention(inventory, f"{layer}.self_attn", config, bias=bias, output_bias=bias)
    if qk_norm:
        inventory.rms_norm(f"{layer}.self_attn.q_norm", config["head_dim"])
        inventory.rms_norm(f"{layer}.self_attn.k_norm", config["head_dim"])
    decoder.gated_mlp(inventory, f"{layer}.mlp", hidden, config["intermediate_size"])
    for norm in norms:
        inventory.rms_norm(f"{layer}.{norm}", hidden)


FAMILIES = {
    "gemma": Family(
        model_type="gemma",
        architecture="GemmaForCausalLM",
        read=_read_gemma1,
        build=partial(_build, norms=_NORMS, qk_norm=False),
    ),
    "gemma2": Family(
        model_type="gemma2",
        architecture="Gemma2ForCausalLM",
        read=_read_gemma2,
        build=partial(_build, norms=_LATER_NORMS, qk_norm=False),
    ),
    "gemma3_text": Family(
        model_type="gemma3_text",
        architecture="Gemma3ForCausalLM",
        read=_read_gemma3,
        build=partial(_build, norms=_LATER_NORMS, qk_norm=True),
    ),
}
