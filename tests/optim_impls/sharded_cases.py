"""What one process and two ranks train alike, and how both save and load; run as a script, this file is one rank."""

from __future__ import annotations

import datetime
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

from optplan.optim_impls import AdamMini, AdamW, Adapprox, MicroAdam
from optplan.planner.tensors import Role

SHARDED: dict[str, tuple[int, ...]] = {
    "even": (64, 48),  # 12 blocks of MicroAdam, half of them on each rank
    "uneven": (37, 24),
    "short": (6, 11),  # less than a block
    "one_row": (1, 40),  # the second rank has none of it
    "kernel": (4, 3, 5, 5),
    "vector": (130,),
    "one": (1,),
    "empty": (0, 3),
}
WHOLE: dict[str, tuple[int, ...]] = {"replicated": (8, 20), "plain": (9, 10), "scalar": ()}
NUM_STEPS, SAVED_AFTER = 5, 2
ONE_EACH = ("adamw", "micro-adam", "adapprox-fp32", "adam-mini-fp32")


class Case(NamedTuple):
    """An optimizer to train with, the dtype of the parameters, the factor on the gradients, and which tensors."""

    build: Callable[[Sequence[torch.nn.Parameter]], torch.optim.Optimizer]
    dtype: torch.dtype
    grad_scale: float | None = None
    names: Sequence[str] = tuple(SHARDED | WHOLE)


def _micro(*, backend: str = "torch", **options: Any) -> Callable[..., torch.optim.Optimizer]:
    return lambda params: MicroAdam(params, lr=0.05, block=256, density=0.04, window=3, backend=backend, **options)


def _mini(params: Sequence[torch.nn.Parameter]) -> torch.optim.Optimizer:
    """Blocks of rows for matrices, elements for vectors, and one block for what has one row."""
    roles: dict[torch.Tensor, Role] = {
        p: "other" if p.dim() == 0 or p.shape[0] == 1 else "mlp" if p.dim() > 1 else "bias" for p in params
    }
    return AdamMini(params, roles=roles, lr=0.05, backend="torch")


FEW = ("short",)
"""For kernels in Triton's interpreter, which takes its time."""
CASES = {
    "adamw": Case(lambda params: AdamW(params, lr=0.05, backend="torch"), torch.float32),
    "micro-adam": Case(_micro(weight_decay=0.1), torch.float32, 0.5),
    "micro-adam-bf16": Case(_micro(alpha=0.25), torch.bfloat16),
    "micro-adam-kernels": Case(_micro(backend="triton"), torch.bfloat16, names=FEW),
    "adapprox": Case(lambda params: Adapprox(params, lr=0.05, rank=5, backend="torch"), torch.float64),
    "adapprox-fp32": Case(
        lambda params: Adapprox(params, lr=0.05, rank=5, betas=(0.0, 0.99), backend="torch"), torch.float32, 0.5
    ),
    "adapprox-kernels": Case(
        lambda params: Adapprox(params, lr=0.05, rank=5, backend="triton"), torch.float32, names=FEW
    ),
    "adam-mini": Case(_mini, torch.float64),
    "adam-mini-fp32": Case(_mini, torch.float32, 0.5),
}


