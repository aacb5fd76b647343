"""The work of one training step: operations of its matrix products, bytes that it writes, launches of the host.

Products are counted from the model's matrices, the rest from the step rules: every tensor that forward and backward
allocate is written once and read a few times, save what products write in backward: their time is that of their
operations. What is copied for collectives is counted on its own, what they write themselves is the links' time. Every
tensor that is not written beside another is a kernel. What checkpointing computes again is on the rules' tape: each
layer's forward up to the last tensor that its backward needs, so mostly without its last product. What the host does
for all this was counted from the families' own modules (`host_work`); of families without counts it is estimated from
the kernels.

Source: `torch/utils/checkpoint.py` (`early_stop`).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from itertools import takewhile
from typing import NamedTuple

import msgspec

from optplan.planner.host_work import HostCalls, host_work, typical_calls
from optplan.planner.models.spec import ModelSpec
from optplan.planner.step.families import FAMILIES
from optplan.planner.step.graph import Record
from optplan.planner.step.options import StepOptions
from optplan.planner.step.program import Program
from optplan.planner.timeline import Phase

_NO_PRODUCT = {"token_embedding", "position_embedding", "norm", "bias"}
_GATHERING = "all-gather output"
_WRITTEN_BY_OTHERS = (
    "weight gradient",
    "gradient of the input",
    _GATHERING,
    f"{_GATHERING} of the layer before",
    "sharded gradients",
)
"""Written by products or collectives, whose time is counted otherwise."""
_LAUNCHES = {
    "attention log-sums": 0,
    "dropout mask": 0,
    "gradient of the keys": 0,
    "gradient of the values": 0,
    "bias gradient": 0,
    "reciprocal deviation": -1,
}
"""Launches that a tensor stands for: none if another's launch writes it, of a layer norm neither this nor the mean."""
_GATHERED = "gathered "
_COLLECTIVES = (_GATHERING, "reduce-scatter input")
_OUTPUT = "output"
_BIDIRECTIONAL = {"bert", "roberta", "vit", "t5"}
RECOMPUTED_SHARE = {"none": 0.0, "selective": 0.5, "full": 1.0, "full-reentrant": 1.0}
"""Share of the layers whose forward runs twice."""
_HOOKED = ("full", "selective")
"""Checkpointing by hooks of Python's on every tensor that a layer keeps: in forward each is replaced."""
_HOOKS_IN_BACKWARD = 2
"""Calls of a hook for each such tensor in backward: when it is made again, and when it is asked for."""


class HeadWork(msgspec.Struct, frozen=True):
    """What of a phase's work on the GPU comes after all layers in forward, before them in backward: head and loss.

    Attributes:
        product_flops: As in `PhaseWork`; likewise the others.
    """

    product_flops: float = 0.0
    written_bytes: float = 0.0
    num_launches: int = 0


class PhaseWork(msgspec.Struct, frozen=True):
    """What one phase of one micro-step does on a GPU.

    Attributes:
        product_flops: Multiplications and additions of products with the model's matrices.
        attention_flops: The same of queries with keys and of weights with values.
        written_bytes: Bytes of the tensors that it allocates, without those that products or collectives write.
        copied_bytes: Bytes of copies for collectives and of what they gathered.
        num_launches: Kernels besides those of collectives.
        num_collectives: Gathers and reductions of fully sharded groups; a group that runs again is asked once more.
        calls: What it asks of the host: in backward also what runs again; `kept` are the tensors handed to
            checkpointing's hooks.
        head: Its part in the output head and the loss.
    """

    product_flops: float
    attention_flops: float
    written_bytes: float
    copied_bytes: float
    num_launches: int
    num_collectives: float = 0.0
    calls: HostCalls = HostCalls()
    head: HeadWork = HeadWork()


class StepWork(msgspec.Struct, frozen=True):
    """Forward and backward of one micro-step."""

    forward: PhaseWork
    backward: PhaseWork


def product_flops(spec: ModelSpec, *, num_tokens: int) -> float:
    """Operations of the forward's products with the model's matrices; of experts, those that a token visits."""
    return sum(_flops_by_name(spec, num_tokens=num_tokens).values())


