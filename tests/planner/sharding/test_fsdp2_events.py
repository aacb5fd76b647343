"""What FSDP2 allocates around a step's layers, against torch's `fully_shard` at work on a rank without others."""

from contextlib import contextmanager

import msgspec
import pytest
import torch
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.fsdp._fully_shard import _fsdp_collectives as collectives
from torch.distributed.fsdp._fully_shard import _fsdp_param

from optplan.planner.models.fields import Fields
from optplan.planner.models.registry import family_of
from optplan.planner.sharding.base import Ranks
from optplan.planner.sharding.fsdp2 import Fsdp2
from optplan.planner.sharding.pipeline import Stage, stage_part
from optplan.planner.step.options import StepOptions
from optplan.planner.step.rules import write_forward_backward
from optplan.planner.timeline import Allocation, TimelineBuilder

NUM_LAYERS = 5
"""As few as the rules need to write some of them once for all."""
CONFIG = {
    "model_type": "llama",
    "vocab_size": 203,
    "hidden_size": 96,
    "intermediate_size": 250,
    "num_hidden_layers": NUM_LAYERS,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}
KINDS = {
    "all-gather output": "gather",
    "gathered": "copy out",
    "reduce-scatter input": "reduce",
    "sharded gradients": "gradients",
}


def planned_events(strategy, precision, checkpointing, *, stage=None):
    config = CONFIG if stage is None else CONFIG | {"num_hidden_layers": NUM_LAYERS * stage.num_stages}
    spec = family_of("llama").spec(Fields(config, where="test"), name="m", source="test")
    stored = "float32" if precision == "mixed" else None
    options = StepOptions(
        batch_size=2, seq_len=8, precision=precision, checkpointing=checkpointing, stored_dtype=stored
    )
    if stage is not None:
        spec = stage_part(spec, stage)
        options = msgspec.structs.replace(options, starts=stage.starts, ends=stage.ends)
    timeline, made, events = TimelineBuilder(), {}, []
    write_forward_backward(timeline, spec, options, strategy)
    for event in timeline.events:
        if isinstance(event, Allocation):
            kind = next((kind for text, kind in KINDS.items() if f"FSDP2: {text}" in event.name), None)
            if kind:
                made[event.id] = kind, event.bytes
                events.append((kind, event.bytes))
        elif made.get(event.id, ("",))[0] == "copy out":
            events.append(("drop", made[event.id][1]))
    return events


@contextmanager
def recorded(monkeypatch):
    """The buffers that collectives ask for, and the storages that parameters are copied out to and dropped from."""
    events, real_alloc, real_free = [], _fsdp_param.alloc_storage, _fsdp_param.free_storage
    real_outputs = _fsdp_param.FSDPParam.init_all_gather_outputs

    def allocate(self, size, *, dtype, device):
        tensor = torch.empty(*size, dtype=dtype, device=device)
        if isinstance(self, collectives.AllGather):
            kind = "gather"
        else:
            kind = "gradients" if events[-1][0] == "reduce" else "reduce"
        events.append((kind, tensor.untyped_storage().nbytes()))
        return tensor

    def alloc(tensor):
        size = tensor.numel() * tensor.itemsize
        # The first time, the tensor was made with its storage.
        if (tensor.untyped_storage().nbytes() == 0) or id(tensor) in fresh:
            events.append(("copy out", size))
        fresh.discard(id(tensor))
        real_alloc(tensor)

    def free(tensor):
        if tensor.untyped_storage().nbytes():
            events.append(("drop", tensor.untyped_storage().nbytes()))
        real_free(tensor)

    def outputs(self, *args):
        had = len(self.all_gather_outputs)
        real_outputs(self, *args)
        if not had:
            fresh.update(id(tensor) for tensor in self.all_gather_outputs)

    fresh = set()
    monkeypatch.setattr(collectives.DefaultAllocMixin, "allocate", allocate)
    monkeypatch.setattr(_fsdp_param, "alloc_storage", alloc)
    monkeypatch.setattr(_fsdp_param, "free_storage", free)
    monkeypatch.setattr(_fsdp_param.FSDPParam, "init_all_gather_outputs", outputs)
    yield events


