"""What a decoder makes before its first layer: rotary tables and attention masks; and how the tables are applied.

Source: transformers `masking_utils.py` and the `RotaryEmbedding` and `apply_rotary_pos_emb` of the models.
"""

from __future__ import annotations

from optplan.planner.dtypes import Dtype
from optplan.planner.step import kernels
from optplan.planner.step.graph import Tensor
from optplan.planner.step.operations import add, cast, multiply_constant, scale
from optplan.planner.step.projections import concatenated, part
from optplan.planner.step.tape import Tape


def position_ids(t: Tape, seq: int) -> Tensor:
    """The positions `[1, seq]`."""
    t.path = "positions"
    counted = t.new(seq, "int64", "count")
    shifted = t.new(seq, "int64", "positions")
    del counted
    return shifted


def rotary_tables(t: Tape, seq: int, width: int, dtype: Dtype) -> tuple[Tensor, Tensor]:
    """Cosines and sines `[seq, width]` in the model's dtype."""
    t.path = "rotary_emb"
    positions = t.new(seq, "float32", "positions")
    angles = t.new(seq * width // 2, "float32", "angles")
    doubled = t.new(seq * width, "float32", "doubled angles")
    cosines = scale(t, t.new(seq * width, "float32", "cosines"), "scaled cosines")
    sines = scale(t, t.new(seq * width, "float32", "sines"), "scaled sines")
    tables = cast(t, cosines, dtype), cast(t, sines, dtype)
    del positions, angles, doubled, cosines, sines
    return tables


def rotate(t: Tape, x: Tensor, tables: tuple[Tensor, Tensor], heads: int) -> Tensor:
    """Queries or keys turned by their positions: `x * cos + rotate_half(x) * sin`."""
    cosines, sines = tables
    return add(
        t,
        multiply_constant(t, x, cosines, "times cosines"),
        multiply_constant(t, _rotate_half(t, x, heads), sines, "times sines"),
        "rotated",
    )


def _rotate_half(t: Tape, x: Tensor, heads: int) -> Tensor:
    half = x.numel // 2
    first, second = part(t, x, half, heads=heads), part(t, x, half, heads=heads)
    return concatenated(t, (scale(t, second, "negated half"), first), "rotated half")


def find_packed_sequences(t: Tape, batch: int, seq: int) -> None:
    """The search for restarts in the positions that precedes every mask."""
    num_tokens = batch * seq
    before = t.new(batch, "int64", "first position")
    extended = t.new(num_tokens + batch, "int64", "extended positions")
    steps = t.new(num_tokens, "int64", "steps of the positions")
    del extended
    restarts = t.new(num_tokens, "bool", "restarts")
    indices = t.new(num_tokens, "int64", "sequence numbers")
    counted = t.new(num_tokens, "int64", "restarts as numbers")
    if batch == 1:
        t.scratch(kernels.SCAN_SCRATCH, operation="scan")
    del counted, restarts
    last_is_zero = t.new(batch, "bool", "single sequences")
    single = t.new(1, "bool", "whether all are single")
    del last_is_zero, single, before, steps, indices


def causal_mask(t: Tape, batch: int, seq: int, *, window: bool, numbers: Dtype | None) -> Tensor:
    """The mask of a causal attention, as booleans `[seq, seq]` or as numbers `[batch, 1, seq, seq]`.

    Args:
        t: The tape.
        batch: Sequences.
        seq: Tokens a sequence.
        window: Whether attention looks through a sliding window.
        numbers: Dtype of the numbers, as eager attention adds them; None for booleans.
    """
    mask = _boolean_mask(t, batch, seq, window=window)
    if numbers is None:
        return mask
    zero, lowest = t.new(1, numbers, "mask constant"), t.new(1, numbers, "mask constant")
    added = t.new(batch * seq * seq, numbers, "mask as numbers")
    del lowest, zero, mask
    return added


def _boolean_mask(t: Tape, batch: int, seq: int, *, window: bool) -> Tensor:
    sequences, heads = t.new(batch, "int64", "sequence numbers"), t.new(1, "int64", "head numbers")
    queries, keys = position_ids(t, seq), position_ids(t, seq)
    t.path = "mask"
    inside = _window(t, seq) if window else None
    mask = t.new(seq * seq, "bool", "keys not after the query")
    if inside is not None:
        both = t.new(seq * seq, "bool", "mask")
        mask, inside = both, None
        del both
    del sequences, heads, queries, keys
    return mask


def _window(t: Tape, seq: int) -> Tensor:
    one = t.new(1, "bool", "true")
    starts = t.new(seq, "int64", "window starts")
    inside = t.new(seq * seq, "bool", "keys inside the window")
    del starts
    mask = t.new(seq * seq, "bool", "mask so far")
    del inside, one
    return mask
