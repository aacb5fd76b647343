"""The settings of torch's CUDA caching allocator: what `PYTORCH_CUDA_ALLOC_CONF` says, as torch reads it.

Source: pytorch `c10/core/AllocatorConfig.h` and `.cpp`, `c10/cuda/CUDAAllocatorConfig.h` and `.cpp` (2.11 to 2.13).
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from typing import Any

import msgspec

from optplan.planner.allocator.caching import LARGE_SEGMENT, OWN_SEGMENT_LIMIT, ROUNDING, SEGMENT_ROUNDING, SMALL_LIMIT
from optplan.planner.allocator.caching import SMALL_SEGMENT as _SMALL_SEGMENT
from optplan.planner.errors import ConfigError, shorten, unknown
from optplan.planner.units import MIB, round_up

NUM_SIZE_CLASSES = 16
"""Size classes of `roundup_power2_divisions`: the first up to 2 MiB, the last from 32 GiB."""

_IGNORED = {
    "release_lock_on_cudamalloc", "release_lock_on_hipmalloc", "graph_capture_record_stream_reuse",
    "throw_on_cudamalloc_oom", "pinned_use_background_threads", "pinned_use_cuda_host_register",
    "pinned_use_hip_host_register", "pinned_num_register_threads", "pinned_reserve_segment_size_mb",
    "pinned_free_catch_all",
}  # fmt: skip
"""Keys that torch knows and that change nothing about the device memory simulated here."""


class AllocatorSettings(msgspec.Struct, frozen=True):
    """How the allocator deals out memory.

    Attributes:
        max_split_bytes: Blocks of at least this size are never split and serve no smaller request; None for no limit.
        max_non_split_rounding_bytes: A request of at least `max_split_bytes` takes a block only if it is less than
            this larger.
        roundup_power2_divisions: For each size class the parts into which the room between two powers of two is
            divided, up to whose ends requests are rounded; 0 or 1 for none. Empty for none at all.
        garbage_collection_threshold: Share of the allowed memory above which old cached blocks are given back; 0 for
            never. Without an allowed share below 1 it does nothing.
        expandable_segments: Whether each pool is one range of addresses that grows, in place of segments.
        large_segment_bytes: Segment made for a request between 1 and 10 MiB; also the pages of an expandable range.
        memory_fraction: Share of the device that may be taken.
        ignored: Settings accepted that have no effect here.
    """

    max_split_bytes: int | None = None
    max_non_split_rounding_bytes: int = LARGE_SEGMENT
    roundup_power2_divisions: tuple[int, ...] = ()
    garbage_collection_threshold: float = 0.0
    expandable_segments: bool = False
    large_segment_bytes: int = LARGE_SEGMENT
    memory_fraction: float = 1.0
    ignored: tuple[str, ...] = ()

    @property
    def is_plain(self) -> bool:
        """Whether these settings are torch's own, so that the lean simulator will do."""
        return msgspec.structs.replace(self, ignored=()) == AllocatorSettings()

    def rounded(self, num_bytes: int) -> int:
        """Bytes that a request of `num_bytes` is rounded up to."""
        if not self.roundup_power2_divisions or num_bytes < ROUNDING:
            return max(ROUNDING, round_up(num_bytes, ROUNDING))
        size_class = min(max(0, num_bytes.bit_length() - MIB.bit_length()), NUM_SIZE_CLASSES - 1)
        divisions = self.roundup_power2_divisions[size_class]
        if divisions <= 1 or num_bytes <= ROUNDING * divisions:
            return round_up(num_bytes, ROUNDING)
        power = 1 << (num_bytes.bit_length() - 1)
        return num_bytes if num_bytes == power else round_up(num_bytes, power // divisions)

    def segment_bytes(self, size: int) -> int:
        """Bytes of the segment made for a rounded request of `size` bytes."""
        if size <= SMALL_LIMIT:
            return _SMALL_SEGMENT
        if size < OWN_SEGMENT_LIMIT:
            return self.large_segment_bytes
        return round_up(size, SEGMENT_ROUNDING)


def parse_alloc_conf(text: str) -> AllocatorSettings:
    """The settings that a text such as `max_split_size_mb:128,expandable_segments:True` makes.

    Spaces are dropped; a setting given twice counts as given last; `large_segment_size_mb` is read first, because it
    bounds others. All as torch does.

    Raises:
        ConfigError: A setting is unknown, a value is not of its kind or out of range, or the allocator is not torch's
            own.
    """
    fields: dict[str, Any] = {}
    ignored: list[str] = []
    pairs = _pairs(text)
    for key, value in sorted(pairs, key=lambda pair: pair[0] != "large_segment_size_mb"):
        if key in _READERS:
            _READERS[key](value, fields)
        elif key in _IGNORED:
            ignored.append(key)
        elif key == "backend":
            _check_backend(value)
        else:
            raise unknown("setting in --alloc-conf", key, [*_READERS, "backend", *sorted(_IGNORED)])
    fields.setdefault("max_non_split_rounding_bytes", fields.get("large_segment_bytes", LARGE_SEGMENT))
    return AllocatorSettings(**fields, ignored=tuple(dict.fromkeys(ignored)))


_PAIR = re.compile(r"([^:,\[\]]+):(\[[^\[\]]*\]|[^:,\[\]]+)(?:,|$)")


def _pairs(text: str) -> list[tuple[str, str]]:
    """The settings and their values, spaces dropped."""
    compact, position, pairs = "".join(text.split()), 0, []
    while position < len(compact):
        match = _PAIR.match(compact, position)
        if match is None:
            raise ConfigError(
                f"--alloc-conf {shorten(text)} is not a list of settings; write it like"
                " max_split_size_mb:128,expandable_segments:True"
            )
        pairs.append((match.group(1), match.group(2)))
        position = match.end()
    return pairs


def _check_backend(value: str) -> None:
    if value != "native":
        raise ConfigError(f"backend {shorten(value)} in --alloc-conf is not modelled; allowed: native")


def _refuse(key: str, value: str, allowed: str) -> ConfigError:
    return ConfigError(f"{key} in --alloc-conf must be {allowed}, got {shorten(value)}")


def _integer(key: str, value: str, *, least: int) -> int:
    if not re.fullmatch(r"[0-9]{1,12}", value) or int(value) < least:
        raise _refuse(key, value, f"an integer of at least {least}")
    return int(value)


def _real(key: str, value: str, allowed: str, is_allowed: Callable[[float], bool]) -> float:
    try:
        number = float(value)
    except ValueError:
        number = math.nan
    if not is_allowed(number):
        raise _refuse(key, value, allowed)
    return number


def _read_large_segment(value: str, fields: dict[str, Any]) -> None:
    fields["large_segment_bytes"] = _integer("large_segment_size_mb", value, least=11) * MIB


def _read_max_split(value: str, fields: dict[str, Any]) -> None:
    least = fields.get("large_segment_bytes", LARGE_SEGMENT) // MIB
    fields["max_split_bytes"] = _integer("max_split_size_mb", value, least=least) * MIB


def _read_non_split_rounding(value: str, fields: dict[str, Any]) -> None:
    least = fields.get("large_segment_bytes", LARGE_SEGMENT) // MIB
    fields["max_non_split_rounding_bytes"] = _integer("max_non_split_rounding_mb", value, least=least) * MIB


def _read_threshold(value: str, fields: dict[str, Any]) -> None:
    key = "garbage_collection_threshold"
    fields[key] = _real(key, value, "above 0 and below 1", lambda number: 0 < number < 1)


def _read_fraction(value: str, fields: dict[str, Any]) -> None:
    key = "per_process_memory_fraction"
    fields["memory_fraction"] = _real(key, value, "between 0 and 1", lambda number: 0 <= number <= 1)


def _read_expandable(value: str, fields: dict[str, Any]) -> None:
    if value not in ("True", "False"):
        raise _refuse("expandable_segments", value, "True or False")
    fields["expandable_segments"] = value == "True"


def _read_divisions(value: str, fields: dict[str, Any]) -> None:
    """One number for all size classes, or a list such as `[256:1,512:2,>:8]`."""
    if not value.startswith("["):
        fields["roundup_power2_divisions"] = (_divisions(value, least=1),) * NUM_SIZE_CLASSES
        return
    classes = [0] * NUM_SIZE_CLASSES
    last: int | None = None
    for entry in filter(None, value[1:-1].split(",")):
        bound, _, text = entry.partition(":")
        divisions = _divisions(text, least=0)
        if bound == ">":
            start = 1 if last is None else last + 1
            classes[start:] = [divisions] * (NUM_SIZE_CLASSES - start)
            continue
        index = _size_class(bound)
        if last is None:
            classes[:index] = [divisions] * index
        classes[index], last = divisions, index
    fields["roundup_power2_divisions"] = tuple(classes)


def _divisions(text: str, *, least: int) -> int:
    allowed = "divisions that are a power of two" + ("" if least else " or 0")
    if not re.fullmatch(r"[0-9]{1,12}", text) or int(text) & (int(text) - 1) or int(text) < least:
        raise _refuse("roundup_power2_divisions", text, allowed)
    return int(text)


def _size_class(bound: str) -> int:
    if not re.fullmatch(r"[0-9]{1,12}", bound) or int(bound) < 1 or int(bound) & (int(bound) - 1):
        raise _refuse("roundup_power2_divisions", bound, "sizes in MiB that are powers of two, or >")
    return min(int(bound).bit_length() - 1, NUM_SIZE_CLASSES - 1)


_READERS: dict[str, Callable[[str, dict[str, Any]], None]] = {
    "large_segment_size_mb": _read_large_segment,
    "max_split_size_mb": _read_max_split,
    "max_non_split_rounding_mb": _read_non_split_rounding,
    "roundup_power2_divisions": _read_divisions,
    "garbage_collection_threshold": _read_threshold,
    "expandable_segments": _read_expandable,
    "per_process_memory_fraction": _read_fraction,
}
