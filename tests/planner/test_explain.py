"""The explanation adds up to the estimate, and its formulas to its numbers."""

from __future__ import annotations

import math
import re
from typing import Any

import pytest

import optplan
from optplan.planner.errors import ConfigError
from optplan.planner.explain import explain
from optplan.planner.explanation import ExplainedPart, Explanation
from optplan.planner.optimizers.registry import optimizer_ids


def parts_of(record: Explanation, key: str) -> list[ExplainedPart]:
    return [part for part in record.parts if part.key == key]


def product(formula: str) -> int:
    """The value of the product that a formula begins with: `32 x 11008 x 2 B (why)`."""
    matched = re.match(r"((?:[\d,]+ (?:tokens )?x )*[\d,]+) B\b", formula)
    assert matched, formula
    return math.prod(int(number.replace(",", "")) for number in re.findall(r"[\d,]+", matched.group(1)))


@pytest.mark.parametrize("optimizer", [name for name in optimizer_ids() if name not in ("soap", "galore", "apollo")])
@pytest.mark.parametrize(("model", "precision"), [("gpt2", "bf16"), ("qwen2.5-0.5b", "mixed")])
def test_the_parts_add_up_to_the_estimate(model: str, precision: str, optimizer: str) -> None:
    record = explain(model, gpu="h200", optimizer=optimizer, precision=precision)
    (row,) = optplan.estimate(model, gpu="h200", optimizer=optimizer, precision=precision).estimates
    assert parts_of(record, "parameters")[0].bytes == row.bytes.parameters
    assert parts_of(record, "gradients")[0].bytes == row.bytes.gradients
    assert sum(part.bytes for part in parts_of(record, "master_weights")) == row.bytes.master_weights
    on_device = [part for part in parts_of(record, "optimizer_state") if "not counted" not in part.title]
    assert sum(part.bytes for part in on_device) == row.bytes.optimizer_state
    (peak,) = parts_of(record, "peak")
    assert sum(line.bytes for line in peak.lines) == peak.bytes == row.peak_allocated_bytes
    (verdict,) = parts_of(record, "verdict")
    assert verdict.bytes == row.headroom_bytes


def test_the_verdict_is_that_of_the_estimate_where_fragmentation_decides() -> None:
    step: Any = {"gpus": 48, "sharding": "fsdp2", "precision": "mixed", "checkpointing": "full"}
    record = explain("llama-3.1-70b", gpu="a100-40g", optimizer="adamw", **step)
    (verdict,) = parts_of(record, "verdict")
    assert record.fits is False
    assert verdict.title == "Headroom: the step does not fit"
    assert verdict.remark.endswith(
        "GiB per GPU; it fits by bytes, but fragmentation leaves no room for a request of 448.00 MiB: 4.02 GiB are "
        "cached in segments that cannot be given back."
    )


@pytest.mark.parametrize("optimizer", [name for name in optimizer_ids() if name != "soap"])
def test_every_formula_gives_its_number(optimizer: str) -> None:
    record = explain("tinyllama-1.1b", gpu="h200", optimizer=optimizer)
    for key in ("parameters", "gradients", "master_weights", "optimizer_state"):
        for part in parts_of(record, key):
            for line in part.lines:
                assert product(line.formula) == line.bytes_each, line
                assert line.bytes == line.count * line.bytes_each


def test_what_is_alive_is_so_many_tokens_of_a_width() -> None:
    (peak,) = parts_of(explain("llama-2-7b", gpu="h200", batch_size=4, seq_len=1024), "peak")
    lines = {line.name: line for line in peak.lines}
    # The activation's input and output of a SwiGLU in bf16: 4096 tokens of 11008 in each of 32 layers.
    gate = lines["model.layers.*.mlp.gate_proj output (activations)"]
    assert (gate.count, gate.bytes_each, gate.formula) == (32, 90_177_536, "4096 tokens x 11008 x 2 B")
    for line in peak.lines:
        if "resident" not in line.name and line.name != "blocks handed out whole":
            assert -(-product(line.formula) // 512) * 512 == line.bytes_each, line


@pytest.mark.parametrize(
    ("optimizer", "bytes_an_element"),
    # Parameter and gradient in bf16 and the moments, read and written; the gradient is only read.
    [("adamw", 14), ("sgd", 10), ("lion", 10)],
)
def test_the_traffic_is_that_of_the_tensors(optimizer: str, bytes_an_element: int) -> None:
    (moved,) = parts_of(explain("gpt2", gpu="h200", optimizer=optimizer), "moved")
    counters = 148 * 8 if optimizer == "adamw" else 0
    assert moved.bytes == bytes_an_element * 124_439_808 + counters
    assert "4,280 GB/s" in moved.remark


def test_every_part_names_its_source() -> None:
    for optimizer in ("adamw", "adam-mini"):
        for part in explain("llama-7b", gpu="a100-40g", optimizer=optimizer).parts:
            assert part.source


def test_a_family_without_rules_is_explained_as_far_as_it_is_known() -> None:
    record = explain("bloom-560m", gpu="h200")
    assert (record.peak_allocated_bytes, record.peak_phase) == (None, None)
    assert [part.key for part in record.parts] == [
        *("parameters", "gradients"),
        *("optimizer_state", "optimizer_state", "optimizer_state"),
        *("moved", "gpu"),
    ]


def test_one_optimizer_at_a_time() -> None:
    with pytest.raises(ConfigError) as caught:
        explain("gpt2", gpu="h200", optimizer=["adamw", "sgd"])  # type: ignore[arg-type]
    assert str(caught.value) == "one optimizer is explained at a time, got 2"
