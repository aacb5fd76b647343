"""The temporaries of Adapprox's steps: in plain torch against a real step, of the kernels against sums written out.

That a step on a GPU requests these bytes is tested beside the kernels.
"""

from __future__ import annotations

from typing import Any

import pytest

from optplan.planner.optimizers.adapprox_layout import MatrixLayout, waves
from optplan.planner.optimizers.base import OptimizerContext
from optplan.planner.optimizers.registry import build_optimizer
from optplan.planner.tensors import Parameter


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
    ("shapes", "options", "expected_bytes"),
    [
        # Table: 30 fields, 8 + 16 programs of the passes and 2 shares. Scratch at a rank of 16: sums, scales, peaks,
        # three Gram matrices, U twice in bf16, Q' in bf16, Y and Z.
        ([(512, 1024)], {"rank": "16"}, 30 * 8 + 26 * 4 + 4 * (8 + 4 + 16 + 3 * 256 + 16384 + 4096 + 8192 + 16384)),
        # A matrix whose rows do not begin at 16 bytes has a round of its own; the larger one counts. The tables, the
        # second of 30 fields and three programs, share a buffer in which each begins at 16 bytes.
        (
            [(512, 1024), (9, 33)],
            {"rank": "16"},
            352 + (30 * 8 + 3 * 4) + 4 * (28 + 768 + 16384 + 4096 + 8192 + 16384),
        ),
        # Vectors have a table beside them, and two sums of 4096 elements each.
        (
            [(512, 1024), (5000,)],
            {"rank": "16"},
            352 + (30 * 8 + 2 * 4) + 4 * (28 + 768 + 16384 + 4096 + 8192 + 16384),
        ),
        # A rank of 20 takes the room of 32; 3000 rows are two partial Z and six shares.
        (
            [(3000, 128)],
            {"rank": "20", "beta1": "0"},
            30 * 8 + (47 + 4 + 6) * 4 + 4 * (48 + 4 + 32 + 7 * 1024 + 4096 + 48000 + 96000 + 2 * 4096),
        ),
    ],
)
def test_a_step_of_the_kernels(step_peak: Any, shapes: Any, options: dict[str, str], expected_bytes: int) -> None:
    context = OptimizerContext("bfloat16", "bfloat16")
    assert step_peak(build_optimizer("adapprox", options), _parameters(shapes), context) == expected_bytes


def test_rounds_hold_one_kind_of_matrix_and_at_most_two_billion_elements() -> None:
    tall, ragged = MatrixLayout(2**20, 512, 32), MatrixLayout(100, 65, 16)
    assert waves([tall, ragged, tall, tall, tall, tall, ragged]) == [[0, 2, 3, 4], [5], [1, 6]]
    assert waves([MatrixLayout(2**21, 2048, 32), tall]) == [[0], [1]]


def test_the_default_rank_is_that_of_the_class() -> None:
    import torch

    from optplan.optim_impls import Adapprox

    parameter = torch.nn.Parameter(torch.ones(200, 300))
    parameter.grad = torch.ones_like(parameter)
    optimizer = Adapprox([parameter], backend="torch")
    optimizer.step()
    factors = {name: tuple(optimizer.state[parameter][name].shape) for name in ("q_factor", "u_factor")}
    assert factors == {"q_factor": (200, 32), "u_factor": (300, 32)}
    variant = build_optimizer("adapprox").variants()["the class's default (rank=32)"]
    described = variant.state(_parameters([(200, 300)])[0], OptimizerContext("float32", "float32"))
    assert {s.name: s.shape for s in described if s.name in factors} == factors
