"""Writes the temporaries of a `step()` to a timeline, with the lifetimes that Python's local variables give them."""

from __future__ import annotations

from optplan.planner.tensors import Parameter
from optplan.planner.timeline import TimelineBuilder

Part = tuple[str, int]
"""What a temporary is, and its bytes."""


class Scratch:
    """The temporaries of one `step()`.

    A local variable keeps its tensor until it is bound to another, also into the next parameter's turn: the new tensor
    is allocated while the old one is still alive. So the peak of a loop may hold tensors of two parameters.
    """

    def __init__(self, timeline: TimelineBuilder) -> None:
        self._timeline = timeline
        self._variables: dict[str, tuple[int, ...]] = {}

    def alloc(self, parameter: Parameter | str, part: Part) -> int:
        """Allocate one temporary, to be bound or freed later, and return its id."""
        what, num_bytes = part
        owner = parameter if isinstance(parameter, str) else parameter.name
        return self._timeline.alloc(num_bytes, "optimizer_temporaries", f"{what} of {owner}")

    def free(self, *ids: int) -> None:
        """Free temporaries in the order given."""
        self._timeline.free(*ids)

    def chain(self, parameter: Parameter | str, *parts: Part) -> int:
        """Evaluate an expression: each intermediate dies when the next exists; return the id of the last."""
        last = self.alloc(parameter, parts[0])
        for part in parts[1:]:
            previous, last = last, self.alloc(parameter, part)
            self.free(previous)
        return last

    def bind(self, variable: str, *ids: int) -> None:
        """Give `variable` a tensor, or a list of them; what it held dies."""
        self.drop(variable)
        self._variables[variable] = ids

    def release(self, variable: str) -> None:
        """Forget a variable whose tensor lives on under another name."""
        self._variables.pop(variable)

    def assign(self, variable: str, parameter: Parameter | str, *parts: Part) -> None:
        """Evaluate an expression and bind its value to `variable`."""
        self.bind(variable, self.chain(parameter, *parts))

    def passing(self, parameter: Parameter | str, *parts: Part) -> None:
        """Evaluate an expression whose value is used at once and kept by nobody."""
        self.free(self.chain(parameter, *parts))

    def drop(self, *variables: str) -> None:
        """Unbind variables; what they held dies."""
        for name in variables:
            self.free(*self._variables.pop(name, ()))

    def close(self) -> None:
        """End the function: every variable's tensor dies."""
        self.drop(*list(self._variables))
