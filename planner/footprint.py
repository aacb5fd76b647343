"""What an optimizer keeps for a whole model: the state of every parameter, summed by name and rounded."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from functools import cache, cached_property

import msgspec

from optplan.planner.allocator.caching import ROUNDING
from optplan.planner.optimizers.base import OptimizerContext, OptimizerModel
from optplan.planner.tensors import Parameter, StateTensor
from optplan.planner.units import round_up

_LAYER_NUMBER = re.compile(r"(?<=\.)\d+(?=\.|$)")


class ParameterState(msgspec.Struct, frozen=True):
    """State of all parameters that differ only in the layer they belong to.

    Attributes:
        pattern: Name of the parameters with `*` for the layer number.
        parameters: The parameters.
        tensors: State tensors that each of them has.
    """

    pattern: str
    parameters: tuple[Parameter, ...]
    tensors: tuple[StateTensor, ...]


class Footprint(msgspec.Struct, frozen=True, dict=True):
    """State of an optimizer over a whole model.

    Attributes:
        groups: State by parameter pattern, in the order of the model's parameters.
        shared: Tensors kept once per optimizer.
    """

    groups: tuple[ParameterState, ...]
    shared: tuple[StateTensor, ...]

    def tensors(self) -> Iterator[tuple[StateTensor, int]]:
        """Every distinct state tensor with the number of times it exists."""
        for group in self.groups:
            yield from ((tensor, len(group.parameters)) for tensor in group.tensors)
        yield from ((tensor, 1) for tensor in self.shared)

    @cached_property
    def bytes_by_name(self) -> dict[str, int]:
        """Unrounded bytes on the device by state name."""
        totals: dict[str, int] = {}
        for tensor, count in self.tensors():
            if tensor.device == "device":
                totals[tensor.name] = totals.get(tensor.name, 0) + count * tensor.num_bytes
        return totals

    @cached_property
    def device_bytes(self) -> int:
        """Unrounded bytes on the device."""
        return sum(self.bytes_by_name.values())

    @cached_property
    def host_bytes(self) -> int:
        """Bytes kept in host memory or in managed memory that the driver may evict to the host."""
        return sum(count * tensor.num_bytes for tensor, count in self.tensors() if tensor.device != "device")

    @cached_property
    def rounded_device_bytes(self) -> int:
        """Bytes that the allocator hands out for the state: each tensor rounded up to 512 bytes."""
        return sum(
            count * round_up(tensor.num_bytes, ROUNDING)
            for tensor, count in self.tensors()
            if tensor.device == "device" and tensor.num_bytes
        )

    def device_sizes(self, parameters: Sequence[Parameter]) -> list[int]:
        """Bytes of each tensor on the device: those kept once first, then those of every parameter in turn."""
        return [tensor.num_bytes for _, tensor in self._on_device(parameters)]

    def device_names(self, parameters: Sequence[Parameter]) -> list[str]:
        """Names of the same tensors: the parameter's and the state's."""
        return [f"{owner} {tensor.name}" for owner, tensor in self._on_device(parameters)]

    def _on_device(self, parameters: Sequence[Parameter]) -> Iterator[tuple[str, StateTensor]]:
        tensors = {member.name: group.tensors for group in self.groups for member in group.parameters}
        shared = (("optimizer", tensor) for tensor in self.shared)
        each = ((parameter.name, tensor) for parameter in parameters for tensor in tensors[parameter.name])
        return ((owner, tensor) for owner, tensor in (*shared, *each) if tensor.device == "device")


@cache
def pattern_of(name: str) -> str:
    """A parameter's name with its layer and expert numbers replaced by `*`."""
    return _LAYER_NUMBER.sub("*", name)


def group_parameters(parameters: Sequence[Parameter]) -> list[tuple[str, tuple[Parameter, ...]]]:
    """The parameters grouped by pattern, shape and role: the members of a group are alike in all but the layer."""
    groups: dict[tuple[object, ...], list[Parameter]] = {}
    for parameter in parameters:
        key = (pattern_of(parameter.name), parameter.shape, parameter.role, parameter.heads)
        groups.setdefault(key, []).append(parameter)
    return [(pattern_of(members[0].name), tuple(members)) for members in groups.values()]


def optimizer_footprint(
    optimizer: OptimizerModel, parameters: Sequence[Parameter], context: OptimizerContext
) -> Footprint:
    """The state that `optimizer` keeps for `parameters` (tied aliases already left out).

    Raises:
        ConfigError: The context asks for a state dtype that the implementation cannot keep.
    """
    groups = tuple(
        ParameterState(pattern, members, optimizer.state(members[0], context))
        for pattern, members in group_parameters(parameters)
    )
    return Footprint(groups, optimizer.shared_state(parameters, context))
