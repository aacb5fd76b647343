"""Steps of an optimizer with every launch watched for races, on tensors that several programs share."""

from __future__ import annotations

import runpy
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor

watched = runpy.run_path(str(Path(__file__).with_name("program_races.py")))["watched"]
NUM_STEPS, LR = 2, 0.25
FEW = 1e-3
"""Part of a parameter that a last bit may move further, by another selection or in a quotient of numbers near zero."""
EXACTLY, IN_BF16 = 1e-4, 2**-6 / LR
"""Tolerances in units of the learning rate; two roundings of bf16 numbers of up to 2."""

Build = Callable[[list[torch.nn.Parameter], str], torch.optim.Optimizer]
"""Makes the optimizer for parameters, on a backend (`triton` or `torch`)."""


def check(
    build: Build,
    shapes: Sequence[tuple[int, ...]],
    *,
    dtype: torch.dtype = torch.float32,
    tolerance: float = EXACTLY,
    **how: Any,
) -> set[str]:
    """Watches steps on tensors between -1 and 1, and compares them with the reference's: work done twice shows there.

    Args:
        build: Makes the optimizer.
        shapes: Of the parameters, of which each must be shared by several programs of a launch.
        dtype: Of parameters and gradients.
        tolerance: In units of the learning rate.
        how: Of `step`.

    Returns:
        The kernels that were launched.
    """
    generator = torch.Generator().manual_seed(0)
    starts = [(2 * torch.rand(shape, generator=generator) - 1).to(dtype) for shape in shapes]
    ours, theirs = ([torch.nn.Parameter(start.clone()) for start in starts] for _ in range(2))
    optimizer, reference = build(ours, "triton"), build(theirs, "torch")
    seen: list[Any] = []
    for step in range(NUM_STEPS):
        for parameters in (ours, theirs):
            _set_gradients(parameters, step)
        with watched(lambda: _named(optimizer)) as launches:
            optimizer.step(**how)
        seen += launches
        reference.step(**how)
    for place, (a, b) in enumerate(zip(ours, theirs, strict=True)):
        writers = max(launch.writers[f"parameter {place}"] for launch in seen)
        assert writers > 1, f"one program updates all of parameter {place}"
        off = (a.detach().double() - b.detach()).abs() > LR * tolerance
        assert off.double().mean().item() <= FEW, f"parameter {place} is not the reference's"
    return {launch.kernel for launch in seen}


def _set_gradients(parameters: Sequence[torch.nn.Parameter], step: int) -> None:
    generator = torch.Generator().manual_seed(1 + step)
    for p in parameters:
        p.grad = torch.randn(p.shape, generator=generator).to(p.dtype)


def _named(optimizer: torch.optim.Optimizer) -> dict[str, torch.Tensor]:
    """All tensors of an optimizer."""
    found: dict[str, torch.Tensor] = {}
    for place, p in enumerate(p for group in optimizer.param_groups for p in group["params"]):
        found |= {f"parameter {place}": p.detach(), f"gradient {place}": p.grad}
        state = optimizer.state[p].items()
        found |= {f"{name} {place}": value for name, value in state if isinstance(value, torch.Tensor)}
    return found


def check_rank(build: Build, shapes: Sequence[tuple[int, ...]], *, rank: int) -> set[str]:
    """Watches a step of one of two ranks that hold rows of every parameter; what the other sends does not come.

    Returns:
        The kernels that were launched with several programs.
    """
    with _rank_of_two(rank) as mesh:

        def deal(shape: tuple[int, ...]) -> torch.Tensor:
            return distribute_tensor(torch.randn(shape), mesh, [Shard(0)], src_data_rank=None)

        parameters = [torch.nn.Parameter(deal(shape)) for shape in shapes]
        optimizer = build(parameters, "triton")
        for p in parameters:
            p.grad = deal(p.shape)
        with watched() as launches:
            optimizer.step()
    return {launch.kernel for launch in launches if launch.num_programs > 1}


@contextmanager
def _rank_of_two(rank: int) -> Iterator[DeviceMesh]:
    from torch.testing._internal.distributed.fake_pg import FakeStore

    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=2)
    try:
        yield init_device_mesh("cpu", (2,))
    finally:
        dist.destroy_process_group()
