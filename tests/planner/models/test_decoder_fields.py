"""Fields of the decoder families: values against transformers' own configurations, and the sentences of refusal."""

from __future__ import annotations

import copy
import runpy
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest

from optplan.planner.errors import ConfigError
from optplan.planner.models.fields import Fields
from optplan.planner.models.registry import family_of
from optplan.planner.models.spec import ModelSpec

CASES: list[tuple[str, dict[str, Any]]] = runpy.run_path(str(Path(__file__).with_name("inventory_cases.py")))["CASES"]
SIZES: dict[str, Any] = {
    "vocab_size": 97, "hidden_size": 48, "intermediate_size": 100, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 12,
}  # fmt: skip
EXPERTS = {"num_experts": 6, "num_experts_per_tok": 2}
COMPLETE: dict[str, dict[str, Any]] = {
    **dict.fromkeys(("llama", "mistral", "qwen2", "qwen3", "gemma", "gemma2", "gemma3_text"), SIZES),
    **dict.fromkeys(("phi", "phi3", "olmo2", "starcoder2"), SIZES),
    "mixtral": {**SIZES, **EXPERTS},
    "qwen3_moe": {**SIZES, **EXPERTS, "moe_intermediate_size": 20},
    "olmoe": {**SIZES, **EXPERTS},
}
ALWAYS = ("hidden_size", "intermediate_size", "num_hidden_layers")
USUALLY = (*ALWAYS, "vocab_size", "num_attention_heads")
REQUIRED: dict[str, tuple[str, ...]] = {
    **dict.fromkeys(("llama", "phi", "phi3", "olmo2"), USUALLY),
    **dict.fromkeys(("mistral", "qwen2", "qwen3", "gemma", "gemma2", "starcoder2"), (*USUALLY, "num_key_value_heads")),
    "gemma3_text": ALWAYS,
    "mixtral": (*USUALLY, "num_key_value_heads", "num_experts", "num_experts_per_tok"),
    "qwen3_moe": (*USUALLY, "num_key_value_heads", "num_experts", "num_experts_per_tok", "moe_intermediate_size"),
    "olmoe": (*USUALLY, "num_experts", "num_experts_per_tok"),
}


def _spec(model_type: str, fields: dict[str, Any]) -> ModelSpec:
    return family_of(model_type).spec(Fields(fields, where="config.json"), name="case", source="test")


def _refusal(model_type: str, fields: dict[str, Any]) -> str:
    with pytest.raises(ConfigError) as error:
        _spec(model_type, fields)
    return str(error.value)


@pytest.mark.parametrize(("model_type", "fields"), [pytest.param(*c, id=f"{c[0]}-{n}") for n, c in enumerate(CASES)])
def test_values_equal_those_of_transformers(model_type: str, fields: dict[str, Any]) -> None:
    transformers = import_module("transformers")
    real = transformers.AutoConfig.for_model(model_type, **copy.deepcopy(fields))
    config = _spec(model_type, fields).config
    renamed = {"hidden_act": "hidden_activation"} if model_type in ("gemma2", "gemma3_text") else {}
    own = {"rotary_width", "rotary_widths", "mlp_only_layers"}
    expected = {key: getattr(real, renamed.get(key, key), None) for key in config if key not in own}
    # Classes without the field divide, as does Mixtral's for a null.
    expected["head_dim"] = expected["head_dim"] or real.hidden_size // real.num_attention_heads
    if "layer_types" in expected:
        expected["layer_types"] = tuple(expected["layer_types"])
    assert {key: value for key, value in config.items() if key not in own} == expected


def test_the_gelu_of_the_first_gemma_files_is_the_tanh_one() -> None:
    # transformers 5.23 reads them so (5.17 takes the word at its face; memory is the same).
    assert _spec("gemma", {**COMPLETE["gemma"], "hidden_act": "gelu"}).config["hidden_act"] == "gelu_pytorch_tanh"


@pytest.mark.parametrize(("model_type", "name"), [(kind, name) for kind, names in REQUIRED.items() for name in names])
def test_a_missing_size_is_named(model_type: str, name: str) -> None:
    fields = {key: value for key, value in COMPLETE[model_type].items() if key != name}
    assert _refusal(model_type, fields) == f"config.json: the field '{name}' is missing"


