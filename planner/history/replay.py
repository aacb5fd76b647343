"""`optplan replay`: a recorded history under its own settings, under others, on a smaller device."""

from __future__ import annotations

import os
from collections.abc import Iterable

from optplan.planner.allocator.device import DeviceAllocator, OutOfMemory
from optplan.planner.allocator.driver import Driver
from optplan.planner.allocator.pools import DeviceBlock
from optplan.planner.allocator.settings import AllocatorSettings, parse_alloc_conf
from optplan.planner.history.addresses import RecordedAddresses
from optplan.planner.history.events import DeviceHistory
from optplan.planner.history.limits import Limits, find_limits
from optplan.planner.history.load import load_start
from optplan.planner.history.reader import read_history
from optplan.planner.history.recorded import RecordedReplay
from optplan.planner.history.report import Agreement, Comparison, Failure, HistoryFacts, HistoryReport, Outcome
from optplan.planner.history.start import StartState, start_state
from optplan.planner.units import format_gib, parse_size
from optplan.planner.version import VERSION


def replay_history(
    path: str | os.PathLike[str],
    *,
    alloc_conf: str | None = None,
    memory: str | int | None = None,
    device: int | None = None,
) -> HistoryReport:
    """A snapshot's history replayed, and what would have become of it elsewhere.

    Args:
        path: A file of `torch.cuda.memory._dump_snapshot`, or a JSON form of it; compressed or not.
        alloc_conf: Settings to try, as in `PYTORCH_CUDA_ALLOC_CONF`; those recorded if left out.
        memory: Bytes that torch can get, or text such as `38GiB`; no limit but that recorded if left out.
        device: Index of the device; the first with a history if left out.

    Raises:
        ConfigError: The file holds no usable history, or the settings or the size cannot be read.
    """
    settings = None if alloc_conf is None else parse_alloc_conf(alloc_conf)
    memory_bytes = parse_size(memory) if isinstance(memory, str) else memory
    history = read_history(path, device=device)
    start = start_state(history)
    limits = find_limits(history, start_reserved_bytes=start.reserved_bytes)
    recorded = RecordedReplay(history, start, limits)
    recorded.run()
    what_if = None
    if settings is not None or memory_bytes is not None:
        trial = _Trial(history, start, settings or history.settings, memory_bytes, follows=limits == Limits())
        what_if = trial.run(recorded.flushes, alloc_conf=history.alloc_conf or "" if alloc_conf is None else alloc_conf)
    return HistoryReport(
        version=VERSION,
        history=_facts(history, start, source=os.fspath(path)),
        replay=_outcome(recorded.allocator, alloc_conf=history.alloc_conf or "", memory_bytes=None, failure=None),
        agreement=_agreement(history, recorded, start),
        what_if=what_if,
        notes=[*_notes(history, start), *_setting_notes(settings or history.settings, memory_bytes)],
    )


class _Trial:
    """A history's requests against an allocator that need not be the one recorded."""

    def __init__(
        self,
        history: DeviceHistory,
        start: StartState,
        settings: AllocatorSettings,
        memory_bytes: int | None,
        *,
        follows: bool,
    ) -> None:
        """Prepare the allocator.

        Args:
            follows: Whether nothing but the program decided when memory was given back, so that under the recorded
                settings the recorded addresses hold until the device is full.
        """
        self._history = history
        self._start = start
        self._memory_bytes = memory_bytes
        self._is_recorded = settings == history.settings
        self._addresses = RecordedAddresses(history.events, once=True)
        if not (follows and self._is_recorded):
            self._addresses.forget()
        driver = Driver(capacity_bytes=memory_bytes, addresses=self._addresses, segment_addresses="placed")
        self._allocator = DeviceAllocator(settings, driver=driver)
        self._live: dict[int, DeviceBlock | None] = {}
        self._waiting: dict[int, DeviceBlock | None] = {}

    def run(self, flushes: Iterable[int], *, alloc_conf: str) -> Outcome:
        """Run the history up to the first request that fails and did not when recorded."""
        failure = self._load() or self._run(set(flushes))
        return _outcome(self._allocator, alloc_conf=alloc_conf, memory_bytes=self._memory_bytes, failure=failure)

    def _load(self) -> Failure | None:
        """Make what is there at the start: as it was, or under other settings, one block after the other anew."""
        if self._is_recorded and self._has_room():
            self._live.update(load_start(self._allocator, self._start, self._history, self._addresses))
            return None
        places = {segment.address: segment for segment in self._start.segments}
        for block in sorted(self._start.blocks.values()):
            segment = places[max(address for address in places if address <= block.address)]
            failure = self._alloc(-1, 0, block.address, block.requested, segment.stream, segment.owner)
            if failure is not None:
                return failure
        return None

    def _has_room(self) -> bool:
        return self._memory_bytes is None or self._start.reserved_bytes <= self._memory_bytes

    def _run(self, flushes: set[int]) -> Failure | None:
        num_allocations = 0
        for index, (action, address, size, stream, owner, _) in enumerate(self._history.events):
            if index in flushes:
                self._allocator.empty_cache()
            if action == "alloc":
                failure = self._alloc(index, num_allocations, address, size, stream, owner)
                if failure is not None:
                    return failure
                num_allocations += 1
            elif action == "free_requested":
                block = self._waiting[address] = self._live.pop(address, None)
                self._allocator.free_when_done(block)
            elif action == "free_completed":
                self._allocator.finish(self._waiting.pop(address, None))
        return None

    def _alloc(
        self, index: int, num_allocations: int, address: int, size: int, stream: int, owner: tuple[int, int]
    ) -> Failure | None:
        try:
            self._live[address] = self._allocator.alloc(size, stream=stream, owner=owner)
        except OutOfMemory:
            allocator = self._allocator
            return Failure(index, num_allocations, size, allocator.allocated_bytes, allocator.reserved_bytes)
        if self._allocator.num_alloc_retries:
            self._addresses.forget()
        return None


