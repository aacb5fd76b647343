"""Positions: what a decoder makes of them before its first layer, rotary tables above all, and how they are applied.

Source: transformers `RotaryEmbedding` and `apply_rotary_pos_emb` of the models.
"""

from __future__ import annotations

from optplan.planner.dtypes import Dtype
from optplan.planner.step.graph import Tensor
from optplan.planner.step.operations import add, cast, multiply_constant, scale
from optplan.planner.step.projections import concatenated, part
from optplan.planner.step.tape import Tape

Tables = tuple[Tensor, Tensor]


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


def rotate_part(
    t: Tape, pair: tuple[Tensor, Tensor], tables: Tables, heads: tuple[int, int], *, width: int, rotated: int
) -> tuple[Tensor, Tensor]:
    """Queries and keys, each head cut into what is rotated and the rest (often nothing) and joined again.

    Args:
        t: The tape.
        pair: Queries and keys.
        tables: Cosines and sines.
        heads: Heads of the queries and of the keys.
        width: Elements of a head.
        rotated: Those that are rotated.
    """
    cuts = [_cut(t, x, count, width, rotated) for x, count in zip(pair, heads, strict=True)]
    turned = [rotate(t, cut[0], tables, count) for cut, count in zip(cuts, heads, strict=True)]
    queries = concatenated(t, (turned[0], cuts[0][1]), "rotated queries", heads=heads[0])
    turned[0] = queries
    return queries, concatenated(t, (turned[1], cuts[1][1]), "rotated keys", heads=heads[1])


def _cut(t: Tape, x: Tensor, heads: int, width: int, rotated: int) -> tuple[Tensor, Tensor]:
    turned = x.numel // width * rotated
    return part(t, x, turned, heads=heads), part(t, x, x.numel - turned, heads=heads)
