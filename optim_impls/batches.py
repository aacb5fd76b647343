"""The parts of a step: a parameter with what belongs to it, and batches that one launch can serve."""

from __future__ import annotations

import os
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import torch

from optplan.optim_impls.fingerprint import local_tensor
from optplan.optim_impls.step_counters import State

GradScale = float | torch.Tensor | None


class Member(NamedTuple):
    """One parameter's part in a step; DTensors are given by their local shard.

    Attributes:
        parameter: Updated in place.
        gradient: Read only.
        state: The parameter's entry in `optimizer.state`.
        ordinal: Its place among all parameters of the optimizer, the same in every run and on every rank.
    """

    parameter: torch.Tensor
    gradient: torch.Tensor
    state: State
    ordinal: int


class Part(NamedTuple):
    """What of a member outlives a step: the parameter (a DTensor as it is), its state, its ordinal."""

    parameter: torch.Tensor
    state: State
    ordinal: int


class Batch:
    """Members that one launch can serve: same device, dtypes, alignment and step, no memory in common.

    Attributes:
        step: Steps of each member, this one included; 0 where the counters live on the device.
        triton: Whether the kernels take them, or the reference.
        aligned: Whether every tensor begins at 16 bytes.
        lead: Place of the first member among the parts of its group.
        scratch: Free for the optimizer to keep what it derived from the members; lives until a pointer moves. It must
            not hold gradients, whose memory `zero_grad` is to free.
    """

    def __init__(self, *, lead: int, triton: bool, aligned: bool) -> None:
        self.parts: list[Part] = []
        self.lead = lead
        self.step = 0
        self.triton = triton
        self.aligned = aligned
        self.scratch: dict[str, Any] = {}
        self._members: list[Member] | None = None

    @property
    def members(self) -> list[Member]:
        """The members with their gradients, at least one; good until the step ends."""
        if self._members is None:
            self._members = [member_of(part) for part in self.parts]
        return self._members

    @property
    def device(self) -> torch.device:
        """Where the members are."""
        return self.parts[0].parameter.device

    def prepare(self) -> None:
        """Do what every step needs before its kernels or the reference run, whatever of the last step was kept."""

    def release(self) -> None:
        """Let go of the gradients."""
        self._members = None


def member_of(part: Part) -> Member:
    """A part of a plan with its gradient of this step."""
    gradient = part.parameter.grad
    assert gradient is not None
    return Member(local_tensor(part.parameter), local_tensor(gradient), part.state, part.ordinal)


def lags_of(steps: Sequence[float]) -> list[float]:
    """How far each counter is ahead of the first; empty if none is."""
    if not steps or steps.count(steps[0]) == len(steps):
        return []
    return [step - steps[0] for step in steps]


def interpreted() -> bool:
    """Whether Triton runs its kernels in the CPU interpreter."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def on_device(device: torch.device) -> AbstractContextManager[Any]:
    """A context in which kernels are launched on `device`; Triton launches on the current one."""
    if device.type != "cuda" or device.index == torch.cuda.current_device():
        return nullcontext()
    return torch.cuda.device(device)


def tensors_of(state: State) -> list[torch.Tensor]:
    """The tensors of a parameter's state but for its step counter, in the order they were made."""
    return [local_tensor(value) for name, value in state.items() if name != "step" and isinstance(value, torch.Tensor)]


def as_scale(grad_scale: GradScale, device: torch.device) -> GradScale:
    """The scale as a kernel takes it: None, a number, or an fp32 scalar tensor on `device`."""
    if not isinstance(grad_scale, torch.Tensor):
        return None if grad_scale is None else float(grad_scale)
    scale = local_tensor(grad_scale)
    if scale.numel() != 1:
        raise ValueError(f"grad_scale must be a scalar, got shape {tuple(scale.shape)}")
    return scale.to(device=device, dtype=torch.float32, non_blocking=True).view(())
