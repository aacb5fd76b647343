"""Forward and backward, allocation by allocation, against what the allocator of an H200 recorded."""

import gzip
import json
from itertools import groupby
from pathlib import Path

import pytest

from optplan.planner.models.fields import Fields
from optplan.planner.models.registry import family_of
from optplan.planner.step.rules import StepOptions, record_step

RECORD = Path(__file__).parents[2] / "records" / "h200_step_events.jsonl.gz"
ROWS = [json.loads(line) for line in gzip.decompress(RECORD.read_bytes()).decode().splitlines()]
RUN_BY_OLDER_CLASSES = "gemma2", "sdpa"  # recorded with a version whose class still took sdpa


def name_of(row):
    tricks = ["checkpointed"] * row["checkpointing"] + ["accumulated"] * (row["grad_accum"] > 1)
    return "-".join([row["model"], row["precision"], row["attention"], f"{row['batch']}x{row['seq']}", *tricks])


def canonical(changes):
    """Signed sizes with each run of frees sorted: which of several frees comes first changes no peak."""
    runs = [list(run) for _, run in groupby(changes, key=lambda change: change > 0)]
    return [change for run in runs for change in (run if run[0] > 0 else sorted(run))]


def recorded_by_rules(row):
    spec = family_of(row["config"]["model_type"]).spec(Fields(row["config"], where="row"), name="m", source="row")
    options = StepOptions(
        batch_size=row["batch"],
        seq_len=row["seq"],
        precision=row["precision"],
        checkpointing="full" if row["checkpointing"] else "none",
        attention=row["attention"],
        grad_accum=row["grad_accum"],
    )
    tape = record_step(spec, options, compressed=False).tape
    changes = [tape.records[abs(id_) - 1].num_bytes * (1 if id_ > 0 else -1) for id_ in tape.events]
    start = next(segment.first_event for segment in tape.segments if segment.phase == "backward")
    return {"forward": changes[:start], "backward": changes[start:]}


@pytest.mark.parametrize(
    "row", [r for r in ROWS if (r["config"]["model_type"], r["attention"]) != RUN_BY_OLDER_CLASSES], ids=name_of
)
def test_the_rules_allocate_what_the_gpu_did_in_the_same_order(row):
    ours = recorded_by_rules(row)
    assert canonical(ours["forward"]) == canonical(row["forward"])
    assert canonical(ours["backward"]) == canonical(row["backward"])