def real_events(monkeypatch, mesh, *, precision, checkpointing, reshards, is_first_stage=False):
    from transformers import LlamaConfig, LlamaForCausalLM

    model = LlamaForCausalLM(LlamaConfig(**CONFIG, use_cache=False))
    model = model.to(torch.float32 if precision == "mixed" else torch.bfloat16).train()
    if checkpointing == "full":
        model.gradient_checkpointing_enable({"use_reentrant": False})
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    how = {"mesh": mesh, "mp_policy": policy if precision == "mixed" else MixedPrecisionPolicy()}
    if is_first_stage:
        model = model.model
        model.norm = torch.nn.Identity()
    for layer in model.layers if is_first_stage else model.model.layers:
        fully_shard(layer, **how, reshard_after_forward=reshards)
    fully_shard(model, **how)
    ids = torch.zeros(2, 8, dtype=torch.int64)
    with recorded(monkeypatch) as events:
        if is_first_stage:
            sent = model(input_ids=ids).last_hidden_state
            sent.backward(torch.ones_like(sent))
        else:
            model(input_ids=ids, labels=ids).loss.backward()
    return events


@pytest.mark.parametrize("world", [2, 3, 8])
@pytest.mark.parametrize("precision", ["bf16", "mixed"])
@pytest.mark.parametrize("reshards", [True, False])
@pytest.mark.parametrize("checkpointing", ["none", "full"])
def test_buffers_come_and_go_as_torch_makes_them(world, precision, reshards, checkpointing, fake_rank, monkeypatch):
    with fake_rank(0, world) as mesh:
        found = real_events(monkeypatch, mesh, precision=precision, checkpointing=checkpointing, reshards=reshards)
    strategy = Fsdp2(Ranks(world), reshards=reshards)
    assert planned_events(strategy, precision, checkpointing) == found


@pytest.mark.parametrize("precision", ["bf16", "mixed"])
@pytest.mark.parametrize("reshards", [True, False])
def test_a_stage_that_sends_on_what_its_last_layer_made_gathers_that_layer_again(
    precision, reshards, fake_rank, monkeypatch
):
    with fake_rank(0, 2) as mesh:
        how = {"precision": precision, "checkpointing": "none", "reshards": reshards}
        found = real_events(monkeypatch, mesh, **how, is_first_stage=True)
    strategy = Fsdp2(Ranks(2), reshards=reshards)
    assert planned_events(strategy, precision, "none", stage=Stage(0, 2)) == found


@pytest.mark.parametrize("precision", ["bf16", "mixed"])
def test_hybrid_sharding_gathers_within_a_node(precision, fake_rank, monkeypatch):
    with fake_rank(0, 8):
        mesh = init_device_mesh("cpu", (2, 4), mesh_dim_names=("replicate", "shard"))
        found = real_events(monkeypatch, mesh, precision=precision, checkpointing="none", reshards=True)
    assert planned_events(Fsdp2(Ranks(8, 2), shard_ranks=4), precision, "none") == found


def test_offloaded_shards_come_to_the_device_to_be_gathered_and_nothing_of_them_stays():
    spec = family_of("llama").spec(Fields(CONFIG, where="test"), name="m", source="test")
    strategy, timeline = Fsdp2(Ranks(4), offloads=True), TimelineBuilder()
    options = StepOptions(batch_size=2, seq_len=8, precision="mixed", stored_dtype="float32")
    write_forward_backward(timeline, spec, options, strategy)
    made = {event.id: event for event in timeline.events if isinstance(event, Allocation)}
    padded = {p.name: -(-p.shape[0] // 4) * (p.numel // p.shape[0]) for p in spec.unique_parameters}
    in_layers = sum(numel for name, numel in padded.items() if ".layers." in name)
    outside = sum(padded.values()) - in_layers
    # Layers are gathered in forward and again in backward, the root once; each shard in fp32 is cast as it arrives.
    gathered = 2 * in_layers + outside
    brought, cast = (
        sum(event.bytes for event in made.values() if name in event.name) for name in ("from the host", "gather input")
    )
    assert (brought, cast) == (4 * gathered, 2 * gathered)
    ended = {event.id for event in timeline.events if not isinstance(event, Allocation)}
    assert not [event.name for id_, event in made.items() if "FSDP2" in event.name and id_ not in ended]
