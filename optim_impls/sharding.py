"""Parameters whose rows are dealt out to ranks, as FSDP2's `fully_shard` does: who has which rows, and whole tensors.

A parameter of n rows on W ranks lies ceil(n / W) rows to a rank, in order: the last rank may hold fewer, or none. A
second mesh dimension may repeat the same shards (hybrid sharding). Everything else that a DTensor can be, such as
columns on different ranks, is refused.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from optplan.optim_impls.fingerprint import local_tensor
from optplan.optim_impls.optimizer_base import Batch, Member, Part

_ALIGNED_NUMEL = 16
"""Gathered tensors begin at multiples of it, so that kernels may load whole vectors."""


@dataclass(frozen=True)
class RowShards:
    """How the rows of one parameter are dealt out.

    Attributes:
        shape: Of the whole parameter.
        mesh: The parameter's device mesh.
        placements: Its placements on each mesh dimension.
        axis: The mesh dimension that deals out rows.
    """

    shape: tuple[int, ...]
    mesh: Any
    placements: tuple[Any, ...]
    axis: int

    @property
    def num_ranks(self) -> int:
        """Ranks that hold different rows."""
        return int(self.mesh.size(self.axis))

    @property
    def rank(self) -> int:
        """This process's place among them."""
        return int(self.mesh.get_local_rank(self.axis))

    @property
    def group(self) -> Any:
        """The process group of the ranks."""
        return self.mesh.get_group(self.axis)

    @property
    def numel(self) -> int:
        """Elements of the whole parameter."""
        return math.prod(self.shape)

    @property
    def columns(self) -> int:
        """Elements of a row."""
        return math.prod(self.shape[1:])

    @property
    def rows_per_rank(self) -> int:
        """Rows of a rank; the last ones may hold fewer."""
        return -(-self.shape[0] // self.num_ranks)

    @property
    def equal(self) -> bool:
        """Whether every rank holds as many rows."""
        return self.shape[0] % self.num_ranks == 0

    @property
    def elements(self) -> slice:
        """This rank's elements of the flattened parameter."""
        width = self.rows_per_rank * self.columns
        return slice(min(self.rank * width, self.numel), min((self.rank + 1) * width, self.numel))

    @property
    def rows(self) -> slice:
        """This rank's rows."""
        first = self.rank * self.rows_per_rank
        return slice(min(first, self.shape[0]), min(first + self.rows_per_rank, self.shape[0]))

    def join(self, local: torch.Tensor, rows: int) -> torch.Tensor:
        """A DTensor of `rows` rows in all from each rank's own, dealt out as the parameter's are."""
        # A build of torch without distributed training can run everything else.
        from torch.distributed.tensor import DTensor

        whole = torch.empty((rows, *local.shape[1:]), device="meta")
        return DTensor.from_local(
            local, self.mesh, self.placements, run_check=False, shape=whole.shape, stride=whole.stride()
        )


def row_shards(parameter: torch.Tensor, *, optimizer: str = "the optimizer") -> RowShards | None:
    """How the rows of a parameter are dealt out; None where every rank holds the whole of it.

    Raises:
        ValueError: It is divided in another way.
    """
    placements = getattr(parameter, "placements", None)
    if placements is None or all(p.is_replicate() for p in placements):
        return None
    axes = [axis for axis, placement in enumerate(placements) if not placement.is_replicate()]
    # Strided shards, of tensor parallelism under FSDP2, are a class of their own.
    if len(axes) != 1 or type(placements[axes[0]]).__name__ != "Shard" or placements[axes[0]].dim != 0:
        raise ValueError(
            f"{optimizer} takes DTensors whose dimension 0 is sharded over one mesh dimension, "
            f"got placements {tuple(placements)} for shape {tuple(parameter.shape)}"
        )
    mesh: Any = parameter.device_mesh  # type: ignore[attr-defined]
    return RowShards(tuple(parameter.shape), mesh, tuple(placements), axes[0])


def divide_apart(
    parts: Sequence[Part],
    steps: Sequence[float],
    *,
    apart: Callable[[Part], bool],
    divide: Callable[[Sequence[Part], Sequence[float]], list[Batch]],
    new_batch: Callable[[Part, int], Batch],
    kind: Callable[[Part], Any] = lambda _: None,
) -> list[Batch]:
    """Batches of the parts that a rank can step on its own, then those of the parts for which ranks need each other.

    The second kind is divided by what every rank knows alike, so that all meet in the same order; parts of which a rank
    holds nothing take part.

    Args:
        parts: All of a param group.
        steps: Their step counts; empty if the counters are on the device.
        apart: Whether a part is of the second kind.
        divide: Divides the first kind.
        new_batch: An empty batch for the second kind, from its first part and the place of that part.
        kind: What else the members of such a batch have in common.
    """
    places = [place for place, part in enumerate(parts) if not apart(part)]
    batches = divide([parts[place] for place in places], [steps[place] for place in places] if steps else [])
    for batch in batches:
        batch.lead = places[batch.lead]
    shared: dict[tuple[Any, ...], Batch] = {}
    for place in sorted(set(range(len(parts))) - set(places)):
        part = parts[place]
        shards, dtypes = shards_of(part), (part.parameter.dtype, _local_gradient(part).dtype)
        key = (shards.mesh, shards.axis, steps[place] if steps else 0, dtypes, kind(part))
        shared.setdefault(key, new_batch(part, place)).parts.append(part)
    return [*batches, *shared.values()]


class GatheredBatch(Batch):
    """Members whose gradients are gathered from all ranks for a step, in one collective.

    Every rank updates the whole tensors alike and keeps its own rows of the parameters. A step allocates for all
    members together the gradients of the largest shard once and `ranks` times, which are freed when they are sorted
    into the whole gradients; these and the whole parameters live until the step ends.

    Args:
        lead: As for a batch.
        triton: As for a batch.
    """

    def __init__(self, *, lead: int, triton: bool) -> None:
        super().__init__(lead=lead, triton=triton, aligned=True)
        self._own: list[torch.Tensor] = []

    @property
    def members(self) -> list[Member]:
        """The whole tensors; the other ranks' rows of the parameters hold nothing."""
        self.prepare()
        assert self._members is not None
        return self._members

    def prepare(self) -> None:
        """Gather, also for a launch that is kept: it reads where the last step's tensors lay, which are gone.

        Ranks keep launches each for itself, by where its own tensors lie, so that all must meet here at every step.
        """
        if self._members is None:
            self._members = self._gather()

    def release(self) -> None:
        """Store this rank's rows, and let go of everything gathered."""
        if self._members is not None:
            torch._foreach_copy_([local_tensor(part.parameter).view(-1) for part in self.parts], self._own)
        self._own = []
        super().release()

    def _gather(self) -> list[Member]:
        shards = [shards_of(part) for part in self.parts]
        numels = [one.numel for one in shards]
        gradients = gather_whole([_local_gradient(part) for part in self.parts], shards)
        parameters = _pieces(numels, like=local_tensor(self.parts[0].parameter))
        self._own = [whole[one.elements] for whole, one in zip(parameters, shards, strict=True)]
        torch._foreach_copy_(self._own, [local_tensor(part.parameter).view(-1) for part in self.parts])
        self._forget_moved(parameters[0], gradients[0])
        return [
            Member(parameter.view(one.shape), gradient.view(one.shape), part.state, part.ordinal)
            for parameter, gradient, one, part in zip(parameters, gradients, shards, self.parts, strict=True)
        ]

    def _forget_moved(self, *firsts: torch.Tensor) -> None:
        """What was derived from the members holds only while they come to lie where they lay in the last step."""
        places = [first.data_ptr() for first in firsts]
        if self.scratch.get("places") != places:
            self.scratch.clear()
            self.scratch["places"] = places


def gather_whole(local: Sequence[torch.Tensor], shards: Sequence[RowShards]) -> list[torch.Tensor]:
    """The whole tensors, flat, of which each rank has its rows; one collective for all.

    Args:
        local: This rank's rows of each, of one dtype, on one group of ranks.
        shards: How each is dealt out.
    """
    import torch.distributed as dist

    widths = [one.rows_per_rank * one.columns for one in shards]
    ranks = shards[0].num_ranks
    sent = local[0].new_empty(sum(widths))
    filled = [slot[: rows.numel()] for slot, rows in zip(torch.split(sent, widths), local, strict=True)]
    torch._foreach_copy_(filled, [rows.reshape(-1) for rows in local])
    received = sent.new_empty(ranks, sent.numel())
    # torch 2.13 renamed it, and warns at the old name.
    gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
    gather(received.view(-1), sent, group=shards[0].group)
    whole = _pieces([one.numel for one in shards], like=sent)
    targets, sources = [], []
    for tensor, columns, width in zip(whole, torch.split(received, widths, dim=1), widths, strict=True):
        full, rest = divmod(tensor.numel(), max(width, 1))
        targets += [tensor[: full * width].view(full, width), tensor[full * width :]]
        sources += [columns[:full], columns[full, :rest] if rest else sent[:0]]
    torch._foreach_copy_(targets, sources)
    return whole


def shards_of(part: Part) -> RowShards:
    """How the rows of a part's parameter are dealt out; it is known to be sharded."""
    shards = row_shards(part.parameter)
    assert shards is not None
    return shards


def cut_state(state: dict[str, Any], like: dict[str, Any]) -> None:
    """Cut whole tensors of a loaded state to this rank's part, where a new state would be sharded.

    Args:
        state: Of one parameter; changed in place.
        like: A new state of the parameter.

    Raises:
        ValueError: A tensor has neither the shape of the whole nor is it sharded.
    """
    for name, own in like.items():
        value, local = state.get(name), local_tensor(own)
        if local is own or not isinstance(value, torch.Tensor) or local_tensor(value) is not value:
            continue
        if value.shape != own.shape:
            raise ValueError(
                f"state '{name}' of a sharded parameter must be sharded or whole, of shape {tuple(own.shape)}, "
                f"got shape {tuple(value.shape)}"
            )
        shards = row_shards(own)
        rows = slice(None) if shards is None else shards.rows
        # A build of torch without distributed training can run everything else.
        from torch.distributed.tensor import DTensor

        state[name] = DTensor.from_local(
            value[rows].clone(), own.device_mesh, own.placements, run_check=False, shape=own.shape, stride=own.stride()
        )


def _pieces(numels: Sequence[int], *, like: torch.Tensor) -> list[torch.Tensor]:
    """Uninitialised tensors of these sizes within one allocation, each beginning at an aligned place."""
    rooms = [-(-numel // _ALIGNED_NUMEL) * _ALIGNED_NUMEL for numel in numels]
    pieces = torch.split(like.new_empty(sum(rooms)), rooms)
    return [piece[:numel] for piece, numel in zip(pieces, numels, strict=True)]


def _local_gradient(part: Part) -> torch.Tensor:
    gradient = part.parameter.grad
    assert gradient is not None
    return local_tensor(gradient)
