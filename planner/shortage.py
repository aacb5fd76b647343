"""Whether steps that fit by bytes run: near the limit the allocator gives its cache back, and what is cut up stays.

A cached segment can be given back only as a whole. Where the limit makes the allocator empty its cache in the midst of
training, segments of which a part is in use stay, with holes in which no large request finds room. Simulated with the
limit, the first steps of Llama-2-7B on two capped H200s fail, or come through, as they were measured to.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import msgspec

from optplan.planner.allocator.device import OutOfMemory
from optplan.planner.step.simulation import StepSimulator
from optplan.planner.timeline import Timeline
from optplan.planner.units import format_bytes

_NUM_STEPS = 6
"""The cache is cut up anew after each time it was emptied: a few steps show where that leads."""


class Shortage(msgspec.Struct, frozen=True):
    """A request that found no room.

    Attributes:
        requested_bytes: What was asked for.
        allocated_bytes: What tensors held.
        reserved_bytes: What was held from the driver, after all that can be given back was.
        num_steps: Whole steps that had been taken by then.
    """

    requested_bytes: int
    allocated_bytes: int
    reserved_bytes: int
    num_steps: int = 0

    def __str__(self) -> str:
        cached = format_bytes(self.reserved_bytes - self.allocated_bytes)
        return (
            f"fits by bytes, but fragmentation leaves no room for a request of {format_bytes(self.requested_bytes)}: "
            f"{cached} are cached in segments that cannot be given back"
        )


class LimitedRun(msgspec.Struct, frozen=True):
    """What became of the first steps on a device that has no more than it has.

    Attributes:
        shortage: The request that failed, None if the steps came through.
        num_flushes: How often in the last of these steps the allocator gave its cache back and asked the driver again,
            torch's `num_alloc_retries`; 0 where a request failed.
    """

    shortage: Shortage | None
    num_flushes: int = 0


class _Makes(Protocol):
    def __call__(self, *, allowed_bytes: int | None) -> StepSimulator: ...


class LimitedSteps:
    """A model's first steps on a device that has no more than it has."""

    def __init__(self, make: _Makes, *, allowed_bytes: int) -> None:
        """Run what all optimizers share: the load and the first micro-steps.

        Args:
            make: Makes the simulator.
            allowed_bytes: Most bytes that the allocator may hold.
        """
        self._simulator: StepSimulator | None = None
        self._failure: Shortage | None = None
        try:
            self._simulator = make(allowed_bytes=allowed_bytes)
        except OutOfMemory as error:
            self._failure = _shortage(error)

    def run(self, state_bytes: Sequence[int], step: Timeline) -> LimitedRun:
        """Whether the steps come through with one optimizer.

        Args:
            state_bytes: Bytes of the optimizer's state tensors on the device.
            step: What its `step()` allocates and frees.
        """
        if self._simulator is None:
            return LimitedRun(self._failure)
        try:
            self._simulator.take_steps(state_bytes, step, num_steps=_NUM_STEPS)
        except OutOfMemory as error:
            return LimitedRun(_shortage(error, self._simulator.num_steps_taken))
        return LimitedRun(None, self._simulator.num_flushes)


def _shortage(error: OutOfMemory, num_steps: int = 0) -> Shortage:
    return Shortage(error.requested_bytes, error.allocated_bytes, error.reserved_bytes, num_steps)
