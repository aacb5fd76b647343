"""The work of one training step: operations of its matrix products, bytes that it writes, launches of the host.

Products are counted from the model's matrices, the rest from the step rules: every tensor that forward and backward
allocate is written once and read a few times, save what products write in backward: their time is that of their
operations. What is copied for collectives is counted on its own, what they write themselves is the links' time. Every
tensor that is not written beside another is a launch of the host. What checkpointing computes again is on the rules'
tape: each layer's forward up to the last tensor that its backward needs, so mostly without its last product. It is
told by what it makes, which in forward and in gradients has different names.

Source: `torch/utils/checkpoint.py` (`early_stop`).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

import msgspec

from optplan.planner.models.spec import ModelSpec
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


class PhaseWork(msgspec.Struct, frozen=True):
    """What one phase of one micro-step does on a GPU.

    Attributes:
        product_flops: Multiplications and additions of products with the model's matrices.
        attention_flops: The same of queries with keys and of weights with values.
        written_bytes: Bytes of the tensors that it allocates, without those that products or collectives write.
        copied_bytes: Bytes of copies for collectives and of what they gathered.
        num_launches: Operations that the host launches.
        num_modules: Modules that it calls in Python: in backward only those that run again.
        num_collectives: Gathers and reductions of fully sharded groups; a group that runs again is asked once more.
        num_backward_launches: Launches that autograd's own thread makes; the others come from Python.
    """

    product_flops: float
    attention_flops: float
    written_bytes: float
    copied_bytes: float
    num_launches: int
    num_modules: float
    num_collectives: float = 0.0
    num_backward_launches: int = 0


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
    backward_products = 2 * products + (_recomputed_flops(program, flops) if again else 0.0)
    if options.fused_loss == "chunked":
        backward_products += head_flops(spec, num_tokens=num_tokens)
    return StepWork(
        PhaseWork(
            products,
            attention,
            forward.written_bytes,
            forward.copied_bytes,
            forward.num_launches,
            forward.num_modules,
            forward.num_collectives,
        ),
        PhaseWork(
            backward_products,
            (2.5 + again) * attention,
            backward.written_bytes,
            backward.copied_bytes,
            backward.num_launches,
            again * forward.num_layer_modules,
            backward.num_collectives + again * forward.num_collectives,
            backward.num_launches - _relaunched(program),
        ),
    )


class _Sums(NamedTuple):
    """What one phase of the whole model writes, copies, launches and calls, its layers' modules also on their own."""

    written_bytes: int
    copied_bytes: int
    num_launches: int
    num_modules: int
    num_layer_modules: int
    num_collectives: int


def _sums(program: Program, phase: Phase) -> _Sums:
    totals = [0] * len(_Sums._fields)
    for records, layer, count in _stretches(program, phase):
        found = _sums_of(records, in_layer=layer is not None)
        totals = [total + count * value for total, value in zip(totals, found, strict=True)]
    return _Sums(*totals)


def _stretches(program: Program, phase: Phase) -> Iterator[tuple[Sequence[Record], int | None, int]]:
    """The recorded stretches of a phase: their records, their layer, and how often they occur in the model."""
    tape = program.tape
    starts = [segment.first_id - 1 for segment in tape.segments] + [len(tape.records)]
    for index, count in Counter(index for index, _ in program.stretches()).items():
        if tape.segments[index].phase == phase:
            yield tape.records[starts[index] : starts[index + 1]], tape.segments[index].layer, count


def _sums_of(records: Sequence[Record], *, in_layer: bool) -> _Sums:
    written = copied = collectives = 0
    modules = set()
    for record in records:
        if record.operation.startswith(_COLLECTIVES):
            collectives += 1
        if record.operation in _WRITTEN_BY_OTHERS:
            continue
        if _is_copy(record):
            copied += record.num_bytes
        else:
            written += record.num_bytes
            modules.add(record.path)
    launches = sum(map(_launches, records))
    return _Sums(written, copied, launches, len(modules), len(modules) if in_layer else 0, collectives)


def _launches(record: Record) -> int:
    return 0 if record.category == "workspace" else _LAUNCHES.get(record.operation, 1)


def _relaunched(program: Program) -> int:
    """Launches in backward that make in a layer what its forward made: what is computed, or gathered, again."""
    made = {
        (layer, record.path, record.operation)
        for records, layer, _ in _stretches(program, "forward")
        for record in records
    }
    return sum(
        count * _launches(record)
        for records, layer, count in _stretches(program, "backward")
        for record in records
        if layer is not None and (layer, record.path, record.operation) in made
    )


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