def tensors(seed: int, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """A tensor of each shape, the same everywhere."""
    generator = torch.Generator().manual_seed(seed)
    shapes = SHARDED | WHOLE
    return {name: torch.randn(shape, generator=generator).to(dtype) for name, shape in shapes.items()}


def one_process(name: str, tensor: torch.Tensor) -> torch.Tensor:
    """The tensor itself."""
    del name
    return tensor


def on_mesh(mesh: Any) -> Callable[[str, torch.Tensor], torch.Tensor]:
    """Deals tensors out to the ranks as their name says."""

    def place(name: str, tensor: torch.Tensor) -> torch.Tensor:
        if name in SHARDED:
            return distribute_tensor(tensor, mesh, [Replicate()] * (mesh.ndim - 1) + [Shard(0)])
        return distribute_tensor(tensor, mesh, [Replicate()] * mesh.ndim) if name == "replicated" else tensor

    return place


Place = Callable[[str, torch.Tensor], torch.Tensor]


class Training:
    """Parameters of all shapes under one optimizer; gradients depend on the step alone."""

    def __init__(self, case: Case, place: Place) -> None:
        self.case, self.place = case, place
        start = tensors(0, case.dtype)
        self.model = nn.ParameterDict({name: nn.Parameter(place(name, start[name])) for name in case.names})
        self.optimizer = case.build(list(self.model.values()))

    def run(self, first: int, last: int) -> None:
        """Steps first to last - 1; gradients mostly stay in their places, as a GPU's allocator leaves them."""
        for step in range(first, last):
            gradients = tensors(1 + step, self.case.dtype)
            for name, parameter in self.model.items():
                gradient = self.place(name, gradients[name])
                stays = parameter.grad is not None and not _moves(step)
                parameter.grad = parameter.grad.copy_(gradient) if stays else gradient
            self.optimizer.step(grad_scale=self.case.grad_scale)  # type: ignore[call-arg]
        self.optimizer.zero_grad()

    def save(self, folder: Path) -> None:
        """Model and optimizer, by torch.distributed.checkpoint."""
        model, optimizer = get_state_dict(self.model, self.optimizer)
        dcp.save({"model": model, "optimizer": optimizer}, checkpoint_id=folder)

    def load(self, folder: Path) -> None:
        """What `save` wrote, on however many ranks."""
        model, optimizer = get_state_dict(self.model, self.optimizer)
        dcp.load({"model": model, "optimizer": optimizer}, checkpoint_id=folder)
        set_state_dict(self.model, self.optimizer, model_state_dict=model, optim_state_dict=optimizer)

    def load_whole(self, whole: dict[str, Any]) -> None:
        """The whole tensors that one process trained, by `load_state_dict`."""
        for name, parameter in self.model.items():
            parameter.data.copy_(self.place(name, whole[name]["parameter"]))
        state = {
            number: {key: value for key, value in whole[name].items() if key != "parameter"}
            for number, name in enumerate(self.model)
        }
        self.optimizer.load_state_dict({**self.optimizer.state_dict(), "state": state})

    def whole(self) -> dict[str, dict[str, torch.Tensor]]:
        """The whole parameters, and the whole state by their names."""
        states = self.optimizer.state
        return {
            name: {"parameter": _whole(parameter.detach())}
            | {key: _whole(value) for key, value in states[parameter].items()}
            for name, parameter in self.model.items()
        }

    def own_bytes(self) -> dict[str, dict[str, int]]:
        """Bytes of each state tensor on this rank."""
        return {
            name: {key: _local(value).nbytes for key, value in self.optimizer.state[parameter].items()}
            for name, parameter in self.model.items()
        }


def _moves(step: int) -> bool:
    """Whether gradients move before a step: on each of the ranks before every other one, never on both at once."""
    return dist.is_initialized() and step % 2 == dist.get_rank()


def _local(value: torch.Tensor) -> torch.Tensor:
    return value.to_local() if isinstance(value, DTensor) else value


def _whole(value: torch.Tensor) -> torch.Tensor:
    """All ranks' rows one below the other: neither gloo nor NCCL gathers 16-bit integers, which `full_tensor` needs."""
    if not isinstance(value, DTensor):
        return value.clone()
    rows: list[Any] = [None, None]
    dist.all_gather_object(rows, value.to_local())
    return torch.cat(rows) if value.placements[-1] == Shard(0) else rows[0]


def network(mesh: Any) -> nn.Module:
    """A small network; with a mesh, under FSDP2."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 64), nn.LayerNorm(64), nn.GELU(), nn.Linear(64, 33), nn.Linear(33, 4))
    if mesh is not None:
        for layer in (model[0], model[3]):
            fully_shard(layer, mesh=mesh)
        fully_shard(model, mesh=mesh)
    return model


def train_network(case: Case, mesh: Any) -> list[float]:
    """Losses of a few steps; every rank sees the same batch."""
    model = network(mesh)
    optimizer = case.build(list(model.parameters()))
    losses = []
    for step in range(NUM_STEPS):
        torch.manual_seed(1 + step)
        loss = nn.functional.mse_loss(model(torch.randn(8, 16)), torch.randn(8, 4))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def _refusals(mesh: Any) -> dict[str, str]:
    """What each optimizer says to parameters that it does not take."""
    columns = nn.Parameter(distribute_tensor(torch.ones(4, 6), mesh, [Shard(1)]))
    rows = nn.Parameter(distribute_tensor(torch.ones(4, 6), mesh, [Shard(0)]))
    attempts = {
        "micro-adam": lambda: MicroAdam([columns], backend="torch"),
        "adapprox": lambda: Adapprox([columns], backend="torch"),
        "adapprox-paper": lambda: Adapprox([rows], mode="paper", backend="torch"),
    }
    found = {}
    for name, attempt in attempts.items():
        try:
            optimizer = attempt()
            columns.grad, rows.grad = columns.detach(), rows.detach()
            optimizer.step()
        except ValueError as error:
            found[name] = str(error)
    return found


def _run_rank(rank: int, port: int, folder: Path) -> None:
    torch.set_num_threads(1)
    alone = datetime.timedelta(seconds=200)  # after which a rank no longer waits for the other
    address = f"tcp://127.0.0.1:{port}"
    dist.init_process_group("gloo", init_method=address, rank=rank, world_size=2, timeout=alone)
    mesh, both = init_device_mesh("cpu", (2,)), init_device_mesh("cpu", (1, 2))
    found: dict[str, Any] = {"refusals": _refusals(mesh)}
    for name, case in CASES.items():
        training = Training(case, on_mesh(both if name == "micro-adam-bf16" else mesh))
        training.run(0, SAVED_AFTER)
        training.save(folder / f"{name}-on-two")
        training.run(SAVED_AFTER, NUM_STEPS)
        own_bytes = training.own_bytes()
        resumed = Training(case, on_mesh(mesh))
        resumed.load(folder / f"{name}-on-one")
        resumed.run(SAVED_AFTER, NUM_STEPS)
        found[name] = {"trained": training.whole(), "resumed": resumed.whole(), "own_bytes": own_bytes}
        if name in ONE_EACH:
            cut = Training(case, on_mesh(mesh))
            cut.load_whole(torch.load(folder / f"{name}-whole.pt"))
            cut.run(SAVED_AFTER, NUM_STEPS)
            found[name] |= {"cut": cut.whole(), "losses": train_network(case, mesh)}
    torch.save(found, folder / f"found-{rank}.pt")
    dist.destroy_process_group()


if __name__ == "__main__":
    _run_rank(int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3]))
