"""FlashAdamW: 8-bit moments and a compressed master weight beside 16-bit parameters, in one fused kernel.

Source: arXiv 2602.23349; flashoptim 0.1.4 `optimizers.py`. State and (absent) temporaries agree with it on an H200.
"""

from __future__ import annotations

from collections.abc import Sequence

from optplan.planner.dtypes import Dtype
from optplan.planner.optimizers.base import OptimizerContext, OptimizerModel, itemsize
from optplan.planner.optimizers.options import Option
from optplan.planner.optimizers.parts import like_parameter, tensor
from optplan.planner.tensors import Parameter, StateTensor
from optplan.planner.timeline import TimelineBuilder

GROUP_NUMEL = 32
"""Elements that share a scale."""

_MASTER_BYTES = {"24bit": 3, "32bit": 4, "none": 0}
_ERROR_DTYPES: dict[int, Dtype] = {1: "int8", 2: "int16"}


class FlashAdamW(OptimizerModel):
    """`flashoptim.FlashAdamW`: int8 and uint8 moments with fp16 scales, and the bits that parameters lack of a master.

    It quantizes tensors of every size. The state names are those of its checkpoints.
    """

    OPTIONS = (
        Option(
            "master", "text", "auto", "bits of the master weight: auto is 24bit for 16-bit parameters, none for fp32",
            choices=("auto", "24bit", "32bit", "none"),
        ),
    )  # fmt: skip

    def state(self, parameter: Parameter, context: OptimizerContext) -> tuple[StateTensor, ...]:
        """Codes and scales of both moments, the error bits if any, the step counter on the host."""
        self.state_dtype(context, own="int8")
        num_groups = -(-parameter.numel // GROUP_NUMEL)
        codes: tuple[tuple[str, Dtype], ...] = (("exp_avg", "int8"), ("exp_avg_sq", "uint8"))
        tensors = []
        for name, dtype in codes:
            tensors.append(tensor(f"{name}::quantized", parameter.shape, dtype))
            why = f"one for every {GROUP_NUMEL} elements"
            tensors.append(tensor(f"{name}::scales", (num_groups,), "float16", why=why))
        num_bytes = self._error_bytes(context)
        if num_bytes:
            tensors.append(like_parameter("error_bits", parameter, _ERROR_DTYPES[num_bytes], why="rest of the master"))
        return (*tensors, tensor("step", (), "int64", device="cpu"))

    def _error_bytes(self, context: OptimizerContext) -> int:
        width, master = itemsize(context.parameter_dtype), self.options["master"]
        if master == "auto":
            return 1 if width == 2 else 0
        return max(0, _MASTER_BYTES[master] - width)

    def unsupported_reason(self, parameters: Sequence[Parameter], context: OptimizerContext) -> str | None:
        """The package refuses a compressed master weight for fp32 parameters."""
        del parameters
        master = self.options["master"]
        if context.parameter_dtype != "float32" or master in ("auto", "none"):
            return None
        return f"flash-adamw with master={master} refuses fp32 parameters, which need no master weight; use master=none"

    def write_step(self, timeline: TimelineBuilder, parameters: Sequence[Parameter], context: OptimizerContext) -> None:
        """Nothing: one fused kernel a tensor, in place."""
        del timeline, parameters, context
