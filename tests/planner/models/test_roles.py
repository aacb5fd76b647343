"""What each family's tensors are for, written out; biases and norms are checked against the modules of transformers."""

from __future__ import annotations

import re
import runpy
import tomllib
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import Any

import pytest

from optplan.planner.models.fields import Fields
from optplan.planner.models.registry import MODULES, family_of
from optplan.planner.models.spec import ModelSpec
from optplan.planner.tensors import HeadLayout

HERE = Path(__file__).parent
PALM = ("palm", {"hidden_size": 48, "num_hidden_layers": 2, "num_attention_heads": 3, "head_dim": 8, "vocab_size": 97})

FUSED = "transformer.h.29.self_attention.query_key_value"

OUTSIDE = {"model.embed_tokens": "token_embedding", "lm_head": "output_head"}
ATTENTION = {
    "model.layers.N.self_attn.q_proj": "query",
    "model.layers.N.self_attn.k_proj": "key",
    "model.layers.N.self_attn.v_proj": "value",
}
OUTPUT = {"model.layers.N.self_attn.o_proj": "attention_output"}
GATED = {f"model.layers.N.mlp.{name}_proj": "mlp" for name in ("gate", "up", "down")}
EXPERTS = {
    "model.layers.N.mlp.gate": "router",
    "model.layers.N.mlp.experts.gate_up_proj": "mlp",
    "model.layers.N.mlp.experts.down_proj": "mlp",
}
LLAMA = OUTSIDE | ATTENTION | OUTPUT | GATED


def _encoder(model: str, head: dict[str, str]) -> dict[str, str]:
    block = f"{model}.encoder.layer.N"
    return head | {
        f"{model}.embeddings.word_embeddings": "token_embedding",
        f"{model}.embeddings.position_embeddings": "position_embedding",
        f"{model}.embeddings.token_type_embeddings": "position_embedding",
        f"{block}.attention.self.query": "query",
        f"{block}.attention.self.key": "key",
        f"{block}.attention.self.value": "value",
        f"{block}.attention.output.dense": "attention_output",
        f"{block}.intermediate.dense": "mlp",
        f"{block}.output.dense": "mlp",
    }


def _t5_stack(stack: str, *, attentions: tuple[str, ...], last: int) -> dict[str, str]:
    letters = {"q": "query", "k": "key", "v": "value", "o": "attention_output"}
    block = f"{stack}.block.N.layer"
    return (
        {f"{stack}.embed_tokens": "token_embedding"}
        | {f"{block}.{name}.{letter}": role for name in attentions for letter, role in letters.items()}
        | {f"{block}.{attentions[0]}.relative_attention_bias": "position_embedding"}
        | {f"{block}.{last}.DenseReluDense.{name}": "mlp" for name in ("wi", "wi_0", "wi_1", "wo")}
    )


