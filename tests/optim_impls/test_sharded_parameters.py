"""DTensor parameters, on two processes that talk over gloo; each process runs this file as a script."""

from __future__ import annotations

import json
import socket
import subprocess
import sys
from pathlib import Path

import torch
import torch.distributed as dist
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


def _train(rank: int, port: int, found: Path) -> None:
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
        found.write_text(json.dumps({"parameters": [tensor.tolist() for tensor in whole], "kinds": kinds}))
    dist.destroy_process_group()


def test_sharded_adamw_takes_the_same_steps(tmp_path: Path) -> None:
    port, found = str(_free_port()), tmp_path / "found.json"
    ranks = [subprocess.Popen([sys.executable, __file__, rank, port, str(found)]) for rank in "01"]
    assert [rank.wait(timeout=100) for rank in ranks] == [0, 0]
    result = json.loads(found.read_text())
    parameters = [torch.nn.Parameter(value) for value in _values(0)]
    optimizer = torch.optim.AdamW(parameters, lr=0.1)
    for step in range(NUM_STEPS):
        for parameter, value in zip(parameters, _values(1 + step), strict=True):
            parameter.grad = value
        optimizer.step()
    assert result["kinds"] == [True] * len(SHAPES)
    for ours, theirs in zip(result["parameters"], parameters, strict=True):
        torch.testing.assert_close(torch.tensor(ours), theirs.detach(), rtol=1e-5, atol=1e-6)


if __name__ == "__main__":
    _train(int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3]))
