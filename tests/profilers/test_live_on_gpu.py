"""Measured steps on a GPU: nothing that is measured changes, and running out of memory is a result."""

from __future__ import annotations

import gc
import subprocess
import sys
import time
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch._dynamo  # torch's first optimizer imports it, and that import itself leaves cycles
from torch import nn

from optplan.planner.measured.measurement import Measurement
from optplan.profilers.live.command import profile
from optplan.profilers.live.host_speed import launching_seconds
from optplan.profilers.live.profile import LiveProfile
from optplan.profilers.workloads.real_step import place_module

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU"),
]

STEP: dict[str, Any] = {"batch_size": 2, "seq_len": 512}


@pytest.fixture(autouse=True)
def clean_gpu() -> Iterator[None]:
    """Nothing of earlier tests on the GPU; in the test itself nothing waits for the garbage collector."""
    gc.collect()
    torch.cuda.empty_cache()
    gc.disable()
    yield
    gc.enable()


def _mlp() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        *(nn.Sequential(nn.Linear(512, 2048), nn.GELU(), nn.Linear(2048, 512)) for _ in range(4))
    ).cuda()


def _train(model: nn.Module, optimizer: torch.optim.Optimizer, *, steps: int) -> list[float]:
    losses = []
    generator = torch.Generator(device="cuda").manual_seed(1)
    for _ in range(steps):
        loss = model(torch.randn(256, 512, device="cuda", generator=generator)).square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def test_losses_and_peak_are_those_of_a_loop_nobody_watches() -> None:
    found = []
    # The first loop of all makes the workspaces that stay; what it finds is not compared.
    for watched in (False, False, True):
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        model = _mlp()
        optimizer = torch.optim.AdamW(model.parameters(), fused=True)
        profile_ = LiveProfile(model, optimizer)
        if watched:
            with profile_.observing():
                losses = _train(model, optimizer, steps=6)
        else:
            losses = _train(model, optimizer, steps=6)
        found.append((losses, torch.cuda.max_memory_allocated() - before))
        del model, optimizer, profile_
        assert torch.cuda.memory_allocated() == before or len(found) == 1
    assert found[1] == found[2]
    assert found[0][0] == found[1][0]


def test_the_recorded_step_adds_up_to_torch_s_own_counters() -> None:
    model = _mlp()
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    live = LiveProfile(model, optimizer)
    with live.observing():
        _train(model, optimizer, steps=2)
        torch.cuda.reset_peak_memory_stats()
        _train(model, optimizer, steps=1)
        live.finish_step()
        peak, now = torch.cuda.max_memory_allocated(), torch.cuda.memory_allocated()
        requested = torch.cuda.memory_stats()["requested_bytes.all.peak"]
    assert live.history is not None and live.first_difference is None
    assert max(live.history.allocated) == peak
    assert live.peak_requested_bytes == requested < peak
    assert live.history.allocated[-1] == now
    unexplained = [tensor for tensor in live.history.resident if tensor.category == "unexplained"]
    assert sum(tensor.bytes for tensor in unexplained) < 2**20


def test_every_phase_and_category_of_a_catalogue_model() -> None:
    record = profile("gpt2", optimizer="adamw", num_steps=6, **STEP)
    assert set(record.phases) >= {"forward", "backward", "step"}
    assert record.peak_categories.get("unexplained", 0) < 2**20
    assert record.time is not None and record.time.num_steps == 3
    assert record.time.optimizer_copy_fraction is not None and 0 < record.time.optimizer_copy_fraction < 1.2
    assert record.time.host_launch_seconds is not None and 1e-6 < record.time.host_launch_seconds < 1e-3
    assert record.device_bytes is not None and record.peak_reserved_bytes is not None
    assert record.device_bytes > record.peak_reserved_bytes
    observing = next(note for note in record.notes if note.startswith("observing took "))
    assert float(observing.removeprefix("observing took ").partition("%")[0]) < 5


def _starved(fraction_bytes: int, **step: Any) -> Measurement:
    total = torch.cuda.get_device_properties(0).total_memory
    torch.cuda.empty_cache()
    torch.cuda.set_per_process_memory_fraction(min(1.0, (torch.cuda.memory_reserved() + fraction_bytes) / total))
    try:
        return profile("gpt2", optimizer="adamw", options=["implementation=foreach"], num_steps=4, **{**STEP, **step})
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
        torch.cuda.empty_cache()


@pytest.mark.parametrize(
    ("allowed_bytes", "step", "phases"),
    [
        (100 * 2**20, {}, {"load"}),
        (1200 * 2**20, {"batch_size": 16}, {"forward"}),
        (900 * 2**20, {"batch_size": 1, "seq_len": 128}, {"step"}),
    ],
)
def test_running_out_of_memory_is_a_result(allowed_bytes: int, step: dict[str, Any], phases: set[str]) -> None:
    record = _starved(allowed_bytes, **step)
    assert record.out_of_memory is not None
    assert record.out_of_memory.phase in phases
    assert "out of memory" in record.out_of_memory.message
    if record.history is not None:
        assert record.out_of_memory.requested_bytes


