"""What the rules of a Llama-like decoder need to know about a model, read from its inventory and configuration."""

from __future__ import annotations

from typing import Literal

import msgspec

from optplan.planner.models.spec import ModelSpec
from optplan.planner.step.experts import ExpertsConfig
from optplan.planner.step.norms import NormStyle

DECODERS = (
    "llama", "mistral", "qwen2", "qwen3", "phi3", "gemma", "gemma2", "gemma3_text", "olmo2",
    "mixtral", "olmoe", "qwen3_moe",
)  # fmt: skip
DENSE = "dense"
"""Second part of the kind of a layer that has an MLP in a model whose other layers have experts."""
FULL, SLIDING = "full_attention", "sliding_attention"
_WINDOW_FOR_ALL = ("mistral", "phi3", "mixtral")
_GEMMAS = ("gemma", "gemma2", "gemma3_text")
_QK_NORM: dict[str, Literal["head", "late", "flat"]] = {
    "qwen3": "head",
    "qwen3_moe": "head",
    "gemma3_text": "late",
    "olmo2": "flat",
    "olmoe": "flat",
}


class DecoderConfig(msgspec.Struct, frozen=True, kw_only=True):
    """A decoder's sizes and the choices in which the families differ.

    Attributes:
        heads: Query heads.
        kv_heads: Key and value heads.
        rotary_width: Elements of a head that are rotated.
        rotates_in_float32: Whether queries and keys are rotated in fp32 and cast back.
        rotary_kinds: Kinds of layer with rotary tables of their own, or one empty name.
        mask_kinds: Kinds of mask, in the order in which they are made.
        maps_masks: Whether the masks are made from arguments kept together to the end, the embedded tokens first.
        window: Sliding window in tokens.
        norm: How the norms are computed.
        norms_before: Whether attention and MLP are preceded by a norm.
        norms_after: Whether they are followed by one.
        second_norm: Name of the norm before the MLP.
        qk_norm: Norm on queries and keys: over each head, over each head once all are projected, or over all heads.
        experts: The mixture in the place of an MLP, None for none.
        is_fused: Whether query, key and value are one projection, and gate and up another.
    """

    hidden: int
    intermediate: int
    heads: int
    kv_heads: int
    head_dim: int
    vocab: int
    activation: str
    tied: bool
    qkv_bias: bool
    output_bias: bool
    mlp_bias: bool
    rotary_width: int
    rotates_in_float32: bool
    rotary_kinds: tuple[str, ...]
    mask_kinds: tuple[str, ...]
    maps_masks: bool
    window: int | None
    norm: NormStyle
    norms_before: bool
    norms_after: bool
    second_norm: str
    qk_norm: Literal["head", "late", "flat"] | None
    experts: ExpertsConfig | None
    is_fused: bool
    scales_embedding: bool
    caps_scores: bool
    caps_logits: bool
    attention_dropout: float
    residual_dropout: float

    def qk_norm_width(self, heads: int) -> int:
        """Elements that a norm on queries or keys of `heads` heads takes together."""
        return heads * self.head_dim if self.qk_norm == "flat" else self.head_dim


def decoder_config(spec: ModelSpec) -> DecoderConfig:
    """The decoder that `spec` describes."""
    family, c = spec.model_type, spec.config
    names = {parameter.name for parameter in spec.parameters}
    kinds = decoder_layers(spec)
    return DecoderConfig(
        hidden=c["hidden_size"],
        intermediate=c["intermediate_size"],
        heads=c["num_attention_heads"],
        kv_heads=c["num_key_value_heads"],
        head_dim=c["head_dim"],
        vocab=c["vocab_size"],
        activation=c["hidden_act"],
        tied=c["tie_word_embeddings"],
        qkv_bias="model.layers.0.self_attn.q_proj.bias" in names,
        output_bias="model.layers.0.self_attn.o_proj.bias" in names,
        mlp_bias="model.layers.0.mlp.up_proj.bias" in names,
        rotary_width=2 * c["rotary_width"] if family == "phi3" else c["head_dim"],
        rotates_in_float32=family == "olmo2",
        rotary_kinds=tuple(dict.fromkeys(map(mask_of, kinds))) if family == "gemma3_text" else ("",),
        mask_kinds=_mask_kinds(family, kinds),
        maps_masks=family in ("qwen2", "qwen3", "gemma2", "gemma3_text"),
        window=c.get("sliding_window"),
        norm="gemma" if family in _GEMMAS else "olmo2" if family == "olmo2" else "llama",
        norms_before=family != "olmo2",
        norms_after=family in ("gemma2", "gemma3_text", "olmo2"),
        second_norm="pre_feedforward_layernorm" if family in _GEMMAS[1:] else "post_attention_layernorm",
        qk_norm=_QK_NORM.get(family),
        experts=_experts(spec),
        is_fused=family == "phi3",
        scales_embedding=family in _GEMMAS,
        caps_scores=c.get("attn_logit_softcapping") is not None,
        caps_logits=c.get("final_logit_softcapping") is not None,
        attention_dropout=c.get("attention_dropout", 0.0),
        residual_dropout=c.get("resid_pdrop", 0.0),
    )


def decoder_layers(spec: ModelSpec) -> tuple[str, ...]:
    """Kind of each layer: the mask that its attention takes, and whether it is dense where others are not."""
    if "mlp_only_layers" in spec.config:
        dense, mask = set(spec.config["mlp_only_layers"]), SLIDING if spec.config["sliding_window"] else FULL
        return tuple(f"{mask}/{DENSE}" if layer in dense else mask for layer in range(spec.config["num_hidden_layers"]))
    if "layer_types" in spec.config:
        return tuple(spec.config["layer_types"])
    windowed = spec.model_type in _WINDOW_FOR_ALL and spec.config.get("sliding_window") is not None
    return (SLIDING if windowed else FULL,) * int(spec.config["num_hidden_layers"])


def mask_of(kind: str) -> str:
    """The mask that a layer of this kind takes."""
    return kind.split("/")[0]


def _experts(spec: ModelSpec) -> ExpertsConfig | None:
    c, is_mixtral = spec.config, spec.model_type == "mixtral"
    if "num_experts" not in c:
        return None
    return ExpertsConfig(
        experts=c["num_experts"],
        visits=c["num_experts_per_tok"],
        hidden=c["hidden_size"],
        intermediate=c.get("moe_intermediate_size", c["intermediate_size"]),
        activation=c["hidden_act"],
        normalises=is_mixtral or c.get("norm_topk_prob", False),
        casts=not is_mixtral,
    )


def _mask_kinds(family: str, kinds: tuple[str, ...]) -> tuple[str, ...]:
    """Gemma makes both masks whatever the layers look at, Qwen the full one always, the others what they need."""
    kinds = tuple(map(mask_of, kinds))
    if family in ("gemma2", "gemma3_text"):
        return (FULL, SLIDING)
    if family in ("qwen2", "qwen3"):
        return (FULL, SLIDING) if SLIDING in kinds else (FULL,)
    return tuple(dict.fromkeys(kinds))
