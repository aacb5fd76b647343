"""Forward and backward of traced steps, allocation by allocation, against what the allocator of an H200 recorded."""

import gzip
import json
from itertools import groupby
from pathlib import Path

import pytest

from optplan.planner.models.fields import Fields
from optplan.planner.models.registry import family_of
from optplan.planner.step.options import StepOptions
from optplan.planner.timeline import Allocation
from optplan.profilers.tracing.trace import TracedStep
from optplan.profilers.workloads.catalogue import build_subject

RECORD = Path(__file__).parents[2] / "records" / "h200_step_events.jsonl.gz"
ROWS = [json.loads(line) for line in gzip.decompress(RECORD.read_bytes()).decode().splitlines()]
RUN_BY_OLDER_CLASSES = "gemma2", "sdpa"  # recorded with a version whose class still took sdpa


def name_of(row):
    tricks = ["checkpointed"] * row["checkpointing"] + ["accumulated"] * (row["grad_accum"] > 1)
    return "-".join([row["model"], row["precision"], row["attention"], f"{row['batch']}x{row['seq']}", *tricks])


def canonical(changes, row):
    """Signed sizes with each run of frees sorted: which of several frees comes first changes no peak.

    The rotary embedding's positions are left out: the class of the recorded version lets them go one operation later.
    """
    kept = [change for change in changes if abs(change) != 4 * row["seq"]]
    runs = [list(run) for _, run in groupby(kept, key=lambda change: change > 0)]
    return [change for run in runs for change in (run if run[0] > 0 else sorted(run))]


def signed_sizes(timeline, phase):
    sizes = {event.id: event.bytes for event in timeline if isinstance(event, Allocation)}
    return [
        event.bytes if isinstance(event, Allocation) else -sizes[event.id] for event in timeline if event.phase == phase
    ]


@pytest.mark.parametrize(
    "row", [r for r in ROWS if (r["config"]["model_type"], r["attention"]) != RUN_BY_OLDER_CLASSES], ids=name_of
)
def test_a_trace_allocates_what_the_gpu_did_in_the_same_order(row):
    spec = family_of(row["config"]["model_type"]).spec(Fields(row["config"], where="row"), name="m", source="row")
    options = StepOptions(
        batch_size=row["batch"],
        seq_len=row["seq"],
        precision=row["precision"],
        checkpointing="full" if row["checkpointing"] else "none",
        attention=row["attention"],
        grad_accum=row["grad_accum"],
    )
    last = TracedStep(build_subject(spec, options), options).pieces.steady[-1]
    for phase in ("forward", "backward"):
        assert canonical(signed_sizes(last, phase), row) == canonical(row[phase], row)
