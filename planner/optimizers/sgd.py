"""SGD with momentum, as torch implements it.

Source: torch 2.13 `optim/sgd.py`. The momentum buffer is a clone of the first gradient.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from optplan.planner.errors import ConfigError
from optplan.planner.optimizers.base import OptimizerContext, OptimizerModel, itemsize
from optplan.planner.optimizers.options import Option
from optplan.planner.optimizers.parts import like_parameter
from optplan.planner.optimizers.scratch import Scratch
from optplan.planner.tensors import Parameter, StateTensor
from optplan.planner.timeline import TimelineBuilder

OPTIONS = (
    Option("momentum", "number", 0.9, "momentum; 0 keeps no state", low=0, high=1),
    Option("weight_decay", "number", 0.0, "L2 penalty; unless 0 it costs a copy of the gradients if not fused", low=0),
    Option("nesterov", "boolean", False, "Nesterov momentum; costs the for-loop another copy of a gradient"),
)


class _Sgd(OptimizerModel):
    """A momentum buffer like the gradient, or nothing."""

    OPTIONS = OPTIONS

    def __init__(self, id_: str, implementation: str, options: Mapping[str, Any]) -> None:
        super().__init__(id_, implementation, options)
        if options["nesterov"] and not options["momentum"]:
            raise ConfigError("sgd: nesterov=true needs a momentum above 0, got momentum=0")

    def state(self, parameter: Parameter, context: OptimizerContext) -> tuple[StateTensor, ...]:
        """The momentum buffer, if there is momentum."""
        dtype = self.state_dtype(context, own=context.gradient_dtype)
        return (like_parameter("momentum_buffer", parameter, dtype),) if self.options["momentum"] else ()


class FusedSgd(_Sgd):
    """`torch.optim.SGD(fused=True)`: one kernel, no temporaries."""

    def write_step(self, timeline: TimelineBuilder, parameters: Sequence[Parameter], context: OptimizerContext) -> None:
        """Nothing: the kernel works in registers."""
        del timeline, parameters, context


class ForeachSgd(_Sgd):
    """`torch.optim.SGD(foreach=True)`, torch's default on CUDA: weight decay copies all gradients of the group."""

    def write_step(self, timeline: TimelineBuilder, parameters: Sequence[Parameter], context: OptimizerContext) -> None:
        """With weight decay the decayed gradients, all at once."""
        if self.options["weight_decay"]:
            scratch, width = Scratch(timeline), itemsize(context.gradient_dtype)
            scratch.free(*[scratch.alloc(p, ("decayed gradient", p.numel * width)) for p in parameters])


class ForLoopSgd(_Sgd):
    """`torch.optim.SGD(foreach=False)`: tensor by tensor, at most two copies of one gradient."""

    def write_step(self, timeline: TimelineBuilder, parameters: Sequence[Parameter], context: OptimizerContext) -> None:
        """The decayed gradient and the Nesterov gradient of one tensor."""
        scratch, width = Scratch(timeline), itemsize(context.gradient_dtype)
        for p in parameters:
            size = p.numel * width
            scratch.drop("grad")
            if self.options["weight_decay"]:
                scratch.assign("grad", p, ("decayed gradient", size))
            if self.options["nesterov"]:
                scratch.bind("grad", scratch.alloc(p, ("Nesterov gradient", size)))
            elif self.options["momentum"]:
                scratch.drop("grad")
        scratch.close()
