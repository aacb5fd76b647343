"""What our optimizers share as `torch.optim.Optimizer`s: collecting tensors, choosing a backend, counting, loading."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import torch
from torch.optim import Optimizer

from optplan.optim_impls.batches import (
    Batch,
    GradScale,
    Member,
    Part,
    as_scale,
    interpreted,
    lags_of,
    member_of,
    on_device,
    tensors_of,
)
from optplan.optim_impls.checks import check_choice, check_gradient, check_parameter
from optplan.optim_impls.exact_state import seal, unseal
from optplan.optim_impls.fingerprint import Fingerprint, local_tensor, same_objects
from optplan.optim_impls.launch import is_aligned
from optplan.optim_impls.step_counters import State, StepCounters

__all__ = [
    "BACKENDS",
    "KERNEL_DTYPES",
    "Batch",
    "GradScale",
    "GroupPlan",
    "KernelOptimizer",
    "Member",
    "Part",
    "as_scale",
    "interpreted",
    "local_tensor",
    "member_of",
    "on_device",
    "tensors_of",
]

BACKENDS = ("auto", "triton", "torch")
KERNEL_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


class GroupPlan(NamedTuple):
    """How the steps of a param group run, for as long as no tensor moves.

    Attributes:
        fingerprint: What it rests on.
        parts: The parameters that have a gradient.
        counters: Their step counters.
        lags: How far each counter is ahead of the first; empty if none is.
        batches: The parts that have elements on this rank, divided.
        scratch: Free for the optimizer, as that of a batch.
    """

    fingerprint: Fingerprint
    parts: list[Part]
    counters: StepCounters
    lags: list[float]
    batches: list[Batch]
    scratch: dict[str, Any]


class KernelOptimizer(Optimizer):
    """Base of our optimizers.

    A subclass gives `_check_group`, `_new_state`, `_step_triton` and `_step_torch`; this class gives the rest of the
    contract: param groups, closures, backend choice, per-tensor step counters (on the host, or on the device with
    `capturable`), state that loads bit by bit, gradients that are never written.

    Args:
        params: As torch's optimizers take them.
        defaults: Hyperparameters of a param group.
        backend: `triton`, `torch` (the reference), or `auto`: Triton for CUDA tensors and under `TRITON_INTERPRET=1`.
        capturable: Keep step counters on the device, so that a CUDA graph may record `step()`.
    """

    def __init__(
        self, params: Any, defaults: dict[str, Any], *, backend: str = "auto", capturable: bool = False
    ) -> None:
        check_choice("backend", backend, BACKENDS)
        self._reset_caches()
        super().__init__(params, {**defaults, "backend": backend, "capturable": capturable})

    @abstractmethod
    def _check_group(self, group: dict[str, Any]) -> None:
        """Raise ValueError for a hyperparameter that is out of range."""

    @abstractmethod
    def _new_state(self, parameter: torch.Tensor, group: dict[str, Any]) -> State:
        """The state of a parameter that has had no step, without `step`."""

    @abstractmethod
    def _step_triton(self, batch: Batch, group: dict[str, Any], grad_scale: GradScale) -> None:
        """Update the members of a batch with kernels."""

    @abstractmethod
    def _step_torch(self, batch: Batch, group: dict[str, Any], grad_scale: GradScale) -> None:
        """Update the members of a batch with the reference."""

    def _before_batches(self, plan: GroupPlan, group: dict[str, Any], grad_scale: GradScale) -> None:
        """What a step needs to know of all tensors of a param group before it updates the first."""

    def _kernels_take(self, member: Member) -> bool:
        """Whether the kernels serve this tensor: contiguous, in a dtype they know. Others go to the reference."""
        parameter, gradient = member.parameter, member.gradient
        known = parameter.dtype in KERNEL_DTYPES and gradient.dtype in KERNEL_DTYPES
        return known and parameter.is_contiguous() and gradient.is_contiguous()

    @torch.no_grad()
    def step(  # type: ignore[override]
        self, closure: Callable[[], float] | None = None, *, grad_scale: GradScale = None
    ) -> float | None:
        """Update every parameter that has a gradient.

        Args:
            closure: Computes the loss again, with gradients.
            grad_scale: Multiplied onto every gradient inside the step, such as a clip factor: a number, or a scalar
                tensor on the parameters' device, which is not read back.

        Returns:
            What the closure returned.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        if not same_objects(self.state.values(), self._known_states):
            self._reset_caches()
        first = 0
        for index, group in enumerate(self.param_groups):
            self._step_group(index, group, first, grad_scale)
            first += len(group["params"])
        return loss

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add parameters with their own hyperparameters.

        Raises:
            ValueError: A hyperparameter is out of range.
            TypeError: A parameter is not of real floating-point numbers.
        """
        self._check_group({**self.defaults, **param_group})
        params = param_group["params"]
        if not isinstance(params, torch.Tensor):
            params = param_group["params"] = _as_list(params)
        for parameter in [params] if isinstance(params, torch.Tensor) else params:
            tensor = parameter[1] if isinstance(parameter, tuple) else parameter
            if isinstance(tensor, torch.Tensor):
                check_parameter(type(self).__name__, tensor)
        super().add_param_group(param_group)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load state bit by bit: dtypes are kept, tensors are copied to their parameter's device.

        `backend` and `capturable` stay those of this optimizer. State of torch's optimizers loads where names agree.
        """
        handle = self.register_load_state_dict_pre_hook(lambda _, loaded: seal(loaded))
        try:
            super().load_state_dict(state_dict)
        finally:
            handle.remove()

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        unseal(self.state, capturable=self.defaults["capturable"])
        for group in self.param_groups:
            for name, value in self.defaults.items():
                group.setdefault(name, value)
            group["backend"], group["capturable"] = self.defaults["backend"], self.defaults["capturable"]
            self._cut_to_shards(group)
        self._reset_caches()

    def _cut_to_shards(self, group: dict[str, Any]) -> None:
        """Where parameters are sharded, keep of a state that was loaded whole what this rank is to hold."""
        # What shards needs batches, which are defined here.
        from optplan.optim_impls.sharding import cut_state

        for parameter in group["params"]:
            if local_tensor(parameter) is not parameter and parameter in self.state:
                cut_state(self.state[parameter], self._new_state(parameter, group))

    def _reset_caches(self) -> None:
        self._plans: dict[int, GroupPlan | None] = {}
        self._known_states: list[Any] = []

    def _step_group(self, index: int, group: dict[str, Any], first: int, grad_scale: GradScale) -> None:
        plan = self._plans.get(index)
        if plan is None or not plan.fingerprint.holds(group["params"]):
            plan = self._plans[index] = self._new_plan(group, first)
            self._known_states = list(self.state.values())
        if plan is None:
            return
        steps = plan.counters.begin()
        if plan.lags != (lags := lags_of(steps)):  # somebody wrote to a counter
            plan = self._plans[index] = plan._replace(lags=lags, batches=self._divide(plan.parts, steps))
        self._before_batches(plan, group, grad_scale)
        for batch in plan.batches:
            batch.step = int(steps[batch.lead]) if steps else 0
            run = self._step_triton if batch.triton else self._step_torch
            try:
                with on_device(batch.device):
                    batch.prepare()
                    run(batch, group, as_scale(grad_scale, batch.device))
            finally:
                batch.release()
        plan.counters.finish()

    def _new_plan(self, group: dict[str, Any], first: int) -> GroupPlan | None:
        parts = []
        for ordinal, parameter in enumerate(group["params"], start=first):
            if parameter.grad is None:
                continue
            check_gradient(type(self).__name__, parameter.grad)
            state = self.state[parameter]
            if not state:
                self._fill(state, parameter, group)
            parts.append(Part(parameter, state, ordinal))
        if not parts:
            return None
        counters = StepCounters([part.state for part in parts], capturable=self.defaults["capturable"])
        steps: list[float] = []  # as if none were ahead; the step to come divides again if one is
        fingerprint = Fingerprint(type(self).__name__, group["params"], [part.state for part in parts])
        return GroupPlan(fingerprint, parts, counters, lags_of(steps), self._divide(parts, steps), {})

    def _fill(self, state: State, parameter: torch.Tensor, group: dict[str, Any]) -> None:
        device = parameter.device if self.defaults["capturable"] else "cpu"
        state["step"] = torch.zeros((), dtype=torch.float32, device=device)
        state.update(self._new_state(parameter, group))

    def _divide(self, parts: Sequence[Part], steps: Sequence[float]) -> list[Batch]:
        batches: dict[tuple[Any, ...], Batch] = {}
        seen: dict[tuple[Any, int], int] = {}
        for place, part in enumerate(parts):
            member = member_of(part)
            if member.parameter.numel() == 0:
                continue
            tensors = [member.parameter, member.gradient, *tensors_of(member.state)]
            triton, aligned = self._use_triton(member), is_aligned(*tensors)
            # Parameters over the same memory must not meet in one launch; they follow each other as in a loop.
            where = (member.parameter.device, member.parameter.data_ptr())
            seen[where] = turn = seen.get(where, -1) + 1
            step = int(steps[place]) if steps else 0
            key = (turn, triton, aligned, step, member.parameter.device, *(tensor.dtype for tensor in tensors))
            batch = batches.setdefault(key, Batch(lead=place, triton=triton, aligned=aligned))
            batch.parts.append(part)
        return [batches[key] for key in sorted(batches, key=lambda key: key[0])]

    def _use_triton(self, member: Member) -> bool:
        backend, device = self.defaults["backend"], member.parameter.device.type
        # The kernels hold lines of PTX, which AMD's GPUs, also called cuda, do not know.
        runs = (device == "cuda" and torch.version.hip is None) or interpreted()
        if backend == "triton" and not runs:
            raise ValueError(
                f"backend='triton' needs parameters on a CUDA device or TRITON_INTERPRET=1, got a {device} tensor"
            )
        return backend != "torch" and runs and self._kernels_take(member)


def _as_list(params: Any) -> Any:
    return list(params) if isinstance(params, Iterable) and not isinstance(params, set | str) else params
