"""What Adapprox's paper mode allocates for one matrix: the second moment, five QR factorizations, a dense update.

On CUDA a QR factorization of a tall matrix takes cuSOLVER's workspaces. That of `geqrf` follows the columns: torch
factors 58,720,256 rows by 36 columns in little memory (pytorch issue 134326). That of `orgqr` is taken to hold 128
elements a row beside 256 a column: a square matrix was measured to take 384, and the 32-bit query overflows beyond 16
million rows (CUDA.jl pull request 3258). Neither was measured for tall matrices; they decide no peak where the largest
matrix has a million elements and a hundred rows and columns, because the update keeps up to eight matrices alive.
"""

from __future__ import annotations

from optplan.planner.optimizers.adapprox_layout import MatrixLayout
from optplan.planner.optimizers.linalg import qr_workspace_bytes
from optplan.planner.optimizers.reduction import write_whole_reduction
from optplan.planner.optimizers.scratch import Scratch
from optplan.planner.tensors import Parameter

ITERATIONS = 5
"""How often the paper's range finder multiplies by the second moment and its transpose."""
OVERSAMPLING = 5
"""Columns of its sketch beyond the rank."""
PASSES = 2 * ITERATIONS + 2
"""How often a step reads or writes the whole second moment: it is formed, multiplied, and used by the update."""
_FP32_BYTES = 4
_INFO_BYTES = 4
_ORGQR_ROW_BYTES = 128 * _FP32_BYTES


def write_paper_step(
    scratch: Scratch, p: Parameter, layout: MatrixLayout, *, converted: frozenset[str], momentum: bool
) -> None:
    """Append one step at a given rank; one that searches its rank repeats the factorization at other ranks.

    Args:
        scratch: Where to write.
        p: The matrix's parameter.
        layout: Its rows, columns and rank.
        converted: Which of `gradient`, `first moment` and `weights` are not fp32 and are copied to it.
        momentum: Whether there is a first moment.
    """
    size = p.numel * _FP32_BYTES
    gradient = [scratch.alloc(p, ("gradient in fp32", size))] if "gradient" in converted else []
    moment = scratch.alloc(p, ("second moment", size))
    factors = _write_range_finder(scratch, p, layout)
    copies = [scratch.alloc(p, (f"{what} in fp32", size)) for what in ("first moment", "weights") if what in converted]
    direction = _write_direction(scratch, p, size)
    averages = _write_average(scratch, p, size) if momentum else ()
    new = scratch.chain(
        p, *((what, size) for what in ("decay of the weights", "move", "move times the rate", "new weights"))
    )
    scratch.free(direction, new, *averages, *copies, *factors, moment, *gradient)


def _write_range_finder(scratch: Scratch, p: Parameter, layout: MatrixLayout) -> tuple[int, int]:
    """The paper's S-RSI; the ids of Q and U with the columns that go beyond the rank."""
    rows, columns = layout.rows, layout.columns
    width = min(layout.rank + OVERSAMPLING, rows, columns)
    tall, wide = rows * width * _FP32_BYTES, columns * width * _FP32_BYTES
    u, q = scratch.alloc(p, ("sketch", wide)), None
    for _ in range(ITERATIONS):
        product = scratch.alloc(p, ("second moment times the sketch", tall))
        new_q = _write_tall_qr(scratch, p, rows, width)
        scratch.free(product, *([] if q is None else [q]))
        q, old_u = new_q, u
        u = scratch.alloc(p, ("projection", wide))
        scratch.free(old_u)
    assert q is not None
    return q, u


def _write_tall_qr(scratch: Scratch, p: Parameter, rows: int, columns: int) -> int:
    """`torch.linalg.qr` of a matrix with at least as many rows as columns; the id of Q, R is dropped."""
    q = scratch.alloc(p, ("basis", rows * columns * _FP32_BYTES))
    r = scratch.alloc(p, ("triangular factor", columns * columns * _FP32_BYTES))
    scales = scratch.alloc(p, ("cuSOLVER reflector scales", columns * _FP32_BYTES))
    for num_bytes in tall_qr_workspace_bytes(rows, columns):
        info = scratch.alloc(p, ("cuSOLVER info", _INFO_BYTES))
        scratch.passing(p, ("cuSOLVER workspace", num_bytes))
        scratch.free(info)
    scratch.free(scales, r)
    return q


def tall_qr_workspace_bytes(rows: int, columns: int) -> tuple[int, int]:
    """Workspaces of cuSOLVER's `geqrf` and `orgqr` for an fp32 matrix with at least as many rows as columns."""
    factorize, multiply = qr_workspace_bytes(columns)
    return factorize, multiply + (rows - columns) * _ORGQR_ROW_BYTES


def _write_direction(scratch: Scratch, p: Parameter, size: int) -> int:
    """The clipped direction's id."""
    direction = scratch.chain(p, *((what, size) for what in ("root", "root plus eps", "direction")))
    norm = write_whole_reduction(scratch, p, ("norm of the direction", _FP32_BYTES))
    rms = scratch.alloc(p, ("RMS of the direction", _FP32_BYTES))
    scratch.free(norm)
    divisor = scratch.alloc(p, ("divisor of the direction", _FP32_BYTES))
    clipped = scratch.alloc(p, ("clipped direction", size))
    scratch.free(rms, divisor, direction)
    return clipped


def _write_average(scratch: Scratch, p: Parameter, size: int) -> tuple[int]:
    """The new first moment's id."""
    parts = [scratch.alloc(p, (what, size)) for what in ("first moment times beta1", "direction times 1 - beta1")]
    average = scratch.alloc(p, ("new first moment", size))
    scratch.free(*parts)
    return (average,)
