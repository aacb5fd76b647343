"""What the accuracy page says of measured steps, on records made by hand and in the committed page."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from typing import Any

import msgspec
import pytest

from optplan.planner.measured.measurement import Environment, Measurement
from optplan.planner.records import ModelRow, ResidentBytes, StepConfig

ROOT = Path(__file__).resolve().parents[2]
PAGE = (ROOT / "docs" / "accuracy.md").read_text(encoding="utf-8")
GIB = 2**30


@pytest.fixture
def sections(monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[Any, Any]]:
    """The two scripts."""
    monkeypatch.syspath_prepend(str(ROOT / ".ci"))
    yield import_module("profiles_section"), import_module("savings_section")
    for name in ("profiles_section", "savings_section"):
        sys.modules.pop(name, None)


def measured(optimizer: str, implementation: str, *, state_gib: float, peak_gib: float, **config: Any) -> Measurement:
    step = {"precision": "bf16", "batch_size": 2, "seq_len": 1024, "grad_accum": 1, "checkpointing": "none"}
    return Measurement(
        version="0.1.0",
        source="live",
        model=ModelRow("gpt2", 124439808, "test"),
        gpu=None,
        config=StepConfig(**{**step, "attention": "sdpa", "gpus": 1, "sharding": "none", **config}),
        optimizer=optimizer,
        implementation=implementation,
        options={},
        bytes=ResidentBytes(GIB, GIB, 0, round(state_gib * GIB)),
        state_tensors={},
        peak_allocated_bytes=round(peak_gib * GIB),
        environment=Environment(python="3.12", optplan="0.1.0", command="", date="2026-11-22T00:00:00Z"),
    )


def test_savings_are_those_of_the_same_step(sections: tuple[Any, Any]) -> None:
    records = {
        "fused": measured("adamw", "fused", state_gib=4, peak_gib=10),
        "mini": measured("adam-mini", "optplan", state_gib=2, peak_gib=8.5),
        "micro": measured("micro-adam", "optplan", state_gib=1, peak_gib=7),
        "other precision": measured("adam-mini", "optplan", state_gib=1, peak_gib=1, precision="fp32"),
    }
    lines = sections[1].savings_section(records)
    assert (
        lines[-1] == "| gpt2 | bf16, 2 x 1024, checkpointing none | 10.00, 4.00 | 1.50 / 2.00 | - | 3.00 / 3.00 | - |"
    )
    assert "In the worst of these steps it is 75%" in lines[1]
    assert sections[1].savings_section({"mini": records["mini"]}) == []


@pytest.mark.parametrize(
    ("command", "world_size", "shown"),
    [
        ("__main__.py profile --model gpt2 --out /tmp/x.json.gz", 1, "optplan profile --model gpt2"),
        ("optplan profile --model gpt2 --steps 6", 1, "optplan profile --model gpt2 --steps 6"),
        (
            "optplan profile --sharding ddp --out x.json.gz --json",
            2,
            "torchrun --nproc-per-node 2 -m optplan profile --sharding ddp",
        ),
        ("torchrun --nproc-per-node 2 -m optplan profile", 2, "torchrun --nproc-per-node 2 -m optplan profile"),
    ],
)
def test_a_command_is_shown_as_it_can_be_given(
    sections: tuple[Any, Any], command: str, world_size: int, shown: str
) -> None:
    place = measured("adamw", "fused", state_gib=1, peak_gib=1).environment
    assert sections[0]._command(msgspec.structs.replace(place, command=command, world_size=world_size)) == shown


def test_the_page_says_what_micro_adam_needs_for_llama_2_7b() -> None:
    (line,) = [line for line in PAGE.splitlines() if line.startswith("- **Llama-2-7B with MicroAdam")]
    assert "35.3 GB with checkpointing full (34.5 reserved, 33.8 allocated at the peak)" in line
    assert "38.6 GB with checkpointing none (37.8 reserved, 33.7 allocated at the peak)" in line


def test_the_page_shows_every_committed_record() -> None:
    rows = {line.partition(" | ")[0].replace("\\", "") for line in PAGE.splitlines()}
    for folder in ("h200_profiles", "h200x2_profiles"):
        for path in (ROOT / "tests" / "records" / folder).glob("*.json.gz"):
            assert f"| {path.name.removesuffix('.json.gz')}" in rows
