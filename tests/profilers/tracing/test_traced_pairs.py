"""Steps traced for one of two ranks, whose peer is made up, against the same steps recorded on pairs of H200s.

Peak and every category within half a percent of the peak; most are equal to the byte.
"""

import gzip
import json
from pathlib import Path

import pytest

from optplan.planner.candidates import choose_optimizers
from optplan.planner.catalog import load_model
from optplan.planner.request import check_request
from optplan.profilers.estimation import TracedWorkload
from optplan.profilers.workloads.source import CatalogueSource

PATH = Path(__file__).parents[2] / "records" / "h200x2_steps.jsonl.gz"
ROWS = {row["case"]["name"]: row for row in map(json.loads, gzip.decompress(PATH.read_bytes()).splitlines())}
ALLOWED = 0.005
NAMES = [
    "gpt2-medium-ddp-copies", "tinyllama-ddp-amp", "tinyllama-zero1-bf16", "qwen2.5-0.5b-fsdp2-bf16-tied",
    "tinyllama-noreshard-mixed-clip", "tinyllama-fsdp2-adam-mini",
    "tinyllama-fsdp2-micro-adam", "gpt2-fsdp2-adapprox-fp32-uneven",
]  # fmt: skip


def merged(categories):
    """Those that both can tell apart.

    The measurement cannot name the gathered parameters of the root, and counts the casts of autocast at the head with
    the loss, where a trace sees activations.
    """
    found = dict(categories)
    found["parameters"] += found.pop("unexplained", 0)
    found["activations"] = found.get("activations", 0) + found.pop("logits_and_loss", 0)
    return found


@pytest.mark.parametrize("name", NAMES)
def test_a_rank_with_a_made_up_peer_is_the_measured_one(name):
    case, measured = ROWS[name]["case"], ROWS[name]["ranks"][0]["measurement"]
    request = check_request(load_model(case["model"]), gpu="h200", gpus=2, nodes=1, engine="trace", **case["step"])
    workload = TracedWorkload(request, CatalogueSource(request.model), searches=False)
    (candidate,), _ = workload.candidates(choose_optimizers(case.get("optimizer", "adamw"), case.get("options")))
    peaks, most = workload.peaks(candidate), measured["peak_allocated_bytes"]
    assert peaks.peak_phase == measured["peak_phase"]
    assert peaks.peak_bytes == pytest.approx(most, rel=ALLOWED)
    for phase, peak in peaks.phases.items():
        assert peak.peak_allocated_bytes == pytest.approx(
            measured["phases"][phase]["peak_allocated_bytes"], rel=ALLOWED
        )
    found, expected = merged(peaks.categories), merged(measured["peak_categories"])
    off = {key: found.get(key, 0) - expected.get(key, 0) for key in found.keys() | expected.keys()}
    assert {key: size for key, size in off.items() if abs(size) > ALLOWED * most} == {}


def test_every_way_of_sharing_and_every_optimizer_is_among_them():
    cases = [ROWS[name]["case"] for name in NAMES]
    assert {case["step"]["sharding"] for case in cases} == {"ddp", "ddp-copies", "zero1", "fsdp2", "fsdp2-noreshard"}
    assert {case.get("optimizer", "adamw") for case in cases} == {"adamw", "adam-mini", "micro-adam", "adapprox"}
