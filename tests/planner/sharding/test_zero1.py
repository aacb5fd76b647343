"""DDP's buckets and ZeRO-1's partition against torch's own."""

import pytest
import torch
import torch.distributed as dist
from torch.distributed.optim import ZeroRedundancyOptimizer

from optplan.planner.catalog import load_model
from optplan.planner.sharding.ddp import BUCKET_BYTES, FIRST_BUCKET_BYTES, buckets
from optplan.planner.sharding.zero1 import partition
from optplan.planner.tensors import Parameter

SHAPES = [(203, 96), (96, 96), (32, 96), (32, 96), (96, 96), (250, 96), (250, 96), (96, 250), (96,), (96,), (203, 96)]


@pytest.mark.parametrize("model", ["gpt2", "tinyllama-1.1b", "llama-2-7b"])
def test_buckets_are_those_torch_computes(model):
    sizes = [2 * parameter.numel for parameter in load_model(model).unique_parameters]
    tensors = [torch.empty(size // 2, dtype=torch.bfloat16, device="meta") for size in sizes]
    indices, _ = dist._compute_bucket_assignment_by_size(tensors, [FIRST_BUCKET_BYTES, BUCKET_BYTES])
    assert buckets(sizes) == [sum(sizes[index] for index in bucket) for bucket in indices]


@pytest.mark.parametrize("world", [2, 3, 7, 16])
def test_the_partition_is_torchs(world, fake_rank):
    parameters = [torch.nn.Parameter(torch.zeros(shape)) for shape in SHAPES]
    with fake_rank(1, world):
        optimizer = ZeroRedundancyOptimizer(parameters, optimizer_class=torch.optim.AdamW)
        found = [
            [next(i for i, p in enumerate(parameters) if p is member) for group in groups for member in group["params"]]
            for groups in optimizer._partition_parameters()
        ]
    planned = [Parameter(str(index), shape, "other", "parameter") for index, shape in enumerate(SHAPES)]
    assert [[int(parameter.name) for parameter in share] for share in partition(planned, world)] == found
