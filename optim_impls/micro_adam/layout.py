"""Where the blocks of a flattened tensor lie in the parameter and in each state tensor.

A tensor of d elements is `full` blocks of `block` elements and a short one. Each block owns a contiguous piece of every
state tensor, whatever GPU wrote it:

    error_feedback   4 bytes for each run of 8 elements, see `codes.pack`
    bucket_min/max   one range a bucket; runs of eight elements are dealt to the block's buckets in turn
    window_*         [window, selected]: row `(step - 1) mod window`, the largest first

The kernel deals the runs to lanes in turn, a multiple of the buckets: a GPU thread has all or a part of a bucket to
itself, and still neighbours read neighbouring addresses.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from optplan.planner.optimizers.micro_adam import RUN_NUMEL, Selection, num_buckets, num_codes, select

__all__ = ["RUN_NUMEL", "Layout", "Part", "layout_of"]


@dataclass(frozen=True)
class Part:
    """Equal blocks of one tensor: all the full ones, or the short last one.

    Attributes:
        numel: Elements of a block.
        count: Blocks.
        num_selected: Elements of a block that enter the window each step.
        num_buckets: Ranges of a block.
        elements: Their elements in the flattened tensor.
        codes: Their bytes of `error_feedback`.
        buckets: Their elements of `bucket_min` and `bucket_max`.
        window: Their elements of `window_indices` and `window_values`.
    """

    numel: int
    count: int
    num_selected: int
    num_buckets: int
    elements: slice
    codes: slice
    buckets: slice
    window: slice


@dataclass(frozen=True)
class Layout:
    """The layout of one tensor.

    Attributes:
        numel: Elements of the tensor.
        block: Elements of a full block.
        bucket: Elements of a full bucket.
        window: Rows of the window.
        density: Part of each block that is selected.
        selection: How many elements of each block are selected.
    """

    numel: int
    block: int
    bucket: int
    window: int
    density: float
    selection: Selection

    @property
    def num_codes(self) -> int:
        """Bytes of the error feedback."""
        return num_codes(self.numel)

    @property
    def num_lanes(self) -> int:
        """Lanes that the runs of a block are dealt to: each has eight runs or fewer."""
        return max(32, self.block // 64, self.block // self.bucket)

    @property
    def num_buckets(self) -> int:
        """Ranges of the error feedback."""
        return num_buckets(self.numel, block=self.block, bucket=self.bucket)

    @property
    def num_window(self) -> int:
        """Elements of the window."""
        return self.window * self.selection.num_selected

    def parts(self) -> Iterator[Part]:
        """The full blocks, then the short one; what is empty is left out."""
        pick, split = self.selection, self.selection.num_full_blocks * self.block
        if pick.num_full_blocks:
            yield self._part(self.block, pick.num_full_blocks, pick.num_selected_block, first=0)
        if pick.tail_numel:
            yield self._part(pick.tail_numel, 1, pick.num_selected_tail, first=split)

    def _part(self, numel: int, count: int, num_selected: int, *, first: int) -> Part:
        blocks_before = first // self.block
        buckets = num_buckets(numel, block=self.block, bucket=self.bucket)
        before = self.window * self.selection.num_selected_block * blocks_before
        return Part(
            numel,
            count,
            num_selected,
            buckets,
            elements=_piece(first, count * numel),
            codes=_piece(first // 2, count * num_codes(numel)),
            buckets=_piece(blocks_before * (self.block // self.bucket), count * buckets),
            window=_piece(before, count * self.window * num_selected),
        )


def _piece(start: int, length: int) -> slice:
    return slice(start, start + length)


def layout_of(numel: int, *, block: int, bucket: int, window: int, density: float) -> Layout:
    """The layout of a tensor of `numel` elements."""
    return Layout(numel, block, bucket, window, density, select(numel, block=block, density=density))
