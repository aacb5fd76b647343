"""A mixture of experts: the router, and the experts' products over tokens sorted by expert.

No tensor here depends on where the tokens go: each token is copied once for every expert it visits, and the grouped
product takes as many rows however they are divided. So the memory of any routing is that of the worst.

Source: transformers `integrations/moe.py` (`grouped_mm_experts_forward`, the default) and the `TopKRouter` of the
models; pytorch `native/cuda/GroupedBlas.cpp`, `Indexing.cu`; scratch as recorded on an H200.
"""

from __future__ import annotations

import msgspec

from optplan.planner.step import kernels, projections
from optplan.planner.step import operations as op
from optplan.planner.step.graph import Tensor
from optplan.planner.step.tape import Tape


class ExpertsConfig(msgspec.Struct, frozen=True, kw_only=True):
    """The sizes of one mixture.

    Attributes:
        experts: Experts in a layer.
        visits: Experts that a token visits.
        hidden: Width of a token.
        intermediate: Width inside an expert.
        activation: The activation that gates.
        normalises: Whether the weights of a token's experts are made to add up to one.
        casts: Whether those weights are cast to the dtype of the router's scores.
    """

    experts: int
    visits: int
    hidden: int
    intermediate: int
    activation: str
    normalises: bool
    casts: bool


def mixture(t: Tape, hidden: Tensor, c: ExpertsConfig) -> Tensor:
    """What the experts make of `hidden`, `[tokens, hidden]`."""
    flat = projections.reshaped(t, hidden)
    scores, weights, chosen = _route(t, flat, c)
    t.path = "mlp.experts"
    out = _run_experts(t, flat, weights, chosen, c)
    del scores, weights, chosen
    return projections.reshaped(t, out)


def _route(t: Tape, hidden: Tensor, c: ExpertsConfig) -> tuple[Tensor, Tensor, Tensor]:
    """The router's scores, the weights of the experts that each token visits, and their numbers."""
    t.path = "mlp.gate"
    num_tokens = hidden.numel // c.hidden
    hidden = projections.reshaped(t, hidden)
    scores = projections.linear(t, hidden, c.hidden, c.experts)
    wide = scores if c.casts else op.cast(t, scores, "float32")
    shares = op.wide_softmax(t, wide, "shares of the experts")
    del wide
    numel, num_shares = num_tokens * c.visits, shares.numel

    def backward(_: list[Tensor]) -> list[Tensor]:
        return [t.new(num_shares, "float32", "gradient among zeros")]

    node = t.node([shares], backward)
    weights, chosen = t.new(numel, "float32", "weights of the visited"), t.new(numel, "int64", "experts visited")
    weights.node = node
    t.save(node, [chosen])
    if c.normalises:
        weights = _normalised(t, weights, num_tokens)
    if c.casts:
        weights = op.cast(t, weights, scores.dtype)
    return scores, weights, chosen


def _normalised(t: Tape, weights: Tensor, num_tokens: int) -> Tensor:
    """`weights /= weights.sum(...)`: the old values are copied for backward, the new ones take their memory."""
    numel = weights.numel
    sum_node = t.node(
        [weights], lambda gradients: [Tensor(gradients[0].storage, numel, "float32", None, 0, False, True)]
    )
    total = t.new(num_tokens, "float32", "sum of the weights")
    total.node = sum_node

    def backward(_: list[Tensor]) -> list[Tensor]:
        first, second = t.new(numel, "float32", "share"), t.new(numel, "float32", "share over the sum")
        negated = t.new(numel, "float32", "negated gradient")
        of_total = t.new(numel, "float32", "gradient")
        del first, second, negated
        return [t.new(numel, "float32", "gradient"), of_total]

    before = t.new(numel, "float32", "weights before") if t.keeps_graph else None
    node = t.node([weights, total], backward, [total] if before is None else [before, total])
    del before
    return Tensor(weights.storage, numel, "float32", node)


def _run_experts(t: Tape, hidden: Tensor, weights: Tensor, chosen: Tensor, c: ExpertsConfig) -> Tensor:
    num_rows = chosen.numel
    num_tokens = num_rows // c.visits
    in_order, order = _sorted(t, num_rows)
    rows = t.new(num_rows, "int64", "token of each row")
    selected = indexed(t, hidden, rows, num_rows, num_rows * c.hidden, num_tokens)
    del rows
    share = indexed(t, weights, order, num_rows, num_rows, num_rows)
    numbers = t.new(num_rows, "int32", "experts as narrow integers")
    counts = t.new(c.experts, "int32", "rows of each expert")
    offsets = t.new(c.experts, "int32", "offsets of the experts")
    t.scratch(kernels.NARROW_SCAN_SCRATCH, operation="scan")
    sentinels = t.new(num_rows, "bool", "rows of no expert")
    selected = _masked_in_place(t, selected, sentinels)
    out = _gated(t, selected, offsets, sentinels, c)
    out = grouped_product(t, out, offsets, "down_proj", c.intermediate, c.hidden, c.experts)
    out = _masked(t, out, sentinels)
    weighted = op.multiply(t, out, share, "weighted output")
    inverse = t.new(num_rows, "int64", "order of the rows")
    t.new(num_rows, "int64", "count")
    weighted = indexed(t, weighted, inverse, num_rows, weighted.numel, num_rows)
    total = summed_visits(t, weighted, num_tokens * c.hidden)
    result = op.cast(t, total, hidden.dtype)
    del in_order, order, selected, share, numbers, counts, offsets, sentinels, out, weighted, inverse, total
    return result


