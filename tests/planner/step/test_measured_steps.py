"""Peaks of whole training steps against measurements on an H200: requested bytes exactly, allocated bytes closely."""

import json
from pathlib import Path

import pytest

from optplan.planner.allocator.caching import CachingAllocator
from optplan.planner.catalog import load_model
from optplan.planner.dtypes import ITEMSIZE_BYTES
from optplan.planner.models.fields import Fields
from optplan.planner.models.registry import family_of
from optplan.planner.replay import replay, replay_blocks
from optplan.planner.step.rules import (
    RULED_FAMILIES,
    StepOptions,
    has_rules,
    step_memory,
    write_forward_backward,
    write_load,
)
from optplan.planner.timeline import Allocation, TimelineBuilder

RECORDS = Path(__file__).parents[2] / "records"
OURS = [json.loads(line) for line in (RECORDS / "h200_steps.jsonl").read_text().splitlines()]
OURS = [row for row in OURS if "error" not in row and row["config"]["model_type"] in RULED_FAMILIES]
FLAGS = ("fused_loss", "keep_grads", "padding_mask", "step_in_backward")
PUBLIC = [json.loads(line) for line in (RECORDS / "public_h200_cases.jsonl").read_text().splitlines()]
PUBLIC = [row for row in PUBLIC if has_rules(load_model(row["model"]))]
MOMENTS = {"adamw": 2, "adamw_foreach": 2, "sgd": 1}
ALLOCATED = 0.003  # nearly all agree to 0.0002; where free blocks tie, the order of frees decides, which is not fixed
ALLOCATED_APART = {
    "tiny-opt-amp-sdpa-adamw-5x701": 0.0057,
    "tiny-llama-gqa-fp32-sdpa-adamw-3x173-padding_mask=True": 0.0034,
    "heads-of-256-bf16-sdpa-adamw-2x512": 0.0038,
    "tiny-llama-tied-amp-sdpa-adamw-3x173-fused_loss=chunked-checkpointing=True": 0.0085,
}  # where segments lie decides among blocks of one size: with ascending addresses each agrees to the byte
RESERVED = 0.02  # segments' addresses are the driver's choice
RESERVED_APART = {
    "gemma-2-2b-bf16-eager-adamw-1x1024": 0.0344,
}
QUICK = 0.031  # rests of blocks, which the sums leave out, reach 3.0 % in one small model with Liger's loss
QUICK_APART = {
    # Matrices of 11 MiB in fp32 and 5.5 MiB in bf16, hundreds of them: of their segments 1 MiB and less is never cut.
    "llama-126-layers-bf16-sdpa-adamw-1x513": 0.0315,
    "llama-126-layers-amp-sdpa-adamw-1x1024-checkpointing=selective": 0.0593,
}
PRODUCTS = (
    "proj output",
    "c_attn output",
    "query_key_value output",
    "query output",
    "SelfAttention.q output",
    "weight gradient",
)
COUNTER_BYTES = {"adamw": 4}  # a step counter of each parameter, on the device


def name_of(row):
    tricks = [
        f"{flag}={row[flag]}" for flag in (*FLAGS, "checkpointing", "clip_grad_norm", "empty_cache") if row.get(flag)
    ]
    tricks += ["accumulated"] * (row.get("grad_accum", 1) > 1)
    parts = (row["model"], row["precision"], row["attention"], row["optimizer"], f"{row['batch']}x{row['seq']}")
    return "-".join([*parts, *tricks])


def model_of(row):
    if "config" not in row:
        return load_model(row["model"])
    return family_of(row["config"]["model_type"]).spec(Fields(row["config"], where="row"), name="m", source="row")


def options_of(row, **changes):
    fields = {
        "batch_size": row["batch"],
        "seq_len": row["seq"],
        "precision": row["precision"],
        "checkpointing": {True: "full", False: "none"}.get(row["checkpointing"], row["checkpointing"]),
        "attention": row["attention"],
        "grad_accum": row.get("grad_accum", 1),
        **{flag: row[flag] for flag in FLAGS if flag in row},
    }
    return StepOptions(**{**fields, **changes})


def steady_step(row, state_bytes):
    """A step that finds the optimizer's state in place."""
    spec, options = model_of(row), options_of(row)
    timeline = TimelineBuilder()
    write_load(timeline, spec, options)
    for name, num_bytes in state_bytes:
        timeline.alloc(num_bytes, "optimizer_state", name)
    write_forward_backward(timeline, spec, options)
    return timeline.events


def state_of(row):
    """Tensors of the optimizer's state in the order in which the first step makes them."""
    spec, options = model_of(row), options_of(row)
    for parameter in spec.trained_parameters:
        if row["optimizer"] in COUNTER_BYTES:
            yield "step", COUNTER_BYTES[row["optimizer"]]
        for _ in range(MOMENTS[row["optimizer"]]):
            yield parameter.name, parameter.numel * ITEMSIZE_BYTES[options.parameter_dtype]


@pytest.mark.parametrize("row", OURS, ids=name_of)
def test_requested_bytes_are_those_measured(row):
    peaks = replay(steady_step(row, state_of(row)), rounding=1).phases
    measured = row["steps"][-1]
    assert {name: peaks[name] for name in ("forward", "backward")} == {
        name: measured[name]["req_peak"] for name in ("forward", "backward")
    }


