"""What a step of our MicroAdam moves and allocates, by hand; densification costs neither."""

from __future__ import annotations

from typing import Any

import pytest

from optplan.planner.optimizers.base import OptimizerContext
from optplan.planner.optimizers.registry import build_optimizer
from optplan.planner.tensors import Parameter

BF16 = OptimizerContext("bfloat16", "bfloat16")
MATRIX = Parameter("mlp", (4096, 4096), "mlp", "linear")

# 16,777,216 elements: gradient read, parameter read and written; 8,388,608 bytes of codes and 262,144 ranges of 4 bytes
# read and written; ten rows of 8192 x 21 entries of 4 bytes read, one of them written.
MOVED = 16_777_216 * 6 + 2 * 8_388_608 + 2 * 262_144 * 4 + 11 * 8192 * 21 * 4
# Seven pointers, elements and ordinal of 8 bytes, and 12 bytes for each of 256 chunks.
TABLE = 9 * 8 + 256 * 12


@pytest.mark.parametrize("options", [{}, {"alpha": 0.1}])
def test_bytes_of_a_step(options: dict[str, Any], step_peak: Any) -> None:
    model, plain = build_optimizer("micro-adam", options), build_optimizer("micro-adam")
    assert model.moved_bytes(MATRIX, BF16) == MOVED
    assert step_peak(model, [MATRIX], BF16) == TABLE
    assert model.state(MATRIX, BF16) == plain.state(MATRIX, BF16)


def test_a_tensor_without_elements_takes_no_room(step_peak: Any) -> None:
    empty = Parameter("unused", (0, 4096), "mlp", "linear")
    assert step_peak(build_optimizer("micro-adam"), [empty, MATRIX], BF16) == TABLE
