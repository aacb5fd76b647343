"""One rank traced among ranks that do not exist: against two measured H200s, against the rules, and in its parts."""

import json
from functools import cache
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import nn

from optplan.planner.allocator.caching import CachingAllocator
from optplan.planner.candidates import choose_optimizers
from optplan.planner.catalog import load_model
from optplan.planner.errors import ConfigError
from optplan.planner.request import check_request
from optplan.planner.timeline import Allocation, Free
from optplan.planner.units import KIB, MIB
from optplan.planner.workload import Workload
from optplan.profilers.estimation import TracedWorkload
from optplan.profilers.tracing.recorder import Recorder
from optplan.profilers.tracing.runs import RunSimulator
from optplan.profilers.tracing.sharded_steps import ShardedStepTracer, Sharding, StepEnd, with_lasting_bucket
from optplan.profilers.tracing.steps import Device
from optplan.profilers.workloads.source import CatalogueSource
from optplan.profilers.workloads.subject import Subject

PATH = Path(__file__).parents[2] / "records" / "public_h200x2_cases.jsonl"
ROWS = [json.loads(line) for line in PATH.read_text().splitlines()]
AFTER_DDP = ROWS[1]
"""The step in whose process a DDP step had left one set of bf16 parameters, freed as this one's were placed."""

TINY = {
    "model_type": "llama", "architectures": ["LlamaForCausalLM"], "hidden_size": 256, "intermediate_size": 688,
    "num_hidden_layers": 3, "num_attention_heads": 8, "num_key_value_heads": 4, "vocab_size": 1003,
    "max_position_embeddings": 512, "tie_word_embeddings": False,
}  # fmt: skip


def name_of(row):
    return f"{row['model']}-{row['mode']}-{row['precision']}"


def traced(spec, *, optimizer="adamw", searches=False, **step):
    request = check_request(spec, gpu="h200", engine="trace", **step)
    workload = TracedWorkload(request, CatalogueSource(spec), searches=searches)
    (candidate,), _ = workload.candidates(choose_optimizers(optimizer, None))
    return workload, candidate


@cache
def traced_row(number):
    row = ROWS[number]
    return traced(
        load_model(row["model"]),
        gpus=row["world"],
        sharding=row["mode"],
        precision=row["precision"],
        batch_size=row["batch"],
        seq_len=row["seq"],
    )


def of_what(workload, candidate):
    """Bytes at the peak by category; attention's random state, 1 KiB a layer, is an activation or workspace."""
    found = dict(workload.peaks(candidate).categories)
    return found | {"activations": found.pop("activations") + found.pop("workspace")}


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    path = tmp_path_factory.mktemp("model") / "config.json"
    path.write_text(json.dumps(TINY))
    return load_model(str(path))


@pytest.mark.parametrize("number", [0, 2, 3], ids=lambda number: name_of(ROWS[number]))
def test_a_rank_allocates_and_reserves_what_was_measured_on_two_h200s(number):
    row, (workload, candidate) = ROWS[number], traced_row(number)
    pieces, part = workload._step(row["batch"]).pieces, workload._part(candidate)
    # Under DDP the rank's first bucket was still held when the later ones were made.
    run = RunSimulator(with_lasting_bucket(pieces) or pieces).simulate(part)
    for phase, measured in row["phases"].items():
        assert run.phases[phase] == pytest.approx(measured["peak"], rel=0.0002), phase
    assert run.peak_bytes == pytest.approx(row["peak"], rel=0.0002)
    assert run.reserved_bytes == pytest.approx(row["reserved"], rel=0.01)
    assert workload.peaks(candidate).peak_bytes == pytest.approx(row["peak"], rel=0.0003)


@pytest.mark.parametrize(
    ("sharding", "between"), [("ddp", "1.40 GiB and 1.64 GiB"), ("zero1", "1.16 GiB and 1.39 GiB")]
)
def test_how_long_the_first_bucket_lives_leaves_the_reserved_bytes_open_as_the_rules_say(sharding, between):
    step = {"sharding": sharding, "gpus": 2, "batch_size": 1, "seq_len": 128}
    workload, candidate = traced(load_model("gpt2"), searches=True, **step)
    peaks, rules = workload.peaks(candidate), Workload(workload.request).peaks(candidate)
    assert peaks.reserved_range_bytes == rules.reserved_range_bytes
    assert peaks.reserved_bytes == rules.reserved_bytes < max(peaks.reserved_range_bytes)
    assert (
        f"reserved between {between}, depending on where the driver puts segments and on when the "
        "communication library lets go of DDP's first bucket"
    ) in workload.notes(candidate)


