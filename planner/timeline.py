"""The step timeline: the ordered allocations and frees of one training step."""

from __future__ import annotations

from typing import Literal

import msgspec

Phase = Literal["load", "forward", "backward", "clip", "step", "zero"]
Category = Literal[
    "parameters",
    "gradients",
    "master_weights",
    "optimizer_state",
    "optimizer_temporaries",
    "activations",
    "logits_and_loss",
    "communication",
    "workspace",
    "unexplained",
]
"""What memory is for; `unexplained` occurs in measurements alone, where no owner was found."""


class Allocation(msgspec.Struct, frozen=True, gc=False):
    """One request to the allocator.

    Attributes:
        id: Number that the matching `Free` names.
        bytes: Bytes requested, before the allocator rounds.
        category: What the memory is for.
        name: What made it: a parameter's name, a module path and operation.
        phase: Phase of the step in which it is made.
        itemsize: Bytes of one element where it is a tensor, 1 where it is scratch.
        stream: Stream that it is made on; the allocator keeps a cache for each. 0 is the one that computes.
    """

    id: int
    bytes: int
    category: Category
    name: str
    phase: Phase
    itemsize: int = 1
    stream: int = 0


class Free(msgspec.Struct, frozen=True, gc=False):
    """The end of the allocation with the same id; it happens in `phase`."""

    id: int
    phase: Phase


Event = Allocation | Free
Timeline = list[Event]


class TimelineBuilder:
    """Writes a timeline: hands out ids, remembers the phase."""

    def __init__(self, phase: Phase = "load") -> None:
        self.events: Timeline = []
        self.phase: Phase = phase
        self._next_id = 0

    def alloc(self, num_bytes: int, category: Category, name: str, *, itemsize: int = 1, stream: int = 0) -> int:
        """Append an allocation and return its id; zero bytes are allocated like any other (a rounding of 0)."""
        self._next_id += 1
        self.events.append(Allocation(self._next_id, num_bytes, category, name, self.phase, itemsize, stream))
        return self._next_id

    def free(self, *ids: int) -> None:
        """Append the ends of allocations, in the order given."""
        self.events.extend(Free(id_, self.phase) for id_ in ids)
