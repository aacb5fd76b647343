"""Collectives between GPUs: how they are timed, and what their records say of a link."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
COMMAND = [sys.executable, str(ROOT / "benchmarks" / "record_links.py")]


def test_each_collective_and_size_has_a_row(tmp_path: Path) -> None:
    # Two processes on the CPU; a GPU's id is what makes a row count as a measurement of links.
    out = tmp_path / "links.jsonl"
    small = ["--device", "cpu", "--calls", "3", "--most-bytes", str(2**22), "--commit", "abc"]
    subprocess.run([*COMMAND, "--out", str(out), *small], check=True, capture_output=True)
    rows = [json.loads(line) for line in out.read_text("utf-8").splitlines()]
    assert [(row["collective"], row["num_bytes"]) for row in rows] == [
        (collective, size) for collective in ("all_gather", "reduce_scatter", "all_reduce") for size in (2**20, 2**22)
    ]
    for row in rows:
        assert (row["ranks"], row["backend"], row["gpu"]) == (2, "gloo", None)
        assert 0 < row["seconds"]["p20"] <= row["seconds"]["p50"] <= row["seconds"]["p80"]
        assert row["environment"]["commit"] == "abc"


@pytest.mark.parametrize(
    ("collective", "ranks", "share"),
    [("all_gather", 2, 0.5), ("reduce_scatter", 8, 0.875), ("all_reduce", 8, 1.75), ("all_reduce", 2, 1.0)],
)
def test_bytes_through_a_link(collective: str, ranks: int, share: float, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    from link_records import bus_bytes_per_s

    row = {"collective": collective, "ranks": ranks, "num_bytes": 2**30, "seconds": {"p50": 0.01}}
    assert bus_bytes_per_s(row) == share * 2**30 / 0.01
