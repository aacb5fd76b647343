"""AdamW with 8-bit, 4-bit and fp8 state, as torchao implements it.

A moment is a tensor subclass of codes, one fp32 scale a block and, except for fp8, a lookup table of its own. Tensors
under 4096 elements, and those that the block does not divide, keep both moments in the parameter's dtype.

Source: torchao 0.18 `optim/adam.py`, `subclass_8bit.py`, `subclass_4bit.py`, `subclass_fp8.py`. The update is compiled;
the buffers it allocates are those of torch 2.11 (Triton 3.6) on an H200: the compiler does not keep everything in
registers, because a block's scale must be known before its codes.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

from optplan.planner.dtypes import Dtype
from optplan.planner.optimizers.base import OptimizerContext, OptimizerModel
from optplan.planner.optimizers.options import Option
from optplan.planner.optimizers.parts import like_parameter, step_counter, tensor
from optplan.planner.optimizers.scratch import Part, Scratch
from optplan.planner.tensors import Parameter, StateTensor
from optplan.planner.timeline import TimelineBuilder

MIN_QUANTIZED_NUMEL = 4096
"""Elements from which a tensor may be quantized."""

_MOMENTS = ("exp_avg", "exp_avg_sq")


def _block_option(default: int) -> Option:
    return Option("block_size", "integer", default, "elements that share a scale", low=2, high=2**20)


class _QuantizedAdamW(OptimizerModel):
    """Two block-quantized moments and a step counter on the host."""

    code_dtype: ClassVar[Dtype] = "uint8"
    codes_per_byte: ClassVar[int] = 1
    map_numel: ClassVar[int] = 0
    buffers: ClassVar[tuple[Part, ...]] = ()
    """What the compiled update allocates for each moment beside its scales, and the bytes an element."""

    def state(self, parameter: Parameter, context: OptimizerContext) -> tuple[StateTensor, ...]:
        """Step counter and both moments: codes, scales and lookup table, or dense."""
        self.state_dtype(context, own=self.code_dtype)
        if not self._is_quantized(parameter):
            dtype = context.parameter_dtype
            moments = [like_parameter(name, parameter, dtype, why="not quantized") for name in _MOMENTS]
        else:
            moments = [part for name in _MOMENTS for part in self._quantized(name, parameter)]
        return (step_counter("cpu"), *moments)

    def _is_quantized(self, parameter: Parameter) -> bool:
        return parameter.numel >= MIN_QUANTIZED_NUMEL and parameter.numel % self.options["block_size"] == 0

    def _quantized(self, name: str, parameter: Parameter) -> tuple[StateTensor, ...]:
        block = self.options["block_size"]
        packed = (parameter.numel // self.codes_per_byte,)
        codes = tensor(f"{name}.codes", parameter.shape if self.codes_per_byte == 1 else packed, self.code_dtype)
        why = f"one for every {block} elements"
        scales = tensor(f"{name}.scale", (parameter.numel // block,), "float32", why=why)
        table = tensor(f"{name}.qmap", (self.map_numel,), "float32", why="lookup table")
        return (codes, scales, table) if self.map_numel else (codes, scales)

    def write_step(self, timeline: TimelineBuilder, parameters: Sequence[Parameter], context: OptimizerContext) -> None:
        """New scales and the codes before they are packed, for both moments of one tensor at a time."""
        del context
        scratch = Scratch(timeline)
        for p in filter(self._is_quantized, parameters):
            scales = ("new scales", p.numel // self.options["block_size"] * 4)
            parts = [scales, *((what, p.numel * width) for what, width in self._buffers_of(p))]
            scratch.free(*[scratch.alloc(p, part) for part in parts for _ in _MOMENTS])

    def _buffers_of(self, parameter: Parameter) -> tuple[Part, ...]:
        """Those of `buffers` that the update of a parameter needs."""
        del parameter
        return self.buffers


class AdamW8bit(_QuantizedAdamW):
    """`torchao.optim.AdamW8bit`."""

    OPTIONS = (_block_option(256),)
    map_numel = 256
    buffers = (("32-bit codes", 4),)


class AdamW4bit(_QuantizedAdamW):
    """`torchao.optim.AdamW4bit`: two codes a byte."""

    OPTIONS = (_block_option(128),)
    codes_per_byte = 2
    map_numel = 16
    buffers = (("scaled moment", 4), ("64-bit codes", 8))


class AdamWFp8(_QuantizedAdamW):
    """`torchao.optim.AdamWFp8`: e4m3 codes, no lookup table."""

    OPTIONS = (_block_option(256),)
    code_dtype = "float8_e4m3fn"
    buffers = (("fp8 codes", 1),)

    def _buffers_of(self, parameter: Parameter) -> tuple[Part, ...]:
        """The codes, unless rows and blocks do not fit each other: then the compiler writes them to the state."""
        row, block = parameter.shape[-1], self.options["block_size"]
        return () if row % block and block % row else self.buffers
