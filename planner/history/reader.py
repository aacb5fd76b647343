"""From a snapshot's plain containers to one device's history, every field checked.

Source: pytorch `torch/csrc/cuda/memory_snapshot.cpp` and `torch/cuda/memory.py` (the snapshot's form, 2.1 to 2.13).
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

from optplan.planner.allocator.settings import NUM_SIZE_CLASSES, AllocatorSettings, parse_alloc_conf
from optplan.planner.errors import ConfigError, shorten
from optplan.planner.history.events import ACTIONS, DeviceHistory, HeldBlock, HeldSegment, HistoryEvent
from optplan.planner.history.file import read_snapshot

_PATH_LIMIT = 200
_LARGEST = 2**63 - 1
_STATES = ("active_allocated", "active_awaiting_free", "active_pending_free", "inactive")
_CONF_KEYS = ("PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_ALLOC_CONF", "last_allocator_settings")


def read_history(path: str | os.PathLike[str], *, device: int | None = None) -> DeviceHistory:
    """The history of one device in a snapshot file.

    Args:
        device: Its index; by default the first with a history.

    Raises:
        ConfigError: The file cannot be read (see `read_snapshot`), is no snapshot, holds no history, holds actions
            unknown here, or has no such device.
    """
    where = shorten(os.fspath(path), limit=_PATH_LIMIT)
    return parse_history(read_snapshot(path), where=where, device=device)


def parse_history(value: Any, *, where: str, device: int | None = None) -> DeviceHistory:
    """The history of one device in a snapshot; `where` names its origin in errors.

    Raises:
        ConfigError: As for `read_history`, apart from the file itself.
    """
    snapshot = _Reader(where).snapshot(value)
    traces = snapshot.list(snapshot.value.get("device_traces"), "device_traces")
    index = _device(traces, device, where)
    events = [snapshot.event(entry) for entry in snapshot.list(traces[index], f"device_traces[{index}]")]
    segments = [snapshot.segment(entry) for entry in snapshot.list(snapshot.value.get("segments"), "segments")]
    settings, alloc_conf = _settings(snapshot.value.get("allocator_settings"), events)
    return DeviceHistory(
        where, index, events, [segment for at, segment in segments if at == index], settings, alloc_conf
    )


def _device(traces: list[Any], device: int | None, where: str) -> int:
    recorded = [index for index, trace in enumerate(traces) if trace]
    if not recorded:
        raise ConfigError(
            f"{where} holds no history: call torch.cuda.memory._record_memory_history() before what is to be recorded"
        )
    if device is None:
        return recorded[0]
    if device not in recorded:
        raise ConfigError(f"{where} holds no history of device {device}; recorded: {', '.join(map(str, recorded))}")
    return device


class _Reader:
    """Takes a snapshot apart; every method refuses what is not of the kind it should be."""

    def __init__(self, where: str) -> None:
        self._where = where
        self.value: Mapping[str, Any] = {}

    def snapshot(self, value: Any) -> _Reader:
        """The reader at the snapshot itself, which a record of ours holds among other things."""
        if isinstance(value, dict) and "device_traces" not in value and isinstance(value.get("snapshot"), dict):
            value = value["snapshot"]
        if not isinstance(value, dict) or "device_traces" not in value:
            kind = "a list" if isinstance(value, list) else shorten(value)
            raise ConfigError(
                f"{self._where} is no snapshot with a history (segments and device_traces), got {kind}; write one with"
                " torch.cuda.memory._dump_snapshot"
            )
        self.value = value
        return self

    def list(self, value: Any, what: str) -> list[Any]:
        """A list."""
        if not isinstance(value, list | tuple):
            raise ConfigError(f"{what} in {self._where} must be a list, got {shorten(value)}")
        return list(value)

    def event(self, entry: Any) -> HistoryEvent:
        """One entry of a trace."""
        entry = self._object(entry, "a trace entry")
        action = entry.get("action")
        if action not in ACTIONS:
            raise ConfigError(
                f"action {shorten(action)} in {self._where} is unknown, perhaps of a newer torch; known:"
                f" {', '.join(ACTIONS)}"
            )
        free = self._integer(entry, "device_free", 0) if action == "oom" else 0
        address = 0 if action in ("oom", "snapshot") else self._integer(entry, "addr")
        stream = self._integer(entry, "stream", 0)
        return HistoryEvent(action, address, self._integer(entry, "size"), stream, self._owner(entry, "pool_id"), free)

    def segment(self, entry: Any) -> tuple[int, HeldSegment]:
        """A segment and the index of its device."""
        entry = self._object(entry, "a segment")
        address = position = self._integer(entry, "address")
        kind = entry.get("segment_type")
        if kind not in ("small", "large"):
            raise ConfigError(f"segment_type in {self._where} must be small or large, got {shorten(kind)}")
        blocks = []
        for block in self.list(entry.get("blocks"), "blocks"):
            held, in_use = self._block(self._object(block, "a block"), position)
            position = held.address + held.size
            if in_use:
                blocks.append(held)
        return self._integer(entry, "device", 0), HeldSegment(
            address=address,
            size=self._integer(entry, "total_size"),
            stream=self._integer(entry, "stream", 0),
            owner=self._owner(entry, "segment_pool_id"),
            small=kind == "small",
            expandable=entry.get("is_expandable") is True,
            allocated=sum(block.size for block in blocks if not block.waiting),
            active=sum(block.size for block in blocks),
            blocks=tuple(blocks),
        )

    def _block(self, block: Mapping[str, Any], position: int) -> tuple[HeldBlock, bool]:
        state = block.get("state")
        if state not in _STATES:
            raise ConfigError(f"state {shorten(state)} in {self._where} is unknown; known: {', '.join(_STATES)}")
        size = self._integer(block, "size")
        requested = self._integer(block, "requested_size", size)
        held = HeldBlock(self._integer(block, "address", position), size, requested, state != "active_allocated")
        return held, state != "inactive"

    def _object(self, value: Any, what: str) -> Mapping[str, Any]:
        if not isinstance(value, dict):
            raise ConfigError(f"{what} in {self._where} must be an object, got {shorten(value)}")
        return value

    def _integer(self, entry: Mapping[str, Any], key: str, default: int | None = None) -> int:
        value = entry.get(key, default)
        if type(value) is not int or not 0 <= value <= _LARGEST:
            raise ConfigError(f"{key} in {self._where} must be an integer from 0 on, got {shorten(value)}")
        return value

    def _owner(self, entry: Mapping[str, Any], key: str) -> tuple[int, int]:
        value = entry.get(key, (0, 0))
        if not isinstance(value, list | tuple) or len(value) != 2 or any(type(part) is not int for part in value):
            raise ConfigError(f"{key} in {self._where} must be two integers, got {shorten(value)}")
        return (value[0], value[1])


def _settings(value: Any, events: list[HistoryEvent]) -> tuple[AllocatorSettings, str | None]:
    """The settings a snapshot names; by its events alone only expandable segments can be told."""
    expandable = any(event.action == "segment_map" for event in events)
    if not isinstance(value, dict):
        return AllocatorSettings(expandable_segments=expandable), None
    text = next((value[key] for key in _CONF_KEYS if isinstance(value.get(key), str)), "")
    try:
        return parse_alloc_conf(text), text
    except ConfigError:
        # The text may hold what only another torch knows; the values read from it stand beside it.
        return _from_values(value, expandable), text


def _from_values(value: Mapping[str, Any], expandable: bool) -> AllocatorSettings:
    limit, threshold = value.get("max_split_size"), value.get("garbage_collection_threshold")
    divisions = value.get("roundup_power2_divisions")
    classes = tuple(divisions.values()) if isinstance(divisions, dict) else ()
    usable = len(classes) == NUM_SIZE_CLASSES and all(type(part) is int for part in classes) and any(classes)
    return AllocatorSettings(
        max_split_bytes=limit if type(limit) is int and limit > 0 else None,
        roundup_power2_divisions=classes if usable else (),
        garbage_collection_threshold=threshold if isinstance(threshold, float) else 0.0,
        expandable_segments=expandable,
    )