def _gated(t: Tape, selected: Tensor, offsets: Tensor, sentinels: Tensor, c: ExpertsConfig) -> Tensor:
    both = grouped_product(t, selected, offsets, "gate_up_proj", c.hidden, 2 * c.intermediate, c.experts)
    both = _masked(t, both, sentinels)
    gate, up = projections.split(t, both, (both.numel // 2,) * 2)
    return op.multiply(t, op.activation(t, gate, c.activation), up, "gate times up")


def _sorted(t: Tape, count: int) -> tuple[Tensor, Tensor]:
    """`torch.sort` of the experts' numbers."""
    values, order = t.new(count, "int64", "experts in order"), t.new(count, "int64", "order of the visits")
    numbers = t.new(count, "int64", "count")
    if count > kernels.SMALL_SORT:
        t.scratch(kernels.radix_sort_scratch(count), operation="sort of the visits")
    del numbers
    return values, order


def indexed(t: Tape, x: Tensor, index: Tensor, count: int, numel: int, num_rows: int) -> Tensor:
    """`x[index]` of `numel` elements; backward adds the `count` gradients up in rows of zeros, `num_rows` of them."""
    source, dtype = x.numel, x.dtype

    def backward(_: list[Tensor]) -> list[Tensor]:
        result = t.new(source, dtype, "gradient among zeros")
        index_put_scratch(t, count, num_rows)
        return [result]

    node = t.node([x], backward, [index])
    out = t.new(numel, dtype, "selected rows")
    out.node = node
    return out


def index_put_scratch(t: Tape, count: int, num_rows: int) -> None:
    """What `index_put_` with accumulation allocates: the indices are brought into range, made linear and sorted."""
    in_range = t.storage(8 * count, "index", "workspace")
    linear = t.storage(8 * count, "index", "workspace")
    del in_range
    held = [t.storage(8 * count, "index", "workspace") for _ in range(3)]
    t.scratch(kernels.pair_sort_scratch(count, num_rows), operation="sort of the index")
    del linear
    held.clear()


def grouped_product(
    t: Tape, x: Tensor, offsets: Tensor, name: str, num_in: int, num_out: int, num_experts: int
) -> Tensor:
    """`F.grouped_mm` of rows sorted by expert with the experts' weights, which autocast leaves as they are."""
    weight = t.parameter(f"{t.path}.{name}", num_experts * num_in * num_out)
    dtype, num_rows = weight.dtype, x.numel // num_in
    x = op.cast(t, x, dtype)

    def product(numel: int, operation: str, *, is_weight: bool = False) -> Tensor:
        result = t.new(numel, dtype, operation, "gradients" if is_weight else None)
        if dtype != "float32":
            sizes = kernels.grouped_product_scratch(num_experts, t.resident_threads)
            t.scratch(*sizes, operation="grouped product")
        return result

    def backward(_: list[Tensor]) -> list[Tensor]:
        of_weight = product(num_experts * num_in * num_out, f"{name} gradient", is_weight=True)
        return [product(num_rows * num_in, "gradient of the input"), of_weight]

    node = t.node([x, weight], backward, [weight, offsets, x])
    out = product(num_rows * num_out, f"{name} output")
    out.node = node
    return out


def _masked(t: Tape, x: Tensor, mask: Tensor) -> Tensor:
    """`x.masked_fill(mask, 0)`."""
    numel, dtype = x.numel, x.dtype
    node = t.node([x], lambda _: [t.new(numel, dtype, "masked gradient")], [mask])
    out = t.new(numel, dtype, "masked output")
    out.node = node
    return out


def _masked_in_place(t: Tape, x: Tensor, mask: Tensor) -> Tensor:
    numel, dtype = x.numel, x.dtype
    node = t.node([x], lambda _: [t.new(numel, dtype, "masked gradient")], [mask])
    return Tensor(x.storage, numel, dtype, node)


def summed_visits(t: Tape, x: Tensor, numel: int) -> Tensor:
    """`x.view(tokens, visits, hidden).sum(1)`; backward writes the gradient out for every visit."""
    whole, dtype = x.numel, x.dtype
    node = t.node([x], lambda _: [t.new(whole, dtype, "gradient of every visit")])
    out = t.new(numel, dtype, "sum of the visits")
    out.node = node
    return out
