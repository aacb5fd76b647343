"""BERT and RoBERTa with their masked-language-model heads.

The two share the encoder; the order of the embeddings and the names of the head differ.

Source: transformers `models/bert/modeling_bert.py` and `models/roberta/modeling_roberta.py`.
"""

from __future__ import annotations

from typing import Any

from optplan.planner.models.fields import MAX_LAYERS, MAX_VOCABULARY, Fields
from optplan.planner.models.spec import Family, Inventory, separate_heads
from optplan.planner.tensors import Buffer


def _read(fields: Fields, *, pad_token_id: int, first_position: int) -> dict[str, Any]:
    hidden_size = fields.integer("hidden_size")
    num_heads = fields.integer("num_attention_heads")
    fields.divides("num_attention_heads", num_heads, "hidden_size", hidden_size)
    fields.refuse("add_cross_attention", "cross-attention is not modelled")
    return {
        "hidden_size": hidden_size,
        "intermediate_size": fields.integer("intermediate_size"),
        "num_hidden_layers": fields.integer("num_hidden_layers", high=MAX_LAYERS),
        "num_attention_heads": num_heads,
        "vocab_size": fields.integer("vocab_size", high=MAX_VOCABULARY),
        "max_position_embeddings": fields.integer("max_position_embeddings", 512, low=first_position + 1, high=2**30),
        "type_vocab_size": fields.integer("type_vocab_size", 2),
        "pad_token_id": pad_token_id,
        "hidden_act": fields.text("hidden_act", "gelu"),
        "hidden_dropout_prob": fields.number("hidden_dropout_prob", 0.1, high=1.0),
        "attention_probs_dropout_prob": fields.number("attention_probs_dropout_prob", 0.1, high=1.0),
        "tie_word_embeddings": fields.boolean("tie_word_embeddings", True),
    }


def _read_bert(fields: Fields) -> dict[str, Any]:
    pad_token_id = fields.integer("pad_token_id", 0, low=0, high=MAX_VOCABULARY)
    return _read(fields, pad_token_id=pad_token_id, first_position=0)


def _read_roberta(fields: Fields) -> dict[str, Any]:
    # RoBERTa counts positions from the one after the padding token's, so its first rows never stand for a token.
    pad_token_id = fields.integer("pad_token_id", 1, low=0, high=MAX_VOCABULARY)
    return _read(fields, pad_token_id=pad_token_id, first_position=pad_token_id + 1)


def _build_bert(config: dict[str, Any]) -> Inventory:
    inventory = Inventory()
    _token_embeddings(inventory, "bert", config)
    _position_embeddings(inventory, "bert", config)
    _token_types(inventory, "bert", config)
    _encoder(inventory, "bert", config)
    _head(inventory, "cls.predictions", ("transform.dense", "transform.LayerNorm"), "bert", config)
    return inventory


def _build_roberta(config: dict[str, Any]) -> Inventory:
    inventory = Inventory()
    _token_embeddings(inventory, "roberta", config)
    _token_types(inventory, "roberta", config)
    _position_embeddings(inventory, "roberta", config)
    _encoder(inventory, "roberta", config)
    _head(inventory, "lm_head", ("dense", "layer_norm"), "roberta", config)
    return inventory


def _token_embeddings(inventory: Inventory, model: str, config: dict[str, Any]) -> None:
    inventory.embedding(f"{model}.embeddings.word_embeddings", config["vocab_size"], config["hidden_size"])
    for name in ("position_ids", "token_type_ids"):
        shape = (1, config["max_position_embeddings"])
        inventory.buffer(Buffer(f"{model}.embeddings.{name}", shape, dtype="int64"))


def _token_types(inventory: Inventory, model: str, config: dict[str, Any]) -> None:
    name = f"{model}.embeddings.token_type_embeddings"
    inventory.embedding(name, config["type_vocab_size"], config["hidden_size"], "position_embedding")
    inventory.layer_norm(f"{model}.embeddings.LayerNorm", config["hidden_size"])


def _position_embeddings(inventory: Inventory, model: str, config: dict[str, Any]) -> None:
    name = f"{model}.embeddings.position_embeddings"
    inventory.embedding(name, config["max_position_embeddings"], config["hidden_size"], "position_embedding")


def _encoder(inventory: Inventory, model: str, config: dict[str, Any]) -> None:
    hidden, width, num_heads = config["hidden_size"], config["intermediate_size"], config["num_attention_heads"]
    layouts = separate_heads(hidden // num_heads, num_heads)
    for layer in range(config["num_hidden_layers"]):
        block = f"{model}.encoder.layer.{layer}"
        for role, heads in layouts.items():
            inventory.linear(f"{block}.attention.self.{role}", hidden, hidden, role, bias=True, heads=heads)
        inventory.linear(f"{block}.attention.output.dense", hidden, hidden, "attention_output", bias=True)
        inventory.layer_norm(f"{block}.attention.output.LayerNorm", hidden)
        inventory.linear(f"{block}.intermediate.dense", hidden, width, "mlp", bias=True)
        inventory.linear(f"{block}.output.dense", width, hidden, "mlp", bias=True)
        inventory.layer_norm(f"{block}.output.LayerNorm", hidden)


def _head(inventory: Inventory, name: str, transform: tuple[str, str], model: str, config: dict[str, Any]) -> None:
    """The head: its own bias, a dense layer and its norm, then a decoder tied to the embedding and to that bias."""
    hidden, vocab_size, tied = config["hidden_size"], config["vocab_size"], config["tie_word_embeddings"]
    dense, norm = transform
    # A decoder of its own has a bias of its own: the head's is then left over from the class, and never used.
    inventory.add(f"{name}.bias", (vocab_size,), "bias", "parameter", is_used=tied)
    inventory.linear(f"{name}.{dense}", hidden, hidden, "other", bias=True)
    inventory.layer_norm(f"{name}.{norm}", hidden)
    embedding = f"{model}.embeddings.word_embeddings.weight" if tied else None
    inventory.linear(f"{name}.decoder", hidden, vocab_size, "output_head", tied_to=embedding)
    tied_bias = f"{name}.bias" if tied else None
    inventory.add(f"{name}.decoder.bias", (vocab_size,), "bias", "linear", tied_to=tied_bias)


def _roberta_max_seq_len(config: dict[str, Any]) -> int:
    longest: int = config["max_position_embeddings"] - config["pad_token_id"] - 1
    return longest


FAMILIES = {
    "bert": Family(model_type="bert", architecture="BertForMaskedLM", read=_read_bert, build=_build_bert),
    "roberta": Family(
        model_type="roberta",
        architecture="RobertaForMaskedLM",
        read=_read_roberta,
        build=_build_roberta,
        max_seq_len=_roberta_max_seq_len,
    ),
}
