"""The temporaries of Adapprox's paper mode, allocation by allocation against a real step, and cuSOLVER's scratch."""

from __future__ import annotations

from typing import Any

import pytest

from optplan.planner.errors import ConfigError
from optplan.planner.optimizers.base import OptimizerContext
from optplan.planner.optimizers.registry import build_optimizer
from optplan.planner.sharding.optimizer_state import check_takes_shards
from optplan.planner.tensors import Parameter
from optplan.planner.timeline import Allocation, TimelineBuilder

SHAPES = [(24, 36), (8, 3, 4, 4), (130, 7), (2, 90)]


def _parameters(shapes: Any) -> list[Parameter]:
    return [Parameter(f"p{i}", shape, "mlp", "linear") for i, shape in enumerate(shapes)]


@pytest.fixture
def drawn_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Sketches drawn in place: on a GPU the numbers come from the host, and only the sketch itself is on the device."""
    from optplan.optim_impls.adapprox import optimizer

    def seeded_sketch(seed: int, *, step: int, index: int, like: Any) -> Any:
        del seed, step, index
        return lambda columns, width: like.new_empty(columns, width).normal_()

    monkeypatch.setattr(optimizer, "seeded_sketch", seeded_sketch)


@pytest.mark.parametrize(
    ("dtype", "state_dtype", "beta1", "rank"),
    [
        ("float32", None, "0.9", "max"),
        ("float32", None, "0", "1"),
        ("bfloat16", None, "0.9", "4"),
        ("bfloat16", "float32", "0.9", "max"),
        ("bfloat16", None, "0", "max"),
        ("float32", "bfloat16", "0.9", "1"),
    ],
)
@pytest.mark.usefixtures("drawn_at_once")
def test_every_allocation_of_a_real_step(
    dtype: Any, state_dtype: Any, beta1: str, rank: str, real_events: Any, model_events: Any
) -> None:
    import torch

    from optplan.optim_impls import Adapprox

    tensors = [torch.nn.Parameter(torch.zeros(shape, dtype=getattr(torch, dtype))) for shape in SHAPES]
    optimizer = Adapprox(
        tensors,
        rank=rank if rank == "max" else int(rank),
        mode="paper",
        betas=(float(beta1), 0.999),
        state_dtype=None if state_dtype is None else getattr(torch, state_dtype),
    )
    on_host, real = (events := real_events(optimizer, tensors))[:2], events[2:]
    assert on_host == [("alloc", 4 * len(SHAPES)), ("free", 4 * len(SHAPES))], "the step counters"
    planned = build_optimizer("adapprox", {"mode": "paper", "rank": rank, "beta1": beta1})
    assert model_events(planned, _parameters(SHAPES), OptimizerContext(dtype, dtype, state_dtype)) == real


def test_the_peak_is_that_of_the_dense_update(step_peak: Any) -> None:
    """Gradient, second moment, both bases, copies of W and M, direction, new M, and two matrices of a sum beside them.

    Of a 4096 x 1024 matrix at rank 32 with bf16 tensors; the scratch of QR is smaller.
    """
    planned = build_optimizer("adapprox", {"mode": "paper", "rank": "32"})
    matrix, bases = 4096 * 1024 * 4, (4096 + 1024) * 37 * 4
    context = OptimizerContext("bfloat16", "bfloat16")
    assert step_peak(planned, _parameters([(4096, 1024)]), context) == 8 * matrix + bases


def test_the_scratch_of_tall_factorizations_on_cuda() -> None:
    """What is measured of square matrices: 2 MiB and 4 KiB a column from 256 on; 1536 bytes a row and column."""
    builder = TimelineBuilder("step")
    planned = build_optimizer("adapprox", {"mode": "paper", "rank": "32"})
    planned.write_step(builder, _parameters([(4096, 1024)]), OptimizerContext("float32", "float32"))
    sizes = [e.bytes for e in builder.events if isinstance(e, Allocation) and e.name.startswith("cuSOLVER workspace")]
    assert sizes == [2 * 2**20 + 4096 * 256 + 128, 1536 * 37 + 66_560 + 512 * (4096 - 37)] * 5


def test_vectors_take_the_kernels_beside_the_paper_s_matrices(step_peak: Any) -> None:
    planned = build_optimizer("adapprox", {"mode": "paper"})
    # A row of 30 fields and an owner for each of two programs of 4096 elements; their two sums.
    expected_bytes = 30 * 8 + 2 * 4 + 2 * 4
    assert step_peak(planned, _parameters([(5000,)]), OptimizerContext("bfloat16", "bfloat16")) == expected_bytes


def test_the_paper_s_mode_moves_the_second_moment_a_dozen_times() -> None:
    """Read: G, W, M, factors, ten products of V, and V in the update; written: W, M, factors and V."""
    planned = build_optimizer("adapprox", {"mode": "paper", "rank": "8"})
    parameter, context = _parameters([(64, 32)])[0], OptimizerContext("bfloat16", "bfloat16")
    assert planned.moved_bytes(parameter, context) == 64 * 32 * (5 * 2 + 12 * 4) + 2 * (64 + 32) * 8 * 4


def test_the_paper_s_mode_is_refused_on_shards() -> None:
    with pytest.raises(ConfigError) as error:
        check_takes_shards(build_optimizer("adapprox", {"mode": "paper"}), flag="--sharding fsdp2")
    assert str(error.value) == (
        "adapprox with mode=paper takes whole tensors, not parts, as --sharding fsdp2 hands it; use mode=fast"
    )
