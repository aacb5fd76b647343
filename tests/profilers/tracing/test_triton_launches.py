"""Modules with Triton kernels of their own, traced: no kernel runs, and what Python allocates around them counts."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from optplan.planner.step.options import StepOptions
from optplan.planner.timeline import Allocation
from optplan.profilers.tracing.trace import TracedStep
from optplan.profilers.tracing.triton_launches import without_launches
from optplan.profilers.workloads.subject import Subject

triton = pytest.importorskip("triton")
tl = triton.language

OPTIONS = StepOptions(batch_size=4, seq_len=1, precision="fp32")


@triton.jit
def double_kernel(x_ptr, out_ptr, block: tl.constexpr):
    at = tl.program_id(0) * block + tl.arange(0, block)
    tl.store(out_ptr + at, 2 * tl.load(x_ptr + at))


autotuned_kernel = triton.autotune([triton.Config({"block": size}) for size in (16, 32)], key=[])(double_kernel)
heuristic_kernel = triton.heuristics({"block": lambda _: 16})(double_kernel)

LAUNCHES = {
    "jitted": lambda x, out: double_kernel[(2,)](x, out, block=16),
    "autotuned": lambda x, out: autotuned_kernel[lambda meta: (32 // meta["block"],)](x, out),
    "heuristic": lambda x, out: heuristic_kernel[(2,)](x, out),
    "without brackets": lambda x, out: double_kernel.run(x, out, block=16, grid=(2,), warmup=False),
}


class Doubled(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, launch):
        ctx.launch = launch
        scratch = torch.empty(64, device=x.device)
        out = torch.empty_like(x)
        launch(x, out)
        del scratch
        return out

    @staticmethod
    def backward(ctx, gradient):
        out = torch.empty_like(gradient)
        ctx.launch(gradient, out)
        return out, None


class Model(nn.Module):
    def __init__(self, launch):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(4, 8, device="meta"))
        self.launch = launch

    def forward(self, x):
        return Doubled.apply(x * self.weight, self.launch).sum()


@pytest.mark.parametrize("how", LAUNCHES)
def test_a_module_with_a_kernel_is_traced(how):
    subject = Subject(Model(LAUNCHES[how]), {"x": torch.empty(4, 8, device="meta")})
    step = TracedStep(subject, OPTIONS).pieces.steady[-1]
    made = [(e.bytes, e.phase) for e in step if isinstance(e, Allocation)]
    # x * weight, scratch, result, the sum; its gradient, expanded without memory, then what the kernel writes, and the
    # product with x, which is the weight's gradient.
    assert made == [
        *[(size, "forward") for size in (128, 256, 128, 4)],
        *[(size, "backward") for size in (4, 128, 128)],
    ]


@pytest.mark.parametrize("kind", [type(double_kernel), type(autotuned_kernel), type(heuristic_kernel)])
def test_kernels_run_again_afterwards(kind):
    before = kind.run
    with pytest.raises(ZeroDivisionError), without_launches():
        assert kind.run is not before
        raise ZeroDivisionError
    assert kind.run is before
