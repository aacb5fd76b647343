"""What an optimizer's smaller state saves at the measured peak of the step, beside AdamW's step in the same setting."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from optplan.planner.measured.measurement import Measurement

COLUMNS = {
    "Adam-mini": ("adam-mini", "optplan"),
    "Adapprox, rank 32": ("adapprox", "optplan"),
    "MicroAdam": ("micro-adam", "optplan"),
    "8-bit AdamW": ("adamw-8bit", "bitsandbytes"),
}
YARDSTICK = ("adamw", "fused")
GIB = 2**30
Runs = dict[tuple[str, str], "Measurement"]


def savings_section(records: Mapping[str, Measurement]) -> list[str]:
    """Its lines, a row for each setting in which torch's fused AdamW and one of the columns were measured."""
    settings: dict[tuple[str, str], Runs] = defaultdict(dict)
    for record in records.values():
        if record.out_of_memory is None and record.peak_allocated_bytes:
            settings[_setting(record)][record.optimizer, record.implementation] = record
    settings = {key: runs for key, runs in sorted(settings.items()) if YARDSTICK in runs}
    if not settings:
        return []
    least = min((share for runs in settings.values() for share in _shares(runs)), default=1.0)
    rows = [_line(key, runs) for key, runs in settings.items()]
    return [
        "",
        "How much of what a smaller state saves is still saved at the peak of the same step, both measured: GiB less than"
        f" with torch's fused AdamW at the peak / in the state. In the worst of these steps it is {least:.0%}; the rests of"
        " blocks, which are cut otherwise, can make it more than all.",
        "",
        f"| model | step | AdamW: peak, state | {' | '.join(COLUMNS)} |",
        f"|---|---|---|{'---|' * len(COLUMNS)}",
        *rows,
    ]


def _setting(record: Measurement) -> tuple[str, str]:
    config = record.config
    step = f"{config.precision}, {config.batch_size} x {config.seq_len}, checkpointing {config.checkpointing}"
    return record.model.name, step


def _line(setting: tuple[str, str], runs: Runs) -> str:
    adamw = runs[YARDSTICK]
    cells = [f"{_peak(adamw) / GIB:.2f}, {adamw.bytes.optimizer_state / GIB:.2f}"]
    for optimizer in COLUMNS.values():
        found = runs.get(optimizer)
        cells.append(_saved(adamw, found) if found else "-")
    return f"| {' | '.join([*setting, *cells])} |"


def _shares(runs: Runs) -> list[float]:
    """How much of the bytes saved in the state each optimizer saves at the peak."""
    adamw = runs[YARDSTICK]
    others = [runs[optimizer] for optimizer in COLUMNS.values() if optimizer in runs]
    return [
        (_peak(adamw) - _peak(other)) / (adamw.bytes.optimizer_state - other.bytes.optimizer_state) for other in others
    ]


def _saved(adamw: Measurement, other: Measurement) -> str:
    state = adamw.bytes.optimizer_state - other.bytes.optimizer_state
    return f"{(_peak(adamw) - _peak(other)) / GIB:.2f} / {state / GIB:.2f}"


def _peak(record: Measurement) -> int:
    assert record.peak_allocated_bytes
    return record.peak_allocated_bytes
