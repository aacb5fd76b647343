"""AdamW: torch's three implementations and our own kernel.

Source: torch 2.13 `optim/adam.py` and `optim/adamw.py`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

from optplan.planner.dtypes import Dtype
from optplan.planner.optimizers.base import OptimizerContext, OptimizerModel, itemsize
from optplan.planner.optimizers.launch import write_launch_table
from optplan.planner.optimizers.options import Option
from optplan.planner.optimizers.parts import like_parameter, step_counter
from optplan.planner.optimizers.scratch import Scratch
from optplan.planner.tensors import Device, Parameter, StateTensor
from optplan.planner.timeline import TimelineBuilder

AMSGRAD = Option("amsgrad", "boolean", False, "keep the largest second moment seen: one more state tensor")


class _AdamW(OptimizerModel):
    """Two moments like the parameter and a step counter; a third with `amsgrad`."""

    OPTIONS: ClassVar[tuple[Option, ...]] = (AMSGRAD,)
    step_device: ClassVar[Device] = "cpu"

    def state(self, parameter: Parameter, context: OptimizerContext) -> tuple[StateTensor, ...]:
        """Step counter and moments, the second one's maximum with `amsgrad`."""
        dtype = self.state_dtype(context)
        names = ["exp_avg", "exp_avg_sq"] + ["max_exp_avg_sq"] * bool(self.options.get("amsgrad"))
        return (step_counter(self.step_device), *(like_parameter(name, parameter, dtype) for name in names))

    @property
    def _second_moment(self) -> str:
        return "max_exp_avg_sq" if self.options.get("amsgrad") else "exp_avg_sq"


class FusedAdamW(_AdamW):
    """`torch.optim.AdamW(fused=True)`: one kernel, no temporaries, the step counters on the device."""

    step_device = "device"

    def write_step(self, timeline: TimelineBuilder, parameters: Sequence[Parameter], context: OptimizerContext) -> None:
        """Nothing: the kernel works in registers."""
        del timeline, parameters, context


class ForeachAdamW(_AdamW):
    """`torch.optim.AdamW(foreach=True)`, torch's default on CUDA: the square roots of the whole group at once."""

    def write_step(self, timeline: TimelineBuilder, parameters: Sequence[Parameter], context: OptimizerContext) -> None:
        """The square roots of the second moments, all at once."""
        scratch, width = Scratch(timeline), itemsize(self.state_dtype(context))
        root = f"square root of {self._second_moment}"
        scratch.free(*[scratch.alloc(p, (root, p.numel * width)) for p in parameters])


class ForLoopAdamW(_AdamW):
    """`torch.optim.AdamW(foreach=False)`: tensor by tensor; the last denominator lives on into the next turn."""

    def write_step(self, timeline: TimelineBuilder, parameters: Sequence[Parameter], context: OptimizerContext) -> None:
        """Square root and denominator of one tensor, beside the denominator of the last."""
        scratch, width = Scratch(timeline), itemsize(self.state_dtype(context))
        for p in parameters:
            size = p.numel * width
            scratch.assign("denom", p, (f"square root of {self._second_moment}", size), ("denominator", size))
        scratch.close()


class OptplanAdamW(_AdamW):
    """Our AdamW: one launch for all tensors, moments in any float dtype, the step counters on the host."""

    OPTIONS = (
        Option(
            "rounding", "text", "nearest",
            "how results are stored in bf16; kahan keeps what rounding took off in one more state tensor",
            choices=("nearest", "stochastic", "kahan"),
        ),
        Option("capturable", "boolean", False, "step counters on the device, for CUDA graphs"),
    )  # fmt: skip
    STATE_DTYPES: ClassVar[tuple[Dtype, ...]] = ("float32", "bfloat16")

    def state(self, parameter: Parameter, context: OptimizerContext) -> tuple[StateTensor, ...]:
        """Step counter and moments; what rounding took off, in the parameter's dtype, with `rounding=kahan`."""
        step, *moments = super().state(parameter, context)
        step = step_counter("device") if self.options["capturable"] else step
        kept = [like_parameter("compensation", parameter, context.parameter_dtype)] * self._is_kahan
        return (step, *moments, *kept)

    def write_step(self, timeline: TimelineBuilder, parameters: Sequence[Parameter], context: OptimizerContext) -> None:
        """The launch table."""
        del context
        num_lists = 4 + self._is_kahan + self.options["capturable"]
        Scratch(timeline).free(write_launch_table(timeline, parameters, num_lists=num_lists))

    @property
    def _is_kahan(self) -> bool:
        return bool(self.options["rounding"] == "kahan")