def test_a_step_on_memory_that_another_left_lies_between_its_requests_and_a_fresh_process():
    workload, candidate = traced_row(1)
    fresh = workload.peaks(candidate).peak_bytes
    step, part = workload._step(AFTER_DDP["batch"]), workload._part(candidate)
    sizes = [2 * parameter.numel for parameter in load_model(AFTER_DDP["model"]).unique_parameters]
    left = [Allocation(-1 - number, size, "parameters", "left", "load") for number, size in enumerate(sizes)]
    load = [
        *(Allocation(10**9 + event.id, event.bytes, event.category, event.name, "load") for event in reversed(left)),
        *(Free(10**9 + event.id, "load") for event in left),
        *step.pieces.load,
    ]
    reused = RunSimulator(step.pieces._replace(load=load)).simulate(part)
    assert AFTER_DDP["peak"] == pytest.approx(reused.peak_bytes, rel=0.007)
    assert AFTER_DDP["peak"] < fresh < 1.015 * AFTER_DDP["peak"]


def test_blocks_that_another_model_left_explain_a_measured_first_step_to_the_kilobyte():
    # The steps ran in one process. Which came before is not told; fp32 shards of a Llama-3.2-1B are 2 bytes for each
    # of its parameters, and with their blocks in the cache the 8 MiB of rests that were not measured are not there.
    row, (workload, _) = ROWS[3], traced_row(3)
    pieces, allocator = workload._step(row["batch"]).pieces, CachingAllocator(segment_addresses="descending")
    left = [allocator.alloc(2 * parameter.numel) for parameter in load_model("llama-3.2-1b").unique_parameters]
    for _ in range(2):
        allocator.alloc(32 * MIB)
    allocator.empty_cache()
    for block in left:
        allocator.free(block)
    blocks = {}
    assert replayed(allocator, pieces.load, blocks)[-1] == pytest.approx(row["alloc_model"], abs=8 * KIB)
    ended = {event.id for event in pieces.first[0] if isinstance(event, Free)}
    # The workspaces are there already.
    events = [e for e in pieces.first[0] if isinstance(e, Free) or e.category != "workspace" or e.id in ended]
    sizes = replayed(allocator, events, blocks)
    backward = [size for size, event in zip(sizes, events, strict=True) if event.phase == "backward"]
    assert max(backward) == pytest.approx(row["first_step"]["backward"]["peak"], abs=2 * KIB)
    assert backward[-1] == pytest.approx(row["first_step"]["backward"]["cur"], abs=2 * KIB)


def replayed(allocator, events, blocks):
    """Allocated bytes after each event."""
    sizes = []
    for event in events:
        if isinstance(event, Free):
            allocator.free(blocks.pop(event.id))
        else:
            blocks[event.id] = allocator.alloc(event.bytes, stream=event.stream)
        sizes.append(allocator.allocated_bytes)
    return sizes


@pytest.mark.parametrize("sharding", ["fsdp2", "fsdp2-noreshard"])
@pytest.mark.parametrize(("gpus", "precision"), [(2, "bf16"), (3, "mixed"), (8, "amp"), (1024, "mixed")])
def test_the_rules_allocate_what_torchs_own_fsdp2_does(tiny, sharding, gpus, precision):
    step = {"sharding": sharding, "gpus": gpus, "precision": precision, "batch_size": 2, "seq_len": 128}
    workload, candidate = traced(tiny, **step)
    rules = Workload(check_request(tiny, gpu="h200", **step))
    assert workload.peaks(candidate).phases == rules.peaks(candidate).phases
    assert of_what(workload, candidate) == of_what(rules, candidate)


@pytest.mark.parametrize("sharding", ["ddp", "ddp-copies", "zero1"])
def test_what_is_alive_under_ddp_is_called_the_same_by_both_engines(tiny, sharding):
    step = {"sharding": sharding, "gpus": 3, "batch_size": 2, "seq_len": 128}
    workload, candidate = traced(tiny, **step)
    rules = Workload(check_request(tiny, gpu="h200", **step))
    assert workload.peaks(candidate).phases == rules.peaks(candidate).phases
    assert of_what(workload, candidate) == of_what(rules, candidate)
    buckets = "communication" if sharding == "ddp-copies" else "gradients"
    assert of_what(rules, candidate)[buckets] >= 2 * tiny.num_parameters


@pytest.mark.parametrize("optimizer", ["adam-mini", "micro-adam", "adapprox"])
def test_our_optimizers_take_their_step_on_shards(tiny, optimizer):
    step = {"sharding": "fsdp2", "gpus": 4, "batch_size": 2, "seq_len": 128}
    workload, candidate = traced(tiny, optimizer=optimizer, **step)
    rules = Workload(check_request(tiny, gpu="h200", **step))
    assert workload.peaks(candidate).phases == rules.peaks(candidate).phases


