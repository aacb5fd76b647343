"""The replay's report over records written by hand."""

from __future__ import annotations

import io
from typing import Any

import pytest
from rich.console import Console

from optplan.planner.allocator.pools import Statistics
from optplan.planner.history.report import Agreement, Comparison, Failure, HistoryFacts, HistoryReport, Outcome
from optplan.reports.terminal.replay import render_replay

MIB = 2**20
FACTS = HistoryFacts(
    source="run\x1b[2J.pickle",
    device=0,
    num_events=3000,
    num_allocations=1000,
    num_ooms=0,
    num_streams=2,
    alloc_conf="max_split_size_mb:64",
    start_reserved_bytes=0,
    start_blocks=0,
    start_unknown_blocks=0,
)
WHOLE = Agreement(1000, 1000, 30, 30, None, [Comparison("final_segments", 9, 9)])


def outcome(*, scale: int = 1, **more: Any) -> Outcome:
    size = 100 * MIB * scale
    return Outcome(
        **{
            "alloc_conf": "",
            "memory_bytes": None,
            "peak_allocated_bytes": size,
            "peak_requested_bytes": size,
            "peak_active_bytes": size,
            "peak_reserved_bytes": size + 20 * MIB,
            "final": Statistics(0, 0, 0, size, 0, 0, 0, 9, 0),
            "num_alloc_retries": 0,
            "out_of_memory": None,
        }
        | more
    )


def text_of(width: int = 100, **parts: Any) -> str:
    record = {"version": "0.1.0", "history": FACTS, "replay": outcome(), "agreement": WHOLE, "what_if": None} | parts
    stream = io.StringIO()
    render_replay(HistoryReport(**record), Console(file=stream, width=width, highlight=False, markup=False))
    return stream.getvalue()


def test_a_whole_agreement_is_said_in_one_line_and_no_name_moves_the_cursor() -> None:
    text = text_of()
    assert "The replay is the recording: all 1,000 addresses and all 30 moves of memory are equal." in text
    assert "run?[2J.pickle, device 0" in text
    assert "3,000 events, 1,000 allocations on 2 streams; recorded under max_split_size_mb:64" in text
    assert "What if" not in text


def test_what_differs_is_told() -> None:
    comparisons = [Comparison("final_segments", 9, 8), Comparison("final_active_bytes", 5, 5)]
    agreement = Agreement(1000, 990, 30, 29, "event 7: something else", comparisons)
    lines = text_of(agreement=agreement).splitlines()
    assert lines[3:7] == [
        "The replay leaves the recording: 990 of 1,000 addresses and 29 of 30 moves of memory are equal.",
        "First difference: event 7: something else.",
        "final_segments: recorded 9, replayed 8",
        "",
    ]


@pytest.mark.parametrize(
    ("scale", "cells"),
    [
        (1, "peak allocated 100.00 MiB 100.00 MiB 0 B"),
        (2, "peak allocated 100.00 MiB 200.00 MiB +100.00 MiB"),
        (0, "peak allocated 100.00 MiB 0 B -100.00 MiB"),
    ],
)
def test_another_outcome_stands_beside_it_with_the_difference(scale: int, cells: str) -> None:
    text = text_of(what_if=outcome(scale=scale, alloc_conf="expandable_segments:True"))
    assert cells in [" ".join(line.split()) for line in text.splitlines()]


def test_the_verdict_names_the_request() -> None:
    failure = Failure(12, 5, 3 * MIB, 90 * MIB, 100 * MIB)
    text = " ".join(text_of(what_if=outcome(memory_bytes=100 * MIB, out_of_memory=failure)).split())
    assert (
        "Out of memory at event 12, after 5 allocations: 3.00 MiB asked for with 90.00 MiB allocated and 100.00 MiB"
        " reserved." in text
    )


def test_without_a_failure_the_device_is_large_enough() -> None:
    assert "Everything is served within 300.00 MiB." in text_of(what_if=outcome(memory_bytes=300 * MIB))


def test_notes_come_last() -> None:
    assert text_of(notes=["a remark"]).splitlines()[-1].endswith("a remark")


@pytest.mark.parametrize("width", [40, 60, 200])
def test_no_line_is_wider_than_the_terminal(width: int) -> None:
    text = text_of(width, what_if=outcome(alloc_conf="expandable_segments:True"))
    assert max(map(len, text.splitlines())) <= width
