"""How long the host takes to launch an optimizer's step, from the measured steps in which that decides."""

from __future__ import annotations

import re
from collections.abc import Sequence
from statistics import median

import msgspec
from step_time_cases import Case

from optplan.planner.gpus import load_gpu
from optplan.planner.step_time import optimizer_update
from optplan.planner.step_time_rates import CALIBRATED_GPU, OptimizerRates, TimeModel
from optplan.planner.step_timer import host_factor

LEAST_RATIO = 1.3
"""An optimizer's step that takes so many times as long as its work on the GPU waits for the host."""
GPU = load_gpu(CALIBRATED_GPU)


def with_update_rates(model: TimeModel, cases: Sequence[Case]) -> TimeModel:
    """The model with the host's rates of those optimizers whose step the host decides in some of the cases.

    One factor an optimizer: the median over its steps of what was measured over what the model says of the same host.
    """
    ratios: dict[tuple[str, str], list[float]] = {}
    for case in cases:
        busy = optimizer_update(case.candidate, case.moved_bytes, GPU, case.request, model=model).busy
        measured = case.time.phases["step"]
        if measured > LEAST_RATIO * busy.gpu:
            host = busy.host * host_factor(case.time.host_launch_seconds, model)
            ratios.setdefault((case.candidate.id, case.candidate.implementation), []).append(measured / host)
    return msgspec.structs.replace(
        model, optimizer=[_scaled(row, ratios.get((row.id, row.implementation))) for row in model.optimizer]
    )


def _scaled(row: OptimizerRates, ratios: list[float] | None) -> OptimizerRates:
    factor = median(ratios) if ratios else 1.0
    names = ("seconds_per_tensor", "seconds_per_matrix")
    return msgspec.structs.replace(row, **{name: float(f"{factor * getattr(row, name):.3g}") for name in names})


def written(text: str, model: TimeModel) -> str:
    """The table's text with these rates."""
    for row in model.optimizer:
        start = text.index(f'id = "{row.id}"\nimplementation = "{row.implementation}"\n')
        entry = text[start:]
        for name in ("seconds_per_tensor", "seconds_per_matrix"):
            entry = _replaced(entry, name, getattr(row, name))
        text = text[:start] + entry
    return text


def _replaced(entry: str, name: str, value: float) -> str:
    """The text with a value of its first row, if that has it, as it was where it is the same."""
    end = entry.index("basis = ")
    found = re.search(rf"(?m)^{name} = (.*)$", entry[:end])
    if found is None or float(found[1]) == value:
        return entry
    return entry[: found.start(1)] + f"{value:.3g}" + entry[found.end(1) :]
