"""Adam-mini through the matrix of every optimizer, and roles of modules that are not from transformers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from optplan.optim_impls import AdamMini
from optplan.optim_impls.adam_mini.roles import describe_module
from optplan.planner.tensors import HeadLayout

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def _build(parameters: list[nn.Parameter], backend: str) -> torch.optim.Optimizer:
    roles: dict[torch.Tensor, Any] = {
        p: "mlp" if p.dim() == 2 else "bias" if p.dim() == 1 else "other" for p in parameters
    }
    return AdamMini(parameters, roles=roles, lr=1e-2, weight_decay=0.1, backend=backend)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_matrix(check_matrix: Callable[..., None], dtype: torch.dtype, backend: str) -> None:
    check_matrix(_build, dtype=dtype, backend=backend)


class OldExperts(nn.Module):
    """A layer with experts as a list of modules, and attention under names of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.num_heads = 2
        self.network_query = nn.Linear(8, 8)
        self.mixer = nn.MultiheadAttention(8, 2, kdim=6, vdim=5)
        self.choose = nn.Linear(8, 3, bias=False)
        self.pool = nn.ModuleList(nn.Linear(8, 8, bias=False) for _ in range(3))


class NoBiasNames(nn.Module):
    """Names that hold `wo`, `norm`, `bias` and `query` and mean nothing by it."""

    def __init__(self) -> None:
        super().__init__()
        self.network = nn.Linear(4, 4)
        self.query_norm = nn.Linear(4, 4, bias=False)
        self.unbiased = nn.Conv2d(4, 6, 3, bias=False)
        self.patches = nn.Conv2d(3, 6, 2, stride=2)
        self.scale = nn.Parameter(torch.zeros(4))
        self.last = nn.Linear(4, 3, bias=False)


@pytest.mark.parametrize(
    ("module", "roles"),
    [
        (
            nn.TransformerEncoderLayer(8, 2, 12),
            {
                "self_attn.in_proj_weight": "fused_qkv", "self_attn.in_proj_bias": "bias",
                "self_attn.out_proj.weight": "attention_output", "self_attn.out_proj.bias": "bias",
                "linear1.weight": "mlp", "linear1.bias": "bias", "linear2.weight": "mlp", "linear2.bias": "bias",
                "norm1.weight": "norm", "norm1.bias": "bias", "norm2.weight": "norm", "norm2.bias": "bias",
            },
        ),
        (
            OldExperts(),
            {
                "network_query.weight": "mlp", "network_query.bias": "bias",
                "mixer.q_proj_weight": "query", "mixer.k_proj_weight": "key", "mixer.v_proj_weight": "value",
                "mixer.in_proj_bias": "bias", "mixer.out_proj.weight": "attention_output",
                "mixer.out_proj.bias": "bias", "choose.weight": "router",
                "pool.0.weight": "mlp", "pool.1.weight": "mlp", "pool.2.weight": "mlp",
            },
        ),
        (
            NoBiasNames(),
            {
                "scale": "other", "network.weight": "other", "network.bias": "bias", "query_norm.weight": "other",
                "unbiased.weight": "other", "patches.weight": "patch_embedding", "patches.bias": "bias",
                "last.weight": "output_head",
            },
        ),
    ],
    ids=["TransformerEncoderLayer", "experts in a list", "misleading names"],
)  # fmt: skip
def test_roles_of_plain_modules(module: nn.Module, roles: dict[str, str]) -> None:
    assert {row.parameter.name: row.parameter.role for row in describe_module(module)} == roles


def test_multihead_attention_has_its_heads() -> None:
    rows = {row.parameter.name: row.parameter.heads for row in describe_module(nn.MultiheadAttention(12, 3))}
    assert rows["in_proj_weight"] == HeadLayout(4, num_query_heads=3, num_key_heads=3, num_value_heads=3)


def test_what_no_rule_knows_is_said() -> None:
    (row, *_) = AdamMini.from_module(nn.Sequential(nn.Conv2d(1, 2, 3, bias=False), nn.Linear(2, 2))).partition_table()
    assert (row.kind, row.num_blocks, row.why) == ("tensor", 1, "no rule for the parameter 'weight' of Conv2d here")
