"""One step's memory by phase, relative to the tensors that are resident whatever the phase."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import msgspec

from optplan.planner.dtypes import ITEMSIZE_BYTES, Dtype
from optplan.planner.optimizers.base import OptimizerContext, OptimizerModel
from optplan.planner.tensors import Parameter
from optplan.planner.timeline import Category, TimelineBuilder


class PhaseMemory(msgspec.Struct, frozen=True):
    """What one phase holds at its peak on top of the resident tensors, in bytes rounded as the allocator rounds."""

    categories: dict[Category, int]

    @property
    def peak_bytes(self) -> int:
        """All categories together."""
        return sum(self.categories.values())

    def merged_with(self, other: Mapping[Category, int]) -> dict[Category, int]:
        """Bytes by category of this phase and `other` together, empty categories left out."""
        names = [*other, *(name for name in self.categories if name not in other)]
        totals = {name: self.categories.get(name, 0) + other.get(name, 0) for name in names}
        return {name: size for name, size in totals.items() if size}

    def on_top_of(self, other: PhaseMemory) -> PhaseMemory:
        """This phase while everything of `other` is alive too."""
        return PhaseMemory(self.merged_with(other.categories))


class StepProfile(msgspec.Struct, frozen=True):
    """Forward and backward of a steady step: their peaks, and what is left alive for the optimizer's step."""

    forward: PhaseMemory
    backward: PhaseMemory
    after_backward: PhaseMemory