@pytest.mark.parametrize(
    ("model_type", "wrong", "sentence"),
    [
        ("llama", {"hidden_size": "48"}, "config.json: the field 'hidden_size' must be an integer, got '48'"),
        ("llama", {"hidden_size": True}, "config.json: the field 'hidden_size' must be an integer, got True"),
        ("llama", {"hidden_size": 48.0}, "config.json: the field 'hidden_size' must be an integer, got 48.0"),
        ("llama", {"hidden_size": 0}, "config.json: the field 'hidden_size' must be between 1 and 1048576, got 0"),
        (
            "llama",
            {"num_hidden_layers": 10**30},
            f"config.json: the field 'num_hidden_layers' must be between 1 and 10000, got {10**30}",
        ),
        (
            "llama",
            {"num_attention_heads": 5, "num_key_value_heads": 5},
            "config.json: the field 'num_attention_heads' (5) must divide 'hidden_size' (48)",
        ),
        (
            "mistral",
            {"num_attention_heads": 5, "num_key_value_heads": 1, "head_dim": None},
            "config.json: the field 'num_attention_heads' (5) must divide 'hidden_size' (48)",
        ),
        (
            "llama",
            {"num_key_value_heads": 3},
            "config.json: the field 'num_key_value_heads' (3) must divide 'num_attention_heads' (4)",
        ),
        (
            "olmo2",
            {"head_dim": 13},
            "config.json: a head must have an even width to be rotated, got 13 ('head_dim')",
        ),
        (
            "olmo2",
            {"head_dim": None, "hidden_size": 52},
            "config.json: a head must have an even width to be rotated, got 13 ('hidden_size' / 'num_attention_heads')",
        ),
        (
            "llama",
            {"rope_scaling": {"type": "mrope"}},
            (
                "config.json, in 'rope_scaling': the field 'type' must be one of default, linear, dynamic, yarn, "
                "longrope, llama3, proportional, got 'mrope'"
            ),
        ),
        ("llama", {"rope_parameters": 3}, "config.json: the field 'rope_parameters' must be an object, got 3"),
        (
            "phi",
            {"partial_rotary_factor": 2},
            "config.json: the field 'partial_rotary_factor' must be a number between 0 and 1, got 2",
        ),
        (
            "phi3",
            {"rope_scaling": {"type": "llama3"}},
            "config.json, in 'rope_scaling': the field 'type' must be one of default, longrope, su, yarn, got 'llama3'",
        ),
        (
            "llama",
            {"rope_scaling": {"type": "yarn", "partial_rotary_factor": 0.25}},
            "config.json, in 'rope_scaling': 'yarn' scaling needs an even number of rotated elements a head, got 3",
        ),
        (
            "mixtral",
            {"num_local_experts": 5},
            (
                "config.json: the fields 'num_experts' (6) and 'num_local_experts' (5) name the same thing "
                "and must be equal"
            ),
        ),
        (
            "mixtral",
            {"num_experts_per_tok": 7},
            "config.json: the field 'num_experts_per_tok' must be between 1 and 6, got 7",
        ),
        (
            "qwen3_moe",
            {"mlp_only_layers": [0, "1"]},
            "config.json: the field 'mlp_only_layers' must be a list of integers between 0 and 10000, got [0, '1']",
        ),
        (
            "gemma2",
            {"layer_types": ["full_attention"]},
            "config.json: the field 'layer_types' must be a list of 2 names, got ['full_attention']",
        ),
        (
            "gemma3_text",
            {"layer_types": ["full_attention", 3]},
            "config.json: the field 'layer_types' must hold only sliding_attention, full_attention, got 3",
        ),
        ("starcoder2", {"use_bias": 1}, "config.json: the field 'use_bias' must be true or false, got 1"),
        ("qwen2", {"hidden_act": ["silu"]}, "config.json: the field 'hidden_act' must be a string, got ['silu']"),
    ],
)
def test_a_wrong_value_is_named_with_what_is_allowed(model_type: str, wrong: dict[str, Any], sentence: str) -> None:
    assert _refusal(model_type, {**COMPLETE[model_type], **wrong}) == sentence