def test_what_fsdp2_gathers_has_a_cache_of_its_own(tiny):
    workload, candidate = traced(tiny, sharding="fsdp2", gpus=2, batch_size=1, seq_len=64)
    timeline = workload.trace(candidate).timeline
    gathered = [event for event in timeline if isinstance(event, Allocation) and event.name == "all-gather output"]
    assert {event.stream for event in gathered} == {1}
    assert {event.category for event in gathered} == {"communication"}
    # A layer: 4 projections of 256 x 256 or 128 x 256, three of 688 x 256, two norms, in bf16.
    layer = 2 * (2 * 256 * 256 + 2 * 128 * 256 + 3 * 688 * 256 + 2 * 256)
    root = 2 * (2 * 1004 * 256 + 256)  # 1003 rows are padded to an even number
    assert {event.bytes for event in gathered} == {layer, root}
    # Per step: the root and three layers in forward, the layers again in backward.
    assert len(gathered) == 3 * (4 + 3)
    names = {event.name for event in timeline if isinstance(event, Allocation) and event.stream == 0}
    assert "gathered model.layers.0.mlp.up_proj.weight" in names


def test_a_zero1_rank_keeps_the_state_of_its_share_alone(tiny):
    step = {"gpus": 2, "batch_size": 1, "seq_len": 64}
    shared, whole = (traced(tiny, sharding=name, **step) for name in ("zero1", "ddp"))
    by_category = [workload.peaks(candidate).categories["optimizer_state"] for workload, candidate in (shared, whole)]
    assert by_category[0] == pytest.approx(by_category[1] / 2, rel=0.05)


class Three(nn.Module):
    """Three matrices of 4 MiB."""

    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(*(nn.Linear(1024, 1024, bias=False, device="meta") for _ in range(3)))

    def forward(self, x):
        """The sum of what comes out."""
        return self.layers(x).sum()


@pytest.mark.parametrize(("views", "category"), [(True, "gradients"), (False, "communication")])
def test_ddp_makes_its_buckets_at_first_and_anew_in_the_second_step(views, category):
    subject = Subject(Three(), {"x": torch.empty(2, 1024, device="meta")})
    tracer = ShardedStepTracer(
        subject,
        sharding=Sharding(strategy="ddp", num_ranks=2, views=views),
        mixed=False,
        updated=[f"layers.{number}.weight" for number in range(3)],
        device=Device(),
    )
    pieces = tracer.run_steps(num_micro_steps=1, end=StepEnd(None, False))
    first, second, third = (
        [e for e in timeline if isinstance(e, Allocation) and e.name == "gradient bucket" and e.bytes >= MIB]
        for timeline in (pieces.load, pieces.second[0], pieces.steady[0])
    )
    # torch begins with one bucket for everything (`_ddp_init_helper`), as the second step makes them anew anyway; then
    # the first is full at 1 MiB, with one matrix, and the others' 8 MiB are within the 25 that a further one may hold.
    assert [event.bytes // MIB for event in first] == [12]
    assert sorted(event.bytes // MIB for event in second) == [4, 8]
    assert third == []
    assert {event.category for event in (*first, *second)} == {category}
    ended = [event.id for event in pieces.second[0] if isinstance(event, Free)]
    assert {event.id for event in first} <= set(ended)
    # DDP lets the first go before it makes the others; the communication library may hold it until they are full.
    made = pieces.second[0].index(second[0])
    assert [event.id for event in pieces.second[0][:made] if isinstance(event, Free)][-1] == first[0].id
    lasting = with_lasting_bucket(pieces)
    assert lasting.second[0][-1] == Free(first[0].id, "backward")
    assert len(lasting.second[0]) == len(pieces.second[0])
    assert lasting.steady == pieces.steady
    assert not dist.is_initialized()


def test_a_storage_that_is_resized_is_a_new_allocation():
    recorder = Recorder()
    storage = torch.empty(100, dtype=torch.uint8, device="meta").untyped_storage()
    for size in (100, 0, 40):
        storage.resize_(size)
        recorder.resize(storage, "communication", "buffer")
    del storage
    assert recorder.events == [1, -1, 2, -2]
    assert [entry.num_bytes for entry in recorder.entries] == [100, 40]


def test_a_process_of_a_real_group_cannot_make_up_its_peers(tiny, tmp_path):
    dist.init_process_group("gloo", init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1)
    try:
        workload, candidate = traced(tiny, sharding="fsdp2", gpus=2, batch_size=1, seq_len=64)
        with pytest.raises(ConfigError) as raised:
            workload.peaks(candidate)
    finally:
        dist.destroy_process_group()
    assert str(raised.value) == (
        "engine trace makes up the other ranks, and this process belongs to a process group already; "
        "trace before init_process_group()"
    )
