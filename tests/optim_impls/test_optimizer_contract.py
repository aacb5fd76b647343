"""The contract of every optimizer on a CPU, where graphs and allocations have stand-ins; and that it finds faults."""

from __future__ import annotations

import runpy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from optplan.optim_impls import AdamW

_contract = runpy.run_path(str(Path(__file__).with_name("optimizer_contract.py")))
Contract, SUBJECTS, Training = _contract["Contract"], _contract["SUBJECTS"], _contract["Training"]
MOST_ELEMENTS = 5000
FP32, BF16 = torch.float32, torch.bfloat16


class StandIn:
    """A GPU's tools without a GPU: a graph calls the step again, and the planner is right."""

    def __init__(self, peak_bytes: int = 0, num_compiled: int = 0) -> None:
        self._peak_bytes, self._num_compiled = peak_bytes, num_compiled

    def peak_bytes(self, step: Callable[[], Any]) -> int:
        step()
        return self._peak_bytes

    def record(self, step: Callable[[], Any]) -> Callable[[], Any]:
        return step

    def num_compiled(self) -> int:
        return self._num_compiled


def small(name: str) -> Any:
    """A subject without its large tensors, and with fewer steps."""
    subject = SUBJECTS[name]
    described = tuple(p for p in subject.described if p.numel <= MOST_ELEMENTS)
    return subject._replace(described=described, num_steps=min(subject.num_steps, 6))


def on_cpu(subject: Any, cuda: Any = None) -> Any:
    return Contract(subject, device="cpu", backend="torch", cuda=cuda or StandIn(subject.peak_bytes()))


CHECKS: dict[str, Callable[[Any], None]] = {
    "repeats": lambda contract: contract.repeats(),
    "resumes": lambda contract: contract.resumes(BF16),
    "replays": lambda contract: contract.replays(scheduled=False),
    "replays with a scheduled rate": lambda contract: contract.replays(scheduled=True),
    "allocates": lambda contract: contract.allocates(capturable=False),
    "counts on the device": lambda contract: contract.counts_on_the_device(num_steps=6),
    "scales on the device": lambda contract: contract.scales_on_the_device(),
    "follows gradients": lambda contract: contract.follows_gradients_that_move(),
    "compiles once": lambda contract: contract.compiles_once(num_steps=2),
}


@pytest.mark.parametrize("check", CHECKS)
@pytest.mark.parametrize("name", ["adamw-kahan", "adam-mini-stochastic", "micro-adam-dense", "adapprox"])
def test_every_optimizer_keeps_to_it(name: str, check: str) -> None:
    CHECKS[check](on_cpu(small(name)))


@pytest.mark.parametrize("num_steps", [1, 30])
@pytest.mark.parametrize("name", ["adamw", "adam-mini"])
def test_fp32_steps_are_those_of_float64(name: str, num_steps: int) -> None:
    on_cpu(small(name)).stays_near_float64(num_steps)


@pytest.mark.parametrize("name", ["adamw-stochastic", "adam-mini"])
def test_interpreted_kernels_equal_the_reference(name: str) -> None:
    subject = small(name)
    subject = subject._replace(described=tuple(p for p in subject.described if p.numel <= 300))
    Contract(subject, device="cpu", backend="triton", cuda=StandIn()).equals_the_reference(BF16)


# Launch tables of tensors with 4 pointers (parameter, gradient, two moments; with Kahan 5, MicroAdam 7), elements and
# ordinal of 8 bytes each, and 12 bytes a chunk of 65,536 elements: 10 tensors that are not empty in 16 chunks.
@pytest.mark.parametrize(
    ("name", "planned", "expected"),
    [
        ("adamw", {}, 10 * 6 * 8 + 16 * 12),
        ("adamw", {"capturable": True}, 10 * 7 * 8 + 16 * 12),
        ("adamw-kahan", {}, 10 * 7 * 8 + 16 * 12),
        ("micro-adam", {}, 10 * 9 * 8 + 16 * 12),
        ("micro-adam-dense", {"capturable": True}, 10 * 10 * 8 + 16 * 12),
    ],
)
def test_what_the_planner_allows_a_step(name: str, planned: dict[str, Any], expected: int) -> None:
    assert SUBJECTS[name].peak_bytes(**planned) == expected


