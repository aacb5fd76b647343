"""Head layouts against the models themselves: which attention maps move when the rows of one head change their sign.

A sign, not noise: norms of whole queries (OLMo 2) stay as they were, so that only the flipped head can move. The rows
of a head are derived here from the layout's definition: separate kinds lie one after another; in an interleaved matrix
each key head follows its queries and is followed by its value head.
"""

from __future__ import annotations

import copy
import re
import runpy
from functools import cache
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest

from optplan.planner.models.fields import Fields
from optplan.planner.models.registry import MODULES, family_of
from optplan.planner.tensors import HeadLayout, Parameter

torch = import_module("torch")
transformers = import_module("transformers")

HERE = Path(__file__).parent
WITHOUT_A_CLASS = {"palm"}


@cache
def _rows() -> list[tuple[str, dict[str, Any]]]:
    names = ("inventory_cases.py", "inventory_cases_other.py")
    return [row for name in names for row in runpy.run_path(str(HERE / name))["CASES"]]


def _cases() -> list[Any]:
    return [pytest.param(*row, id=f"{row[0]}-{number}") for number, row in enumerate(_rows())]


def _model(architecture: str, model_type: str, fields: dict[str, Any]) -> Any:
    config = transformers.models.auto.configuration_auto.CONFIG_MAPPING[model_type].from_dict(copy.deepcopy(fields))
    torch.manual_seed(0)
    return getattr(transformers, architecture)._from_config(config, attn_implementation="eager").eval()


def _first_attention(parameters: tuple[Parameter, ...]) -> list[Parameter]:
    """The projections with heads of the first layer: those that share the layer number of the first one."""
    with_heads = [p for p in parameters if p.heads is not None]
    match = re.match(r".*?\.\d+\.", with_heads[0].name)
    assert match
    return [p for p in with_heads if p.name.startswith(match.group())]


def _enlarge(tensors: dict[str, Any], projections: list[Parameter]) -> None:
    """Make attention far from uniform: embeddings of size 1, projections that keep it."""
    for name, tensor in tensors.items():
        if "embed" in name or name.endswith(("wte.weight", "shared.weight")):
            tensor.normal_(0.0, 1.0)
    for p in projections:
        fan_in = p.shape[1 - p.output_axes[0]] if len(p.shape) == 2 else 1
        tensors[p.name].normal_(0.0, fan_in**-0.5)


def _inputs(model_type: str, fields: dict[str, Any]) -> dict[str, Any]:
    tokens = torch.arange(10, 16)[None]
    if model_type == "t5":
        return {"input_ids": tokens, "decoder_input_ids": tokens}
    if model_type != "vit":
        return {"input_ids": tokens}
    size = fields["image_size"]
    height, width = size if isinstance(size, list) else (size, size)
    return {"pixel_values": torch.randn(1, fields.get("num_channels", 3), height, width)}


def _attention_maps(model: Any, inputs: dict[str, Any]) -> Any:
    """Attention probabilities of the first layer, [query head, query, key]."""
    output = model(**inputs, output_attentions=True)
    return (output.get("encoder_attentions") or output["attentions"])[0][0]


def _first_row(model_type: str) -> dict[str, Any]:
    return next(fields for name, fields in _rows() if name == model_type)


def _num_queries(model: Any, inputs: dict[str, Any], *, must_run: bool) -> int:
    """Query heads of the first layer; some rows bend a field further than the class can run, never a family's first."""
    try:
        return int(_attention_maps(model, inputs).shape[0])
    except RuntimeError:
        if must_run:
            raise
        pytest.skip("transformers builds this configuration but cannot run it")


def _rows_of(heads: HeadLayout, kind: str, index: int) -> range:
    """Output neurons of one head; see the file's docstring."""
    queries, keys, values = heads.num_query_heads, heads.num_key_heads, heads.num_value_heads
    if heads.interleaved:
        group = queries // keys
        place = {
            "query": index // group * (group + 2) + index % group,
            "key": index * (group + 2) + group,
            "value": index * (group + 2) + group + 1,
        }[kind]
    else:
        place = {"query": index, "key": queries + index, "value": queries + keys + index}[kind]
    assert place < queries + keys + values
    return range(place * heads.head_dim, (place + 1) * heads.head_dim)


def _moved(model: Any, inputs: dict[str, Any], tensors: list[tuple[Any, int]], rows: range) -> set[int]:
    """Query heads whose map in the first layer changes when `rows` of the tensors change their sign."""
    before = _attention_maps(model, inputs)
    index = torch.tensor(list(rows))
    for tensor, axis in tensors:
        tensor.index_copy_(axis, index, -tensor.index_select(axis, index))
    difference = (_attention_maps(model, inputs) - before).abs().amax(dim=(1, 2))
    for tensor, axis in tensors:
        tensor.index_copy_(axis, index, -tensor.index_select(axis, index))
    assert not ((difference > 1e-6) & (difference < 1e-4)).any(), difference
    return {head for head, size in enumerate(difference.tolist()) if size > 1e-4}


@pytest.mark.parametrize(("model_type", "fields"), _cases())
def test_a_flipped_head_moves_its_own_maps_only(model_type: str, fields: dict[str, Any]) -> None:
    spec = family_of(model_type).spec(Fields(fields, where="config.json"), name="case", source="test")
    model = _model(spec.architecture, model_type, fields)
    tensors = dict(model.named_parameters(remove_duplicate=False))
    projections = _first_attention(spec.parameters)
    inputs = _inputs(model_type, fields)
    with torch.no_grad():
        _enlarge(tensors, projections)
        num_queries = _num_queries(model, inputs, must_run=fields is _first_row(model_type))
        for weight in (p for p in projections if len(p.shape) == 2):
            biases = [p for p in projections if p.name == weight.name.removesuffix("weight") + "bias"]
            flipped = [(tensors[weight.name], weight.output_axes[0])] + [(tensors[p.name], 0) for p in biases]
            heads = weight.heads
            assert heads is not None
            assert heads.num_query_heads in (0, num_queries)
            for head in range(heads.num_query_heads):
                assert _moved(model, inputs, flipped, _rows_of(heads, "query", head)) == {head}, weight.name
            for head in range(heads.num_key_heads):
                group = num_queries // heads.num_key_heads
                own = set(range(head * group, (head + 1) * group))
                assert _moved(model, inputs, flipped, _rows_of(heads, "key", head)) == own, weight.name
            for head in range(heads.num_value_heads):
                assert _moved(model, inputs, flipped, _rows_of(heads, "value", head)) == set(), weight.name


def test_every_family_with_a_class_has_a_case() -> None:
    assert {model_type for model_type, _ in _rows()} == set(MODULES) - WITHOUT_A_CLASS