ROLES: dict[str, dict[str, str]] = {
    "llama": LLAMA,
    "mistral": LLAMA,
    "qwen2": LLAMA,
    "qwen3": LLAMA,
    "qwen3_moe": LLAMA | EXPERTS,
    "gemma": LLAMA,
    "gemma2": LLAMA,
    "gemma3_text": LLAMA,
    "olmo2": LLAMA,
    "mixtral": OUTSIDE | ATTENTION | OUTPUT | EXPERTS,
    "olmoe": OUTSIDE | ATTENTION | OUTPUT | EXPERTS,
    "phi": OUTSIDE
    | ATTENTION
    | {
        "model.layers.N.self_attn.dense": "attention_output",
        "model.layers.N.mlp.fc1": "mlp",
        "model.layers.N.mlp.fc2": "mlp",
    },
    "phi3": OUTSIDE
    | OUTPUT
    | {
        "model.layers.N.self_attn.qkv_proj": "fused_qkv",
        "model.layers.N.mlp.gate_up_proj": "mlp",
        "model.layers.N.mlp.down_proj": "mlp",
    },
    "starcoder2": OUTSIDE | ATTENTION | OUTPUT | {"model.layers.N.mlp.c_fc": "mlp", "model.layers.N.mlp.c_proj": "mlp"},
    "gpt2": {
        "transformer.wte": "token_embedding",
        "transformer.wpe": "position_embedding",
        "transformer.h.N.attn.c_attn": "fused_qkv",
        "transformer.h.N.attn.c_proj": "attention_output",
        "transformer.h.N.mlp.c_fc": "mlp",
        "transformer.h.N.mlp.c_proj": "mlp",
        "lm_head": "output_head",
    },
    "gpt_neox": {
        "gpt_neox.embed_in": "token_embedding",
        "gpt_neox.layers.N.attention.query_key_value": "fused_qkv",
        "gpt_neox.layers.N.attention.dense": "attention_output",
        "gpt_neox.layers.N.mlp.dense_h_to_4h": "mlp",
        "gpt_neox.layers.N.mlp.dense_4h_to_h": "mlp",
        "lm_head": "output_head",
    },
    "bloom": {
        "transformer.word_embeddings": "token_embedding",
        "transformer.h.N.self_attention.query_key_value": "fused_qkv",
        "transformer.h.N.self_attention.dense": "attention_output",
        "transformer.h.N.mlp.dense_h_to_4h": "mlp",
        "transformer.h.N.mlp.dense_4h_to_h": "mlp",
        "lm_head": "output_head",
    },
    # The head's inner layer of BERT, OPT's bridges between two widths and ViT's class token fit no other role.
    "bert": _encoder("bert", {"cls.predictions.transform.dense": "other", "cls.predictions.decoder": "output_head"}),
    "roberta": _encoder("roberta", {"lm_head.dense": "other", "lm_head.decoder": "output_head"}),
    "opt": {
        "model.decoder.embed_tokens": "token_embedding",
        "model.decoder.embed_positions": "position_embedding",
        "model.decoder.project_in": "other",
        "model.decoder.project_out": "other",
        "model.decoder.layers.N.self_attn.q_proj": "query",
        "model.decoder.layers.N.self_attn.k_proj": "key",
        "model.decoder.layers.N.self_attn.v_proj": "value",
        "model.decoder.layers.N.self_attn.out_proj": "attention_output",
        "model.decoder.layers.N.fc1": "mlp",
        "model.decoder.layers.N.fc2": "mlp",
        "lm_head": "output_head",
    },
    "t5": _t5_stack("encoder", attentions=("0.SelfAttention",), last=1)
    | _t5_stack("decoder", attentions=("0.SelfAttention", "1.EncDecAttention"), last=2)
    | {"shared": "token_embedding", "lm_head": "output_head"},
    "vit": {
        "vit.embeddings.cls_token": "other",
        "vit.embeddings.position_embeddings": "position_embedding",
        "vit.embeddings.patch_embeddings.projection": "patch_embedding",
        "vit.layers.N.attention.q_proj": "query",
        "vit.layers.N.attention.k_proj": "key",
        "vit.layers.N.attention.v_proj": "value",
        "vit.layers.N.attention.o_proj": "attention_output",
        "vit.layers.N.mlp.fc1": "mlp",
        "vit.layers.N.mlp.fc2": "mlp",
        "classifier": "output_head",
    },
    "palm": {
        "embedding": "token_embedding",
        "layers.N.attention.query": "query",
        "layers.N.attention.key": "key",
        "layers.N.attention.value": "value",
        "layers.N.attention.output": "attention_output",
        "layers.N.mlp.gate": "mlp",
        "layers.N.mlp.up": "mlp",
        "layers.N.mlp.down": "mlp",
        "lm_head": "output_head",
    },
}
ROLES["falcon"] = ROLES["bloom"]


@cache
def _specs() -> tuple[ModelSpec, ...]:
    rows = [PALM]
    for name in ("inventory_cases.py", "inventory_cases_other.py"):
        rows += runpy.run_path(str(HERE / name))["CASES"]
    return tuple(_spec(model_type, fields) for model_type, fields in rows)


def _spec(model_type: str, fields: dict[str, Any]) -> ModelSpec:
    return family_of(model_type).spec(Fields(fields, where="config.json"), name="case", source="test")


def _published(name: str, file: str) -> ModelSpec:
    text = files("optplan.planner.data.models").joinpath(f"{file}.toml").read_text(encoding="utf-8")
    (row,) = (row for row in tomllib.loads(text)["model"] if row["id"] == name)
    return _spec(row["config"]["model_type"], row["config"])


def _module_name(parameter_name: str, model_type: str) -> str:
    name = parameter_name.removesuffix(".weight")
    layer = r"(?<=\.block\.)\d+" if model_type == "t5" else r"(?<=\.)\d+(?=\.)|(?<=^layers\.)\d+"
    return re.sub(layer, "N", name)


@pytest.mark.parametrize("model_type", MODULES)
def test_every_tensor_has_the_role_of_its_module(model_type: str) -> None:
    found = {
        _module_name(p.name, model_type): p.role
        for spec in _specs()
        if spec.model_type == model_type
        for p in spec.parameters
        if p.role not in ("bias", "norm")
    }
    assert found == ROLES[model_type]