class Scribbler(AdamW):
    """Writes to gradients."""

    def step(self, closure: Any = None, **how: Any) -> Any:
        loss = super().step(closure, **how)
        for group in self.param_groups:
            for p in group["params"]:
                p.grad.mul_(2)
        return loss


class Gambler(AdamW):
    """Adds noise that no seed decides."""

    @torch.no_grad()
    def step(self, closure: Any = None, **how: Any) -> Any:
        loss = super().step(closure, **how)
        for group in self.param_groups:
            for p in group["params"]:
                p.add_(torch.rand_like(p))
        return loss


class Amnesiac(AdamW):
    """Forgets what it loads."""

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        super().load_state_dict({**state_dict, "state": {}})


class Deaf(AdamW):
    """Does not hear of a scale."""

    def step(self, closure: Any = None, **how: Any) -> Any:
        return super().step(closure)


class HardOfHearing(AdamW):
    """Does not hear of a scale on the device."""

    def step(self, closure: Any = None, *, grad_scale: Any = None) -> Any:
        return super().step(closure, grad_scale=None if isinstance(grad_scale, torch.Tensor) else grad_scale)


class Stubborn(AdamW):
    """Goes on with the gradients that it met first, and the learning rate that it was made with."""

    def step(self, closure: Any = None, **how: Any) -> Any:
        params = [p for group in self.param_groups for p in group["params"]]
        if not hasattr(self, "kept"):
            self.kept = [p.grad for p in params]
        now = [p.grad for p in params]
        for p, gradient in zip(params, self.kept, strict=True):
            p.grad = gradient
        loss = super().step(closure, **how)
        for p, gradient in zip(params, now, strict=True):
            p.grad = gradient
        return loss


class Hasty(AdamW):
    """Steps further than it should, by a thousandth where counters are on the device and a tenth in kernels."""

    def __init__(
        self, params: Any, lr: Any, backend: str = "auto", *, capturable: bool = False, **options: Any
    ) -> None:
        lr = lr * (1.001 if capturable else 1) * (1.1 if backend == "triton" else 1.0002)
        super().__init__(params, lr=lr, backend=backend, capturable=capturable, **options)


@pytest.mark.parametrize(
    ("cls", "check"),
    [
        (Scribbler, "repeats"),
        (Gambler, "repeats"),
        (Amnesiac, "resumes"),
        (Deaf, "scales on the device"),
        (HardOfHearing, "scales on the device"),
        (Stubborn, "follows gradients"),
        (Hasty, "counts on the device"),
    ],
)
def test_it_finds_what_is_wrong(monkeypatch: pytest.MonkeyPatch, cls: type, check: str) -> None:
    subject = small("adamw")
    CHECKS[check](on_cpu(subject))
    monkeypatch.setitem(type(subject).build.__globals__["CLASSES"], "adamw", cls)
    with pytest.raises(AssertionError):
        CHECKS[check](on_cpu(subject))


def test_it_finds_steps_that_are_not_those_of_float64(monkeypatch: pytest.MonkeyPatch) -> None:
    subject = small("adamw")
    monkeypatch.setitem(type(subject).build.__globals__["CLASSES"], "adamw", Hasty)
    contract = on_cpu(subject)
    contract._where["backend"] = "auto"
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    plain = contract.train
    monkeypatch.setattr(contract, "train", lambda dtype, n, **o: plain(dtype, n, capturable=not o, **o))
    with pytest.raises(AssertionError, match="parameter 0"):
        contract.stays_near_float64(1)


def test_it_finds_a_graph_that_does_nothing() -> None:
    class Idle(StandIn):
        def record(self, step: Callable[[], Any]) -> Callable[[], Any]:
            return lambda: None

    with pytest.raises(AssertionError, match="parameter 0 differs"):
        on_cpu(small("adamw"), Idle()).replays(scheduled=False)


def test_it_finds_an_allocation_that_is_not_planned() -> None:
    subject = small("adamw")
    with pytest.raises(AssertionError):
        on_cpu(subject, StandIn(subject.peak_bytes() + 8)).allocates(capturable=False)


def test_it_finds_another_kernel() -> None:
    class Growing(StandIn):
        def num_compiled(self) -> int:
            self._num_compiled += 1
            return self._num_compiled

    with pytest.raises(AssertionError):
        on_cpu(small("adamw"), Growing()).compiles_once()
