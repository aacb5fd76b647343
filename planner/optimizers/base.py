"""What every optimizer model answers: the state it keeps, what `step()` allocates, the bytes it moves."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any, ClassVar

import msgspec

from optplan.planner.dtypes import ITEMSIZE_BYTES, Dtype
from optplan.planner.tensors import Parameter, StateTensor
from optplan.planner.timeline import TimelineBuilder


class OptimizerContext(msgspec.Struct, frozen=True):
    """The dtypes an optimizer meets: those of the tensors handed to it, and the state dtype asked for.

    Attributes:
        parameter_dtype: Dtype of the parameters that the optimizer updates (of the fp32 master weights, if any).
        gradient_dtype: Dtype of the gradients it reads.
        state_dtype: Dtype asked for with `--state-dtype`, or None for the optimizer's own choice.
    """

    parameter_dtype: Dtype
    gradient_dtype: Dtype
    state_dtype: Dtype | None = None


class OptimizerModel(ABC):
    """Memory model of one optimizer in one implementation with its options filled in.

    Subclasses are frozen records of options: two equal models answer the same. `parameters` given to the methods never
    include tied aliases.
    """

    id: ClassVar[str]
    implementation: str
    options: dict[str, Any]

    @abstractmethod
    def state(self, parameter: Parameter, context: OptimizerContext) -> tuple[StateTensor, ...]:
        """Tensors kept between steps for one parameter, in the order they are created."""

    def shared_state(self, parameters: Sequence[Parameter], context: OptimizerContext) -> tuple[StateTensor, ...]:
        """Tensors kept once per optimizer, such as quantization maps."""
        del parameters, context
        return ()

    @abstractmethod
    def write_step(self, timeline: TimelineBuilder, parameters: Sequence[Parameter], context: OptimizerContext) -> None:
        """Append what one steady `step()` allocates and frees (state already exists) to `timeline`.

        Every allocation has the category `optimizer_temporaries` and a name that says what it is and for which tensor.
        """

    @abstractmethod
    def moved_bytes(self, parameter: Parameter, context: OptimizerContext) -> int:
        """Bytes that a step must at least read and write in device memory for one parameter (its roofline floor)."""

    @property
    def unsupported_reason(self) -> str | None:
        """Why this optimizer cannot run as configured, or None; set by implementations with hard limits."""
        return None


def itemsize(dtype: str) -> int:
    """Bytes of one element of `dtype`."""
    return ITEMSIZE_BYTES[dtype]
