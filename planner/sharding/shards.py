"""How a parameter's rows are dealt out to ranks, as FSDP2 does: dimension 0, equal shares, the last ranks with fewer.

Every rank's shard is stored padded to the rows of the first, so that collectives move equal pieces.

Source: torch `distributed/fsdp/_fully_shard/_fsdp_param.py` (`_init_sharded_param`) and `_fsdp_common.py`
(`_chunk_with_empty`, `_get_dim0_padded_size`).
"""

from __future__ import annotations

from math import prod

import msgspec

from optplan.planner.tensors import Parameter


class RowShard(msgspec.Struct, frozen=True):
    """One rank's rows of a parameter.

    Attributes:
        num_ranks: Ranks among which the rows are dealt out.
        rank: This one, from 0.
    """

    num_ranks: int
    rank: int = 0

    def rows_per_rank(self, parameter: Parameter) -> int:
        """Rows of the first rank, to which all are padded; a scalar counts as one row."""
        return -(-_num_rows(parameter) // self.num_ranks)

    def num_rows(self, parameter: Parameter) -> int:
        """Rows of this rank."""
        rows = self.rows_per_rank(parameter)
        return min(max(_num_rows(parameter) - self.rank * rows, 0), rows)

    def is_even(self, parameter: Parameter) -> bool:
        """Whether every rank holds as many rows."""
        return _num_rows(parameter) % self.num_ranks == 0

    def padded_numel(self, parameter: Parameter) -> int:
        """Elements of the stored shard, the same on every rank."""
        return self.rows_per_rank(parameter) * prod(parameter.shape[1:])

    def local(self, parameter: Parameter) -> Parameter:
        """The parameter as this rank's optimizer meets it: without the rows of the others, and without padding."""
        return msgspec.structs.replace(parameter, shape=(self.num_rows(parameter), *parameter.shape[1:]))


def _num_rows(parameter: Parameter) -> int:
    return parameter.shape[0] if parameter.shape else 1