def _flops_by_name(spec: ModelSpec, *, num_tokens: int) -> dict[str, float]:
    """Operations of the forward's product with each of the model's matrices."""
    chosen = spec.config.get("num_experts_per_tok")
    experts = spec.config.get("num_local_experts") or spec.config.get("num_experts")
    share = chosen / experts if chosen and experts else 1.0
    return {
        parameter.name: 2.0 * num_tokens * parameter.numel * (share if parameter.module == "experts" else 1.0)
        for parameter in spec.parameters
        if parameter.role not in _NO_PRODUCT and len(parameter.shape) > 1
    }


def head_flops(spec: ModelSpec, *, num_tokens: int) -> float:
    """Operations of the forward's product with the output head, which a loss in chunks takes a second time."""
    return 2.0 * num_tokens * sum(p.numel for p in spec.parameters if p.role == "output_head" and len(p.shape) > 1)


def attention_flops(spec: ModelSpec, options: StepOptions) -> float:
    """Operations of the forward's attention; a fused causal kernel leaves the upper triangle out."""
    width = sum(p.heads.num_query_heads * p.heads.head_dim for p in spec.parameters if p.heads and len(p.shape) > 1)
    full = 4.0 * options.batch_size * options.seq_len**2 * width
    halved = options.attention != "eager" and spec.model_type not in _BIDIRECTIONAL and not options.padding_mask
    return full / 2 if halved else full


def step_work(spec: ModelSpec, options: StepOptions, program: Program) -> StepWork:
    """The work of forward and backward of one micro-step.

    Args:
        spec: The model.
        options: How the step is run.
        program: The forward and backward that the rules recorded for them.
    """
    num_tokens = options.batch_size * options.seq_len
    flops, attention = _flops_by_name(spec, num_tokens=num_tokens), attention_flops(spec, options)
    again, products = RECOMPUTED_SHARE[options.checkpointing], sum(flops.values())
    forward, backward = _sums(program, "forward"), _sums(program, "backward")
    calls = _host_calls(spec, options, (forward.num_launches, backward.num_launches))
    head = head_flops(spec, num_tokens=num_tokens)
    heads_backward = (3 if options.fused_loss == "chunked" else 2) * head
    recomputed = _recomputed_flops(program, flops) if again else 0.0
    return StepWork(
        PhaseWork(
            products,
            attention,
            forward.written_bytes,
            forward.copied_bytes,
            forward.num_launches,
            forward.num_collectives,
            calls.forward,
            _head_work(program, "forward", head),
        ),
        PhaseWork(
            2 * (products - head) + heads_backward + recomputed,
            (2.5 + again) * attention,
            backward.written_bytes,
            backward.copied_bytes,
            backward.num_launches,
            backward.num_collectives + again * forward.num_collectives,
            calls.backward,
            _head_work(program, "backward", heads_backward),
        ),
    )


def _head_work(program: Program, phase: Phase, product_flops: float) -> HeadWork:
    """What a phase does after its last layer, or before the first that it comes to in backward."""
    segments = program.tape.segments
    in_order = [index for index, _ in program.stretches() if segments[index].phase == phase]
    in_order = in_order[::-1] if phase == "forward" else in_order
    beyond = list(takewhile(lambda index: segments[index].layer is None, in_order))
    if len(beyond) == len(in_order):
        return HeadWork()
    sums = [_sums_of(_records_of(program, index)) for index in beyond]
    return HeadWork(product_flops, sum(one.written_bytes for one in sums), sum(one.num_launches for one in sums))


class _PhaseCalls(NamedTuple):
    """What forward and backward ask of the host."""

    forward: HostCalls
    backward: HostCalls


def num_layers(spec: ModelSpec) -> list[int]:
    """Layers of each stack of a model."""
    family = FAMILIES[spec.model_type]
    return [len(stack) for stack in family.stacks(family.layers(spec))]