def _outcome(
    allocator: DeviceAllocator, *, alloc_conf: str, memory_bytes: int | None, failure: Failure | None
) -> Outcome:
    return Outcome(
        alloc_conf=alloc_conf,
        memory_bytes=memory_bytes,
        peak_allocated_bytes=allocator.allocated_peak_bytes,
        peak_requested_bytes=allocator.requested_peak_bytes,
        peak_active_bytes=allocator.active_peak_bytes,
        peak_reserved_bytes=allocator.driver.reserved_peak_bytes,
        final=allocator.statistics(),
        num_alloc_retries=allocator.num_alloc_retries,
        out_of_memory=failure,
    )


def _facts(history: DeviceHistory, start: StartState, *, source: str) -> HistoryFacts:
    actions = [event.action for event in history.events]
    blocks = start.blocks.values()
    return HistoryFacts(
        source=source,
        device=history.device,
        num_events=len(actions),
        num_allocations=actions.count("alloc"),
        num_ooms=actions.count("oom"),
        num_streams=len({event.stream for event in history.events if event.action == "alloc"}),
        alloc_conf=history.alloc_conf,
        start_reserved_bytes=start.reserved_bytes,
        start_blocks=len(blocks),
        start_unknown_blocks=sum(block.size is None for block in blocks),
    )


def _agreement(history: DeviceHistory, replay: RecordedReplay, start: StartState) -> Agreement:
    final, segments = replay.allocator.statistics(), history.segments
    requested_peak, reserved_peak = _recorded_peaks(history, start)
    comparisons = [
        Comparison("peak_requested_bytes", requested_peak, replay.allocator.requested_peak_bytes),
        Comparison("peak_reserved_bytes", reserved_peak, replay.allocator.driver.reserved_peak_bytes),
        Comparison("final_allocated_bytes", sum(segment.allocated for segment in segments), final.allocated_bytes),
        Comparison("final_active_bytes", sum(segment.active for segment in segments), final.active_bytes),
        Comparison("final_reserved_bytes", sum(segment.size for segment in segments), final.reserved_bytes),
        Comparison("final_segments", sum(not segment.expandable for segment in segments), final.num_segments),
    ]
    return Agreement(
        replay.num_allocations,
        replay.num_equal_addresses,
        replay.num_moves,
        replay.num_equal_moves,
        replay.first_difference,
        comparisons,
    )


def _recorded_peaks(history: DeviceHistory, start: StartState) -> tuple[int, int]:
    """Peaks of requested and of reserved bytes by the entries alone."""
    requested = requested_peak = sum(block.requested for block in start.blocks.values())
    reserved = reserved_peak = start.reserved_bytes
    for action, _, size, *_ in history.events:
        if action == "alloc":
            requested += size
            requested_peak = max(requested_peak, requested)
        elif action == "free_completed":
            requested -= size
        elif action in ("segment_alloc", "segment_map"):
            reserved += size
            reserved_peak = max(reserved_peak, reserved)
        elif action in ("segment_free", "segment_unmap"):
            reserved -= size
    return requested_peak, reserved_peak


def _notes(history: DeviceHistory, start: StartState) -> list[str]:
    notes = []
    if history.alloc_conf is None:
        notes.append("the snapshot does not tell the allocator's settings: torch's own are taken")
    unknown = sum(block.size is None for block in start.blocks.values())
    if start.segments:
        notes.append(
            f"the recording begins with {format_gib(start.reserved_bytes)} reserved and {len(start.blocks)} blocks in"
            f" use; the sizes of {unknown} that end within it are worked out, each at most 1 MiB too small"
        )
    return notes


def _setting_notes(settings: AllocatorSettings, memory_bytes: int | None) -> list[str]:
    """What of the settings does nothing in what is asked."""
    notes = [f"{key} has no effect on the memory simulated here" for key in settings.ignored]
    limited = settings.memory_fraction < 1 and memory_bytes is not None
    if settings.garbage_collection_threshold and not limited:
        notes.append(
            "garbage_collection_threshold has no effect without a share of the device: add --memory and"
            " per_process_memory_fraction below 1"
        )
    elif settings.memory_fraction < 1 and not limited:
        notes.append("per_process_memory_fraction has no effect without --memory")
    return notes
