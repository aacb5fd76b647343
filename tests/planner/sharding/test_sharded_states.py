"""Bytes that a rank keeps of sharded parameters, against torch's `fully_shard` and real optimizers on it."""

import gc

import pytest
import torch
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from optplan.optim_impls import AdamMini, AdamW, Adapprox, MicroAdam
from optplan.optim_impls.adam_mini.shared_blocks import SharedBlocks
from optplan.planner.models.fields import Fields
from optplan.planner.models.registry import family_of
from optplan.planner.optimizers.base import OptimizerContext
from optplan.planner.optimizers.registry import build_optimizer
from optplan.planner.sharding.base import Ranks
from optplan.planner.sharding.optimizer_state import kept_beside_state
from optplan.planner.sharding.rank import rank_footprint
from optplan.planner.sharding.registry import strategy_of
from optplan.planner.sharding.shards import RowShard

CONFIG = {
    "model_type": "llama",
    "vocab_size": 203,
    "hidden_size": 96,
    "intermediate_size": 250,
    "num_hidden_layers": 2,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}
"""Rows that few numbers of ranks divide: 203 tokens, 250 neurons, 2 key heads."""
RANKS = [(0, 2), (1, 2), (0, 3), (2, 3), (0, 8), (7, 8), (10, 64)]


def spec():
    return family_of("llama").spec(Fields(CONFIG, where="test"), name="m", source="test")


def sharded_model(mesh):
    from transformers import LlamaConfig, LlamaForCausalLM

    model = LlamaForCausalLM(LlamaConfig(**CONFIG)).to(torch.bfloat16)
    for layer in model.model.layers:
        fully_shard(layer, mesh=mesh)
    return fully_shard(model, mesh=mesh)


def local(tensor):
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def stepped(optimizer, model):
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    return optimizer


OPTIMIZERS = {
    "adamw": (build_optimizer("adamw"), lambda m: torch.optim.AdamW(m.parameters(), fused=True)),
    "adamw-optplan": (
        build_optimizer("adamw", {"implementation": "optplan"}),
        lambda m: AdamW(m.parameters(), backend="torch"),
    ),
    "sgd": (build_optimizer("sgd"), lambda m: torch.optim.SGD(m.parameters(), lr=0.1, momentum=0.9)),
    "adam-mini": (build_optimizer("adam-mini"), lambda m: AdamMini.from_module(m, backend="torch")),
    "micro-adam": (
        build_optimizer("micro-adam", {"block": 256}),
        lambda m: MicroAdam(m.parameters(), block=256, backend="torch"),
    ),
    "adapprox": (build_optimizer("adapprox", {"rank": 8}), lambda m: Adapprox(m.parameters(), rank=8, backend="torch")),
}


@pytest.mark.parametrize(("rank", "world"), RANKS)
def test_shards_are_stored_padded_and_seen_without_padding(rank, world, fake_rank):
    shard = RowShard(world, rank)
    with fake_rank(rank, world) as mesh:
        found = {
            name: (p.to_local().untyped_storage().nbytes(), tuple(p.to_local().shape))
            for name, p in sharded_model(mesh).named_parameters()
        }
    assert found == {p.name: (2 * shard.padded_numel(p), shard.local(p).shape) for p in spec().unique_parameters}


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize(("rank", "world"), RANKS)
def test_a_ranks_state_is_that_of_the_real_optimizer(name, rank, world, fake_rank):
    planned, build = OPTIMIZERS[name]
    parameters = spec().unique_parameters
    strategy = strategy_of("fsdp2", Ranks(world)).at(rank)
    footprint = rank_footprint(planned.bind(parameters), parameters, OptimizerContext("bfloat16", "bfloat16"), strategy)
    expected = {
        (member.name, tensor.name): (tensor.num_bytes, tensor.shape)
        for group in footprint.groups
        for member in group.parameters
        for tensor in group.tensors
        if tensor.name != "step"
    }
    with fake_rank(rank, world) as mesh:
        model = sharded_model(mesh)
        optimizer = stepped(build(model), model)
        names = {parameter: name for name, parameter in model.named_parameters()}
        found = {
            (names[parameter], key): (local(value).untyped_storage().nbytes(), tuple(local(value).shape))
            for parameter, state in optimizer.state.items()
            for key, value in state.items()
            if key != "step" and isinstance(value, torch.Tensor)
        }
    assert found == expected


@pytest.mark.parametrize(("rank", "world"), RANKS)
def test_adam_mini_keeps_how_many_elements_shared_blocks_have(rank, world, fake_rank):
    parameters = spec().unique_parameters
    with fake_rank(rank, world) as mesh:
        model = sharded_model(mesh)
        optimizer = stepped(AdamMini.from_module(model, backend="torch"), model)
        found = [one.new_sums().nbytes for one in gc.get_objects() if isinstance(one, SharedBlocks)]
        del optimizer
    shard = RowShard(world, rank)
    kept = kept_beside_state(build_optimizer("adam-mini"), parameters, shard)
    assert kept == [("elements of shared blocks", num_bytes) for num_bytes in found]
    assert kept_beside_state(build_optimizer("adamw"), parameters, shard) == []
