"""MicroAdam as our kernels keep it: blocks of a fixed size, so that a checkpoint is at home on every GPU.

A parameter of d elements divides into blocks; of each block the largest `density` of the accumulated gradient enters
the window, the rest is carried on in 4-bit error feedback, quantized by buckets. The last block may be short, and a
tensor smaller than a block is one short block: at least one element is selected of each. The window's indices count
from the start of their block, so int16 holds them; the window of a block is contiguous. Runs of `RUN_NUMEL` elements
are dealt to the block's buckets in turn, so that one GPU thread reads whole runs and owns a whole bucket; a short block
needs no more buckets than it has runs. The codes of a run are four bytes, also of one that the tensor's end cuts short.
Densification (`alpha`) reads and changes what a step moves anyway: it keeps, allocates and moves nothing more.

Source: Modoranu et al., NeurIPS 2024, arXiv 2405.15593.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from fractions import Fraction
from typing import Any

import msgspec

from optplan.planner.errors import ConfigError
from optplan.planner.optimizers.base import OptimizerContext, OptimizerModel
from optplan.planner.optimizers.launch import write_launch_table
from optplan.planner.optimizers.options import Option
from optplan.planner.optimizers.parts import step_counter, tensor
from optplan.planner.tensors import Parameter, StateTensor
from optplan.planner.timeline import TimelineBuilder

RUN_NUMEL = 8
"""Neighbouring elements of one bucket: 16 bytes of 16-bit gradients, one load of a thread."""

NUM_LISTS = 7
"""Pointers of a tensor in the launch table: parameter, gradient, error feedback and its range, the window.

Of capturable optimizers the step counter is one more.
"""

WINDOW = Option("window", "integer", 10, "gradients kept in the window", low=1, high=1000)
DENSITY = Option(
    "density", "number", 0.01, "part of each block that enters the window", low=0, high=1, low_exclusive=True
)


_WINDOW_NAMES = ("window_indices", "window_values", "I", "V")


class Selection(msgspec.Struct, frozen=True):
    """How many elements of a parameter enter the window a step.

    Attributes:
        block_numel: Elements of a full block.
        num_full_blocks: Full blocks.
        num_selected_block: Elements selected of each of them.
        tail_numel: Elements of the short last block, 0 if there is none.
        num_selected_tail: Elements selected of it.
    """

    block_numel: int
    num_full_blocks: int
    num_selected_block: int
    tail_numel: int
    num_selected_tail: int

    @property
    def num_selected(self) -> int:
        """Elements of a window row."""
        return self.num_full_blocks * self.num_selected_block + self.num_selected_tail

    @property
    def num_blocks(self) -> int:
        """Blocks, the short one included."""
        return self.num_full_blocks + (self.tail_numel > 0)

    @property
    def why(self) -> str:
        """The selection in words, for a formula."""
        plural = "s" * (self.num_full_blocks > 1)
        full = f"{self.num_full_blocks} block{plural} x {self.num_selected_block} of {self.block_numel}"
        tail = f"{self.num_selected_tail} of {self.tail_numel}"
        return " + ".join([full] * (self.num_full_blocks > 0) + [tail] * (self.tail_numel > 0)) or "empty"


def select(numel: int, *, block: int, density: float) -> Selection:
    """The selection of a tensor of `numel` elements: `ceil(density x elements)` of each block, in exact decimals."""
    part = Fraction(str(density))
    full, tail = divmod(numel, block)
    return Selection(block, full, -int(-part * block // 1), tail, -int(-part * tail // 1))


def num_buckets(numel: int, *, block: int, bucket: int) -> int:
    """Buckets of a tensor: `block / bucket` a block; the short one has no more than it has runs."""
    full, tail = divmod(numel, block)
    return full * (block // bucket) + min(block // bucket, -(-tail // RUN_NUMEL))


def num_codes(numel: int) -> int:
    """Bytes of the error feedback: half a byte for each element of every run begun."""
    return -(-numel // RUN_NUMEL) * RUN_NUMEL // 2


class MicroAdam(OptimizerModel):
    """Our MicroAdam: window and error feedback, no moments."""

    OPTIONS = (
        WINDOW,
        DENSITY,
        Option("block", "integer", 2048, "elements among which the largest are selected", low=64, high=32_768),
        Option("bucket", "integer", 64, "elements that share a scale of the error feedback", low=8, high=32_768),
        Option(
            "alpha", "number", 0.0, "part of the error fed into the update of every element; costs no memory",
            low=0, high=1, high_exclusive=True,
        ),
        Option("capturable", "boolean", False, "step counters on the device, for CUDA graphs"),
    )  # fmt: skip

    def __init__(self, id_: str, implementation: str, options: Mapping[str, Any]) -> None:
        super().__init__(id_, implementation, options)
        block, bucket = options["block"], options["bucket"]
        if bucket % RUN_NUMEL or block % bucket:
            raise ConfigError(f"micro-adam: bucket must be a multiple of 8 and divide block={block}, got {bucket}")

    def selection(self, parameter: Parameter) -> Selection:
        """How many elements of a parameter enter the window."""
        return select(parameter.numel, block=self.options["block"], density=self.options["density"])

    def state(self, parameter: Parameter, context: OptimizerContext) -> tuple[StateTensor, ...]:
        """Step counter, packed 4-bit error feedback with the range of each bucket, and the window."""
        self.state_dtype(context, own="bfloat16")
        numel, block, bucket = parameter.numel, self.options["block"], self.options["bucket"]
        selection, window = self.selection(parameter), self.options["window"]
        buckets = (num_buckets(numel, block=block, bucket=bucket),)
        entries, ranges = f"{window} rows x ({selection.why})", f"{numel} elements in buckets of {bucket}"
        return (
            step_counter("cpu"),
            tensor(
                "error_feedback", (num_codes(numel),), "uint8", why=f"codes of 4 bits for runs of 8, {numel} elements"
            ),
            tensor("bucket_min", buckets, "bfloat16", why=ranges),
            tensor("bucket_max", buckets, "bfloat16", why=ranges),
            tensor("window_indices", (window * selection.num_selected,), "int16", why=entries),
            tensor("window_values", (window * selection.num_selected,), "bfloat16", why=entries),
        )

    def write_step(self, timeline: TimelineBuilder, parameters: Sequence[Parameter], context: OptimizerContext) -> None:
        """The launch table alone; candidates of the selection are gathered in shared memory."""
        del context
        num_lists = NUM_LISTS + self.options["capturable"]
        timeline.free(write_launch_table(timeline, parameters, num_lists=num_lists))

    def moved_bytes(self, parameter: Parameter, context: OptimizerContext) -> int:
        """Gradient read, parameter and error feedback read and written, the window read and one row of it written."""
        return window_moved_bytes(self, parameter, context)


def window_moved_bytes(model: OptimizerModel, parameter: Parameter, context: OptimizerContext) -> int:
    """The floor of MicroAdam: as by default, but only one row of the window is written."""
    window: int = model.options["window"]
    rows = [t for t in model.state(parameter, context) if t.name in _WINDOW_NAMES]
    unwritten = sum(t.num_bytes for t in rows) // window * (window - 1)
    return OptimizerModel.moved_bytes(model, parameter, context) - unwritten
