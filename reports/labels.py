"""The words that all reports use for categories, metrics and the parts of a comparison."""

from __future__ import annotations

from optplan.planner.measured.comparison import Section
from optplan.planner.timeline import Category

CATEGORY_NAMES: dict[Category, str] = {
    "parameters": "parameters",
    "gradients": "gradients",
    "master_weights": "master weights",
    "optimizer_state": "optimizer state",
    "optimizer_temporaries": "optimizer temporaries",
    "activations": "activations",
    "logits_and_loss": "logits and loss",
    "communication": "communication",
    "workspace": "workspace",
    "unexplained": "unexplained",
}
"""Categories in the order in which they are drawn."""

SECTION_TITLES: dict[Section, str] = {
    "resident": "Resident, unrounded",
    "state": "Optimizer state by name, unrounded",
    "phases": "Peak allocated by phase",
    "peak": "Allocated at the peak by category",
    "totals": "Per GPU",
    "time": "Time",
}

ROW_NAMES: dict[str, str] = {
    **{str(category): label for category, label in CATEGORY_NAMES.items()},
    "peak_allocated_bytes": "peak allocated",
    "peak_reserved_bytes": "peak reserved",
    "device_bytes": "device, context included",
    "tokens_per_second": "tokens per second",
    "optimizer_copy_fraction": "optimizer, share of copy bandwidth",
    "host_launches_per_second": "host, launches per second",
}
"""Names of a comparison's rows for people, where they are not their own."""

ERROR_NAMES = {
    "peak_error": "peak allocated",
    "reserved_error": "peak reserved",
    "device_error": "device, context included",
    "step_seconds_error": "time of the whole step",
    "step_seconds_spread": "time of one process, from its step's median",
    "trace_peak_error": "peak allocated, traced",
    "trace_reserved_error": "peak reserved, traced",
}
"""Errors of a validation, but for those of its phases; and how far processes are from each other."""
