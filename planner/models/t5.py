"""T5 and its version 1.1 (Flan-T5): an encoder and a decoder that share one embedding.

Source: transformers `models/t5/modeling_t5.py` and `configuration_t5.py`.
"""

from __future__ import annotations

from typing import Any

from optplan.planner.errors import ConfigError, shorten
from optplan.planner.models.fields import MAX_LAYERS, MAX_VOCABULARY, Fields
from optplan.planner.models.spec import Family, Inventory, separate_heads


def _read(fields: Fields) -> dict[str, Any]:
    num_layers = fields.integer("num_layers", high=MAX_LAYERS)
    activation, is_gated = _feed_forward(fields)
    return {
        "d_model": fields.integer("d_model"),
        "d_kv": fields.integer("d_kv", 64),
        "d_ff": fields.integer("d_ff"),
        "num_layers": num_layers,
        "num_decoder_layers": fields.integer("num_decoder_layers", num_layers, high=MAX_LAYERS),
        "num_heads": fields.integer("num_heads"),
        "vocab_size": fields.integer("vocab_size", high=MAX_VOCABULARY),
        # Relative positions have no longest sequence; the published files state the one trained with.
        "n_positions": fields.integer("n_positions", 512, high=2**30),
        "relative_attention_num_buckets": fields.integer("relative_attention_num_buckets", 32),
        "dense_act_fn": activation,
        "is_gated_act": is_gated,
        "dropout_rate": fields.number("dropout_rate", 0.1, high=1.0),
        # transformers 5 ties the output head whatever the file says; `false` only stops the scaling of its input.
        "scale_decoder_outputs": fields.boolean("tie_word_embeddings", True),
    }


def _feed_forward(fields: Fields) -> tuple[str, bool]:
    """The activation of the feed-forward layer, and whether a second projection gates it."""
    text = fields.text("feed_forward_proj", "relu")
    gate, _, activation = text.rpartition("-")
    if gate not in ("", "gated") or not activation:
        raise ConfigError(
            f"{fields.where}: the field 'feed_forward_proj' must be an activation such as relu, or gated-gelu, "
            f"got {shorten(text)}"
        )
    return "gelu_new" if text == "gated-gelu" else activation, gate == "gated"


def _build(config: dict[str, Any]) -> Inventory:
    vocab_size, hidden = config["vocab_size"], config["d_model"]
    inventory = Inventory()
    inventory.embedding("shared", vocab_size, hidden)
    for stack, num_layers in (("encoder", config["num_layers"]), ("decoder", config["num_decoder_layers"])):
        inventory.embedding(f"{stack}.embed_tokens", vocab_size, hidden, tied_to="shared.weight")
        for layer in range(num_layers):
            _block(inventory, f"{stack}.block.{layer}.layer", config, decoder=stack == "decoder", first=layer == 0)
        inventory.rms_norm(f"{stack}.final_layer_norm", hidden)
    inventory.linear("lm_head", hidden, vocab_size, "output_head", tied_to="shared.weight")
    return inventory


def _block(inventory: Inventory, name: str, config: dict[str, Any], *, decoder: bool, first: bool) -> None:
    hidden = config["d_model"]
    _attention(inventory, f"{name}.0.SelfAttention", config)
    if first:
        # Only the first block of a stack holds the biases; the others use its.
        bias = f"{name}.0.SelfAttention.relative_attention_bias"
        rows = config["relative_attention_num_buckets"]
        inventory.embedding(bias, rows, config["num_heads"], "position_embedding")
    inventory.rms_norm(f"{name}.0.layer_norm", hidden)
    if decoder:
        _attention(inventory, f"{name}.1.EncDecAttention", config)
        inventory.rms_norm(f"{name}.1.layer_norm", hidden)
    last = 2 if decoder else 1
    _mlp(inventory, f"{name}.{last}.DenseReluDense", config)
    inventory.rms_norm(f"{name}.{last}.layer_norm", hidden)


def _attention(inventory: Inventory, name: str, config: dict[str, Any]) -> None:
    hidden, width = config["d_model"], config["num_heads"] * config["d_kv"]
    for role, heads in separate_heads(config["d_kv"], config["num_heads"]).items():
        inventory.linear(f"{name}.{role[0]}", hidden, width, role, heads=heads)
    inventory.linear(f"{name}.o", width, hidden, "attention_output")


def _mlp(inventory: Inventory, name: str, config: dict[str, Any]) -> None:
    hidden, width = config["d_model"], config["d_ff"]
    for projection in ("wi_0", "wi_1") if config["is_gated_act"] else ("wi",):
        inventory.linear(f"{name}.{projection}", hidden, width, "mlp")
    inventory.linear(f"{name}.wo", width, hidden, "mlp")


FAMILY = Family(
    model_type="t5", architecture="T5ForConditionalGeneration", read=_read, build=_build, max_seq_len="n_positions"
)
