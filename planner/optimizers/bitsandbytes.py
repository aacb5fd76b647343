"""AdamW with block-wise 8-bit state, as bitsandbytes implements it, in device memory or paged.

Each moment keeps one byte an element and one fp32 scale for every 256 elements; two lookup tables serve all tensors.
Tensors with fewer than `min_8bit_size` elements keep fp32 moments, whatever the parameters' dtype.

Source: bitsandbytes 0.50.2 `optim/optimizer.py`; transformers 5.23 `trainer.py` for the embeddings under its Trainer.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

from optplan.planner.dtypes import Dtype
from optplan.planner.optimizers.base import OptimizerContext, OptimizerModel
from optplan.planner.optimizers.options import Option
from optplan.planner.optimizers.parts import tensor
from optplan.planner.tensors import Device, Parameter, StateTensor
from optplan.planner.timeline import TimelineBuilder

BLOCK_NUMEL = 256
"""Elements that share a scale; not a choice since the block-wise kernels replaced the others."""

PAGED_MIN_NUMEL = 100_000
"""Elements from which a paged optimizer keeps a moment in managed memory."""

_MAP_NUMEL = 256


class AdamW8bit(OptimizerModel):
    """`bitsandbytes.optim.AdamW8bit`."""

    OPTIONS = (
        Option("min_8bit_size", "integer", 4096, "elements from which a tensor's state is kept in 8 bits", low=0),
        Option(
            "hf_embeddings_32bit", "boolean", False, "fp32 state for embeddings, as the Hugging Face Trainer arranges"
        ),
    )
    is_paged: ClassVar[bool] = False

    def state(self, parameter: Parameter, context: OptimizerContext) -> tuple[StateTensor, ...]:
        """Two moments of one byte an element with their scales, or two fp32 moments."""
        dtype = self._moment_dtype(parameter, context)
        is_quantized = dtype == "uint8"
        paged = self.is_paged and parameter.numel >= PAGED_MIN_NUMEL
        device: Device = "managed" if paged else "device"
        moments = [tensor(name, parameter.shape, dtype, device=device) for name in ("state1", "state2")]
        num_blocks = -(-parameter.numel // BLOCK_NUMEL)
        why = f"one for every {BLOCK_NUMEL} elements"
        scales = [tensor(name, (num_blocks,), "float32", why=why) for name in ("absmax1", "absmax2")]
        return (*moments, *(scales if is_quantized else ()))

    def shared_state(self, parameters: Sequence[Parameter], context: OptimizerContext) -> tuple[StateTensor, ...]:
        """The lookup tables, if any tensor is quantized."""
        if not any(self._moment_dtype(p, context) == "uint8" for p in parameters):
            return ()
        return tuple(tensor(name, (_MAP_NUMEL,), "float32", why="shared") for name in ("qmap1", "qmap2"))

    def _moment_dtype(self, parameter: Parameter, context: OptimizerContext) -> Dtype:
        self.state_dtype(context, own="uint8")
        keeps_fp32 = parameter.numel < self.options["min_8bit_size"] or (
            self.options["hf_embeddings_32bit"] and parameter.module == "embedding"
        )
        return "float32" if keeps_fp32 else "uint8"

    def write_step(self, timeline: TimelineBuilder, parameters: Sequence[Parameter], context: OptimizerContext) -> None:
        """Nothing: one kernel a tensor, in place."""
        del timeline, parameters, context


class PagedAdamW8bit(AdamW8bit):
    """`bitsandbytes.optim.PagedAdamW8bit`: large moments in managed memory, which the driver may evict to the host.

    The scales stay on the device: they are the least that must be resident. While a tensor is updated its moments are
    on the device too.
    """

    is_paged = True
