"""Finds the attention of a model and says what its projections hold, from the modules themselves.

An attention module is one that owns its projections under one of the known sets of attributes (`q_proj`, `k_proj`,
`v_proj`; `query`, `key`, `value`; a fused `c_attn`, `qkv_proj`, `query_key_value`; ...), with widths that its own head
counts or head width divide. Nothing is read off the dotted names of parameters, so a module may be called anything.

Source: the attention classes of transformers 5, timm, torchvision and `torch.nn.MultiheadAttention`.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from typing import TypeGuard

import msgspec
from torch import Tensor, nn

from optplan.planner.tensors import HeadLayout, Role

_SEPARATE = (
    ("q_proj", "k_proj", "v_proj"),
    ("query", "key", "value"),
    ("q", "k", "v"),
    ("wq", "wk", "wv"),
    ("to_q", "to_k", "to_v"),
    ("q_lin", "k_lin", "v_lin"),
    ("query_proj", "key_proj", "value_proj"),
)
_FUSED = ("c_attn", "qkv_proj", "query_key_value", "qkv", "Wqkv", "wqkv", "in_proj")
_HEAD_WIDTHS = ("head_dim", "attention_head_size", "head_size", "key_value_proj_dim", "kv_channels", "dim_head")
_HEAD_COUNTS = ("num_heads", "num_attention_heads", "n_heads", "n_head", "heads")


class Projection(msgspec.Struct, frozen=True):
    """What one attention projection is for.

    Attributes:
        weight: The weight itself.
        role: `query`, `key`, `value`, `fused_qkv` or `attention_output`.
        heads: How its output neurons divide into heads; None for the output projection.
        why: The structure that told.
    """

    weight: Tensor
    role: Role
    heads: HeadLayout | None
    why: str


class Attention(msgspec.Struct, frozen=True):
    """The projections of one attention module, and the module that holds all of them."""

    module: nn.Module
    projections: tuple[Projection, ...]


def is_transposed_linear(module: nn.Module) -> bool:
    """Whether `module` is transformers' `Conv1D`, whose weight lies `[in, out]`."""
    loaded = sys.modules.get("transformers.pytorch_utils")
    return loaded is not None and isinstance(module, loaded.Conv1D)


def is_linear(module: object) -> TypeGuard[nn.Module]:
    """Whether `module` is a linear map with a weight matrix, in either orientation."""
    return isinstance(module, nn.Linear) or (isinstance(module, nn.Module) and is_transposed_linear(module))


def linear_sizes(module: nn.Module) -> tuple[int, int]:
    """Input and output width of a linear map."""
    rows, columns = _weight(module).shape
    return (rows, columns) if is_transposed_linear(module) else (columns, rows)


def find_attentions(model: nn.Module) -> list[Attention]:
    """Every attention of the model whose projections can be told apart."""
    parents = {id(child): module for module in model.modules() for child in module.children()}
    found = []
    for module in model.modules():
        projections = _multihead(module) or _fused(module) or _separate(module)
        if projections:
            found.append(_with_output(module, projections, parents.get(id(module))))
    return found


def _multihead(module: nn.Module) -> list[Projection]:
    if not isinstance(module, nn.MultiheadAttention):
        return []
    width, num_heads = module.head_dim, module.num_heads
    why = f"{num_heads} heads of torch.nn.MultiheadAttention"
    fused: Tensor | None = module.in_proj_weight
    if fused is not None:
        heads = HeadLayout(width, num_heads, num_heads, num_heads)
        return [Projection(fused, "fused_qkv", heads, why)]
    return [
        Projection(module.q_proj_weight, "query", HeadLayout(width, num_query_heads=num_heads), why),
        Projection(module.k_proj_weight, "key", HeadLayout(width, num_key_heads=num_heads), why),
        Projection(module.v_proj_weight, "value", HeadLayout(width, num_value_heads=num_heads), why),
    ]


