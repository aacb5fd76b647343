"""FSDP2 against torch's own memory tracker, and torchao's choice of what to quantize on shards."""

import pytest
import torch
from torch.distributed._tools.fsdp2_mem_tracker import FSDPMemTracker
from torch.distributed.fsdp import fully_shard

from optplan.planner.models.fields import Fields
from optplan.planner.models.registry import family_of
from optplan.planner.optimizers.base import OptimizerContext
from optplan.planner.optimizers.registry import build_optimizer
from optplan.planner.sharding.base import Ranks
from optplan.planner.sharding.fsdp2 import Fsdp2
from optplan.planner.sharding.optimizer_state import shard_state
from optplan.planner.sharding.rank import rank_footprint
from optplan.planner.sharding.shards import RowShard
from optplan.planner.step.options import StepOptions
from optplan.planner.step.rules import write_forward_backward
from optplan.planner.tensors import Parameter
from optplan.planner.timeline import Allocation, TimelineBuilder

CONFIG = {
    "model_type": "llama",
    "vocab_size": 203,
    "hidden_size": 96,
    "intermediate_size": 250,
    "num_hidden_layers": 6,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}
CONTEXT = OptimizerContext("bfloat16", "bfloat16")


def spec():
    return family_of("llama").spec(Fields(CONFIG, where="test"), name="m", source="test")


def tracked(mesh):
    """What torch's tracker finds at a steady step's peak and after it, by kind."""
    from transformers import LlamaConfig, LlamaForCausalLM

    model = LlamaForCausalLM(LlamaConfig(**CONFIG, use_cache=False)).to(torch.bfloat16)
    for layer in model.model.layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    optimizer = torch.optim.AdamW(model.parameters(), foreach=True)
    ids = torch.zeros(2, 8, dtype=torch.int64)
    with FSDPMemTracker(model, optimizer) as tracker:
        for step in range(2):
            model(input_ids=ids, labels=ids).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            if step == 0:
                tracker.reset_mod_stats()
    return [
        {
            str(kind).rpartition(".")[2]: size
            for kind, size in next(iter(tracker.get_tracker_snapshot(when).values())).items()
        }
        for when in ("peak", "current")
    ]


def most_exchanged(strategy):
    """Most bytes of gathered parameters and buffers of collectives alive at once."""
    timeline, sizes, most = TimelineBuilder(), {}, 0
    write_forward_backward(timeline, spec(), StepOptions(batch_size=2, seq_len=8), strategy)
    for event in timeline.events:
        if isinstance(event, Allocation):
            if event.category == "communication" or "FSDP2: gathered" in event.name:
                sizes[event.id] = event.bytes
        else:
            sizes.pop(event.id, None)
        most = max(most, sum(sizes.values()))
    return most


@pytest.mark.parametrize(("rank", "world"), [(0, 2), (3, 4)])
def test_shards_state_and_exchanges_are_those_of_torchs_tracker(rank, world, fake_rank):
    with fake_rank(rank, world) as mesh:
        peak, after = tracked(mesh)
    strategy = Fsdp2(Ranks(world, rank=rank))
    parameters = spec().unique_parameters
    optimizer = build_optimizer("adamw", {"implementation": "foreach"})
    footprint = rank_footprint(optimizer, parameters, CONTEXT, strategy)
    assert after["SHARDED_PARAM"] == sum(2 * strategy.shard().padded_numel(p) for p in parameters)
    # The tracker counts the counters on the host too, a number of 4 bytes a parameter.
    assert after["OPT"] == footprint.device_bytes + 4 * len(parameters)
    exchanged = peak["UNSHARDED_PARAM"] + peak["ALL_GATHER"] + peak["REDUCE_SCATTER"]
    assert exchanged == most_exchanged(strategy)


@pytest.mark.parametrize("name", ["adamw-8bit", "adamw-4bit", "adamw-fp8"])
@pytest.mark.parametrize(("rank", "world"), [(0, 2), (1, 2), (0, 5), (4, 5), (15, 16)])
@pytest.mark.parametrize("shape", [(128, 96), (64, 64), (250, 96), (4096,), (8, 512)])
def test_torchao_quantizes_by_a_ranks_own_elements(name, rank, world, shape, fake_rank):
    from torch.distributed.tensor import Shard, distribute_tensor
    from torchao import optim

    build = {"adamw-8bit": optim.AdamW8bit, "adamw-4bit": optim.AdamW4bit, "adamw-fp8": optim.AdamWFp8}[name]
    with fake_rank(rank, world) as mesh:
        parameter = distribute_tensor(torch.zeros(shape, dtype=torch.bfloat16), mesh, [Shard(0)], src_data_rank=None)
        buffer = build([torch.nn.Parameter(parameter)])._new_buffer(parameter, True).to_local()
    parts = (
        [getattr(buffer, part) for part in buffer.tensor_attrs if part != "qmap"]
        if hasattr(buffer, "tensor_attrs")
        else [buffer]
    )
    planned = Parameter("p", shape, "mlp", "linear")
    options = {"implementation": "torchao"} if name == "adamw-8bit" else {}
    state = shard_state(build_optimizer(name, options), planned, CONTEXT, RowShard(world, rank))
    first = [tensor for tensor in state if tensor.name.startswith("exp_avg") and "_sq" not in tensor.name]
    found = sum(part.untyped_storage().nbytes() for part in parts)
    assert found == sum(tensor.num_bytes for tensor in first if not tensor.name.endswith("qmap"))
