"""Every family's inventory against the transformers class itself, built on the meta device.

A row is `(model_type, fields of the config.json)`; the rows lie in `inventory_cases.py` and `inventory_cases_other.py`.
"""

from __future__ import annotations

import copy
import runpy
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest

from optplan.planner.models.fields import Fields
from optplan.planner.models.registry import family_of
from optplan.planner.models.spec import ModelSpec

torch = import_module("torch")
transformers = import_module("transformers")

Case = tuple[str, dict[str, Any]]
HERE = Path(__file__).parent


def _cases() -> list[Any]:
    rows: list[Case] = []
    for name in ("inventory_cases.py", "inventory_cases_other.py"):
        rows += runpy.run_path(str(HERE / name))["CASES"]
    return [pytest.param(*row, id=f"{row[0]}-{number}") for number, row in enumerate(rows)]


def _spec(model_type: str, fields: dict[str, Any]) -> ModelSpec:
    return family_of(model_type).spec(
        Fields({"model_type": model_type, **fields}, where="config.json"), name="case", source="test"
    )


def _module(architecture: str, model_type: str, fields: dict[str, Any], dtype: Any) -> Any:
    config = transformers.models.auto.configuration_auto.CONFIG_MAPPING[model_type].from_dict(copy.deepcopy(fields))
    with torch.device("meta"):
        return getattr(transformers, architecture)._from_config(config, dtype=dtype)


def _owners(model: Any) -> dict[str, Any]:
    modules = dict(model.named_modules(remove_duplicate=False))
    names = [name for name, _ in model.named_parameters(remove_duplicate=False)]
    return {name: modules[name.rpartition(".")[0]] for name in names}


def _kind(owner: Any) -> str:
    """Kind of the module that owns a parameter, read from its class."""
    name = type(owner).__name__
    for cls, kind in (
        (torch.nn.Linear, "linear"),
        (transformers.pytorch_utils.Conv1D, "conv1d"),
        (torch.nn.Conv2d, "conv2d"),
        (torch.nn.Embedding, "embedding"),
        (torch.nn.LayerNorm, "layer_norm"),
    ):
        if isinstance(owner, cls):
            return kind
    if name.endswith(("RMSNorm", "T5LayerNorm")):
        return "rms_norm"
    return "experts" if name.endswith("Experts") else "parameter"


@pytest.mark.parametrize(("model_type", "fields"), _cases())
def test_inventory_equals_transformers(model_type: str, fields: dict[str, Any]) -> None:
    spec = _spec(model_type, fields)
    model = _module(spec.architecture, model_type, fields, torch.bfloat16)
    real = list(model.named_parameters(remove_duplicate=False))
    first: dict[int, str] = {}
    expected = []
    for name, tensor in real:
        owner = first.setdefault(id(tensor), name)
        expected.append((name, tuple(tensor.shape), None if owner == name else owner))
    assert [(p.name, p.shape, p.tied_to) for p in spec.parameters] == expected
    assert spec.num_parameters == sum(tensor.numel() for tensor in model.parameters())


@pytest.mark.parametrize(("model_type", "fields"), _cases())
def test_buffers_equal_transformers(model_type: str, fields: dict[str, Any]) -> None:
    spec = _spec(model_type, fields)
    model = _module(spec.architecture, model_type, fields, torch.bfloat16)
    saved = set(model.state_dict())
    expected = [
        (name, tuple(tensor.shape), str(tensor.dtype).removeprefix("torch."), name in saved)
        for name, tensor in model.named_buffers()
    ]
    assert [(b.name, b.shape, b.dtype or "bfloat16", b.persistent) for b in spec.buffers] == expected


@pytest.mark.parametrize(("model_type", "fields"), _cases())
def test_buffers_keep_their_dtype_in_fp32(model_type: str, fields: dict[str, Any]) -> None:
    spec = _spec(model_type, fields)
    model = _module(spec.architecture, model_type, fields, torch.float32)
    expected = [str(tensor.dtype).removeprefix("torch.") for _, tensor in model.named_buffers()]
    assert [b.dtype or "float32" for b in spec.buffers] == expected


@pytest.mark.parametrize(("model_type", "fields"), _cases())
def test_parameters_are_described_by_their_modules(model_type: str, fields: dict[str, Any]) -> None:
    spec = _spec(model_type, fields)
    owners = _owners(_module(spec.architecture, model_type, fields, torch.bfloat16))
    assert {p.name: p.module for p in spec.parameters} == {name: _kind(owner) for name, owner in owners.items()}
    for parameter in spec.parameters:
        assert (parameter.role == "bias") == parameter.name.endswith("bias"), parameter.name
        if parameter.role == "norm":
            assert parameter.module in ("layer_norm", "rms_norm"), parameter.name


@pytest.mark.parametrize(("model_type", "fields"), _cases())
def test_head_layouts_account_for_every_output_neuron(model_type: str, fields: dict[str, Any]) -> None:
    spec = _spec(model_type, fields)
    with_heads = [p for p in spec.parameters if p.heads is not None]
    assert with_heads
    for p in with_heads:
        heads = p.heads
        num_heads = heads.num_query_heads + heads.num_key_heads + heads.num_value_heads
        assert heads.head_dim * num_heads == p.num_output_neurons, p.name
    attention = [p for p in spec.parameters if p.role in ("query", "key", "value", "fused_qkv")]
    assert all(p.heads is not None for p in attention)
