"""What all our optimizers keep to on a GPU, as checks that run on a CPU too, with stand-ins for CUDA's tools."""

from __future__ import annotations

import io
import runpy
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

_subjects = runpy.run_path(str(Path(__file__).with_name("contract_subjects.py")))
Subject, SUBJECTS = _subjects["Subject"], _subjects["SUBJECTS"]
NUM_STEPS_BEFORE_RECORDING = 3


class Cuda:
    """What a check asks of a GPU."""

    def peak_bytes(self, step: Callable[[], Any]) -> int:
        """Most bytes that a step asks torch for; an error if the host waits in it."""
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_stats()["requested_bytes.all.current"]
        torch.cuda.set_sync_debug_mode("error")
        try:
            step()
        finally:
            torch.cuda.set_sync_debug_mode("default")
        return int(torch.cuda.memory_stats()["requested_bytes.all.peak"]) - before

    def record(self, step: Callable[[], Any]) -> Callable[[], Any]:
        """A step as a graph; what replays it."""
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            step()
        return graph.replay

    def num_compiled(self) -> int:
        """Kernels of ours that Triton has compiled so far."""
        from triton.runtime.jit import JITFunction

        modules = [module for name, module in list(sys.modules.items()) if name.startswith("optplan.optim_impls")]
        found = {id(k): k for module in modules for k in vars(module).values() if isinstance(k, JITFunction)}
        return sum(len(cache[0]) for kernel in found.values() for cache in kernel.device_caches.values())


class Training:
    """Parameters, their optimizer, and gradients that depend on the number of the step alone.

    Args:
        subject: The optimizer.
        dtype: Of parameters and gradients.
        device: Of them.
        starts: The parameters, which are stepped in place; random ones of the shapes described without them.
        options: Of the optimizer, besides the subject's.
    """

    def __init__(
        self,
        subject: Any,
        dtype: torch.dtype,
        *,
        device: str,
        starts: Sequence[torch.Tensor] | None = None,
        **options: Any,
    ) -> None:
        self.subject, self.num_steps, self._device = subject, 0, device
        if starts is None:
            generator = torch.Generator(device).manual_seed(0)
            starts = [torch.randn(p.shape, generator=generator, device=device).to(dtype) for p in subject.described]
        self.parameters = [torch.nn.Parameter(start) for start in starts]
        self.optimizer = subject.build(self.parameters, **options)

    def renew_gradients(self) -> None:
        """Those of the next step, where the last ones lay."""
        generator = torch.Generator(self._device).manual_seed(100 + self.num_steps)
        self.num_steps += 1
        for p in self.parameters:
            gradient = torch.randn(p.shape, generator=generator, device=self._device)
            if self.subject.scaled and p.dim() >= 2:
                gradient *= torch.linspace(-2, 2, len(p), device=self._device).exp().view(-1, *[1] * (p.dim() - 1))
                gradient *= torch.linspace(1, -2, p.shape[-1], device=self._device).exp()
            if p.grad is None:
                p.grad = gradient.to(p.dtype)
            else:
                p.grad.copy_(gradient)

    def run(self, num_steps: int, **how: Any) -> Training:
        """Steps; none may write to a gradient."""
        for _ in range(num_steps):
            self.renew_gradients()
            copies = [p.grad.clone() for p in self.parameters if p.grad is not None]
            self.optimizer.step(**how)
            for place, (p, copy) in enumerate(zip(self.parameters, copies, strict=True)):
                assert p.grad is not None
                assert torch.equal(p.grad, copy), f"the step wrote to the gradient of parameter {place}"
        return self

    def results(self) -> dict[str, torch.Tensor]:
        """Parameters and their state; a parameter without elements has none that counts."""
        found = {}
        for place, p in enumerate(self.parameters):
            found[f"parameter {place}"] = p.detach()
            for name, value in self.optimizer.state[p].items() if p.numel() else ():
                found[f"{name} of {place}"] = value.cpu() if name == "step" else value
        return found


def assert_same(ours: Training, theirs: Training) -> None:
    """Both trainings are at the same point, bit by bit."""
    one, other = ours.results(), theirs.results()
    assert list(one) == list(other)
    for name, value in one.items():
        assert value.isfinite().all(), f"{name} is not finite"
        assert value.dtype == other[name].dtype, f"{name} has another dtype"
        assert torch.equal(value, other[name]), f"{name} differs"


