"""What every optimizer model answers: the state it keeps, what `step()` allocates, the bytes it moves."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Self

import msgspec

from optplan.planner.dtypes import ITEMSIZE_BYTES, Dtype
from optplan.planner.errors import ConfigError
from optplan.planner.optimizers.options import Option
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

    Build it with `build_optimizer`, then `bind` it to the model's parameters. `parameters` given to the methods form
    one param group and never include tied aliases.

    Attributes:
        OPTIONS: What `--set` may say for this implementation.
        STATE_DTYPES: State dtypes a user may ask for; empty if the implementation takes no such wish.
        id: Name in the registry.
        implementation: One of the registry's implementations of `id`.
        options: Every option with its value.
    """

    OPTIONS: ClassVar[tuple[Option, ...]] = ()
    STATE_DTYPES: ClassVar[tuple[Dtype, ...]] = ()

    def __init__(self, id_: str, implementation: str, options: Mapping[str, Any]) -> None:
        self.id = id_
        self.implementation = implementation
        self.options: dict[str, Any] = dict(options)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, OptimizerModel) and self._key() == other._key()

    def __hash__(self) -> int:
        return hash(self._key())

    def __repr__(self) -> str:
        settings = "".join(f", {key}={value!r}" for key, value in self.options.items())
        return f"{type(self).__name__}({self.id!r}, implementation={self.implementation!r}{settings})"

    def _key(self) -> tuple[Any, ...]:
        return (self.id, self.implementation, *sorted(self.options.items()))

    def bind(self, parameters: Sequence[Parameter]) -> Self:
        """The same optimizer with the options that follow from the model filled in (most have none)."""
        del parameters
        return self

    def variants(self) -> dict[str, OptimizerModel]:
        """The same optimizer at the ends of a range that its state may span, by what each end means; most have none."""
        return {}

    @abstractmethod
    def state(self, parameter: Parameter, context: OptimizerContext) -> tuple[StateTensor, ...]:
        """Tensors kept between steps for one parameter, in the order they are created.

        Raises:
            ConfigError: `context.state_dtype` asks for what this implementation cannot do.
        """

    def shared_state(self, parameters: Sequence[Parameter], context: OptimizerContext) -> tuple[StateTensor, ...]:
        """Tensors kept once per optimizer, such as quantization maps."""
        del parameters, context
        return ()

    @abstractmethod
    def write_step(self, timeline: TimelineBuilder, parameters: Sequence[Parameter], context: OptimizerContext) -> None:
        """Append what one steady `step()` allocates and frees on the device (state already exists) to `timeline`.

        Every allocation has the category `optimizer_temporaries` and a name that says what it is and for which tensor;
        scratch that only CUDA kernels take begins with `CUDA` or `cuSOLVER`. The workspace of cuBLAS is not among them:
        it outlives the step, and forward and backward need it anyway.
        """

    def moved_bytes(self, parameter: Parameter, context: OptimizerContext) -> int:
        """Bytes that a step must at least read and write in device memory for one parameter (its roofline floor).

        Unless an optimizer needs more passes: gradient read, parameter and state each read and written once.
        """
        state_bytes = sum(t.num_bytes for t in self.state(parameter, context) if t.device != "cpu")
        width = itemsize(context.gradient_dtype) + 2 * itemsize(context.parameter_dtype)
        return parameter.numel * width + 2 * state_bytes

    def unsupported_reason(self, parameters: Sequence[Parameter], context: OptimizerContext) -> str | None:
        """Why this implementation fails on these parameters, in one sentence, or None if it runs."""
        del parameters, context
        return None

    def state_dtype(self, context: OptimizerContext, *, own: Dtype | None = None) -> Dtype:
        """Dtype of the moments: the one asked for, else `own` (by default the parameters' dtype).

        Raises:
            ConfigError: Another dtype is asked for than this implementation can keep.
        """
        own = own or context.parameter_dtype
        wish = context.state_dtype
        if wish is None or wish == own or wish in self.STATE_DTYPES:
            return wish or own
        can = " or ".join(dict.fromkeys((own, *self.STATE_DTYPES)))
        message = f"{self.id} with implementation={self.implementation} keeps its state in {can}, got {wish}"
        if not self.STATE_DTYPES:
            message += "; a state dtype can be chosen for adamw, adam-mini and adapprox with implementation=optplan"
        raise ConfigError(message)


def itemsize(dtype: str) -> int:
    """Bytes of one element of `dtype`."""
    return ITEMSIZE_BYTES[dtype]