def _host_calls(spec: ModelSpec, options: StepOptions, num_launches: tuple[int, int]) -> _PhaseCalls:
    """What is asked of the host, where its family was counted or is typical; with what checkpointing asks besides."""
    work = host_work(spec.model_type, options.precision, options.attention)
    if work is None:
        whole = in_layers = _typical_calls(*num_launches)
    else:
        in_layers = work.in_layers(num_layers(spec))
        whole = work.outside.plus(in_layers)
    again = RECOMPUTED_SHARE[options.checkpointing]
    hooked = again * in_layers.kept if options.checkpointing in _HOOKED else 0
    waits = max(whole.waits, options.padding_mask)  # whether the mask hides anything is looked up on the host
    return _PhaseCalls(
        HostCalls(whole.calls, whole.launches, whole.modules, hooked, waits),
        HostCalls(
            again * in_layers.calls,
            again * in_layers.launches,
            again * in_layers.modules,
            _HOOKS_IN_BACKWARD * hooked,
            0,
            whole.nodes,
            whole.backward_launches,
        ),
    )


def _typical_calls(forward: int, backward: int) -> HostCalls:
    """What so many launches of forward and backward mostly ask of the host."""
    share = typical_calls()
    return HostCalls(
        forward * share.calls,
        forward * share.launches,
        forward * share.modules,
        forward * share.kept,
        share.waits,
        backward * share.nodes,
        backward * share.backward_launches,
    )


def num_kernels(program: Program) -> tuple[int, int]:
    """Kernels of forward and of backward, besides those of collectives."""
    return _sums(program, "forward").num_launches, _sums(program, "backward").num_launches


class _Sums(NamedTuple):
    """What one phase of the whole model writes, copies and launches."""

    written_bytes: int
    copied_bytes: int
    num_launches: int
    num_collectives: int


def _sums(program: Program, phase: Phase) -> _Sums:
    totals = [0] * len(_Sums._fields)
    for records, _, count in _stretches(program, phase):
        found = _sums_of(records)
        totals = [total + count * value for total, value in zip(totals, found, strict=True)]
    return _Sums(*totals)


def _stretches(program: Program, phase: Phase) -> Iterator[tuple[Sequence[Record], int | None, int]]:
    """The recorded stretches of a phase: their records, their layer, and how often they occur in the model."""
    segments = program.tape.segments
    for index, count in Counter(index for index, _ in program.stretches()).items():
        if segments[index].phase == phase:
            yield _records_of(program, index), segments[index].layer, count


def _records_of(program: Program, index: int) -> Sequence[Record]:
    """The records of one of the tape's segments."""
    segments, records = program.tape.segments, program.tape.records
    end = segments[index + 1].first_id - 1 if index + 1 < len(segments) else len(records)
    return records[segments[index].first_id - 1 : end]


def _sums_of(records: Sequence[Record]) -> _Sums:
    written = copied = collectives = 0
    for record in records:
        if record.operation.startswith(_COLLECTIVES):
            collectives += 1
        if record.operation in _WRITTEN_BY_OTHERS:
            continue
        if _is_copy(record):
            copied += record.num_bytes
        else:
            written += record.num_bytes
    return _Sums(written, copied, sum(map(_launches, records)), collectives)


def _launches(record: Record) -> int:
    return 0 if record.category == "workspace" else _LAUNCHES.get(record.operation, 1)


def _recomputed_flops(program: Program, flops: Mapping[str, float]) -> float:
    """Operations of the products whose output is made again in backward, by the names of their matrices."""
    total = 0.0
    for records, layer, count in _stretches(program, "backward"):
        if layer is not None:
            prefix = program.layer_name(layer)
            names = {
                f"{prefix}.{record.path}.{_matrix(record)}" for record in records if record.operation.endswith(_OUTPUT)
            }
            total += count * sum(flops.get(name, 0.0) for name in names)
    return total


def _matrix(record: Record) -> str:
    """Name, within its module, of the matrix that an output is the product with."""
    return record.operation.removesuffix(_OUTPUT).strip() or "weight"


def _is_copy(record: Record) -> bool:
    return record.category == "communication" or record.operation.startswith(_GATHERED)
