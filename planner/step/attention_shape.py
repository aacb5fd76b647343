"""The sizes of one attention."""

from __future__ import annotations

import msgspec


class AttentionShape(msgspec.Struct, frozen=True):
    """The sizes of one attention.

    Attributes:
        batch: Sequences.
        seq: Tokens a sequence.
        heads: Query heads.
        kv_heads: Key and value heads.
        width: Elements of one head.
        is_causal: Whether a token sees none that comes after it, where no mask says what it sees.
    """

    batch: int
    seq: int
    heads: int
    kv_heads: int
    width: int
    is_causal: bool = True

    @property
    def numel(self) -> int:
        """Elements of the queries, and of the result."""
        return self.batch * self.seq * self.heads * self.width

    @property
    def num_scores(self) -> int:
        """Elements of the attention weights."""
        return self.batch * self.heads * self.seq * self.seq

    @property
    def comes_joined(self) -> bool:
        """Whether the gradient of the heads' results comes with the heads joined, so that a product must copy it."""
        return self.heads > 1 and self.batch > 1 and self.seq > 1

    @property
    def copies(self) -> int:
        """Query heads that share a key head."""
        return self.heads // self.kv_heads
