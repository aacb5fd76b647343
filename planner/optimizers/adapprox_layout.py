"""How Adapprox's kernels share out a matrix, and the scratch that takes: one rule for the kernels and for the planner.

Pass A walks along bands of rows, pass B down bands of columns. A long band is split, so that a few large matrices keep
a whole GPU busy; each split leaves its own partial sum in scratch. Everything in scratch is fp32.
"""

from __future__ import annotations

from collections.abc import Sequence

import msgspec

from optplan.planner.units import round_up

TILE = 64
"""Rows and columns of one tile of the second moment."""
BAND_NUMEL = 2048
"""Columns of a band of rows, or rows of a band of columns, that one program walks."""
SHARE_ROWS, MAX_SHARES = 512, 64
"""Rows of a matrix's tall factors that a program takes between the passes, and how many such programs at most."""
VECTOR_CHUNK_NUMEL = 4096
"""Elements of a vector that one program updates."""
MAX_KERNEL_RANK = 64
"""Factors of a higher rank do not fit the kernels' registers and are left to plain torch."""
WAVE_NUMEL = 2**31
"""Elements of the matrices that one round of launches may serve, so that scratch stays small beside the gradients."""
NUM_FIELDS = 30
"""64-bit fields of a matrix's row in the launch table."""
_FP32_BYTES = 4
_TABLE_ALIGNMENT_BYTES = 16


class Split(msgspec.Struct, frozen=True):
    """One direction of a matrix: how many bands, splits of each, and the length of a split."""

    bands: int
    splits: int
    length: int

    @property
    def programs(self) -> int:
        """Programs of the pass."""
        return self.bands * self.splits


class MatrixLayout(msgspec.Struct, frozen=True):
    """One matrix of `rows` by `columns` with factors of `rank`."""

    rows: int
    columns: int
    rank: int

    @property
    def padded_rank(self) -> int:
        """The rank as tensor cores take it: a power of two, at least 16."""
        return max(16, 1 << (self.rank - 1).bit_length())

    @property
    def even(self) -> bool:
        """Whether every row begins at 16 bytes if the first does, in any dtype."""
        return self.columns % 8 == 0

    @property
    def pass_a(self) -> Split:
        """Bands of rows, each split along the columns."""
        return _split(self.rows, self.columns)

    @property
    def pass_b(self) -> Split:
        """Bands of columns, each split along the rows."""
        return _split(self.columns, self.rows)

    @property
    def shares(self) -> int:
        """Programs that share the tall factors."""
        return min(MAX_SHARES, -(-max(self.rows, self.columns) // SHARE_ROWS))

    def parts(self) -> dict[str, int]:
        """Elements of each part of the matrix's scratch, in order; bf16 parts count half."""
        wide = self.padded_rank
        return {
            "sums": -(-self.pass_a.programs // 4) * 4,
            "scales": 4,
            "peaks": wide,
            "partials": self.shares * wide * wide,
            "turn": wide * wide,
            "start": self.columns * wide // 2,
            "rest": self.columns * wide // 2,
            "basis": self.rows * wide // 2,
            "y": self.pass_a.splits * self.rows * wide,
            "z": self.pass_b.splits * self.columns * wide,
        }

    def scratch_bytes(self) -> int:
        """Bytes of the matrix's scratch."""
        return sum(self.parts().values()) * _FP32_BYTES


def _split(across: int, along: int) -> Split:
    splits = -(-along // BAND_NUMEL)
    length = -(-along // (splits * TILE)) * TILE
    return Split(-(-across // TILE), -(-along // length), length)


def vector_chunks(numel: int) -> int:
    """Programs that update a vector."""
    return -(-numel // VECTOR_CHUNK_NUMEL)


def waves(layouts: Sequence[MatrixLayout]) -> list[list[int]]:
    """Places of the matrices that each round of launches serves.

    A round's matrices have one rank and one evenness, and together at most `WAVE_NUMEL` elements (or there is one).
    """
    kinds: dict[tuple[int, bool], list[list[int]]] = {}
    room: dict[tuple[int, bool], int] = {}
    for place, layout in enumerate(layouts):
        kind, numel = (layout.rank, layout.even), layout.rows * layout.columns
        if room.get(kind, 0) < numel:
            kinds.setdefault(kind, []).append([])
            room[kind] = WAVE_NUMEL
        kinds[kind][-1].append(place)
        room[kind] -= numel
    return [wave for rounds in kinds.values() for wave in rounds]


def matrix_table_bytes(layouts: Sequence[MatrixLayout]) -> int:
    """Bytes of the launch table of one round: a row of fields a matrix, and for each program its matrix (int32)."""
    programs = sum(x.pass_a.programs + x.pass_b.programs + x.shares for x in layouts)
    return len(layouts) * NUM_FIELDS * 8 + programs * 4


def table_places(sizes: Sequence[int]) -> tuple[list[int], int]:
    """Where each launch table of a step begins in their one buffer, at 16 bytes, and the bytes of the buffer."""
    firsts, end = [], 0
    for size in sizes:
        firsts.append(round_up(end, _TABLE_ALIGNMENT_BYTES))
        end = firsts[-1] + size
    return firsts, end


def vector_table_bytes(numels: Sequence[int]) -> int:
    """Bytes of the launch table of the vectors."""
    return len(numels) * NUM_FIELDS * 8 + sum(map(vector_chunks, numels)) * 4


def vector_scratch_bytes(numels: Sequence[int]) -> int:
    """Bytes of the vectors' partial sums."""
    return sum(map(vector_chunks, numels)) * _FP32_BYTES
