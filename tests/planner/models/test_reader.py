"""Whole configurations: which are refused, in which sentence, and that nothing else can happen."""

from __future__ import annotations

import time
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from optplan.planner.errors import ConfigError
from optplan.planner.models.reader import MAX_PARAMETERS, read_model
from optplan.planner.models.registry import MODULES
from optplan.planner.models.spec import ModelSpec

LLAMA: dict[str, Any] = {
    "model_type": "llama", "vocab_size": 97, "hidden_size": 48, "intermediate_size": 100, "num_hidden_layers": 2,
    "num_attention_heads": 4,
}  # fmt: skip


def _read(raw: dict[str, Any]) -> ModelSpec:
    return read_model(raw, name="mine", source="mine.json", where="config.json")


def _refusal(raw: dict[str, Any]) -> str:
    with pytest.raises(ConfigError) as error:
        _read(raw)
    return str(error.value)


@pytest.mark.parametrize(
    "extra",
    [
        {"architectures": ["LlamaForCausalLM"]},
        {"architectures": ["LLaMAForCausalLM"]},
        {"architectures": []},
        {"architectures": None, "quantization_config": None},
        {"torch_dtype": "bfloat16", "dtype": 3, "transformers_version": None, "auto_map": {"AutoConfig": "x.y"}},
    ],
)
def test_fields_without_bearing_on_the_tensors_change_nothing(extra: dict[str, Any]) -> None:
    spec = _read({**LLAMA, **extra})
    assert (spec.name, spec.source, spec.architecture) == ("mine", "mine.json", "LlamaForCausalLM")
    # 97 x 48 twice, two layers of 4 x 48 x 48 + 3 x 48 x 100 + 2 x 48, one norm of 48.
    assert spec.num_parameters == 2 * 4656 + 2 * (9216 + 14400 + 96) + 48
    assert spec.max_seq_len == 2048


def test_a_bare_model_with_a_tied_head_is_the_family_s() -> None:
    raw = {"model_type": "bloom", "vocab_size": 97, "hidden_size": 48, "n_layer": 2, "n_head": 4}
    assert _read({**raw, "architectures": ["BloomModel"]}) == _read(raw)


@pytest.mark.parametrize(
    ("raw", "sentence"),
    [
        ({}, "config.json: the field 'model_type' is missing"),
        ({"model_type": 3}, "config.json: the field 'model_type' must be a string, got 3"),
        (
            {"model_type": "lama"},
            "unknown architecture (model_type) 'lama'; nearest: llama, palm",
        ),
        (
            {"model_type": "mamba"},
            "unknown architecture (model_type) 'mamba'; nearest: llama",
        ),
        (
            {**LLAMA, "architectures": ["LlamaForSequenceClassification"]},
            (
                "config.json: the field 'architectures' names 'LlamaForSequenceClassification'; "
                "supported for 'llama': LlamaForCausalLM"
            ),
        ),
        (
            {**LLAMA, "architectures": "LlamaForCausalLM"},
            "config.json: the field 'architectures' must be a list of names, got 'LlamaForCausalLM'",
        ),
        (
            {**LLAMA, "quantization_config": {"quant_method": "gptq"}},
            (
                "config.json describes quantised weights ('quantization_config'), which are not trained as they are; "
                "remove that field to plan for the model itself"
            ),
        ),
        (
            {"model_type": "gemma3", "text_config": {"model_type": "gemma3_text"}, "vision_config": {}},
            (
                "config.json describes a model ('gemma3') around a text model ('gemma3_text'); "
                "to plan for the text model alone, save the object in 'text_config' as its own config.json"
            ),
        ),
        (
            {**LLAMA, "vocab_size": 2**24, "hidden_size": 2**20, "num_hidden_layers": 100, "intermediate_size": 2**20},
            f"config.json describes 804842722295808 parameters; at most {MAX_PARAMETERS} are accepted",
        ),
    ],
)
def test_refusals(raw: dict[str, Any], sentence: str) -> None:
    assert _refusal(raw) == sentence


def test_the_most_layers_that_are_accepted_take_little_time() -> None:
    start = time.perf_counter()
    spec = _read({**LLAMA, "model_type": "gemma2", "num_hidden_layers": 10_000, "num_key_value_heads": 4})
    assert len(spec.parameters) == 110_000 + 3
    assert time.perf_counter() - start < 3.0


NAMES = (
    "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "head_dim",
    "num_key_value_heads", "num_experts", "num_experts_per_tok", "moe_intermediate_size", "mlp_only_layers",
    "decoder_sparse_step", "layer_types", "sliding_window", "rope_scaling", "rope_parameters", "hidden_act",
    "tie_word_embeddings", "attention_bias", "partial_rotary_factor", "architectures", "text_config",
    "quantization_config", "n_embd", "n_layer", "n_head", "n_positions", "d_model", "d_ff", "num_layers", "num_heads",
    "image_size", "patch_size", "num_channels", "ffn_dim", "word_embed_proj_dim", "num_kv_heads", "multi_query",
    "alibi", "feed_forward_proj", "id2label", "max_position_embeddings", "n_inner", "type_vocab_size", "pad_token_id",
)  # fmt: skip
SCALARS = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-3, 200),
    st.sampled_from([2**20, 2**31, 2**63, 10**30, -(10**30)]),
    st.floats(allow_nan=False, allow_infinity=False),
    st.sampled_from(["silu", "linear", "yarn", "full_attention", "gated-gelu", "", "\ud800"]),
    st.text(max_size=5),
)
KEYS = st.sampled_from(["type", "rope_type", "factor", "full_attention", "model_type"])
VALUES = st.recursive(
    SCALARS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(KEYS, inner, max_size=3),
    max_leaves=6,
)
SIZES = st.fixed_dictionaries(dict.fromkeys(NAMES[:5], st.sampled_from([1, 2, 4, 8, 16, 3])))


@settings(max_examples=300, deadline=None)
@given(
    st.sampled_from([*MODULES, "gemma3", "?"]),
    st.dictionaries(st.sampled_from(NAMES), VALUES, max_size=8),
    SIZES | st.just({}),
)
def test_any_object_is_a_model_or_one_sentence(model_type: str, fields: dict[str, Any], sizes: dict[str, int]) -> None:
    try:
        spec = _read({**sizes, **fields, "model_type": model_type})
    except ConfigError as error:
        assert "\n" not in str(error)
        assert len(str(error)) < 600
    else:
        assert all(isinstance(size, int) and size >= 0 for p in (*spec.parameters, *spec.buffers) for size in p.shape)
        assert spec.max_seq_len >= 1
        assert 0 < spec.num_parameters <= MAX_PARAMETERS
