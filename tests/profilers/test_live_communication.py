"""What training on several GPUs allocates by itself is named as in a trace; here one process is all ranks."""

import json
from itertools import count

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.nn.parallel import DistributedDataParallel

import optplan
from optplan.planner.candidates import choose_optimizers
from optplan.planner.catalog import load_model
from optplan.planner.history.events import HistoryEvent
from optplan.planner.replay import LiveTensor
from optplan.planner.request import check_request
from optplan.planner.timeline import Allocation
from optplan.profilers.estimation import TracedWorkload
from optplan.profilers.live.communication import CommunicationFollower, GradientNames, NamedEvents, bucket_sizes
from optplan.profilers.live.live_history import Communication, Ownership, StartingBlock, step_history
from optplan.profilers.live.owners import Owner, Owners
from optplan.profilers.live.phases import Mark
from optplan.profilers.live.profile import LiveProfile
from optplan.profilers.workloads.real_step import build_real_model, make_inputs
from optplan.profilers.workloads.sharded_modules import fully_shard_module
from optplan.profilers.workloads.source import CatalogueSource

TINY = {
    "model_type": "llama", "architectures": ["LlamaForCausalLM"], "hidden_size": 32, "intermediate_size": 72,
    "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 99,
    "max_position_embeddings": 64, "tie_word_embeddings": False,
}  # fmt: skip
CPU = torch.device("cpu")


@pytest.fixture
def spec(tmp_path):
    path = tmp_path / "config.json"
    path.write_text(json.dumps(TINY))
    return load_model(str(path))


@pytest.fixture
def ranks():
    """A process group of this process alone."""
    dist.init_process_group("gloo", rank=0, world_size=1, store=dist.HashStore())
    yield init_device_mesh("cpu", (1,))
    dist.destroy_process_group()


def _traced_names(spec, sharding):
    """Category and name of everything that a trace of two ranks says is alive at some time of a steady step."""
    request = check_request(
        spec, gpu="h200", engine="trace", gpus=2, sharding=sharding, precision="fp32", batch_size=2, seq_len=16
    )
    workload = TracedWorkload(request, CatalogueSource(spec), searches=False)
    workload.candidates(choose_optimizers("adamw", None))
    pieces = workload._step(2).pieces
    events = [*pieces.load, *(event for piece in pieces.steady for event in piece)]
    return {(event.category, event.name) for event in events if isinstance(event, Allocation)}


def test_fsdp2_s_memory_has_the_names_of_a_trace(spec, request):
    traced = _traced_names(spec, "fsdp2")
    mesh, numbers, whole = request.getfixturevalue("ranks"), count(), []
    config = check_request(spec, gpu="h200", precision="fp32", batch_size=2, seq_len=16).config
    model = build_real_model(spec, config, CPU)
    fully_shard_module(model, mesh=mesh, reshards=True, mixed=False)
    optimizer = torch.optim.AdamW(model.parameters())
    owners = Owners(model, optimizer, name_gradient=GradientNames(model))

    def note(group):
        whole.extend(p._param_fqn for p in group.fsdp_params if p._unsharded_param.grad is not None)

    follower = CommunicationFollower(model, count_events=lambda: next(numbers))
    inputs = make_inputs(model, config, CPU)
    model(**inputs).loss.backward()
    optimizer.zero_grad()
    follower.start(on_reduction=note)
    model(**inputs).loss.backward()
    follower.stop()
    found = {owner for _, _, owner in follower.ranges}
    gathered = {owner for owner in found if owner.category == "parameters"}
    assert {name for _, name in gathered} == {f"gathered {name}" for name in owners.parameters}
    # A single rank gathers and casts nothing; of its own names a trace has all.
    assert found - gathered == {("communication", "reduce-scatter buffer")}
    assert {(category, name) for category, name in found} <= traced
    weights = {owner for _, owner in owners.weights()}
    of_runtime = {named for named in traced if named[0] in ("communication", "parameters")} - weights - found
    assert of_runtime <= {("communication", "all-gather output"), ("communication", "cast for communication")}
    assert {owner for _, owner in owners.gradients()} <= traced
    assert {name for _, (_, name) in owners.gradients()} == {
        "root reduced gradients", "model.layers.0 reduced gradients", "model.layers.1 reduced gradients",
    }  # fmt: skip
    assert {("gradients", f"{name} gradient") for name in whole} <= traced
    assert sorted(whole) == sorted(owners.parameters)
    before = len(follower.ranges)
    model(**inputs).loss.backward()
    assert len(follower.ranges) == before and not any("allocate" in vars(group) for group in model.modules())