def _separate(module: nn.Module) -> list[Projection]:
    for names in _SEPARATE:
        children = [getattr(module, name, None) for name in names]
        if not all(is_linear(child) for child in children):
            continue
        query, key, value = (child for child in children if isinstance(child, nn.Module))
        widths = [linear_sizes(child)[1] for child in (query, key, value)]
        head_dim = _head_width(module, query_width=widths[0])
        if head_dim is None or any(width % head_dim for width in widths):
            return []
        counts = [width // head_dim for width in widths]
        why = "{} of {} heads of " + f"{head_dim} in {type(module).__name__}"
        return [
            Projection(_weight(query), "query", HeadLayout(head_dim, num_query_heads=counts[0]), _say(why, 0, counts)),
            Projection(_weight(key), "key", HeadLayout(head_dim, num_key_heads=counts[1]), _say(why, 1, counts)),
            Projection(_weight(value), "value", HeadLayout(head_dim, num_value_heads=counts[2]), _say(why, 2, counts)),
        ]
    return []


def _say(why: str, index: int, counts: list[int]) -> str:
    return why.format(("queries", "keys", "values")[index], counts[index])


def _fused(module: nn.Module) -> list[Projection]:
    for name in _FUSED:
        child = getattr(module, name, None)
        if not is_linear(child):
            continue
        layout = _fused_layout(module, name, linear_sizes(child)[1])
        if layout is None:
            return []
        order = "each key and value after its queries" if layout.interleaved else "queries, then keys, then values"
        why = f"heads of {layout.head_dim} in {type(module).__name__}: {order}"
        return [Projection(_weight(child), "fused_qkv", layout, why), *_lone_query(module, layout.head_dim)]
    return []


def _lone_query(module: nn.Module, head_dim: int) -> list[Projection]:
    """GPT-2's cross-attention: the fused matrix holds keys and values, the queries come from the decoder's own."""
    query = getattr(module, "q_attn", None)
    if not is_linear(query):
        return []
    count = linear_sizes(query)[1] // head_dim
    why = f"queries of {count} heads of {head_dim} in {type(module).__name__}"
    return [Projection(_weight(query), "query", HeadLayout(head_dim, num_query_heads=count), why)]


def _fused_layout(module: nn.Module, name: str, out_features: int) -> HeadLayout | None:
    """Layout of a fused matrix: the query heads are known, what its width leaves is keys and values in equal parts."""
    num_heads = _attribute(module, _HEAD_COUNTS)
    if num_heads is None:
        return None
    head_dim = _attribute(module, _HEAD_WIDTHS)
    if head_dim is None and out_features % (3 * num_heads) == 0:
        head_dim = out_features // (3 * num_heads)
    if head_dim is None or out_features % head_dim:
        return None
    num_queries = 0 if is_linear(getattr(module, "q_attn", None)) else num_heads
    num_keys, odd = divmod(out_features // head_dim - num_queries, 2)
    if odd or num_keys < 1 or (num_queries and num_queries % num_keys):
        return None
    return HeadLayout(head_dim, num_queries, num_keys, num_keys, interleaved=_is_interleaved(module, name))


def _is_interleaved(module: nn.Module, name: str) -> bool:
    """Whether each key head follows its queries: said by Falcon and GPT-BigCode, true of GPT-NeoX and BLOOM."""
    if getattr(module, "new_decoder_architecture", False):
        return True
    multi_query = getattr(module, "multi_query", None)
    return name == "query_key_value" if multi_query is None else not multi_query


def _head_width(module: nn.Module, *, query_width: int) -> int | None:
    width = _attribute(module, _HEAD_WIDTHS)
    if width is not None:
        return width
    num_heads = _attribute(module, _HEAD_COUNTS)
    return query_width // num_heads if num_heads and query_width % num_heads == 0 else None


def _attribute(module: nn.Module, names: tuple[str, ...]) -> int | None:
    """The first positive integer among the attributes of the module, else of its configuration."""
    for owner in (module, getattr(module, "config", None)):
        for name in names:
            value = getattr(owner, name, None)
            if type(value) is int and value > 0:
                return value
    return None


def _with_output(module: nn.Module, projections: list[Projection], parent: nn.Module | None) -> Attention:
    """Add the output projection: a linear map of the heads' width in the module, or alone beside it in its parent."""
    width = _heads_width(projections)
    own = [child for child in module.children() if is_linear(child) and not _among(child, projections)]
    outputs = [child for child in own if linear_sizes(child)[0] == width]
    holder = module
    if not own and parent is not None:
        beside = list(_weights_outside(parent, module))
        if len(beside) == 1 and is_linear(beside[0]) and linear_sizes(beside[0])[0] == width:
            outputs, holder = beside, parent
    why = f"takes the heads of {type(module).__name__}"
    added = tuple(Projection(_weight(child), "attention_output", None, why) for child in outputs)
    return Attention(holder, (*projections, *added))


def _heads_width(projections: list[Projection]) -> int:
    """Width of all query heads together, which the output projection takes (as values of as many heads)."""
    layouts = [projection.heads for projection in projections if projection.heads is not None]
    return max(heads.num_query_heads * heads.head_dim for heads in layouts)


def _weights_outside(parent: nn.Module, module: nn.Module) -> Iterator[nn.Module]:
    """Modules of `parent` but not of `module` that own a matrix or more."""
    inside = {id(part) for part in module.modules()}
    for part in parent.modules():
        if id(part) not in inside and any(weight.dim() > 1 for weight in part.parameters(recurse=False)):
            yield part


def _among(child: nn.Module, projections: list[Projection]) -> bool:
    return any(_weight(child) is projection.weight for projection in projections)


def _weight(module: object) -> Tensor:
    weight = getattr(module, "weight", None)
    assert isinstance(weight, Tensor)
    return weight