def _kinds(heads: HeadLayout) -> set[str]:
    counts = {"query": heads.num_query_heads, "key": heads.num_key_heads, "value": heads.num_value_heads}
    return {kind for kind, count in counts.items() if count}


@pytest.mark.parametrize("model_type", MODULES)
def test_heads_are_of_the_kind_that_the_role_says(model_type: str) -> None:
    for spec in (spec for spec in _specs() if spec.model_type == model_type):
        layouts = {p.name.removesuffix(".weight"): p.heads for p in spec.parameters if p.role != "bias" and p.heads}
        for p in spec.parameters:
            if p.role in ("query", "key", "value", "fused_qkv"):
                assert p.heads is not None, p.name
                assert _kinds(p.heads) == ({"query", "key", "value"} if p.role == "fused_qkv" else {p.role}), p.name
            elif p.role == "bias":
                assert p.heads == layouts.get(p.name.removesuffix(".bias")), p.name
            else:
                assert p.heads is None, p.name


@pytest.mark.parametrize(
    ("name", "file", "tensor", "layout"),
    [
        ("gpt2", "gpt2", "transformer.h.11.attn.c_attn.weight", HeadLayout(64, 12, 12, 12)),
        ("pythia-1b", "gpt_neox", "gpt_neox.layers.0.attention.query_key_value.weight", HeadLayout(256, 8, 8, 8, True)),
        ("bloom-7b1", "bloom", f"{FUSED}.bias", HeadLayout(128, 32, 32, 32, True)),
        ("falcon-7b", "falcon", f"{FUSED}.weight", HeadLayout(64, 71, 1, 1)),
        ("falcon-40b", "falcon", f"{FUSED}.weight", HeadLayout(64, 128, 8, 8, True)),
        ("palm-540b", "palm", "layers.117.attention.query.weight", HeadLayout(256, num_query_heads=48)),
        ("palm-540b", "palm", "layers.117.attention.key.weight", HeadLayout(256, num_key_heads=1)),
        ("t5-3b", "t5", "decoder.block.23.layer.1.EncDecAttention.v.weight", HeadLayout(128, num_value_heads=32)),
        ("bert-large", "bert", "bert.encoder.layer.0.attention.self.key.bias", HeadLayout(64, num_key_heads=16)),
    ],
)  # fmt: skip
def test_heads_of_published_models(name: str, file: str, tensor: str, layout: HeadLayout) -> None:
    (parameter,) = (p for p in _published(name, file).parameters if p.name == tensor)
    assert parameter.heads == layout


@pytest.mark.parametrize(
    ("name", "file", "tensor", "rows"),
    [
        ("gpt2", "gpt2", "transformer.h.0.attn.c_attn.weight", 2304),
        ("gpt2", "gpt2", "transformer.h.0.mlp.c_proj.weight", 768),
        ("gpt2", "gpt2", "transformer.wpe.weight", 1024),
        ("gpt2", "gpt2", "lm_head.weight", 50257),
        ("opt-350m", "opt", "model.decoder.project_out.weight", 512),
        ("opt-350m", "opt", "model.decoder.embed_positions.weight", 2050),
        ("vit-base", "vit", "vit.embeddings.position_embeddings", 197),
        ("vit-base", "vit", "vit.embeddings.cls_token", 1),
        ("vit-base", "vit", "vit.embeddings.patch_embeddings.projection.weight", 768),
        ("t5-small", "t5", "encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight", 32),
    ],
)
def test_output_neurons_of_published_models(name: str, file: str, tensor: str, rows: int) -> None:
    (parameter,) = (p for p in _published(name, file).parameters if p.name == tensor)
    assert parameter.num_output_neurons == rows


def test_stacked_experts_have_their_rows_on_two_axes() -> None:
    fields = {
        "vocab_size": 97, "hidden_size": 48, "intermediate_size": 100, "num_hidden_layers": 1,
        "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64,
        "num_local_experts": 5, "num_experts_per_tok": 1,
    }  # fmt: skip
    rows = {p.name: p.num_output_neurons for p in _spec("mixtral", fields).parameters if "mlp" in p.name}
    assert rows == {
        "model.layers.0.mlp.gate.weight": 5,
        "model.layers.0.mlp.experts.gate_up_proj": 1000,
        "model.layers.0.mlp.experts.down_proj": 240,
    }
