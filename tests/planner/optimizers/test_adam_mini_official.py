"""The authors' Adam-mini: state and step against the package, its failures, and what other releases keep."""

from __future__ import annotations

from importlib import import_module
from typing import Any

import pytest

from optplan.planner.optimizers.base import OptimizerContext
from optplan.planner.optimizers.registry import build_optimizer
from optplan.planner.tensors import HeadLayout, Parameter

# Name, shape: every branch of the package, with names it takes for something else (`query_key_value`, `network`).
TENSORS: list[tuple[str, tuple[int, ...]]] = [
    ("model.embed_tokens.weight", (37, 24)),
    ("h.0.self_attn.q_proj.weight", (24, 24)),
    ("h.0.self_attn.k_proj.weight", (12, 24)),
    ("h.0.self_attn.k_proj.bias", (12,)),
    ("h.0.self_attn.v_proj.weight", (12, 24)),
    ("h.0.self_attn.o_proj.weight", (24, 24)),
    ("h.0.attention.query_key_value.weight", (72, 24)),
    ("h.0.attn.c_attn.weight", (24, 72)),
    ("h.0.mlp.c_fc.weight", (24, 63)),
    ("h.0.MLP.up.weight", (63, 24)),
    ("h.0.ln_1.weight", (24,)),
    ("network.0.weight", (5, 7)),
    ("conv.weight", (3, 2, 5, 5)),
    ("scale", ()),
    ("empty", (0, 5)),
    ("lm_head.weight", (37, 24)),
]  # fmt: skip


def _parameters(tensors: list[tuple[str, tuple[int, ...]]]) -> list[Parameter]:
    return [Parameter(name, shape, "other", "linear") for name, shape in tensors]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_state_and_step_equal_the_package(dtype: Any, state_bytes: Any, real_events: Any, model_events: Any) -> None:
    torch = import_module("torch")
    adam_mini = import_module("adam_mini")
    generator = torch.Generator().manual_seed(1)
    kind = getattr(torch, dtype)
    tensors = [(n, torch.nn.Parameter(torch.randn(s, generator=generator).to(kind))) for n, s in TENSORS]
    optimizer = adam_mini.Adam_mini(tensors, dim=24, n_heads=4, weight_decay=0.1, verbose=False)

    parameters, context = _parameters(TENSORS), OptimizerContext(dtype, dtype)
    model = build_optimizer("adam-mini", {"implementation": "official", "dim": 24, "n_heads": 4}).bind(parameters)
    assert model.unsupported_reason(parameters, context) is None
    assert model_events(model, parameters, context) == real_events(optimizer, [tensor for _, tensor in tensors])
    for parameter, (_, tensor) in zip(parameters, tensors, strict=True):
        said = {state.name: state.num_bytes for state in model.state(parameter, context)}
        assert said == state_bytes(optimizer, tensor), parameter.name


@pytest.mark.parametrize(
    ("name", "shape", "reason"),
    [
        (
            "embeddings.LayerNorm.weight",
            (24,),
            "adam-mini 1.1.1 fails on embeddings.LayerNorm.weight: it expects a matrix by that name, got shape [24]",
        ),
        (
            "vit.embed.weight",
            (24, 3, 2, 2),
            "adam-mini 1.1.1 fails on vit.embed.weight: it expects a matrix by that name, got shape [24, 3, 2, 2]",
        ),
        (
            "query_norm",
            (24,),
            "adam-mini 1.1.1 fails on query_norm: 24 elements do not divide into heads of 144 (dim x dim / n_heads)",
        ),
    ],
)
def test_what_the_package_fails_on_is_refused(name: str, shape: tuple[int, ...], reason: str) -> None:
    torch = import_module("torch")
    adam_mini = import_module("adam_mini")
    parameters, context = _parameters([(name, shape)]), OptimizerContext("float32", "float32")
    model = build_optimizer("adam-mini", {"implementation": "official", "dim": 24, "n_heads": 4})
    assert model.unsupported_reason(parameters, context) == reason

    tensor = torch.nn.Parameter(torch.randn(shape))
    tensor.grad = torch.randn(shape)
    with pytest.raises((IndexError, RuntimeError)):
        adam_mini.Adam_mini([(name, tensor)], dim=24, n_heads=4, verbose=False).step()


HEADS = HeadLayout(6, num_query_heads=4)


@pytest.mark.parametrize(
    ("heads", "given", "dim_and_heads"),
    [
        (HEADS, {}, (20, 4)),
        (HEADS, {"n_heads": "2"}, (20, 2)),
        (HEADS, {"dim": "64", "n_heads": "8"}, (64, 8)),
        (None, {}, (2048, 32)),
    ],
)
def test_dim_and_n_heads_follow_from_the_model(heads: Any, given: dict[str, str], dim_and_heads: Any) -> None:
    query = Parameter("q_proj.weight", (24, 20), "query", "linear", heads=heads)
    bound = build_optimizer("adam-mini", {"implementation": "official", **given}).bind([query])
    assert (bound.options["dim"], bound.options["n_heads"]) == dim_and_heads


# Elements of m, vmean and v by release, measured with adam-mini 1.0.4, 1.0.5 and 1.1.1 (dim 24, 4 heads).
@pytest.mark.parametrize(
    ("name", "shape", "elements"),
    [
        ("embed.weight", (37, 24), {"1.0.4": "m v", "1.0.5": "m v", "1.1.1": 37}),
        ("lm_head.weight", (37, 24), {"1.0.4": "m v", "1.0.5": "m v", "1.1.1": 37}),
        ("k_proj.weight", (12, 24), {"1.0.4": 2, "1.0.5": 2, "1.1.1": 2}),
        ("v_proj.weight", (12, 24), {"1.0.4": 1, "1.0.5": 2, "1.1.1": 12}),
        ("o_proj.weight", (24, 24), {"1.0.4": 1, "1.0.5": 24, "1.1.1": 24}),
        ("feed_forward.w1.weight", (63, 24), {"1.0.4": 1, "1.0.5": 63, "1.1.1": 63}),
        ("mlp.up.weight", (63, 24), {"1.0.4": 1, "1.0.5": 1, "1.1.1": 63}),
        ("Embed.weight", (37, 24), {"1.0.4": 1, "1.0.5": 1, "1.1.1": 37}),
        ("k_proj.bias", (12,), {"1.0.4": 1, "1.0.5": 1, "1.1.1": "m v"}),
        ("norm.weight", (24,), {"1.0.4": 1, "1.0.5": 1, "1.1.1": 1}),
    ],
)
def test_releases_partition_differently(name: str, shape: tuple[int, ...], elements: dict[str, Any]) -> None:
    parameter, context = Parameter(name, shape, "other", "linear"), OptimizerContext("bfloat16", "bfloat16")
    for version, second in elements.items():
        options = {"implementation": "official", "version": version, "dim": 24, "n_heads": 4}
        said = {s.name: s.num_bytes // 2 for s in build_optimizer("adam-mini", options).state(parameter, context)}
        expected = {"v": parameter.numel} if second == "m v" else {"vmean": second}
        assert said == {"m": parameter.numel} | expected, version
