"""Training steps of one rank under DDP or FSDP2, run on tensors without contents and kept in pieces.

Three steps are run, because each of the first two is unlike any later one: FSDP2 makes what it resizes later, DDP makes
its buckets anew in the second, and lets the first one go before it does.

Source: torch `nn/parallel/distributed.py`, `csrc/distributed/c10d/reducer.cpp`,
`distributed/fsdp/_fully_shard/_fully_shard.py`.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import msgspec
import torch
from torch import nn

from optplan.planner.timeline import Allocation, Category, Free, Timeline
from optplan.profilers.group_names import reduced_gradient_names
from optplan.profilers.tracing.runs import NUM_STEPS, Pieces
from optplan.profilers.tracing.sharded_tracer import ShardedTracer
from optplan.profilers.tracing.sharded_world import World
from optplan.profilers.tracing.steps import StepTracer
from optplan.profilers.tracing.tracer import Tracer
from optplan.profilers.workloads.sharded_modules import FULLY_SHARDED, fully_shard_module
from optplan.profilers.workloads.subject import Subject, placed_tensors

_BUCKET = "gradient bucket"

_TRACED_MICRO_STEPS = 3
"""Micro-steps of a step that are run; all further ones are like the third."""


class Sharding(msgspec.Struct, frozen=True, kw_only=True):
    """How a step is divided among ranks.

    Attributes:
        strategy: As `--sharding` takes it.
        num_ranks: Processes, one a GPU.
        rank: The one that is traced.
        views: Whether DDP's gradients are views of its buckets (`gradient_as_bucket_view`).
    """

    strategy: str
    num_ranks: int
    rank: int = 0
    views: bool = True

    @property
    def is_full(self) -> bool:
        """Whether ranks hold rows of parameters, as under FSDP2, and not the whole of them."""
        return self.strategy in FULLY_SHARDED


class StepEnd(NamedTuple):
    """What follows the micro-steps of a step.

    Attributes:
        clip: Clips these gradients; None where nothing is clipped.
        keeps_gradients: Whether the gradients' memory stays.
    """

    clip: Callable[[list[nn.Parameter]], Any] | None
    keeps_gradients: bool


def own_copy(subject: Subject) -> Subject:
    """The subject with a module of its own, which may be changed."""
    names = {id(module): name for name, module in subject.module.named_modules()}
    module = copy.deepcopy(subject.module)
    head = None if subject.head is None else module.get_submodule(names[id(subject.head)])
    return subject._replace(module=module, head=head)


def with_lasting_bucket(pieces: Pieces) -> Pieces | None:
    """The same run where DDP's first bucket lives to the end of the micro-step that replaces it, None without one.

    The communication library holds on to it until a thread of its own has seen that the first reduction is over; of two
    ranks of one run, measured on H200s, one replaced it in its place, the other beside it.

    Source: torch `csrc/distributed/c10d/ProcessGroupNCCL.cpp` (`shelvesToUnstash_`).
    """
    buckets = {event.id for event in pieces.load if isinstance(event, Allocation) and event.name == _BUCKET}
    if not buckets:
        return None
    return pieces._replace(
        first=tuple(_ending_last(micro_step, buckets) for micro_step in pieces.first),
        second=tuple(_ending_last(micro_step, buckets) for micro_step in pieces.second),
    )


def _ending_last(timeline: Timeline, ids: set[int]) -> Timeline:
    """The events with the ends of these allocations put last."""
    ends = [event for event in timeline if isinstance(event, Free) and event.id in ids]
    others = [event for event in timeline if not (isinstance(event, Free) and event.id in ids)]
    return others + [msgspec.structs.replace(event, phase="backward") for event in ends]


class ShardedStepTracer(StepTracer):
    """One rank's subject at work on a simulated device."""

    def __init__(
        self, subject: Subject, *, sharding: Sharding, mixed: bool, updated: Sequence[str], **arguments: Any
    ) -> None:
        """Prepare; nothing is recorded yet.

        Args:
            subject: What is trained; its module is copied first.
            sharding: How the step is divided.
            mixed: Whether shards in fp32 are gathered in bf16.
            updated: Names of the parameters that this rank's optimizer has, in its order.
            arguments: As for a `StepTracer`.
        """
        super().__init__(own_copy(subject), **arguments)
        self.updated = {name: self.updated[name] for name in updated if name in self.updated}
        self.sharding = sharding
        self._mixed = mixed
        self._world = World(self.recorder, num_ranks=sharding.num_ranks, rank=sharding.rank)
        self._wrapped: nn.Module = self.subject.module
        self._parameters: dict[str, nn.Parameter] = {}
        self._groups: list[Any] = []

    def run_steps(self, *, num_micro_steps: int, end: StepEnd) -> Pieces:
        """Place the module, take three steps but for the optimizer, and keep what was recorded."""
        count = min(num_micro_steps, _TRACED_MICRO_STEPS)
        with self._world.running():
            if self.sharding.is_full:
                self._shard()
            with self.tracing():
                load = self.place()
                steps = [self._step(count, end) for _ in range(NUM_STEPS)]
            # The group's end must not find the module's own references to it.
            self._wrapped = self.subject.module
        first, second, steady = (self._repeated(micro_steps, num_micro_steps) for micro_steps, _, _ in steps)
        zeros = [self.timeline(zero) for _, _, zero in steps]
        return Pieces(
            load=self.timeline(load),
            first=first,
            second=second,
            steady=steady,
            clip=self.timeline(steps[-1][1]),
            zero=zeros[-1],
            early_zeros=tuple(zeros[:-1]),
        )

    def _step(self, num_micro_steps: int, end: StepEnd) -> tuple[list[slice], slice, slice]:
        micro_steps = [self.micro_step() for _ in range(num_micro_steps)]
        clip = end.clip
        clipped = self.run("clip", lambda: clip(list(self._clippable()))) if clip is not None else slice(0, 0)
        zero = slice(0, 0) if end.keeps_gradients else self.run("zero", self._end_gradients)
        return micro_steps, clipped, zero

    def _repeated(self, micro_steps: list[slice], count: int) -> tuple[Timeline, ...]:
        timelines = [self.timeline(piece) for piece in micro_steps]
        return tuple(timelines + timelines[-1:] * (count - len(timelines)))

    def place(self) -> slice:
        """Place this rank's part of the module, its master weights and the inputs on the device."""
        if not self.sharding.is_full:
            start = super().place().start
            self._parameters = self.subject.trainable()
            self._wrapped = self._replicate()
            return slice(start, len(self.recorder.events))
        with self._piece("load") as piece:
            for name, tensor in placed_tensors(self.subject.module):
                self.recorder.track(_part(tensor), "parameters", name)
            for name, value in self.subject.inputs.items():
                if isinstance(value, torch.Tensor):
                    self.recorder.track(value, "activations", name)
        return piece()

    def _replicate(self) -> nn.Module:
        views = self.sharding.views
        bucket: tuple[Category, str] = ("gradients" if views else "communication", _BUCKET)
        with self._world.labelled(*bucket):
            wrapped = nn.parallel.DistributedDataParallel(self.subject.module, gradient_as_bucket_view=views)
        wrapped.register_comm_hook(None, self._reduce)
        wrapped.logger = _NoTimes()  # the real one warns that this device has no clock
        before_forward: Any = wrapped._pre_forward  # it makes the buckets anew, once

        def named(*args: Any, **kwargs: Any) -> Any:
            with self._world.labelled(*bucket):
                return before_forward(*args, **kwargs)

        wrapped._pre_forward = named  # type: ignore[method-assign]
        return wrapped

    def _reduce(self, _, bucket):  # type: ignore[no-untyped-def]  # DDP reads annotations
        """DDP's communication hook: the bucket holds the sum already."""
        answer: Any = torch.futures.Future()
        answer.set_result(bucket.buffer())
        return answer

    def _shard(self) -> None:
        module = self.subject.module
        fully_shard_module(
            module, mesh=self._world.mesh, reshards=FULLY_SHARDED[self.sharding.strategy], mixed=self._mixed
        )
        self._parameters = self.subject.trainable()
        self._groups = [group for state in _states(module) for group in state._fsdp_param_groups]
        for group in self._groups:
            # The API's own way: `set_custom_all_gather` and `set_custom_reduce_scatter` of each module.
            group._all_gather_comm = self._world.communicator("all-gather output")
            group._reduce_scatter_comm = self._world.communicator("reduce-scatter buffer")
        self.updated = {name: nn.Parameter(_local(parameter)) for name, parameter in self._parameters.items()}

    def _name_gradients(self) -> None:
        if not self.sharding.is_full and self.sharding.views:
            return
        names = reduced_gradient_names(self._groups)
        for name, parameter in self._parameters.items():
            if parameter.grad is not None:
                found = names.get(id(parameter), f"{name} gradient")
                self.recorder.label(_local(parameter.grad), "gradients", found)

    def _make_tracer(self) -> Tracer:
        return ShardedTracer(self._world, self.recorder, self._scopes, **self._tracer_arguments())

    def trained(self) -> dict[str, nn.Parameter]:
        """What has gradients when the optimizer steps: under FSDP2 stand-ins for the shards, as plain tensors."""
        return self.updated if self.sharding.is_full else super().trained()

    def _run_module(self) -> torch.Tensor:
        return self.subject.loss(self._wrapped, self.subject.inputs)

    def _clippable(self) -> Iterator[nn.Parameter]:
        """Stand-ins for the parameters with gradients, as plain tensors."""
        for parameter in self._parameters.values():
            if parameter.grad is not None:
                stand_in = nn.Parameter(_local(parameter))
                stand_in.grad = _local(parameter.grad)
                yield stand_in

    def _end_gradients(self) -> None:
        for parameter in self._parameters.values():
            parameter.grad = None


class _NoTimes:
    """DDP's record of its own times, of which there are none."""

    def set_runtime_stats_and_log(self) -> None:
        """Do nothing."""


def _states(module: nn.Module) -> Iterator[Any]:
    """FSDP2's states of the modules to which it was applied, layers first."""
    from torch.distributed.fsdp import FSDPModule

    sharded = [inner for inner in module.modules() if isinstance(inner, FSDPModule)]
    return (inner._get_fsdp_state() for inner in (*sharded[1:], sharded[0]))


def _part(tensor: torch.Tensor) -> torch.Tensor:
    """This rank's part of a tensor, the very tensor that is kept: nothing is run, which would be recorded."""
    part: torch.Tensor = getattr(tensor, "_local_tensor", tensor)
    return part


def _local(tensor: torch.Tensor) -> torch.Tensor:
    """The same outside any graph."""
    return _part(tensor).detach()
