"""The estimate against training steps measured on an H200, and the promises of its record."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import msgspec
import pytest

import optplan
from optplan.planner.catalog import load_model
from optplan.planner.records import EstimateReport

RECORDS = Path(__file__).parent.parent / "records"
CASES = [json.loads(line) for line in (RECORDS / "public_h200_cases.jsonl").read_text().splitlines()]

OPTIMIZERS: dict[str, dict[str, Any]] = {
    "adamw": {"optimizer": "adamw"},
    "adamw_foreach": {"optimizer": "adamw", "options": {"implementation": "foreach"}},
    "sgd": {"optimizer": "sgd"},
    "adafactor": {"optimizer": "adafactor", "options": {"implementation": "transformers"}},
    "adam_mini": {"optimizer": "adam-mini", "options": {"implementation": "official"}},
}


def name_of(case: dict[str, Any]) -> str:
    checkpointing = "-checkpointing" if case["checkpointing"] else ""
    return (
        f"{case['model']}-{case['precision']}-{case['optimizer']}-b{case['batch']}-s{case['seq']}"
        f"-{case['attention']}{checkpointing}"
    )


def estimate_case(case: dict[str, Any]) -> EstimateReport:
    return optplan.estimate(
        case["model"],
        gpu="h200-141g",
        precision=case["precision"],
        batch_size=case["batch"],
        seq_len=case["seq"],
        checkpointing="full" if case["checkpointing"] else "none",
        attention=case["attention"],
        **OPTIMIZERS[case["optimizer"]],
    )


@pytest.mark.parametrize("case", CASES, ids=name_of)
def test_state_and_parameters_as_measured_to_the_byte(case: dict[str, Any]) -> None:
    report = estimate_case(case)
    (row,) = report.estimates
    itemsize = 2 if case["precision"] == "bf16" else 4
    assert report.model.num_parameters == case["params"]
    assert row.bytes.parameters == row.bytes.gradients == case["params"] * itemsize
    assert row.state_tensors == case["state_by"]
    assert row.bytes.optimizer_state == case["state"]


RESERVED_APART = {"gemma-2-2b": 0.0344, "bert-large-fp32": 0.0391}
"""Steps whose reserved bytes are that far off: segments at ascending addresses would give those measured of gemma-2-2b,
a third step, which is not simulated, those of bert-large."""


def reserved_tolerance(case: dict[str, Any]) -> float:
    return RESERVED_APART.get(case["model"], RESERVED_APART.get(f"{case['model']}-{case['precision']}", 0.01))


@pytest.mark.parametrize("case", CASES, ids=name_of)
def test_peaks_as_measured(case: dict[str, Any]) -> None:
    (row,) = estimate_case(case).estimates
    assert row.phases is not None
    assert row.peak_reserved_bytes is not None
    assert row.peak_allocated_bytes == pytest.approx(case["peak"], rel=0.001)
    assert row.peak_reserved_bytes == pytest.approx(case["reserved"], rel=reserved_tolerance(case))
    steady = case["phases"]
    for phase in ("forward", "backward", "step"):
        assert row.phases[phase].peak_allocated_bytes == pytest.approx(steady[phase]["peak"], rel=0.001)


def test_the_record_has_the_agreed_keys() -> None:
    report = msgspec.to_builtins(optplan.estimate("llama-7b", gpu="a100-40g", optimizer="micro-adam"))
    assert report["schema"] == "optplan.estimate/1"
    assert {"schema", "version", "engine", "model", "gpu", "config", "estimates", "recommendation"} <= set(report)
    assert list(report["model"]) == ["name", "num_parameters", "source"]
    assert list(report["gpu"]) == ["name", "total_bytes", "usable_bytes", "context_bytes"]
    assert list(report["config"]) == [
        "precision", "batch_size", "seq_len", "grad_accum", "checkpointing", "attention", "gpus", "sharding",
        "alloc_conf", "fused_loss", "step_in_backward", "clip_grad_norm", "keep_grads", "padding_mask", "empty_cache",
        "nodes", "tensor_parallel", "sequence_parallel", "pipeline_parallel", "pipeline_schedule",
    ]  # fmt: skip
    (row,) = report["estimates"]
    assert {
        "optimizer", "implementation", "options", "bytes", "state_tensors", "phases", "peak_allocated_bytes",
        "peak_phase", "peak_categories", "peak_reserved_bytes",
        "peak_reserved_range_bytes", "device_bytes", "fits", "headroom_bytes",
        "max_batch_size", "step_seconds",
    } <= set(row)  # fmt: skip
    assert list(row["bytes"]) == ["parameters", "gradients", "master_weights", "optimizer_state"]
    assert list(row["phases"]) == ["forward", "backward", "step"]
    assert "per_tensor" not in row


@pytest.mark.parametrize("model", ["llama-7b", "gpt2", "bert-base", "mixtral-8x7b"])
def test_the_record_survives_json(model: str) -> None:
    report = optplan.estimate(model, gpu="h200", per_tensor=model == "gpt2")
    assert msgspec.json.decode(msgspec.json.encode(report), type=EstimateReport) == report


@pytest.mark.parametrize("model", ["llama-7b", "gpt2"])
@pytest.mark.parametrize("precision", ["bf16", "fp32", "amp", "mixed", "fp16-amp"])
def test_the_categories_at_the_peak_add_up_to_it(model: str, precision: str) -> None:
    for row in optplan.estimate(model, gpu="h200", precision=precision).estimates:
        assert row.peak_categories is not None
        assert row.phases is not None
        assert row.peak_phase is not None
        assert sum(row.peak_categories.values()) == row.peak_allocated_bytes
        assert row.peak_allocated_bytes == max(phase.peak_allocated_bytes for phase in row.phases.values())
        assert row.phases[row.peak_phase].peak_allocated_bytes == row.peak_allocated_bytes
        assert row.peak_reserved_bytes is not None
        assert row.peak_allocated_bytes <= row.peak_reserved_bytes
        assert row.device_bytes == row.peak_reserved_bytes + 804_061_184


def test_mixed_precision_keeps_master_weights() -> None:
    (row,) = optplan.estimate("gpt2", gpu="h200", precision="mixed", optimizer="adamw").estimates
    assert msgspec.structs.astuple(row.bytes) == (
        2 * 124_439_808, 2 * 124_439_808, 4 * 124_439_808, 8 * 124_439_808 + 148 * 4,
    )  # fmt: skip


def test_the_largest_micro_batch_fits_and_one_more_does_not() -> None:
    report = optplan.estimate("tinyllama-1.1b", gpu="a100-40g")
    for row in report.estimates:
        assert row.max_batch_size is not None
        assert row.max_batch_size > 0
        for batch_size, fits in ((row.max_batch_size, True), (row.max_batch_size + 1, False)):
            (again,) = optplan.estimate(
                "tinyllama-1.1b",
                gpu="a100-40g",
                optimizer=row.optimizer,
                options={"implementation": row.implementation},
                batch_size=batch_size,
            ).estimates
            assert again.fits is fits


def test_nothing_fits_where_not_even_the_parameters_do() -> None:
    report = optplan.estimate("llama-2-70b", gpu="t4-16g")
    assert all(row.fits is False and row.max_batch_size == 0 for row in report.estimates)
    assert report.recommendation is None


def test_a_family_without_rules_has_no_peak() -> None:
    report = optplan.estimate("bloom-560m", gpu="h200")
    for row in report.estimates:
        assert row.bytes.parameters == 2 * 559_214_592
        assert row.fits is None
        assert (row.phases, row.peak_allocated_bytes, row.peak_phase, row.peak_categories) == (None,) * 4
        assert (row.headroom_bytes, row.max_batch_size, row.peak_reserved_bytes, row.device_bytes) == (None,) * 4
    assert report.recommendation is None
    assert report.notes == [
        "bloom-560m adds ALiBi to its attention scores, which sdpa cannot: "
        "eager attention is taken, as transformers does",
        "bloom models have no step rules in this version: their peak is not predicted; try --engine trace",
    ]


def test_resident_bytes_beyond_the_gpu_do_not_fit_whatever_the_peak() -> None:
    (row,) = optplan.estimate("falcon-40b", gpu="a100-40g", optimizer="sgd").estimates
    assert row.fits is False


def test_per_tensor_rows_add_up_to_the_state() -> None:
    for optimizer in ("adamw", "micro-adam", "adam-mini", "adapprox", "adamw-8bit", "paged-adamw-8bit"):
        (row,) = optplan.estimate("gpt2", gpu="h200", optimizer=optimizer, per_tensor=True).estimates
        assert isinstance(row.per_tensor, list)
        assert sum(t.bytes for t in row.per_tensor if t.device == "device") == row.bytes.optimizer_state
        names = {parameter.name for parameter in load_model("gpt2").unique_parameters}
        assert {t.parameter for t in row.per_tensor} - {""} == names


def test_saving_is_counted_against_adamw() -> None:
    report = optplan.estimate("tinyllama-1.1b", gpu="h200", batch_size=2, seq_len=1024)
    rows = {row.optimizer: row for row in report.estimates}
    assert rows["adamw"].saving_against_adamw is None
    saving = rows["sgd"].saving_against_adamw
    assert saving is not None
    # Measured: 4,400,194,340 bytes of state with AdamW, 2,200,096,768 with SGD; the step's peak moves by the same.
    assert saving.state_bytes == 2_200_097_572
    assert saving.surviving == pytest.approx((11_420_845_056 - 9_218_548_224) / 2_200_097_572, abs=0.02)
