"""The vision transformer with its classifier.

Source: transformers `models/vit/modeling_vit.py` and `configuration_vit.py` (the names of version 5).
"""

from __future__ import annotations

from typing import Any

from optplan.planner.errors import ConfigError, shorten
from optplan.planner.models.fields import MAX_LAYERS, MAX_VOCABULARY, MAX_WIDTH, Fields
from optplan.planner.models.spec import Family, Inventory, separate_heads


def _read(fields: Fields) -> dict[str, Any]:
    hidden_size = fields.integer("hidden_size")
    num_heads = fields.integer("num_attention_heads")
    head_dim = fields.integer("head_dim", None)
    if head_dim is None:
        fields.divides("num_attention_heads", num_heads, "hidden_size", hidden_size)
    image_size = _pair(fields, "image_size", 224)
    patch_size = _pair(fields, "patch_size", 16)
    if any(patch > image for patch, image in zip(patch_size, image_size, strict=True)):
        raise ConfigError(
            f"{fields.where}: the field 'patch_size' {patch_size} must not exceed 'image_size' {image_size}"
        )
    return {
        "hidden_size": hidden_size,
        "intermediate_size": fields.integer("intermediate_size"),
        "num_hidden_layers": fields.integer("num_hidden_layers", high=MAX_LAYERS),
        "num_attention_heads": num_heads,
        "head_dim": hidden_size // num_heads if head_dim is None else head_dim,
        "image_size": image_size,
        "patch_size": patch_size,
        "num_channels": fields.integer("num_channels", 3),
        "num_labels": _num_labels(fields),
        "qkv_bias": fields.boolean("qkv_bias", True),
        "hidden_act": fields.text("hidden_act", "gelu"),
        "hidden_dropout_prob": fields.number("hidden_dropout_prob", 0.0, high=1.0),
        "attention_probs_dropout_prob": fields.number("attention_probs_dropout_prob", 0.0, high=1.0),
    }


def _pair(fields: Fields, name: str, default: int) -> tuple[int, int]:
    """Height and width of the field `name`, one integer for both or a list of two."""
    value = fields.raw.get(name)
    if not isinstance(value, list | tuple):
        side: int = fields.integer(name, default)
        return side, side
    if len(value) != 2 or any(type(side) is not int or not 1 <= side <= MAX_WIDTH for side in value):
        raise ConfigError(
            f"{fields.where}: the field '{name}' must be an integer between 1 and {MAX_WIDTH} or a list of two, "
            f"got {shorten(value)}"
        )
    return value[0], value[1]


def _num_labels(fields: Fields) -> int:
    """Classes of the classifier: one for each label the file names, two if it names none, as in transformers."""
    if fields.raw.get("id2label") is None:
        stated: int = fields.integer("num_labels", 2, low=0, high=MAX_VOCABULARY)
        return stated
    named = len(fields.mapping("id2label"))
    if fields.integer("num_labels", named, low=0, high=MAX_VOCABULARY) != named:
        raise ConfigError(
            f"{fields.where}: the field 'num_labels' ({fields.raw['num_labels']}) must equal the number of labels in "
            f"'id2label' ({named})"
        )
    return named


def _num_positions(config: dict[str, Any]) -> int:
    """Patches of the image and the class token."""
    (image_height, image_width), (patch_height, patch_width) = config["image_size"], config["patch_size"]
    num_patches: int = (image_height // patch_height) * (image_width // patch_width)
    return num_patches + 1


def _build(config: dict[str, Any]) -> Inventory:
    hidden = config["hidden_size"]
    inventory = Inventory()
    _embeddings(inventory, config)
    for layer in range(config["num_hidden_layers"]):
        _layer(inventory, f"vit.layers.{layer}", config)
    inventory.layer_norm("vit.layernorm", hidden)
    if config["num_labels"]:
        inventory.linear("classifier", hidden, config["num_labels"], "output_head", bias=True)
    return inventory


def _embeddings(inventory: Inventory, config: dict[str, Any]) -> None:
    hidden, name = config["hidden_size"], "vit.embeddings"
    inventory.add(f"{name}.cls_token", (1, 1, hidden), "other", "parameter", output_axes=(0, 1))
    positions = (1, _num_positions(config), hidden)
    inventory.add(f"{name}.position_embeddings", positions, "position_embedding", "parameter", output_axes=(0, 1))
    patches = (hidden, config["num_channels"], *config["patch_size"])
    inventory.add(f"{name}.patch_embeddings.projection.weight", patches, "patch_embedding", "conv2d")
    inventory.add(f"{name}.patch_embeddings.projection.bias", (hidden,), "bias", "conv2d")


def _layer(inventory: Inventory, name: str, config: dict[str, Any]) -> None:
    hidden, width, num_heads = config["hidden_size"], config["intermediate_size"], config["num_attention_heads"]
    inner = num_heads * config["head_dim"]
    for role, heads in separate_heads(config["head_dim"], num_heads).items():
        projection = f"{name}.attention.{role[0]}_proj"
        inventory.linear(projection, hidden, inner, role, bias=config["qkv_bias"], heads=heads)
    inventory.linear(f"{name}.attention.o_proj", inner, hidden, "attention_output", bias=True)
    inventory.layer_norm(f"{name}.layernorm_before", hidden)
    inventory.layer_norm(f"{name}.layernorm_after", hidden)
    inventory.linear(f"{name}.mlp.fc1", hidden, width, "mlp", bias=True)
    inventory.linear(f"{name}.mlp.fc2", width, hidden, "mlp", bias=True)


FAMILY = Family(
    model_type="vit",
    architecture="ViTForImageClassification",
    read=_read,
    build=_build,
    max_seq_len=_num_positions,
)
