"""Sixteen steps recorded on pairs of H200s, rank by rank, against the rules: bytes, phases, categories, reserved.

The steps ran one after another in one launch. Where something of the step before was left (`left_bytes`) its memory was
in the cache, and what is reserved says nothing of a fresh process; there it is not compared.
"""

import gzip
import json
from pathlib import Path

import pytest

from optplan.planner.candidates import choose_optimizers
from optplan.planner.catalog import load_model
from optplan.planner.request import check_request
from optplan.planner.requested_step import sharded_view
from optplan.planner.sharding.groups import ParameterGroups
from optplan.planner.units import MIB
from optplan.planner.workload import Workload

PATH = Path(__file__).parents[2] / "records" / "h200x2_steps.jsonl.gz"
ROWS = {
    row["case"]["name"]: row
    for row in map(json.loads, gzip.decompress(PATH.read_bytes()).splitlines())
    if "error" not in row
}
EXACT = {
    "tinyllama-ddp-amp", "tinyllama-noreshard-mixed-clip", "tinyllama-fsdp2-mixed-accumulated",
    "llama-3.2-1b-fsdp2-mixed-checkpointed", "qwen2.5-0.5b-fsdp2-bf16-tied", "gpt2-medium-ddp-copies",
    "gpt2-fsdp2-adapprox-fp32-uneven",
}  # fmt: skip
"""Steps whose reserved bytes are foreseen to the byte on both ranks."""


def workload_of(row):
    case = row["case"]
    workload = Workload(check_request(load_model(case["model"]), gpu="h200", gpus=2, nodes=1, **case["step"]))
    (candidate,), _ = workload.candidates(choose_optimizers(case.get("optimizer", "adamw"), case.get("options")))
    return workload, candidate


def root_bytes(workload):
    """What of the gathered parameters lies outside the layers, in the dtype that computes."""
    view = sharded_view(workload.request)
    members = ParameterGroups(view.parameters, view.layer_name).of_root(view.num_layers)
    return sum(parameter.numel for parameter in members.values()) * view.compute_itemsize


def test_there_are_sixteen_with_all_optimizers_and_both_kinds_of_sharding():
    assert len(ROWS) == 16
    assert {row["case"].get("optimizer", "adamw") for row in ROWS.values()} == {
        "adamw", "adam-mini", "micro-adam", "adapprox",
    }  # fmt: skip


@pytest.mark.parametrize("name", ROWS)
def test_every_rank_is_foreseen_within_a_thousandth_and_its_state_to_the_byte(name):
    workload, candidate = workload_of(ROWS[name])
    resident, peaks = workload.resident(candidate), workload.peaks(candidate)
    for rank in ROWS[name]["ranks"]:
        figures = rank["figures"]
        if rank["rank"] == 0:
            assert resident.optimizer_state == figures["bytes"]["optimizer_state"]
            assert resident.parameters == figures["bytes"]["parameters"]
        assert peaks.peak_bytes == pytest.approx(figures["peak_allocated_bytes"], rel=0.001)
        for phase, peak in peaks.phases.items():
            assert peak.peak_allocated_bytes == pytest.approx(
                figures["phases"][phase]["peak_allocated_bytes"], rel=0.001
            )


@pytest.mark.parametrize("name", ROWS)
def test_what_is_alive_at_the_peak_is_foreseen_by_category(name):
    row = ROWS[name]
    workload, candidate = workload_of(row)
    foreseen, measurement = workload.peaks(candidate), row["ranks"][0]["measurement"]
    assert foreseen.peak_phase == measurement["peak_phase"]
    expected, found = dict(measurement["peak_categories"]), dict(foreseen.categories)
    # The gathered parameters of the root are the one thing that the measurement cannot name, but for a loss.
    unexplained = expected.pop("unexplained", 0)
    if row["case"]["step"]["sharding"].startswith("fsdp2") and unexplained > 512:
        assert unexplained == pytest.approx(root_bytes(workload), abs=2 * MIB)
    expected["parameters"] += unexplained
    # Casts that autocast makes at the head are the loss's by their module, activations by their graph.
    for categories in (expected, found):
        categories["activations"] = categories.get("activations", 0) + categories.pop("logits_and_loss", 0)
    for category in expected.keys() | found.keys():
        difference = expected.get(category, 0) - found.get(category, 0)
        assert abs(difference) <= 0.001 * foreseen.peak_bytes, category


@pytest.mark.parametrize("name", [name for name, row in ROWS.items() if not row["ranks"][0]["left_bytes"]])
def test_reserved_bytes_where_nothing_was_left(name):
    workload, candidate = workload_of(ROWS[name])
    reserved = workload.peaks(candidate).reserved_bytes
    for rank in ROWS[name]["ranks"]:
        measured = rank["figures"]["peak_reserved_bytes"]
        assert reserved == measured if name in EXACT else reserved == pytest.approx(measured, rel=0.008)
