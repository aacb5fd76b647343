"""PaLM against the totals that its paper publishes, the only reference for a model without a public class."""

from __future__ import annotations

import pytest

from optplan.planner.models.fields import Fields
from optplan.planner.models.registry import family_of
from optplan.planner.models.spec import ModelSpec

# arXiv:2204.02311, table 1: layers, heads, d_model, parameters in billions.
TABLE_1 = [(32, 16, 4096, 8.63), (64, 32, 8192, 62.50), (118, 48, 18432, 540.35)]


def _palm(layers: int, heads: int, width: int) -> ModelSpec:
    raw = {"num_hidden_layers": layers, "num_attention_heads": heads, "hidden_size": width}
    return family_of("palm").spec(Fields(raw, where="config.json"), name="palm", source="the paper")


@pytest.mark.parametrize(("layers", "heads", "width", "published_billions"), TABLE_1)
def test_matrices_sum_to_the_published_total(layers: int, heads: int, width: int, published_billions: float) -> None:
    # The printed totals leave out the scales of the norms: with them 540.35 would read 540.36.
    spec = _palm(layers, heads, width)
    scales = sum(p.numel for p in spec.parameters if p.role == "norm")
    assert round((spec.num_parameters - scales) / 1e9, 2) == published_billions
    assert scales == (layers + 1) * width


def test_the_540b_total_is_known_to_the_element() -> None:
    assert _palm(118, 48, 18432).num_parameters == 540_356_474_880


def test_one_layer_is_laid_out_as_the_paper_says() -> None:
    spec = _palm(1, 3, 512)
    assert [(p.name, p.shape) for p in spec.parameters] == [
        ("embedding.weight", (256_000, 512)),
        ("layers.0.norm.weight", (512,)),
        ("layers.0.attention.query.weight", (768, 512)),
        ("layers.0.attention.key.weight", (256, 512)),
        ("layers.0.attention.value.weight", (256, 512)),
        ("layers.0.attention.output.weight", (512, 768)),
        ("layers.0.mlp.gate.weight", (2048, 512)),
        ("layers.0.mlp.up.weight", (2048, 512)),
        ("layers.0.mlp.down.weight", (512, 2048)),
        ("norm.weight", (512,)),
        ("lm_head.weight", (256_000, 512)),
    ]
    assert {p.name: p.tied_to for p in spec.parameters if p.tied_to} == {"lm_head.weight": "embedding.weight"}
    assert spec.buffers == ()
    assert spec.max_seq_len == 2048
    assert spec.architecture == "PaLM, the paper's layout (no transformers class)"