def test_a_model_is_placed_as_module_to_does() -> None:
    device, found = torch.device("cuda", torch.cuda.current_device()), []
    for place in (lambda module: module.to(device), lambda module: place_module(module, device)):
        model = nn.Sequential(nn.Embedding(1003, 65), nn.BatchNorm1d(65), nn.Linear(65, 1003, bias=False))
        model[2].weight = model[0].weight
        before = torch.cuda.memory_allocated()
        place(model)
        assert model[2].weight is model[0].weight and isinstance(model[0].weight, nn.Parameter)
        assert torch.equal(model[1].running_var, torch.ones(65, device=device))
        found.append([torch.cuda.memory_allocated() - before, *(t.data_ptr() % 512 for t in model.parameters())])
        del model
    assert found[0] == found[1]


class _Hungry(torch.autograd.Function):
    """Asks for more than any GPU has, in forward or in backward."""

    @staticmethod
    def forward(ctx: Any, values: torch.Tensor, where: str) -> torch.Tensor:
        ctx.where = where
        if where == "forward":
            torch.empty(2**50, dtype=torch.uint8, device="cuda")
        return values.clone()

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor, None]:
        if ctx.where == "backward":
            torch.empty(2**50, dtype=torch.uint8, device="cuda")
        return gradients[0], None


class _HungryMomentum(torch.optim.SGD):
    """Asks for as much in its step, once told to."""

    is_hungry = False

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        if self.is_hungry:
            torch.empty(2**50, dtype=torch.uint8, device="cuda")
        for parameter in self.param_groups[0]["params"]:
            parameter.data.add_(parameter.grad, alpha=-1e-3)


@pytest.mark.parametrize("phase", ["forward", "backward", "step"])
def test_where_the_memory_ran_out_and_what_was_asked_for(phase: str) -> None:
    model = _mlp()
    optimizer = _HungryMomentum(model.parameters(), lr=1e-3)
    live = LiveProfile(model, optimizer)
    with pytest.raises(torch.cuda.OutOfMemoryError), live.observing():
        _train(model, optimizer, steps=2)
        optimizer.is_hungry = phase == "step"
        hidden = model(torch.randn(256, 512, device="cuda"))
        _Hungry.apply(hidden, phase).square().mean().backward()
        optimizer.step()
    assert live.out_of_memory is not None
    assert (live.out_of_memory.phase, live.out_of_memory.requested_bytes) == (phase, 2**50)
    assert live.out_of_memory.allocated_bytes > 0
    # What was alive then is known event by event.
    assert live.history is not None
    assert sum(tensor.bytes for tensor in live.history.alive(len(live.history.events))) > 0


def test_an_interrupt_in_mid_step_ends_the_recording() -> None:
    model = _mlp()
    optimizer = torch.optim.AdamW(model.parameters())
    live = LiveProfile(model, optimizer)
    with pytest.raises(KeyboardInterrupt), live.observing():
        _train(model, optimizer, steps=1)
        model(torch.randn(256, 512, device="cuda")).square().mean()
        raise KeyboardInterrupt
    before = len(torch.cuda.memory._snapshot()["device_traces"][0])
    torch.empty(2**20, device="cuda")
    assert len(torch.cuda.memory._snapshot()["device_traces"][0]) == before
    assert not any(module._forward_hooks for module in model.modules())


_WORKSPACE_BYTES = 2**28
"""More than cuBLAS keeps, and less than gpt2's parameters with their gradients."""

HOG = "import torch, sys; x = torch.empty(2**30, dtype=torch.uint8, device='cuda'); print('there', flush=True); input()"


def test_memory_of_another_process_is_told_and_not_counted() -> None:
    alone = profile("gpt2", optimizer="sgd", num_steps=3, **STEP)
    assert torch.cuda.memory_allocated() < _WORKSPACE_BYTES
    torch.cuda.empty_cache()
    with subprocess.Popen([sys.executable, "-c", HOG], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as other:
        assert other.stdout is not None and other.stdin is not None
        other.stdout.readline()
        beside = profile("gpt2", optimizer="sgd", num_steps=3, **STEP)
        other.stdin.write(b"\n")
        other.stdin.close()
    assert alone.environment.other_processes_bytes is not None and beside.environment.other_processes_bytes is not None
    assert beside.environment.other_processes_bytes - alone.environment.other_processes_bytes >= 2**30
    assert alone.device_bytes is not None and beside.device_bytes is not None
    assert abs(beside.device_bytes - alone.device_bytes) < 2**28


def test_timing_the_host_leaves_nothing_behind() -> None:
    device = torch.device("cuda", torch.cuda.current_device())

    def found() -> list[int]:
        return [torch.cuda.memory_allocated(device), torch.cuda.memory_reserved(device)]

    held, random = found(), [torch.get_rng_state(), torch.cuda.get_rng_state(device)]
    # The first time the driver loads two kernels and autograd starts its thread.
    assert launching_seconds(device) is not None
    begin = time.perf_counter()
    seconds = launching_seconds(device)
    assert time.perf_counter() - begin < 0.15
    assert seconds is not None and 1e-6 < seconds < 1e-3
    assert found() == held
    for before, after in zip(random, [torch.get_rng_state(), torch.cuda.get_rng_state(device)], strict=True):
        assert torch.equal(before, after)
