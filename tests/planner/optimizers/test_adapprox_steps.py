"""The temporaries of Adapprox's steps: in plain torch against a real step, on the GPU against recorded peaks."""

from __future__ import annotations

from typing import Any

import pytest

from optplan.planner.optimizers.adapprox_layout import MatrixLayout, waves
from optplan.planner.optimizers.base import OptimizerContext
from optplan.planner.optimizers.registry import build_optimizer
from optplan.planner.tensors import Parameter

LLAMA_LAYERS = [*[(4096, 4096)] * 4, *[(11008, 4096)] * 2, (4096, 11008), *[(4096,)] * 2] * 16


def _parameters(shapes: Any) -> list[Parameter]:
    return [Parameter(f"p{i}", shape, "mlp", "linear") for i, shape in enumerate(shapes)]


@pytest.mark.parametrize(("shape", "dtype"), [((2048, 1536), "float32"), ((600, 4096), "bfloat16")])
def test_a_step_in_plain_torch(real_events: Any, step_peak: Any, shape: tuple[int, int], dtype: Any) -> None:
    import torch

    from optplan.optim_impls import Adapprox

    parameter = torch.nn.Parameter(torch.zeros(shape, dtype=getattr(torch, dtype)))
    alive = peak = 0
    for what, size in real_events(Adapprox([parameter], rank="max", backend="torch"), [parameter]):
        alive += size if what == "alloc" else -size
        peak = max(peak, alive)
    expected = step_peak(build_optimizer("adapprox"), _parameters([shape]), OptimizerContext(dtype, dtype))
    assert expected <= peak < expected + 64  # a few scalars


@pytest.mark.parametrize(
    ("shapes", "options", "measured_bytes"),
    [
        ([(512, 1024), (1000, 320), (64, 3, 5, 5), (130, 70), (37,)], {"rank": "16", "beta1": "0"}, 221184),
        ([(512, 1024), (1000, 320)], {"rank": "64"}, 1297920),
        ([(32000, 4096), *LLAMA_LAYERS, (4096,), (32000, 4096)], {"rank": "32"}, 141839360),
    ],
)
def test_a_step_on_an_h200(step_peak: Any, shapes: Any, options: dict[str, str], measured_bytes: int) -> None:
    """torch.cuda.max_memory_allocated over the step; both allocations of a round are rounded up to 512 bytes."""
    context = OptimizerContext("bfloat16", "bfloat16")
    peak = step_peak(build_optimizer("adapprox", options), _parameters(shapes), context)
    assert measured_bytes - 1024 < peak <= measured_bytes


def test_rounds_hold_one_kind_of_matrix_and_at_most_two_billion_elements() -> None:
    tall, ragged = MatrixLayout(2**20, 512, 32), MatrixLayout(100, 65, 16)
    assert waves([tall, ragged, tall, tall, tall, tall, ragged]) == [[0, 2, 3, 4], [5], [1, 6]]
    assert waves([MatrixLayout(2**21, 2048, 32), tall]) == [[0], [1]]
