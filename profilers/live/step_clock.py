"""How long the phases of training steps take, without making the GPU wait."""

from __future__ import annotations

import time
from statistics import median
from typing import Any, NamedTuple

import torch

from optplan.planner.timeline import Phase


class _Moment(NamedTuple):
    """When a phase began: a CUDA event, or seconds of the host's clock."""

    step: int
    phase: Phase
    when: Any


class StepClock:
    """Notes when phases begin; the times are read once at the end."""

    def __init__(self, device: torch.device) -> None:
        self._on_gpu = device.type == "cuda"
        self._moments: list[_Moment] = []

    def note(self, step: int, phase: Phase) -> None:
        """Note that `phase` of step number `step` begins now."""
        self._moments.append(_Moment(step, phase, self._now()))

    def seconds(self, steps: range) -> dict[Phase, float]:
        """Median time by phase over the steps asked for that were finished; micro-steps of one phase are added up."""
        totals: dict[tuple[Phase, int], float] = {}
        if self._on_gpu:
            torch.cuda.synchronize()
        for begin, end in zip(self._moments, self._moments[1:], strict=False):
            if begin.step in steps:
                key = (begin.phase, begin.step)
                totals[key] = totals.get(key, 0.0) + self._between(begin.when, end.when)
        phases = dict.fromkeys(phase for phase, _ in totals)
        return {phase: median(t for (p, _), t in totals.items() if p == phase) for phase in phases}

    def step_seconds(self, steps: range) -> list[float]:
        """Time from the first forward of each of these steps to the end of its optimizer's step."""
        if self._on_gpu:
            torch.cuda.synchronize()
        found = []
        for step in steps:
            begin = next((m for m in self._moments if m.step == step and m.phase == "forward"), None)
            end = next((m for m in self._moments if m.step == step and m.phase == "zero"), None)
            if begin is not None and end is not None:
                found.append(self._between(begin.when, end.when))
        return found

    def _now(self) -> Any:
        if not self._on_gpu:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        event.record()
        return event

    def _between(self, begin: Any, end: Any) -> float:
        return float(begin.elapsed_time(end)) / 1000 if self._on_gpu else float(end - begin)
