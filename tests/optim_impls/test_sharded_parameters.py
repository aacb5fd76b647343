"""DTensor parameters, on two processes that talk over gloo."""

from __future__ import annotations

import socket
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard, distribute_tensor

from optplan.optim_impls import AdamW

SHAPES = ((7, 3), (64, 5), (1, 4))
NUM_STEPS = 3


def _values(step: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(step)
    return [torch.randn(shape, generator=generator) for shape in SHAPES]


def _free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


def _train(rank: int, port: int, results: Any) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
    mesh = init_device_mesh("cpu", (2,))
    parameters = [torch.nn.Parameter(distribute_tensor(value, mesh, [Shard(0)])) for value in _values(0)]
    optimizer = AdamW(parameters, lr=0.1, backend="torch")
    for step in range(NUM_STEPS):
        for parameter, value in zip(parameters, _values(1 + step), strict=True):
            parameter.grad = distribute_tensor(value, mesh, [Shard(0)])
        optimizer.step()
        if step == 0:
            saved = optimizer.state_dict()
            optimizer = AdamW(parameters, lr=0.1, backend="torch")
            optimizer.load_state_dict(saved)
    whole = [parameter.detach().full_tensor() for parameter in parameters]
    kinds = [isinstance(optimizer.state[parameter]["exp_avg"], DTensor) for parameter in parameters]
    if rank == 0:
        results["parameters"], results["kinds"] = [tensor.tolist() for tensor in whole], kinds
    dist.destroy_process_group()


def test_sharded_adamw_takes_the_same_steps() -> None:
    with mp.Manager() as manager:
        results = manager.dict()
        mp.spawn(_train, args=(_free_port(), results), nprocs=2)
        found, kinds = results["parameters"], results["kinds"]
    parameters = [torch.nn.Parameter(value) for value in _values(0)]
    optimizer = torch.optim.AdamW(parameters, lr=0.1)
    for step in range(NUM_STEPS):
        for parameter, value in zip(parameters, _values(1 + step), strict=True):
            parameter.grad = value
        optimizer.step()
    assert kinds == [True] * len(SHAPES)
    for ours, theirs in zip(found, parameters, strict=True):
        torch.testing.assert_close(torch.tensor(ours), theirs.detach(), rtol=1e-5, atol=1e-6)
