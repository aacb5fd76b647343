"""The work of one training step: operations of its matrix products, bytes of the tensors that it writes.

Products are counted from the model's matrices, the rest from the step rules: every tensor that forward and backward
allocate is written once and read a few times, save what products write in backward: their time is that of their
operations. What is copied for collectives is counted on its own, what they write themselves is the links' time. What
checkpointing computes again is on the rules' tape already; its products are added here.
"""

from __future__ import annotations

from collections.abc import Sequence

import msgspec

from optplan.planner.models.spec import ModelSpec
from optplan.planner.step.graph import Record
from optplan.planner.step.options import StepOptions
from optplan.planner.step.program import Program
from optplan.planner.timeline import Phase

_NO_PRODUCT = {"token_embedding", "position_embedding", "norm", "bias"}
_WRITTEN_BY_OTHERS = {"weight gradient", "gradient of the input", "all-gather output", "sharded gradients"}
"""Written by products or collectives, whose time is counted otherwise."""
_GATHERED = "gathered "
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
        num_layers: Layers that it runs through.
        num_recomputed_layers: Layers whose forward it runs again.
        rotates: Whether positions are encoded by rotation, which takes many small operations.
    """

    product_flops: float
    attention_flops: float
    written_bytes: float
    copied_bytes: float
    num_layers: int
    num_recomputed_layers: float
    rotates: bool


class StepWork(msgspec.Struct, frozen=True):
    """Forward and backward of one micro-step."""

    forward: PhaseWork
    backward: PhaseWork


def product_flops(spec: ModelSpec, *, num_tokens: int) -> float:
    """Operations of the forward's products with the model's matrices; of experts, those that a token visits."""
    chosen = spec.config.get("num_experts_per_tok")
    experts = spec.config.get("num_local_experts") or spec.config.get("num_experts")
    share = chosen / experts if chosen and experts else 1.0
    numel = 0.0
    for parameter in spec.parameters:
        if parameter.role not in _NO_PRODUCT and len(parameter.shape) > 1:
            numel += parameter.numel * (share if parameter.module == "experts" else 1.0)
    return 2.0 * num_tokens * numel


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
    products = product_flops(spec, num_tokens=options.batch_size * options.seq_len)
    attention = attention_flops(spec, options)
    again = RECOMPUTED_SHARE[options.checkpointing]
    head = head_flops(spec, num_tokens=options.batch_size * options.seq_len) if options.fused_loss == "chunked" else 0.0
    num_layers, rotates = _num_layers(program), any(name.startswith("rotary") for name in spec.config)
    return StepWork(
        PhaseWork(products, attention, *_written_bytes(program, "forward"), num_layers, 0.0, rotates),
        PhaseWork(
            (2 + again) * products + head,
            (2.5 + again) * attention,
            *_written_bytes(program, "backward"),
            num_layers,
            again * num_layers,
            rotates,
        ),
    )


def _num_layers(program: Program) -> int:
    segments = program.tape.segments
    return sum(
        segments[index].phase == "forward" and segments[index].layer is not None for index, _ in program.stretches()
    )


def _written_bytes(program: Program, phase: Phase) -> tuple[float, float]:
    """Bytes that a phase writes in the whole model: those of its operations, and those copied for collectives."""
    tape, written, copied = program.tape, 0, 0
    starts = [segment.first_id - 1 for segment in tape.segments] + [len(tape.records)]
    sums: dict[int, tuple[int, int]] = {}
    for index, _ in program.stretches():
        if tape.segments[index].phase != phase:
            continue
        if index not in sums:
            sums[index] = _sums_of(tape.records[starts[index] : starts[index + 1]])
        written, copied = written + sums[index][0], copied + sums[index][1]
    return float(written), float(copied)


def _sums_of(records: Sequence[Record]) -> tuple[int, int]:
    counted = [record for record in records if record.operation not in _WRITTEN_BY_OTHERS]
    copied = sum(record.num_bytes for record in counted if _is_copy(record))
    return sum(record.num_bytes for record in counted) - copied, copied


def _is_copy(record: Record) -> bool:
    return record.category == "communication" or record.operation.startswith(_GATHERED)
