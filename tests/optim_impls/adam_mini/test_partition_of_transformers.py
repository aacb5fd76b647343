"""The partition of transformers' own classes, tensor by tensor, as the paper's rules give it."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
import transformers

from optplan.optim_impls import AdamMini

SMALL: dict[str, Any] = {"hidden_size": 12, "num_hidden_layers": 1, "num_attention_heads": 4, "intermediate_size": 20}
DECODER: dict[str, Any] = {**SMALL, "num_key_value_heads": 2, "vocab_size": 13, "tie_word_embeddings": False}
VIT: dict[str, Any] = {**SMALL, "image_size": 8, "patch_size": 4, "num_labels": 5}
T5: dict[str, Any] = {"d_model": 12, "d_kv": 5, "d_ff": 20, "num_layers": 1, "num_heads": 3, "vocab_size": 13}
RESNET: dict[str, Any] = {
    "embedding_size": 8,
    "hidden_sizes": [8],
    "depths": [1],
    "num_labels": 4,
    "layer_type": "basic",
}
CASES = [
    (
        transformers.BertForSequenceClassification,
        transformers.BertConfig(**SMALL, vocab_size=13, max_position_embeddings=7),
        {
            "bert.embeddings.word_embeddings": ("row", 13), "bert.embeddings.position_embeddings": ("row", 7),
            "bert.embeddings.token_type_embeddings": ("row", 2), "attention.self.query": ("head", 4),
            "attention.self.key": ("head", 4), "attention.self.value": ("row", 12),
            "attention.output.dense": ("row", 12), "intermediate.dense": ("row", 20), "output.dense": ("row", 12),
            "bert.pooler.dense": ("tensor", 1),
            "classifier": ("row", 2),
        },
    ),
    (
        transformers.T5ForConditionalGeneration,
        transformers.T5Config(**T5, feed_forward_proj="gated-gelu"),
        {
            "shared": ("row", 13), "SelfAttention.q": ("head", 3), "SelfAttention.k": ("head", 3),
            "SelfAttention.v": ("row", 15), "SelfAttention.o": ("row", 12), "EncDecAttention.q": ("head", 3),
            "EncDecAttention.k": ("head", 3), "EncDecAttention.v": ("row", 15), "EncDecAttention.o": ("row", 12),
            "SelfAttention.relative_attention_bias": ("row", 32), "DenseReluDense.wi_0": ("row", 20),
            "DenseReluDense.wi_1": ("row", 20), "DenseReluDense.wo": ("row", 12),
        },
    ),
    (
        transformers.ViTForImageClassification,
        transformers.ViTConfig(**VIT),
        {
            "vit.embeddings.cls_token": ("tensor", 1), "vit.embeddings.position_embeddings": ("row", 5),
            "vit.embeddings.patch_embeddings.projection": ("row", 12), "attention.q_proj": ("head", 4),
            "attention.k_proj": ("head", 4), "attention.v_proj": ("row", 12), "attention.o_proj": ("row", 12),
            "mlp.fc1": ("row", 20), "mlp.fc2": ("row", 12), "classifier": ("row", 5),
        },
    ),
    (
        transformers.Qwen3ForCausalLM,
        transformers.Qwen3Config(**DECODER, head_dim=6),
        {
            "model.embed_tokens": ("row", 13), "self_attn.q_proj": ("head", 4), "self_attn.k_proj": ("head", 2),
            "self_attn.v_proj": ("row", 12), "self_attn.o_proj": ("row", 12), "mlp.gate_proj": ("row", 20),
            "mlp.up_proj": ("row", 20), "mlp.down_proj": ("row", 12), "lm_head": ("row", 13),
        },
    ),
    (
        transformers.MixtralForCausalLM,
        transformers.MixtralConfig(**DECODER, num_local_experts=3),
        {
            "model.embed_tokens": ("row", 13), "self_attn.q_proj": ("head", 4), "self_attn.k_proj": ("head", 2),
            "self_attn.v_proj": ("row", 6), "self_attn.o_proj": ("row", 12), "mlp.gate": ("row", 3),
            "mlp.experts.gate_up_proj": ("row", 3 * 40), "mlp.experts.down_proj": ("row", 3 * 12),
            "lm_head": ("row", 13),
        },
    ),
    (
        transformers.OlmoeForCausalLM,
        transformers.OlmoeConfig(**DECODER, num_experts=4),
        {
            "model.embed_tokens": ("row", 13), "self_attn.q_proj": ("head", 4), "self_attn.k_proj": ("head", 2),
            "self_attn.v_proj": ("row", 6), "self_attn.o_proj": ("row", 12), "mlp.gate": ("row", 4),
            "mlp.experts.gate_up_proj": ("row", 4 * 40), "mlp.experts.down_proj": ("row", 4 * 12),
            "lm_head": ("row", 13),
        },
    ),
    (
        transformers.ResNetForImageClassification,
        transformers.ResNetConfig(**RESNET),
        {
            "resnet.embedder.embedder.convolution": ("tensor", 1), "convolution": ("tensor", 1),
            "classifier.1": ("row", 4),
        },
    ),
]  # fmt: skip


@pytest.mark.parametrize(("model_class", "config", "expected"), CASES, ids=[case[0].__name__ for case in CASES])
def test_weights_divide_as_the_paper_says(model_class: Any, config: Any, expected: dict[str, tuple[str, int]]) -> None:
    with torch.device("meta"):
        model = model_class(config)
    found = {
        _short(row.name): (row.kind, row.num_blocks)
        for row in AdamMini.from_module(model).partition_table()
        if row.role not in ("bias", "norm")
    }
    assert found == expected


@pytest.mark.parametrize(("model_class", "config"), [case[:2] for case in CASES], ids=[c[0].__name__ for c in CASES])
def test_biases_keep_every_element_and_norms_one(model_class: Any, config: Any) -> None:
    with torch.device("meta"):
        model = model_class(config)
    rows = AdamMini.from_module(model).partition_table()
    assert [row.name for row in rows] == [name for name, _ in model.named_parameters()]
    for row in rows:
        if row.name.endswith("bias"):
            assert (row.kind, row.num_blocks) == ("element", row.shape[0])
        elif row.role == "norm":
            assert (row.kind, row.num_blocks) == ("tensor", 1)
        assert row.why


def _short(name: str) -> str:
    """Without the number of the layer, and what stands before it."""
    return re.sub(r".*\.\d+\.", "", name.removesuffix(".weight"))
