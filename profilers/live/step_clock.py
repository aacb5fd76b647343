"""How long the phases of training steps take, without making the GPU wait."""

from __future__ import annotations

import time
from statistics import median
from typing import Any, NamedTuple

import torch

from optplan.planner.timeline import Phase

_NUM_PREPARED = 128
"""CUDA events made beforehand at least: they last a score of steps, for loops of which nobody says how long they go."""
_MOST_PREPARED = 8192
"""And at most: a loop with more changes of the phase is so long that making an event does not show."""


class _Moment(NamedTuple):
    """When a phase began: a CUDA event, or seconds of the host's clock."""

    step: int
    phase: Phase
    when: Any


def moments_of_step(num_micro_steps: int) -> int:
    """How often a phase begins in a step: forward, backward and clip of each micro-step, step and zero."""
    return 3 * num_micro_steps + 2


class StepClock:
    """Notes when phases begin; the times are read once at the end."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._on_gpu = device.type == "cuda"
        self._moments: list[_Moment] = []
        self._prepared: list[Any] = []

    def prepare(self, num_moments: int = 0) -> None:
        """Make events, so that none is made while steps are timed.

        Args:
            num_moments: How many will be needed, where that is known.
        """
        if self._on_gpu:
            stream = torch.cuda.current_stream(self._device)
            while len(self._prepared) < max(_NUM_PREPARED, min(num_moments, _MOST_PREPARED)):
                event = _new_event()
                event.record(stream)  # the driver makes it when it is recorded first
                self._prepared.append(event)

    def note(self, step: int, phase: Phase) -> None:
        """Note that `phase` of step number `step` begins now."""
        if self._on_gpu:
            when = self._prepared.pop() if self._prepared else _new_event()
            when.record()
        else:
            when = time.perf_counter()
        self._moments.append(_Moment(step, phase, when))

    def seconds(self, steps: range) -> dict[Phase, float]:
        """Median time by phase over the steps asked for that were finished; micro-steps of one phase are added up."""
        totals: dict[tuple[Phase, int], float] = {}
        self._wait()
        for begin, end in zip(self._moments, self._moments[1:], strict=False):
            if begin.step in steps:
                key = (begin.phase, begin.step)
                totals[key] = totals.get(key, 0.0) + self._between(begin.when, end.when)
        phases = dict.fromkeys(phase for phase, _ in totals)
        return {phase: median(t for (p, _), t in totals.items() if p == phase) for phase in phases}

    def step_seconds(self, steps: range) -> list[float]:
        """Time from the first forward of each of these steps to the end of its optimizer's step."""
        self._wait()
        begins: dict[int, Any] = {}
        ends: dict[int, Any] = {}
        for step, phase, when in self._moments:
            if phase == "forward":
                begins.setdefault(step, when)
            elif phase == "zero":
                ends.setdefault(step, when)
        return [self._between(begins[step], ends[step]) for step in steps if step in begins and step in ends]

    def _wait(self) -> None:
        if self._on_gpu:
            torch.cuda.synchronize(self._device)

    def _between(self, begin: Any, end: Any) -> float:
        return float(begin.elapsed_time(end)) / 1000 if self._on_gpu else float(end - begin)


def _new_event() -> Any:
    return torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