class Contract:
    """The checks, each on fresh parameters.

    Args:
        subject: What is checked.
        device: Where.
        backend: Of the optimizer.
        cuda: What stands for a GPU's tools.
    """

    def __init__(self, subject: Any, *, device: str = "cuda", backend: str = "triton", cuda: Any = None) -> None:
        self.subject, self._cuda = subject, cuda or Cuda()
        self._where = {"device": device, "backend": backend}

    def train(self, dtype: torch.dtype, num_steps: int, **options: Any) -> Training:
        """A training after some steps."""
        return Training(self.subject, dtype, **{**self._where, **options}).run(num_steps)

    def repeats(self, **options: Any) -> None:
        """Two runs are equal bit by bit."""
        assert_same(*(self.train(torch.bfloat16, self.subject.num_steps, **options) for _ in range(2)))

    def resumes(self, dtype: torch.dtype) -> None:
        """So is one that goes on from a saved state in a fresh optimizer."""
        num_steps, saved = self.subject.num_steps, io.BytesIO()
        ours = self.train(dtype, num_steps - 2)
        torch.save(ours.optimizer.state_dict(), saved)
        ours.optimizer = self.subject.build(ours.parameters, backend=self._where["backend"])
        ours.optimizer.load_state_dict(torch.load(io.BytesIO(saved.getvalue()), weights_only=True))
        assert_same(ours.run(2), self.train(dtype, num_steps))

    def replays(self, *, scheduled: bool) -> None:
        """Replays of a recorded step are steps, also with a learning rate on the device."""
        num_steps = self.subject.num_steps
        eager = self.train(torch.bfloat16, num_steps, capturable=True)
        lr = self.subject.options.get("lr", 1e-2)
        more = {"lr": torch.tensor(lr, device=self._where["device"], dtype=torch.float64)} if scheduled else {}
        ours = self.train(torch.bfloat16, NUM_STEPS_BEFORE_RECORDING, capturable=True, **more)
        replay = self._cuda.record(ours.optimizer.step)
        while ours.num_steps < num_steps:
            ours.renew_gradients()
            replay()
        assert_same(ours, eager)

    def allocates(self, *, capturable: bool) -> None:
        """A step allocates what the planner says, and the host does not wait."""
        planned = {"capturable": True} if capturable else {}
        ours = self.train(torch.bfloat16, 2, **planned)
        assert self._cuda.peak_bytes(ours.optimizer.step) == self.subject.peak_bytes(**planned)

    def counts_on_the_device(self, *, num_steps: int = 50) -> None:
        """Counters there give the same steps."""
        ours, theirs = (self.train(torch.float32, num_steps, capturable=where) for where in (True, False))
        for a, b in zip(ours.parameters, theirs.parameters, strict=True):
            torch.testing.assert_close(a, b, rtol=2e-6, atol=1e-6)
        self.agree_on_exact_state(ours, theirs)

    def scales_on_the_device(self) -> None:
        """A scale there is a scale on the host."""
        device = self._where["device"]
        one, other = (
            Training(self.subject, torch.float32, **self._where).run(3, grad_scale=scale).results()
            for scale in (torch.tensor(0.5, device=device), 0.5)
        )
        for name, value in one.items():
            # The step's numbers may be computed there too, to the last bit or two of fp32.
            torch.testing.assert_close(value, other[name], rtol=1e-6, atol=1e-7, msg=lambda m, n=name: f"{n}: {m}")
        unscaled = self.train(torch.float32, 3).results()
        assert not all(torch.equal(one[name], unscaled[name]) for name in one), "the scale changes nothing"

    def follows_gradients_that_move(self) -> None:
        """New gradients in other places give the steps of gradients in one place."""
        ours, kept = self.train(torch.float32, 1), []
        for _ in range(3):
            kept.append([p.grad for p in ours.parameters])
            for p in ours.parameters:
                p.grad = None
            ours.run(1)
        assert_same(ours, self.train(torch.float32, 4))

    def stays_near_float64(self, num_steps: int) -> None:
        """Steps in fp32 are those of the reference in float64 but for the rounding of each."""
        ours = self.train(torch.float32, num_steps)
        exact = self.train(torch.float64, num_steps, backend="torch")
        for place, (a, b) in enumerate(zip(ours.parameters, exact.parameters, strict=True)):
            error = (a.detach().double() - b.detach()).abs()
            # A rounding of fp32 is 6e-8 of the parameter's size, which is up to 4.
            assert not error.numel() or error.max().item() <= 2e-7 * (4 + num_steps), f"parameter {place}"
            found, expected = (o.optimizer.state[p]["exp_avg_sq"].double() for o, p in ((ours, a), (exact, b)))
            torch.testing.assert_close(found, expected, rtol=4e-6, atol=0)

    def equals_the_reference(self, dtype: torch.dtype, **options: Any) -> None:
        """Kernels and reference agree."""
        num_steps = self.subject.agreement.num_steps
        ours, theirs = (self.train(dtype, num_steps, **options, **more) for more in ({}, {"backend": "torch"}))
        self.agree(ours, theirs, dtype)

    def agree(self, ours: Training, theirs: Training, dtype: torch.dtype) -> None:
        """Both trainings came to the same, but for what a last bit may decide."""
        self.agree_on_exact_state(ours, theirs)
        agreement, unit, narrow = self.subject.agreement, torch.finfo(dtype).eps, dtype != torch.float32
        relative, absolute = agreement.relative[narrow] * unit, max(agreement.absolute * unit, 1e-7)
        for a, b in zip(ours.parameters, theirs.parameters, strict=True):
            assert a.isfinite().all()
            torch.testing.assert_close(a, b, rtol=relative, atol=absolute)
            assert not narrow or not a.numel() or (a != b).double().mean() <= agreement.flipped

    def compiles_once(self, *, num_steps: int = 20) -> None:
        """New numbers do not compile another kernel."""
        ours = self.train(torch.bfloat16, 1)
        count = self._cuda.num_compiled()
        for step in range(num_steps):
            ours.optimizer.param_groups[0].update(lr=1.0 + step, **self.subject.numbers)
            ours.optimizer.step()
        assert self._cuda.num_compiled() == count

    def agree_on_exact_state(self, ours: Training, theirs: Training) -> None:
        """What of the state is to be equal bit by bit is."""
        exact = self.subject.agreement.exact if self.subject.agreement else ()
        for a, b in zip(ours.parameters, theirs.parameters, strict=True):
            for name in exact:
                assert torch.equal(ours.optimizer.state[a][name], theirs.optimizer.state[b][name]), name
