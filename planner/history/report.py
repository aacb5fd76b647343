"""What `optplan replay` says of a history."""

from __future__ import annotations

from typing import Literal

import msgspec

from optplan.planner.allocator.pools import Statistics

REPLAY_SCHEMA: Literal["optplan.replay/1"] = "optplan.replay/1"


class Failure(msgspec.Struct, frozen=True):
    """The first request that could not be served.

    Attributes:
        event: Index of its entry in the history.
        allocation: How many allocations the history has before it.
        requested_bytes: What it asked for.
        allocated_bytes: What tensors held then.
        reserved_bytes: What was still held from the driver, after all that could be given back had been.
    """

    event: int
    allocation: int
    requested_bytes: int
    allocated_bytes: int
    reserved_bytes: int


class Outcome(msgspec.Struct, frozen=True, kw_only=True):
    """A history run through the simulated allocator.

    Attributes:
        alloc_conf: The settings, empty for torch's own.
        memory_bytes: What the device could give, None for no limit.
        peak_allocated_bytes: The most bytes that tensors held at once.
        peak_requested_bytes: The most bytes asked for at once.
        peak_active_bytes: The most bytes that tensors held or other streams still used at once.
        peak_reserved_bytes: The most bytes held from the driver at once.
        final: The counters after the last event.
        num_alloc_retries: Requests served only after all cached segments had been given back.
        out_of_memory: The request at which the program would have ended, None if all were served.
    """

    alloc_conf: str
    memory_bytes: int | None
    peak_allocated_bytes: int
    peak_requested_bytes: int
    peak_active_bytes: int
    peak_reserved_bytes: int
    final: Statistics
    num_alloc_retries: int
    out_of_memory: Failure | None


class Comparison(msgspec.Struct, frozen=True):
    """One figure that the snapshot tells, and what the replay made of it."""

    name: str
    recorded: int
    replayed: int


class Agreement(msgspec.Struct, frozen=True):
    """How far the replay under the recorded settings is what was recorded.

    Attributes:
        num_allocations: Allocations in the history.
        num_equal_addresses: Those whose address is the recorded one.
        num_moves: Segments or pages that changed hands with the driver.
        num_equal_moves: Those that did at the same place with the same size.
        first_difference: What the first difference is, None if there is none.
        comparisons: Figures that the snapshot tells.
    """

    num_allocations: int
    num_equal_addresses: int
    num_moves: int
    num_equal_moves: int
    first_difference: str | None
    comparisons: list[Comparison]

    @property
    def is_whole(self) -> bool:
        """Whether nothing differs."""
        return self.first_difference is None and all(row.recorded == row.replayed for row in self.comparisons)


class HistoryFacts(msgspec.Struct, frozen=True):
    """The history itself.

    Attributes:
        source: The file.
        device: The device's index.
        num_events: Entries.
        num_allocations: Allocations among them.
        num_ooms: Requests among them that failed.
        num_streams: Streams that memory was allocated on.
        alloc_conf: The settings recorded with it, None if the snapshot does not tell.
        start_reserved_bytes: What was held from the driver before the first event.
        start_blocks: Blocks in use before the first event.
        start_unknown_blocks: Those of them whose size had to be worked out.
    """

    source: str
    device: int
    num_events: int
    num_allocations: int
    num_ooms: int
    num_streams: int
    alloc_conf: str | None
    start_reserved_bytes: int
    start_blocks: int
    start_unknown_blocks: int


class HistoryReport(msgspec.Struct, frozen=True, kw_only=True):
    """The answer of `optplan replay`.

    Attributes:
        replay: The history under the settings it was recorded with.
        agreement: How that compares with the snapshot.
        what_if: The history under the settings and on the device asked for, None if nothing was asked.
        notes: What else to know.
    """

    schema: Literal["optplan.replay/1"] = REPLAY_SCHEMA
    version: str
    history: HistoryFacts
    replay: Outcome
    agreement: Agreement
    what_if: Outcome | None
    notes: list[str] = []
