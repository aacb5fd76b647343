"""MicroAdam as the authors' package keeps it: the block follows from the GPU's shared memory.

Source: ista-daslab-optimizers 1.1.15, `micro_adam/micro_adam.py`. It asks for bfloat16 parameters and gradients.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from optplan.planner.optimizers.base import OptimizerContext, OptimizerModel, itemsize
from optplan.planner.optimizers.micro_adam import DENSITY, WINDOW, Selection, window_moved_bytes
from optplan.planner.optimizers.options import Option
from optplan.planner.optimizers.parts import like_parameter, tensor
from optplan.planner.optimizers.reduction import write_reduction_buffers, write_whole_reduction
from optplan.planner.optimizers.scratch import Scratch
from optplan.planner.optimizers.sorting import write_topk_buffers
from optplan.planner.reductions import row_reduction_bytes, whole_reduction_bytes
from optplan.planner.tensors import Parameter, StateTensor
from optplan.planner.timeline import TimelineBuilder

SHARED_MEMORY_KIB: dict[str, int] = {
    "v100": 96, "t4": 64, "a100": 164, "rtx": 100, "h100": 228, "h200": 228, "b200": 228,
}  # fmt: skip
"""Shared memory of one multiprocessor (`rtx`: compute capabilities 8.6, 8.9 and 12.0)."""

MAX_SELECTED = 1024
"""The kernel gives each selected element of a block one thread."""

_BF16_BYTES, _INT16_BYTES, _INT64_BYTES = 2, 2, 8
_VALUE_AND_INDEX_BYTES = 16


def reference_block(gpu: str) -> int:
    """Elements of the block that the package takes on a GPU: two floats an element in its shared memory less 1 KiB."""
    return (SHARED_MEMORY_KIB[gpu] - 1) * 1024 // 4 // 2


class MicroAdam(OptimizerModel):
    """The package ista-daslab-optimizers."""

    OPTIONS = (
        WINDOW,
        DENSITY,
        Option(
            "block", "integer", "reference:h200", "elements among which the largest are selected; the GPU decides",
            low=1, high=32_767, choices=tuple(f"reference:{gpu}" for gpu in SHARED_MEMORY_KIB),
        ),
        Option("bucket", "integer", 64, "elements that share a scale; its README: 100000", low=2, high=2**31),
        Option(
            "alpha", "number", 0.0, "part of the error fed into the update; -2 keeps the quantization error",
            low=0, high=1, high_exclusive=True, choices=("-2",),
        ),
    )  # fmt: skip

    @property
    def _block(self) -> int:
        block = self.options["block"]
        return reference_block(block.partition(":")[2]) if isinstance(block, str) else int(block)

    def selection(self, parameter: Parameter) -> Selection:
        """How many elements of a parameter enter the window; the part is a float product, as in the package."""
        numel, density = parameter.numel, self.options["density"]
        block = min(numel, self._block)
        full, tail = divmod(numel, block) if block else (0, 0)
        return Selection(block, full, math.ceil(block * density), tail, math.ceil(tail * density))

    def _num_full_buckets(self, parameter: Parameter) -> int:
        return max(1, parameter.numel // int(self.options["bucket"]))

    def state(self, parameter: Parameter, context: OptimizerContext) -> tuple[StateTensor, ...]:
        """The window, the error and the range of each bucket, of which there is always one more than full ones."""
        self.state_dtype(context, own="bfloat16")
        numel, selection = parameter.numel, self.selection(parameter)
        window, num_buckets = (self.options["window"], selection.num_selected), self._num_full_buckets(parameter) + 1
        error = [like_parameter("quant_err", parameter, context.parameter_dtype)] * (self.options["alpha"] == "-2")
        why = f"{numel} elements in buckets of {self.options['bucket']}, and one more"
        return (
            *error,
            tensor("I", window, "int16", why=selection.why),
            tensor("V", window, "bfloat16", why=selection.why),
            tensor("error", (-(-numel // 2),), "uint8", why=f"{numel} codes of 4 bits"),
            tensor("min_vals", (num_buckets,), "bfloat16", why=why),
            tensor("max_vals", (num_buckets,), "bfloat16", why=why),
        )

    def unsupported_reason(self, parameters: Sequence[Parameter], context: OptimizerContext) -> str | None:
        """Other dtypes than bfloat16, too many selected elements for a block of threads, empty tensors."""
        selected = math.ceil(self._block * self.options["density"])
        wrong = next((d for d in (context.parameter_dtype, context.gradient_dtype) if d != "bfloat16"), None)
        empty = next((p.name for p in parameters if not p.numel), None)
        if wrong:
            return f"the official micro-adam needs bfloat16 parameters and gradients, got {wrong}"
        if selected > MAX_SELECTED:
            return (
                f"the official micro-adam selects at most {MAX_SELECTED} of a block, got density "
                f"{self.options['density']:g} of {self._block}, which is {selected}"
            )
        if self.options["bucket"] % 2:
            return (
                f"the official micro-adam packs two codes a byte and needs an even bucket, got {self.options['bucket']}"
            )
        return f"the official micro-adam divides by zero on the empty tensor {empty}" if empty else None

    def write_step(self, timeline: TimelineBuilder, parameters: Sequence[Parameter], context: OptimizerContext) -> None:
        """Magnitudes and the selection of the full blocks, then of the tail, then the buckets' ranges."""
        scratch = Scratch(timeline)
        for p in parameters:
            s = self.selection(p)
            self._write_selection(scratch, p, s.num_full_blocks, s.block_numel, s.num_selected_block)
            self._write_selection(scratch, p, 1, s.tail_numel, s.num_selected_tail)
            self._write_ranges(scratch, p)
            if self.options["alpha"] == "-2":
                self._write_error_statistics(scratch, p, itemsize(context.parameter_dtype))
            elif self.options["alpha"]:
                self._write_ranges(scratch, p)
        scratch.close()

    def _write_selection(self, scratch: Scratch, p: Parameter, num_blocks: int, numel: int, per_block: int) -> None:
        """The largest `per_block` of each of the blocks of `numel` elements."""
        if not num_blocks * numel:
            return
        num_selected = num_blocks * per_block
        magnitudes = scratch.alloc(p, ("magnitudes", num_blocks * numel * _BF16_BYTES))
        values = scratch.alloc(p, ("selected magnitudes", num_selected * _BF16_BYTES))
        indices = scratch.alloc(p, ("int64 indices", num_selected * _INT64_BYTES))
        write_topk_buffers(scratch, p, slices=num_blocks, slice_numel=numel, element_bytes=_BF16_BYTES)
        scratch.free(magnitudes, values)
        narrow = scratch.alloc(p, ("int16 indices", num_selected * _INT16_BYTES))
        scratch.free(indices, narrow)

    def _write_ranges(self, scratch: Scratch, p: Parameter) -> None:
        num_full, bucket = self._num_full_buckets(p), self.options["bucket"]
        width = _BF16_BYTES if num_full == 1 else _VALUE_AND_INDEX_BYTES
        sizes = row_reduction_bytes(num_full, min(bucket, p.numel), element_bytes=width)
        for what in ("minima", "maxima"):
            parts = [(what, num_full * _BF16_BYTES), (f"indices of {what}", num_full * _INT64_BYTES)]
            results = [scratch.alloc(p, part) for part in parts[: 1 if num_full == 1 else 2]]
            write_reduction_buffers(scratch, p, sizes)
            scratch.free(*reversed(results))
        if p.numel > bucket and p.numel % bucket:
            tail_sizes = whole_reduction_bytes(p.numel % bucket, element_bytes=_BF16_BYTES)
            for what in ("minimum of the tail", "maximum of the tail"):
                extreme = scratch.alloc(p, (what, _BF16_BYTES))
                write_reduction_buffers(scratch, p, tail_sizes)
                scratch.free(extreme)

    def _write_error_statistics(self, scratch: Scratch, p: Parameter, width: int) -> None:
        """The norm and the number of zeros of the quantization error, which the package logs."""
        norm = write_whole_reduction(scratch, p, ("norm of the quantization error", width))
        square = scratch.alloc(p, ("its square", width))
        scratch.free(norm)
        zeros = scratch.alloc(p, ("zeros of the quantization error", p.numel))
        number = scratch.alloc(p, ("their number", _INT64_BYTES))
        copy = scratch.alloc(p, ("CUDA int64 copy of the zeros", p.numel * _INT64_BYTES))
        write_reduction_buffers(scratch, p, whole_reduction_bytes(p.numel, element_bytes=_INT64_BYTES))
        scratch.free(copy, zeros, square, number)

    def moved_bytes(self, parameter: Parameter, context: OptimizerContext) -> int:
        """The algorithm's floor, see `window_moved_bytes`."""
        return window_moved_bytes(self, parameter, context)
