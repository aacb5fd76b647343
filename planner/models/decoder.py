"""What Llama-like decoders share: their fields, separate attention projections, gated MLPs, experts, rotary tables.

Source: transformers `modeling_rope_utils.py` and the `modeling_*.py` of the families that use these functions.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from optplan.planner.errors import ConfigError
from optplan.planner.models.fields import MAX_EXPERTS, MAX_LAYERS, MAX_VOCABULARY, Fields
from optplan.planner.models.spec import Inventory
from optplan.planner.tensors import Buffer, HeadLayout

EMBEDDING = "model.embed_tokens"
MAX_POSITIONS = 2**30
SLIDING, FULL = "sliding_attention", "full_attention"

ROPE_TYPES = ("default", "linear", "dynamic", "yarn", "longrope", "llama3", "proportional")


def decoder_fields(fields: Fields, *, optional_kv_heads: bool = False) -> dict[str, Any]:
    """The fields that every family here has.

    Args:
        fields: The configuration as read, with the class defaults of the optional fields filled in.
        optional_kv_heads: Whether the class takes `num_attention_heads` where `num_key_value_heads` is absent. Where
            its default is a number that suits one published size only, the field is required here.
    """
    heads = fields.integer("num_attention_heads")
    kv_heads = fields.integer("num_key_value_heads", *([heads] if optional_kv_heads else []))
    fields.divides("num_key_value_heads", kv_heads, "num_attention_heads", heads)
    hidden = fields.integer("hidden_size")
    return {
        "vocab_size": fields.integer("vocab_size", high=MAX_VOCABULARY),
        "hidden_size": hidden,
        "intermediate_size": fields.integer("intermediate_size"),
        "num_hidden_layers": fields.integer("num_hidden_layers", high=MAX_LAYERS),
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "head_dim": _head_dim(fields, hidden, heads),
        "max_position_embeddings": fields.integer("max_position_embeddings", high=MAX_POSITIONS),
        "hidden_act": fields.text("hidden_act", "silu"),
        "attention_dropout": fields.number("attention_dropout", 0.0, high=1.0),
        "tie_word_embeddings": fields.boolean("tie_word_embeddings", False),
    }


def _head_dim(fields: Fields, hidden: int, heads: int) -> int:
    """Width of one head; rotation pairs its elements, so it must be even."""
    width: int | None = fields.integer("head_dim", None)
    origin = "'head_dim'"
    if width is None:
        origin = "'hidden_size' / 'num_attention_heads'"
        fields.divides("num_attention_heads", heads, "hidden_size", hidden)
        width = hidden // heads
    if width % 2:
        raise ConfigError(f"{fields.where}: a head must have an even width to be rotated, got {width} ({origin})")
    return width


def heads_divide_hidden(fields: Fields, config: dict[str, Any]) -> None:
    """Check that the heads divide the hidden size, as some classes demand even where `head_dim` is given."""
    fields.divides("num_attention_heads", config["num_attention_heads"], "hidden_size", config["hidden_size"])


def rotary_width(
    fields: Fields, head_dim: int, *, always_partial: bool = False, rope_types: tuple[str, ...] = ROPE_TYPES
) -> int:
    """Frequencies in the rotary table.

    Args:
        fields: The configuration as read; `rope_scaling` (the older name) goes before `rope_parameters`.
        head_dim: Width of one head.
        always_partial: Whether `partial_rotary_factor` shortens the unscaled table too (Phi), not only scaled ones.
        rope_types: Types of scaling that the class knows.
    """
    rope = fields.section("rope_scaling" if fields.mapping("rope_scaling") else "rope_parameters")
    rope = rope.filled(partial_rotary_factor=partial_factor(fields))
    return table_width(rope, head_dim, always_partial=always_partial, rope_types=rope_types)


def partial_factor(fields: Fields) -> float:
    """The part of each head that is rotated, where the rope parameters do not say so themselves."""
    factor: float = fields.number("partial_rotary_factor", 1.0, high=1.0)
    return factor


def table_width(
    rope: Fields, head_dim: int, *, always_partial: bool = False, rope_types: tuple[str, ...] = ROPE_TYPES
) -> int:
    """Frequencies in the table that one set of rope parameters describes."""
    rope_type = rope.text("rope_type" if "rope_type" in rope.raw else "type", "default", allowed=rope_types)
    factor = partial_factor(rope)
    if rope_type == "proportional" or (rope_type == "default" and not always_partial):
        return head_dim // 2
    rotated = int(head_dim * factor)
    if rope_type == "yarn" and rotated % 2:
        raise ConfigError(
            f"{rope.where}: 'yarn' scaling needs an even number of rotated elements a head, got {rotated}"
        )
    return (rotated + 1) // 2


def sliding_window(fields: Fields, *, switched: bool = False) -> int | None:
    """The attention window in tokens, None for none; if `switched`, only where `use_sliding_window` turns it on."""
    window: int | None = fields.integer("sliding_window", None, high=MAX_POSITIONS)
    return window if not switched or fields.boolean("use_sliding_window", False) else None


def windowed_layers(fields: Fields, num_layers: int, window: int | None) -> tuple[str, ...]:
    """Attention of each Qwen layer; unless listed, those from `max_window_layers` on look through the window."""
    first = num_layers if window is None else fields.integer("max_window_layers", 28, low=0)
    regular = tuple(SLIDING if layer >= first else FULL for layer in range(num_layers))
    types: tuple[str, ...] = fields.names("layer_types", regular, allowed=(SLIDING, FULL), length=num_layers)
    return types


def expert_fields(fields: Fields) -> dict[str, Any]:
    """Experts of a mixture, how many of them a token visits; the count goes by two names in published files."""
    count = fields.integer(fields.one_of("num_experts", "num_local_experts"), high=MAX_EXPERTS)
    return {"num_experts": count, "num_experts_per_tok": fields.integer("num_experts_per_tok", high=count)}


def layer_names(config: dict[str, Any]) -> Iterator[str]:
    """Dotted name of each decoder layer."""
    return (f"model.layers.{layer}" for layer in range(config["num_hidden_layers"]))


def attention(
    inventory: Inventory,
    name: str,
    config: dict[str, Any],
    *,
    bias: bool = False,
    output: str = "o_proj",
    output_bias: bool = False,
) -> None:
    """Append separate query, key and value projections and the output projection."""
    hidden, head_dim = config["hidden_size"], config["head_dim"]
    num_heads, num_kv = config["num_attention_heads"], config["num_key_value_heads"]
    query = HeadLayout(head_dim, num_query_heads=num_heads)
    key = HeadLayout(head_dim, num_key_heads=num_kv)
    value = HeadLayout(head_dim, num_value_heads=num_kv)
    inventory.linear(f"{name}.q_proj", hidden, num_heads * head_dim, "query", bias=bias, heads=query)
    inventory.linear(f"{name}.k_proj", hidden, num_kv * head_dim, "key", bias=bias, heads=key)
    inventory.linear(f"{name}.v_proj", hidden, num_kv * head_dim, "value", bias=bias, heads=value)
    inventory.linear(f"{name}.{output}", num_heads * head_dim, hidden, "attention_output", bias=output_bias)


def gated_mlp(inventory: Inventory, name: str, hidden: int, width: int, *, bias: bool = False) -> None:
    """Append the gate, up and down projections of a gated feed-forward block."""
    inventory.linear(f"{name}.gate_proj", hidden, width, "mlp", bias=bias)
    inventory.linear(f"{name}.up_proj", hidden, width, "mlp", bias=bias)
    inventory.linear(f"{name}.down_proj", width, hidden, "mlp", bias=bias)


def experts(inventory: Inventory, name: str, hidden: int, width: int, num_experts: int) -> None:
    """Append stacked experts: gate and up `[experts, 2 * width, hidden]`, down `[experts, hidden, width]`."""
    for part, shape in (
        ("gate_up_proj", (num_experts, 2 * width, hidden)),
        ("down_proj", (num_experts, hidden, width)),
    ):
        inventory.add(f"{name}.{part}", shape, "mlp", "experts", output_axes=(0, 1))


def router(inventory: Inventory, name: str, hidden: int, num_experts: int) -> None:
    """Append the gate that scores the experts: weight `[experts, hidden]`."""
    inventory.add(f"{name}.weight", (num_experts, hidden), "router", "parameter")


def embed(config: dict[str, Any]) -> Inventory:
    """A new inventory that begins with the token embedding."""
    inventory = Inventory()
    inventory.embedding(EMBEDDING, config["vocab_size"], config["hidden_size"])
    return inventory


def output_head(inventory: Inventory, config: dict[str, Any], *, bias: bool = False) -> None:
    """Append the projection onto the vocabulary, sharing the embedding's storage where the words are tied."""
    tied_to = f"{EMBEDDING}.weight" if config["tie_word_embeddings"] else None
    inventory.linear("lm_head", config["hidden_size"], config["vocab_size"], "output_head", bias=bias, tied_to=tied_to)


def rotary(inventory: Inventory, width: int, *, prefix: str = "") -> None:
    """Append the two fp32 tables of rotary frequencies `[width]`; they stay fp32 in a model built in bf16."""
    for name in ("inv_freq", "original_inv_freq"):
        inventory.buffer(Buffer(f"model.rotary_emb.{prefix}{name}", (width,)))
