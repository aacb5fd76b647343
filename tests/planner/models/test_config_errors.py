"""What a person reads when a field of a config.json is missing or wrong, for GPT-2 and the families beside Llama's."""

from __future__ import annotations

from typing import Any

import pytest

from optplan.planner.errors import ConfigError
from optplan.planner.models.fields import Fields
from optplan.planner.models.registry import family_of

COMPLETE: dict[str, dict[str, Any]] = {
    "gpt2": {"vocab_size": 97, "n_embd": 48, "n_layer": 2, "n_head": 4},
    "bert": {
        "vocab_size": 97, "hidden_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 100,
    },
    "roberta": {
        "vocab_size": 97, "hidden_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 100,
    },
    "opt": {"vocab_size": 97, "hidden_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "ffn_dim": 100},
    "gpt_neox": {
        "vocab_size": 97, "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 100,
    },
    "bloom": {"vocab_size": 97, "hidden_size": 48, "n_layer": 2, "n_head": 4},
    "falcon": {"vocab_size": 97, "hidden_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4},
    "palm": {"hidden_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4},
    "t5": {"vocab_size": 97, "d_model": 48, "d_ff": 100, "num_layers": 2, "num_heads": 4},
    "vit": {"hidden_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 100},
}  # fmt: skip


def _read(model_type: str, raw: dict[str, Any]) -> None:
    family_of(model_type).spec(Fields(raw, where="config.json"), name="case", source="test")


def _required() -> list[tuple[str, str]]:
    return [(model_type, name) for model_type, raw in COMPLETE.items() for name in raw]


@pytest.mark.parametrize("model_type", COMPLETE)
def test_the_complete_configuration_is_accepted(model_type: str) -> None:
    _read(model_type, COMPLETE[model_type])


@pytest.mark.parametrize(("model_type", "name"), _required())
def test_a_missing_field_is_named(model_type: str, name: str) -> None:
    raw = {key: value for key, value in COMPLETE[model_type].items() if key != name}
    with pytest.raises(ConfigError) as error:
        _read(model_type, raw)
    assert str(error.value) == f"config.json: the field '{name}' is missing"


@pytest.mark.parametrize(
    ("model_type", "change", "sentence"),
    [
        ("gpt2", {"n_head": 5}, "the field 'n_head' (5) must divide 'n_embd' (48)"),
        (
            "gpt2",
            {"n_head": None, "num_attention_heads": 5},
            "the field 'num_attention_heads' (5) must divide 'n_embd' (48)",
        ),
        ("gpt2", {"n_layer": "12"}, "the field 'n_layer' must be an integer, got '12'"),
        ("gpt2", {"n_layer": True}, "the field 'n_layer' must be an integer, got True"),
        ("gpt2", {"n_layer": 10**30}, f"the field 'n_layer' must be between 1 and 10000, got {10**30}"),
        ("gpt2", {"attn_pdrop": 1.5}, "the field 'attn_pdrop' must be a number between 0 and 1, got 1.5"),
        ("gpt2", {"attn_pdrop": float("nan")}, "the field 'attn_pdrop' must be a number between 0 and 1, got nan"),
        (
            "gpt2",
            {"hidden_size": 64},
            "the fields 'n_embd' (48) and 'hidden_size' (64) name the same thing and must be equal",
        ),
        (
            "gpt2",
            {"add_cross_attention": True},
            "the field 'add_cross_attention' must be false, got true, because cross-attention is not modelled",
        ),
        (
            "bert",
            {"add_cross_attention": True},
            "the field 'add_cross_attention' must be false, got true, because cross-attention is not modelled",
        ),
        ("bert", {"num_attention_heads": 7}, "the field 'num_attention_heads' (7) must divide 'hidden_size' (48)"),
        ("bert", {"tie_word_embeddings": "no"}, "the field 'tie_word_embeddings' must be true or false, got 'no'"),
        (
            "roberta",
            {"max_position_embeddings": 2},
            f"the field 'max_position_embeddings' must be between 3 and {2**30}, got 2",
        ),
        ("opt", {"word_embed_proj_dim": 0}, "the field 'word_embed_proj_dim' must be between 1 and 1048576, got 0"),
        ("opt", {"num_attention_heads": 5}, "the field 'num_attention_heads' (5) must divide 'hidden_size' (48)"),
        ("gpt_neox", {"rotary_pct": "1"}, "the field 'rotary_pct' must be a number between 0 and 1, got '1'"),
        (
            "gpt_neox",
            {"rope_scaling": {"type": "linear", "partial_rotary_factor": 2}},
            "in 'rope_scaling': the field 'partial_rotary_factor' must be a number between 0 and 1, got 2",
        ),
        ("gpt_neox", {"rope_parameters": []}, "the field 'rope_parameters' must be an object, got []"),
        (
            "bloom",
            {"n_embed": 64},
            "the fields 'hidden_size' (48) and 'n_embed' (64) name the same thing and must be equal",
        ),
        ("bloom", {"n_head": 7}, "the field 'n_head' (7) must divide 'hidden_size' (48)"),
        (
            "falcon",
            {"new_decoder_architecture": True, "num_kv_heads": 3},
            "the field 'num_kv_heads' (3) must divide 'num_attention_heads' (4)",
        ),
        (
            "falcon",
            {"num_attention_heads": 16},
            "a head must have an even width to be rotated, got 3 ('hidden_size' / 'num_attention_heads')",
        ),
        (
            "falcon",
            {"num_ln_in_parallel_attn": 3},
            "the field 'num_ln_in_parallel_attn' must be between 1 and 2, got 3",
        ),
        ("palm", {"num_hidden_layers": -1}, "the field 'num_hidden_layers' must be between 1 and 10000, got -1"),
        (
            "t5",
            {"feed_forward_proj": "ungated-gelu"},
            "the field 'feed_forward_proj' must be an activation such as relu, or gated-gelu, got 'ungated-gelu'",
        ),
        (
            "t5",
            {"feed_forward_proj": "gated-"},
            "the field 'feed_forward_proj' must be an activation such as relu, or gated-gelu, got 'gated-'",
        ),
        ("t5", {"feed_forward_proj": 3}, "the field 'feed_forward_proj' must be a string, got 3"),
        (
            "vit",
            {"image_size": [224, 224, 3]},
            "the field 'image_size' must be an integer between 1 and 1048576 or a list of two, got [224, 224, 3]",
        ),
        (
            "vit",
            {"patch_size": [16, "16"]},
            "the field 'patch_size' must be an integer between 1 and 1048576 or a list of two, got [16, '16']",
        ),
        ("vit", {"image_size": 1.5}, "the field 'image_size' must be an integer, got 1.5"),
        (
            "vit",
            {"image_size": 8},
            "the field 'patch_size' (16, 16) must not exceed 'image_size' (8, 8)",
        ),
        (
            "vit",
            {"id2label": {"0": "cat", "1": "dog"}, "num_labels": 3},
            "the field 'num_labels' (3) must equal the number of labels in 'id2label' (2)",
        ),
        ("vit", {"num_attention_heads": 7}, "the field 'num_attention_heads' (7) must divide 'hidden_size' (48)"),
    ],
)
def test_a_wrong_field_is_refused_in_one_sentence(model_type: str, change: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ConfigError) as error:
        _read(model_type, COMPLETE[model_type] | change)
    separator = ", " if sentence.startswith("in '") else ": "
    assert str(error.value) == f"config.json{separator}{sentence}"