@pytest.mark.parametrize("row", PUBLIC, ids=name_of)
def test_requested_bytes_are_those_published(row):
    # A scalar was on the device besides; the state is taken as measured, whatever the optimizer.
    peaks = replay(steady_step(row, [("scalar", 4), ("state", row["state"])]), rounding=1).phases
    assert {name: peaks[name] for name in ("forward", "backward")} == {
        name: row["phases"][name]["req_peak"] for name in ("forward", "backward")
    }


class Run:
    """Several steps as one timeline; the libraries' workspaces come with the first product of each thread."""

    def __init__(self, row):
        self.row, self.timeline = row, TimelineBuilder()
        if "config" not in row:
            self.timeline.alloc(4, "activations", "scalar")
        load = TimelineBuilder()
        write_load(load, model_of(row), options_of(row))
        self.workspaces = [event for event in load.events if event.category == "workspace"]
        for event in load.events:
            if event.category != "workspace":
                self.timeline.alloc(event.bytes, event.category, event.name)

    def step(self, kept=None):
        """One step up to its optimizer: the index of the last micro-step's first event, and the gradients."""
        first, gradients = len(self.timeline.events), self.micro_step(kept=kept)
        for _ in range(self.row.get("grad_accum", 1) - 1):
            first = len(self.timeline.events)
            self.micro_step(kept=gradients)
        self.timeline.phase = "step"
        return first, gradients

    def micro_step(self, kept):
        written = TimelineBuilder()
        options = options_of(self.row, grad_accum=2 if kept else 1, keep_grads=False)
        gradients = write_forward_backward(written, model_of(self.row), options)
        ids = {id_: kept[name] for name, id_ in gradients.items()} if kept else {}
        for event in written.events:
            self.timeline.phase = event.phase
            if not isinstance(event, Allocation):
                self.timeline.free(ids[event.id])
            elif event.id not in ids:
                ids[event.id] = self.timeline.alloc(event.bytes, event.category, event.name)
                self.first_product(event)
        return {name: ids[id_] for name, id_ in gradients.items()}

    def first_product(self, event):
        is_product = event.name.endswith(PRODUCTS)
        for workspace in [w for w in self.workspaces if is_product and w.name.endswith(event.phase)]:
            self.timeline.alloc(workspace.bytes, "workspace", workspace.name)
            self.workspaces.remove(workspace)


def simulated(row, segment_addresses="descending"):
    """The third step through the allocator."""
    run, gradients = Run(row), None
    for number in range(3):
        first, gradients = run.step(kept=gradients if row.get("keep_grads") else None)
        if number == 0:
            for name, num_bytes in state_of(row):
                run.timeline.alloc(num_bytes, "optimizer_state", name)
        end = len(run.timeline.events)
        if not row.get("keep_grads"):
            run.timeline.free(*gradients.values())
    events, allocator = run.timeline.events, CachingAllocator(segment_addresses=segment_addresses)
    return replay_blocks(events[first:end], before=events[:first], allocator=allocator)


@pytest.mark.parametrize("row", [row for row in OURS if not row.get("step_in_backward")], ids=name_of)
def test_allocated_and_reserved_bytes_are_close_to_those_measured(row):
    result, measured = simulated(row), row["steps"][-1]
    assert_close(row, result, measured)


@pytest.mark.parametrize("row", [row for row in OURS if name_of(row) in ALLOCATED_APART], ids=name_of)
def test_segments_at_ascending_addresses_explain_the_gaps(row):
    result = simulated(row, "ascending")
    for name in ("forward", "backward"):
        assert result.phases[name] == row["steps"][-1][name]["peak"]
    assert result.reserved_bytes == row["reserved"]


def assert_close(row, result, measured):
    for name in ("forward", "backward"):
        tolerance = ALLOCATED_APART.get(name_of(row), ALLOCATED)
        assert result.phases[name] == pytest.approx(measured[name]["peak"], rel=tolerance)
    assert result.reserved_bytes == pytest.approx(row["reserved"], rel=RESERVED_APART.get(name_of(row), RESERVED))


@pytest.mark.parametrize("row", [row for row in PUBLIC if row["optimizer"] in ("adamw", "sgd")], ids=name_of)
def test_allocated_and_reserved_bytes_are_close_to_those_published(row):
    assert_close(row, simulated(row), row["phases"])


@pytest.mark.parametrize(("row", "tolerance"), [(row, QUICK) for row in OURS] + [(row, 0.005) for row in PUBLIC])
def test_rounded_sums_are_near_the_measured_peaks(row, tolerance):
    phases = row["steps"][-1] if "steps" in row else row["phases"]
    state = list(state_of(row)) if row["optimizer"] in MOMENTS else [("state", row["state"])]
    peaks = replay(steady_step(row, state)).phases
    for name in ("forward", "backward"):
        apart = QUICK_APART.get(name_of(row), tolerance)
        assert peaks[name] == pytest.approx(phases[name]["peak"], rel=apart)


@pytest.mark.parametrize("row", OURS[::3], ids=name_of)
def test_the_quick_peaks_are_those_of_the_timeline(row):
    spec, options = model_of(row), options_of(row)
    result = replay(steady_step(row, []))
    resident = replay(
        [event for event in steady_step(row, []) if event.phase == "load" and event.category == "parameters"]
    )
    quick = step_memory(spec, options)
    assert sum(quick.forward.values()) == result.phases["forward"] - resident.peak_bytes
    assert sum(quick.backward.values()) == result.phases["backward"] - resident.peak_bytes
    assert sum(quick.after_backward.values()) == result.end_bytes - resident.peak_bytes
    at_peak = quick.forward if result.peak_phase == "forward" else quick.backward
    assert {"parameters": resident.peak_bytes, **at_peak} == result.categories
