"""Ranks without other processes: torch's fake process group."""

from contextlib import contextmanager

import pytest
import torch
import torch.distributed as dist


@pytest.fixture(autouse=True, scope="module")
def _one_thread():
    """Tensors here are so small that threads wait for each other longer than they compute."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@contextmanager
def _rank_of(rank, world):
    from torch.distributed.device_mesh import init_device_mesh
    from torch.testing._internal.distributed.fake_pg import FakeStore

    dist.init_process_group("fake", rank=rank, world_size=world, store=FakeStore())
    try:
        yield init_device_mesh("cpu", (world,))
    finally:
        dist.destroy_process_group()


@pytest.fixture
def fake_rank():
    """`with fake_rank(rank, world) as mesh`: one rank of a world whose other ranks do nothing."""
    return _rank_of
