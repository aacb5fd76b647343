"""PaLM as its paper describes it; no public class of transformers holds it.

One norm feeds attention and MLP in parallel; queries have many heads, keys and values one; the MLP is SwiGLU; nothing
has a bias; the output head is the embedding.

Source: Chowdhery et al., "PaLM: Scaling Language Modeling with Pathways", arXiv:2204.02311, section 2 and table 1.
"""

from __future__ import annotations

from typing import Any

from optplan.planner.models.fields import MAX_LAYERS, MAX_VOCABULARY, Fields
from optplan.planner.models.spec import Family, Inventory
from optplan.planner.tensors import HeadLayout


def _read(fields: Fields) -> dict[str, Any]:
    hidden_size = fields.integer("hidden_size")
    return {
        "hidden_size": hidden_size,
        "intermediate_size": fields.integer("intermediate_size", 4 * hidden_size),
        "num_hidden_layers": fields.integer("num_hidden_layers", high=MAX_LAYERS),
        "num_attention_heads": fields.integer("num_attention_heads"),
        "head_dim": fields.integer("head_dim", 256),
        "hidden_act": "silu",
        "vocab_size": fields.integer("vocab_size", 256_000, high=MAX_VOCABULARY),
        "max_position_embeddings": fields.integer("max_position_embeddings", 2048, high=2**30),
    }


def _build(config: dict[str, Any]) -> Inventory:
    hidden, vocab_size = config["hidden_size"], config["vocab_size"]
    inventory = Inventory()
    inventory.embedding("embedding", vocab_size, hidden)
    for layer in range(config["num_hidden_layers"]):
        inventory.layer_norm(f"layers.{layer}.norm", hidden, bias=False)
        _attention(inventory, f"layers.{layer}.attention", config)
        _mlp(inventory, f"layers.{layer}.mlp", hidden, config["intermediate_size"])
    inventory.layer_norm("norm", hidden, bias=False)
    inventory.linear("lm_head", hidden, vocab_size, "output_head", tied_to="embedding.weight")
    return inventory


def _attention(inventory: Inventory, name: str, config: dict[str, Any]) -> None:
    hidden, head_dim, num_heads = config["hidden_size"], config["head_dim"], config["num_attention_heads"]
    query = HeadLayout(head_dim, num_query_heads=num_heads)
    inventory.linear(f"{name}.query", hidden, num_heads * head_dim, "query", heads=query)
    inventory.linear(f"{name}.key", hidden, head_dim, "key", heads=HeadLayout(head_dim, num_key_heads=1))
    inventory.linear(f"{name}.value", hidden, head_dim, "value", heads=HeadLayout(head_dim, num_value_heads=1))
    inventory.linear(f"{name}.output", num_heads * head_dim, hidden, "attention_output")


def _mlp(inventory: Inventory, name: str, hidden: int, width: int) -> None:
    inventory.linear(f"{name}.gate", hidden, width, "mlp")
    inventory.linear(f"{name}.up", hidden, width, "mlp")
    inventory.linear(f"{name}.down", width, hidden, "mlp")


FAMILY = Family(
    model_type="palm",
    architecture="PaLM, the paper's layout (no transformers class)",
    read=_read,
    build=_build,
)