@pytest.mark.parametrize("views", [True, False])
def test_ddp_s_gradients_lie_in_buckets(ranks, views):
    inner = nn.Sequential(nn.Linear(6, 5), nn.Linear(5, 3))
    model = DistributedDataParallel(inner, gradient_as_bucket_view=views)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    profile = LiveProfile(model, optimizer)
    with profile.observing():
        for step in range(3):
            model(torch.ones(2, 6)).sum().backward()
            names = {name for _, (category, name) in profile._owners.gradients() if category == "gradients"}
            optimizer.step()
            if step < 2:
                optimizer.zero_grad()
    weights = {"0.weight", "0.bias", "1.weight", "1.bias"}
    assert set(profile._owners.parameters) == weights
    assert names == ({"gradient bucket"} if views else weights)
    numel = 6 * 5 + 5 + 5 * 3 + 3
    assert bucket_sizes(model) == (frozenset() if views else frozenset({4 * numel}))
    assert profile.residents is not None
    assert (profile.residents.bytes.gradients, profile.residents.bytes.optimizer_state) == (4 * numel, 4 * numel)


def test_names_reach_the_history():
    def alloc(address, stream=0):
        return HistoryEvent("alloc", address, 512, stream, (0, 0), 0)

    history = step_history(
        [alloc(0x10), alloc(0x20, stream=7), alloc(0x30), alloc(0x40)],
        allocated=[1536, 2048, 2560, 3072, 3584],
        start=[StartingBlock(0x1, 512), StartingBlock(0x2, 1024)],
        marks=[Mark(0, "forward", "layer", False)],
        ownerships=[Ownership(0, {}), Ownership(4, {0x1: Owner("gradients", "gradient bucket")})],
        reserved_bytes=2**21,
        communication=Communication(
            [
                NamedEvents(0, 1, Owner("communication", "all-gather output")),
                NamedEvents(1, 4, Owner("communication", "outer")),
                NamedEvents(2, 3, Owner("parameters", "gathered layer.weight")),
            ],
            has_streams=True,
            bucket_sizes=frozenset({1024}),
        ),
    )
    assert history.resident == [
        LiveTensor("gradient bucket", "gradients", 512),
        LiveTensor("gradient bucket", "communication", 1024),
    ]
    assert [(event.category, event.name) for event in history.events if isinstance(event, Allocation)] == [
        ("communication", "all-gather output"),
        ("communication", "outer"),
        ("parameters", "gathered layer.weight"),
        ("communication", "outer"),
    ]


def test_other_streams_are_communication_only_under_fsdp2():
    event = HistoryEvent("alloc", 0x10, 512, 7, (0, 0), 0)
    found = [
        step_history(
            [event],
            allocated=[0, 512],
            start=[],
            marks=[Mark(0, "backward", "layer", False)],
            ownerships=[Ownership(0, {})],
            reserved_bytes=2**21,
            communication=Communication(has_streams=has_streams),
        ).events[0]
        for has_streams in (True, False)
    ]
    assert [(event.category, event.name) for event in found if isinstance(event, Allocation)] == [
        ("communication", "cast for communication"),
        ("activations", "layer backward"),
    ]


def test_a_loop_of_somebody_s_own_says_how_it_is_divided(ranks, tmp_path):
    inner = nn.Linear(6, 3)
    model = DistributedDataParallel(inner)
    optimizer = torch.optim.AdamW(model.parameters())
    with optplan.profile_step(model, optimizer, out=tmp_path / "step.json.gz") as prof:
        for _ in range(3):
            model(torch.ones(4, 6)).sum().backward()
            optimizer.step()
            optimizer.zero_grad()
    record = prof.measurement()
    assert (record.config.gpus, record.config.sharding) == (1, "ddp-copies")
    assert (record.environment.world_size, record.environment.rank) == (1, 0)
    assert (record.model.name, record.model.num_parameters) == ("Linear", 21)
    assert (tmp_path / "step.json.gz").exists()


def test_rank_1_leaves_the_file_to_rank_0(monkeypatch, tmp_path):
    model, out = nn.Linear(6, 3), tmp_path / "step.json.gz"
    optimizer = torch.optim.AdamW(model.parameters())
    monkeypatch.setattr(dist, "is_initialized", lambda: True)
    monkeypatch.setattr(dist, "get_rank", lambda: 1)
    monkeypatch.setattr(dist, "get_world_size", lambda: 2)
    with optplan.profile_step(model, optimizer, out=out) as prof:
        for _ in range(3):
            model(torch.ones(4, 6)).sum().backward()
            optimizer.step()
            optimizer.zero_grad()
    assert not out.exists()
    assert prof.measurement().environment.rank == 1
