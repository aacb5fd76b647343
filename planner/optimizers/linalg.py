"""What torch's CUDA decompositions allocate: their outputs, a copy of the input, cuSOLVER's workspace.

Source: buffers of torch 2.11 (CUDA 13) on an H200, and cuSOLVER's own size queries.
"""

from __future__ import annotations

from typing import NamedTuple

from optplan.planner.optimizers.scratch import Scratch
from optplan.planner.tensors import Parameter
from optplan.planner.units import round_up

_FP32_BYTES = 4
_INFO_BYTES = 4


class SvdOutputs(NamedTuple):
    """Ids of the factors of `A = U S Vh`, with as many singular values as the shorter side has elements."""

    left: int
    right: int
    values: int


def write_svd(scratch: Scratch, parameter: Parameter, *, rows: int, columns: int) -> SvdOutputs:
    """Append `torch.linalg.svd(full_matrices=False)` of an fp32 matrix; the outputs are the caller's to free."""
    small, size = min(rows, columns), rows * columns * _FP32_BYTES
    left = scratch.alloc(parameter, ("left singular vectors", rows * small * _FP32_BYTES))
    right = scratch.alloc(parameter, ("right singular vectors", small * columns * _FP32_BYTES))
    values = scratch.alloc(parameter, ("singular values", small * _FP32_BYTES))
    info = scratch.alloc(parameter, ("cuSOLVER info", _INFO_BYTES))
    copy = scratch.alloc(parameter, ("cuSOLVER copy of the matrix", size))
    scratch.passing(parameter, ("cuSOLVER workspace", svd_workspace_bytes(rows, columns)))
    scratch.free(copy)
    scratch.free(*[scratch.alloc(parameter, ("cuSOLVER convergence", 1)) for _ in range(2)], info)
    return SvdOutputs(left, right, values)


def svd_workspace_bytes(rows: int, columns: int) -> int:
    """Workspace of cuSOLVER's Jacobi SVD with its thin factors, for an fp32 matrix.

    A wide matrix is transposed first, a tall one may be reduced to its square triangular factor. Fitted to 1080 answers
    of `cusolverDnSgesvdj_bufferSize` (CUDA 13) for sides from 8 to 28,672: 736 are exact, none is off by over 9 KiB.
    """
    tall, small = max(rows, columns), min(rows, columns)
    transposed = round_up(rows * columns * _FP32_BYTES, 128) if rows < columns else 0
    if tall == small:
        return _square_svd_numel(small) * _FP32_BYTES
    square = small * small
    reduced = _square_svd_numel(small) + (0 if transposed else square)
    applied = (small + 256) * tall + square + 514 * small + 65_792
    factored = qr_workspace_bytes(small)[0] // _FP32_BYTES + small
    return transposed + max(reduced, applied, factored) * _FP32_BYTES


def _square_svd_numel(size: int) -> int:
    padded = round_up(size, 64)
    return 2 * size * size + (padded // 16) ** 2 + 65 * padded + 1024 + max(32, padded // 32)


def write_qr(scratch: Scratch, parameter: Parameter, *, size: int) -> tuple[int, int]:
    """Append `torch.linalg.qr` of a square fp32 matrix and return the ids of Q and R, the caller's to free."""
    q, r = (scratch.alloc(parameter, (name, size * size * _FP32_BYTES)) for name in ("Q", "R"))
    tau = scratch.alloc(parameter, ("cuSOLVER reflector scales", size * _FP32_BYTES))
    for num_bytes in qr_workspace_bytes(size):
        info = scratch.alloc(parameter, ("cuSOLVER info", _INFO_BYTES))
        scratch.passing(parameter, ("cuSOLVER workspace", num_bytes))
        scratch.free(info)
    scratch.free(tau)
    return q, r


def qr_workspace_bytes(size: int) -> tuple[int, int]:
    """Workspaces of cuSOLVER's factorization and of the product of its reflectors, for a square fp32 matrix.

    The second is up to 33 KiB too large for sides under 128.
    """
    return 2 * 2**20 + 4096 * max(size, 256) + 128, 1536 * size + 66_560
