"""Forward and backward, allocation by allocation, against what the allocator of an H200 recorded."""

import gzip
import json
from itertools import groupby
from pathlib import Path

import pytest

from optplan.planner.models.fields import Fields
from optplan.planner.models.registry import family_of
from optplan.planner.step.rules import RULED_FAMILIES, StepOptions, record_step

RECORDS = Path(__file__).parents[2] / "records"
RUN_BY_OLDER_CLASSES = "gemma2", "sdpa"  # recorded with a version whose class still took sdpa
OPTIONS = ("fused_loss", "step_in_backward", "keep_grads", "padding_mask")


def rows_of(name):
    rows = map(json.loads, gzip.decompress((RECORDS / name).read_bytes()).decode().splitlines())
    return [row for row in rows if "error" not in row and row["config"]["model_type"] in RULED_FAMILIES]


def is_apart(row):
    """Steps with more than forward and backward in their events, and single tokens, a few bytes apart."""
    steps_within = row.get("step_in_backward") and row["optimizer"] == "adamw_foreach"
    if row["config"]["model_type"] == "t5" and row["seq"] == 701:
        return True  # the scratch of a scan over the distances is 1.5 KiB apart
    return steps_within or (row["model"], row["batch"] * row["seq"]) == ("tiny-olmoe", 1)


ROWS = [
    row
    for name in ("h200_step_events.jsonl.gz", "h200_family_events.jsonl.gz", "h200_edge_events.jsonl.gz")
    for row in rows_of(name)
    if (row["config"]["model_type"], row["attention"]) != RUN_BY_OLDER_CLASSES and not is_apart(row)
]


def name_of(row):
    tricks = [
        f"{name}={row[name]}" for name in (*OPTIONS, "checkpointing", "clip_grad_norm", "empty_cache") if row.get(name)
    ]
    tricks += ["accumulated"] * (row["grad_accum"] > 1)
    return "-".join([row["model"], row["precision"], row["attention"], f"{row['batch']}x{row['seq']}", *tricks])


def canonical(changes):
    """Signed sizes with each run of frees sorted: which of several frees comes first changes no peak."""
    runs = [list(run) for _, run in groupby(changes, key=lambda change: change > 0)]
    return [change for run in runs for change in (run if run[0] > 0 else sorted(run))]


def recorded_by_rules(row):
    spec = family_of(row["config"]["model_type"]).spec(Fields(row["config"], where="row"), name="m", source="row")
    checkpointing = row["checkpointing"]
    options = StepOptions(
        batch_size=row["batch"],
        seq_len=row["seq"],
        precision=row["precision"],
        checkpointing={True: "full", False: "none"}.get(checkpointing, checkpointing),
        attention=row["attention"],
        grad_accum=row["grad_accum"],
        **{name: row[name] for name in OPTIONS if name in row},
    )
    tape = record_step(spec, options, compressed=False).tape
    changes = [tape.records[abs(id_) - 1].num_bytes * (1 if id_ > 0 else -1) for id_ in tape.events]
    start = next(segment.first_event for segment in tape.segments if segment.phase == "backward")
    return {"forward": changes[:start], "backward": changes[start:]}


@pytest.mark.parametrize("row", ROWS, ids=name_of)
def test_the_rules_allocate_what_the_gpu_did_in_the_same_order(row):
    ours = recorded_by_rules(row)
    assert canonical(ours["forward"]) == canonical(row["forward"])
    assert canonical(ours["backward"]) == canonical(row["backward"])
