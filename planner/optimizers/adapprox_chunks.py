"""What Adapprox's fast mode allocates for one matrix where it runs in plain torch, chunk of rows by chunk of rows."""

from __future__ import annotations

from optplan.planner.optimizers.adapprox_layout import MatrixLayout
from optplan.planner.optimizers.base import OptimizerContext
from optplan.planner.optimizers.scratch import Scratch
from optplan.planner.tensors import Parameter

CHUNK_NUMEL = 2**20
"""Elements of the second moment that exist at a time."""
_FP32_BYTES = 4


def chunk_rows(rows: int, columns: int) -> int:
    """Rows of a chunk: as many as `CHUNK_NUMEL` elements hold, at least one."""
    return min(rows, max(1, CHUNK_NUMEL // max(1, columns)))


def write_chunked_step(scratch: Scratch, p: Parameter, layout: MatrixLayout, context: OptimizerContext) -> None:
    """Append the large temporaries: both new factors, what makes them orthonormal, and chunks of fp32 rows."""
    converted = context.gradient_dtype != "float32"
    rank, width = layout.rank, layout.columns
    tall, wide = layout.rows * rank * _FP32_BYTES, width * rank * _FP32_BYTES
    chunk = chunk_rows(layout.rows, width) * width * _FP32_BYTES
    start = scratch.alloc(p, ("start of the sketch", wide))
    sketch = scratch.alloc(p, ("sketch", tall))
    write_chunk(scratch, p, chunk, converted=converted)
    scratch.free(start)
    new_q = _write_orthonormal(scratch, p, tall, rank * rank * _FP32_BYTES)
    scratch.free(sketch)
    new_u = scratch.alloc(p, ("new U", wide))
    write_chunk(scratch, p, chunk, converted=converted)
    scratch.free(new_q, new_u)


def write_chunk(scratch: Scratch, p: Parameter | str, size: int, *, converted: bool) -> None:
    """Append what the second moment and the direction of a chunk of rows take."""
    gradient = scratch.alloc(p, ("rows of the gradient in fp32", size * converted))
    moment = scratch.alloc(p, ("rows of the second moment", size))
    root = scratch.alloc(p, ("root of these rows", size))
    direction = scratch.alloc(p, ("rows of the direction", size))
    scratch.free(root, direction, moment, gradient)


def _write_orthonormal(scratch: Scratch, p: Parameter, size: int, gram_bytes: int) -> int:
    q = scratch.alloc(p, ("sketch, scaled", size))
    for _ in range(2):  # Cholesky-QR twice; the second round's results replace the first's
        scratch.assign("gram", p, ("Gram matrix of the sketch", gram_bytes))
        scratch.assign("factor", p, ("Cholesky factor", gram_bytes))
        old, q = q, scratch.alloc(p, ("sketch made orthonormal", size))
        scratch.free(old)
    scratch.close()
    return q
