from __future__ import annotations

import csv
import io
from typing import Any

import pytest

from optplan.planner.errors import ConfigError
from optplan.planner.estimate import estimate
from optplan.planner.sweep import sweep
from optplan.planner.sweep_records import SweepReport, violation_of
from optplan.reports.sweep_csv import COLUMNS, sweep_csv


@pytest.fixture(scope="module")
def report() -> SweepReport:
    return sweep(
        ["pythia-160m", "gpt2"],
        gpus=["rtx-4090-24g", "a100-80g", "a100-40g"],
        optimizers=["adamw", "micro-adam"],
        options=["window=5"],
        seq_lens=[512, 2048],
        batch_sizes=[1, 4],
        checkpointings=["full"],
        grad_accum=2,
    )


def test_rows_follow_the_axes_in_the_order_given(report: SweepReport) -> None:
    assert [(row.model, row.gpu) for row in report.rows[::8]] == [
        ("pythia-160m", "rtx-4090-24g"),
        ("pythia-160m", "a100-80g"),
        ("pythia-160m", "a100-40g"),
        ("gpt2", "rtx-4090-24g"),
        ("gpt2", "a100-80g"),
        ("gpt2", "a100-40g"),
    ]
    assert [(row.seq_len, row.batch_size, row.optimizer) for row in report.rows[:8]] == [
        (512, 1, "adamw"),
        (512, 1, "micro-adam"),
        (512, 4, "adamw"),
        (512, 4, "micro-adam"),
        (2048, 1, "adamw"),
        (2048, 1, "micro-adam"),
        (2048, 4, "adamw"),
        (2048, 4, "micro-adam"),
    ]


def test_a_row_says_what_an_estimate_says(report: SweepReport) -> None:
    for row in (row for row in report.rows if row.reason is None):
        (single,) = estimate(
            row.model,
            gpu=row.gpu,
            optimizer=row.optimizer,
            options=row.options,
            seq_len=row.seq_len,
            batch_size=row.batch_size,
            checkpointing="full",
            grad_accum=2,
        ).estimates
        assert (row.peak_allocated_bytes, row.peak_phase) == (single.peak_allocated_bytes, single.peak_phase)
        assert (row.peak_reserved_bytes, row.device_bytes) == (single.peak_reserved_bytes, single.device_bytes)
        assert (row.headroom_bytes, row.fits) == (single.headroom_bytes, single.fits)
        assert row.optimizer_state_bytes == single.bytes.optimizer_state
        assert row.parameters_bytes == single.bytes.parameters


def test_adamw_keeps_four_bytes_a_parameter(report: SweepReport) -> None:
    # Two bf16 moments of each of GPT-2's 124,439,808 parameters, and a 4-byte counter for each of its 148 tensors.
    (row,) = [r for r in report.rows if (r.model, r.gpu, r.seq_len, r.batch_size) == ("gpt2", "a100-40g", 512, 1)][:1]
    assert row.optimizer_state_bytes == 4 * 124_439_808 + 4 * 148


def test_a_combination_that_cannot_run_keeps_its_row(report: SweepReport) -> None:
    refused = [row for row in report.rows if row.reason is not None]
    assert {(row.model, row.seq_len) for row in refused} == {("gpt2", 2048)}
    assert refused[0].reason == "--seq-len 2048 is beyond the 1024 positions that gpt2 has embeddings for"
    assert (refused[0].fits, refused[0].peak_allocated_bytes) == (None, None)


def test_the_same_again(report: SweepReport) -> None:
    again = sweep(
        ["pythia-160m"],
        gpus=["rtx-4090-24g"],
        optimizers=["adamw", "micro-adam"],
        options=["window=5"],
        seq_lens=[512, 2048],
        batch_sizes=[1, 4],
        checkpointings=["full"],
        grad_accum=2,
    )
    assert again.rows == report.rows[:8]


def test_a_budget_is_a_limit_on_every_gpu() -> None:
    result = sweep(["gpt2"], gpus=["t4-16g", "h200-141g"], optimizers=["adamw"], seq_lens=[64], budget="20GiB")
    usable = [row.usable_bytes for row in result.rows]
    assert [row.limit_bytes for row in result.rows] == [usable[0], 20 * 2**30]
    assert result.rows[1].headroom_bytes == 20 * 2**30 - (result.rows[1].peak_allocated_bytes or 0)


def test_violations_are_lines() -> None:
    result = sweep(["gpt2"], optimizers=["adamw"], seq_lens=[64, 1025], budget=2**28)
    fits, cannot = (violation_of(row) for row in result.rows)
    peak = result.rows[0].peak_allocated_bytes
    assert peak is not None
    assert fits == (
        f"gpt2 on 256 MiB: adamw (fused), batch 1, sequence 64, bf16, checkpointing none: "
        f"needs {peak} bytes, {peak - 2**28} more than the 268435456 allowed"
    )
    assert cannot is not None
    assert cannot.endswith("cannot run: --seq-len 1025 is beyond the 1024 positions that gpt2 has embeddings for")
    assert result.violations == [fits, cannot]


def test_gpus_work_together_under_each_sharding_and_alone_once() -> None:
    result = sweep(
        ["gpt2"],
        gpus=["a100-40g", "h200-141g"],
        optimizers=["adamw"],
        precisions=["mixed"],
        gpus_per_run=[1, 8],
        shardings=["none", "ddp", "fsdp2"],
    )
    assert [(row.gpus, row.sharding) for row in result.rows[:3]] == [(1, "none"), (8, "ddp"), (8, "fsdp2")]
    assert (result.axes["gpus"], result.axes["sharding"]) == ([1, 8], ["none", "ddp", "fsdp2"])
    for row in result.rows:
        (single,) = estimate(
            "gpt2", gpu=row.gpu, optimizer="adamw", precision="mixed", gpus=row.gpus, sharding=row.sharding
        ).estimates
        assert row.peak_allocated_bytes == single.peak_allocated_bytes
        assert row.step_seconds == (single.step_seconds or {})["step"]
        assert row.tokens_per_second == row.gpus * 1024 / (row.step_seconds or 0)
    # Two fp32 moments of 124,439,808 parameters, an eighth of them on each GPU and a counter for each tensor.
    assert result.rows[2].optimizer_state_bytes == pytest.approx(124_439_808, rel=1e-3)


def test_a_sharding_that_refuses_a_precision_keeps_its_row() -> None:
    result = sweep(
        ["gpt2"],
        gpus=["h200"],
        optimizers=["adamw"],
        precisions=["mixed", "bf16"],
        gpus_per_run=[2],
        shardings=["zero2"],
    )
    mixed, bf16 = result.rows
    assert mixed.fits
    assert bf16.reason == (
        "--sharding zero2 is DeepSpeed's, which keeps fp32 master weights: use --precision mixed, got bf16"
    )


def test_a_violation_says_how_many_gpus() -> None:
    result = sweep(["gpt2"], gpus=["t4-16g"], optimizers=["adamw"], gpus_per_run=[2], shardings=["ddp"], budget=2**28)
    (line,) = result.violations
    assert line.startswith("gpt2 on 2 x t4-16g under ddp: adamw (fused), batch 1, sequence 1024, bf16, ")


def test_a_family_without_rules_is_not_known_to_fit() -> None:
    result = sweep(["bloom-560m"], optimizers=["adamw"], budget="10GiB")
    assert result.rows[0].fits is None
    assert result.violations == [
        "bloom-560m on 10 GiB: adamw (fused), batch 1, sequence 2048, bf16, checkpointing none: "
        "its peak is not predicted"
    ]


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ({}, "no GPU given: add --gpus NAME,NAME (`optplan gpus` lists them) or --budget SIZE"),
        (
            {"budget": "1GiB", "batch_sizes": list(range(1, 20_002))},
            "the grid has 20001 combinations (20001 batch_size); at most 20000 are computed in one sweep",
        ),
        ({"budget": "1GiB", "batch_sizes": []}, "--batch-sizes is empty: give at least one value"),
        ({"budget": "1GiB", "batch_sizes": [1, 0]}, "--batch-size must be an integer between 1 and 1048576, got 0"),
        ({"budget": "1GiB", "seq_lens": [0]}, "--seq-len must be an integer between 1 and 16777216, got 0"),
        ({"budget": "1GiB", "gpus_per_run": [1, 0]}, "--gpus-per-run takes numbers between 1 and 65536, got 0"),
        (
            {"budget": "1GiB", "gpus_per_run": [2]},
            "--gpus-per-run 2 needs a --sharding strategy: ddp, ddp-copies, zero1, zero1-deepspeed, zero2, zero3, "
            "fsdp2, fsdp2-noreshard, fsdp2-hybrid, fsdp2-offload",
        ),
        (
            {"budget": "1GiB", "shardings": ["fsdp2"]},
            "--sharding fsdp2 needs --gpus-per-run of at least 2, got 1",
        ),
        (
            {"budget": "1GiB", "gpus_per_run": [2], "shardings": ["fsdp3"]},
            "unknown sharding for --sharding 'fsdp3'; nearest: fsdp2, ddp",
        ),
        ({"budget": "1GiB", "precisions": ["bf61"]}, "unknown precision for --precision 'bf61'; nearest: bf16"),
        (
            {"budget": "1GiB", "step_in_backward": True, "clip_grad_norm": 1.0},
            "--step-in-backward and --clip-grad-norm contradict each other: "
            "the norm of all gradients needs all of them",
        ),
    ],
)
def test_bad_input_is_refused_before_anything_is_computed(arguments: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ConfigError) as caught:
        sweep(["gpt2"], optimizers=["adamw"], **arguments)
    assert str(caught.value) == sentence


def test_csv_has_a_line_a_row_and_units_in_its_names(report: SweepReport) -> None:
    rows = list(csv.DictReader(io.StringIO(sweep_csv(report))))
    assert len(rows) == 48
    first, single = rows[1], report.rows[1]
    assert (first["model"], first["optimizer"], first["options"]) == ("pythia-160m", "micro-adam", "window=5")
    assert int(first["peak_allocated_bytes"]) == single.peak_allocated_bytes
    assert first["fits"] == "true"
    assert rows[-1]["peak_allocated_bytes"] == ""
    assert rows[-1]["reason"] == "--seq-len 2048 is beyond the 1024 positions that gpt2 has embeddings for"
    assert [name for name in COLUMNS if name.endswith("_bytes")] == [
        "usable_bytes",
        "limit_bytes",
        "parameters_bytes",
        "gradients_bytes",
        "master_weights_bytes",
        "optimizer_state_bytes",
        "peak_allocated_bytes",
        "peak_reserved_bytes",
        "device_bytes",
        "headroom_bytes",
    ]


def test_a_row_that_fragmentation_refuses_does_not_fit_as_in_an_estimate() -> None:
    step: dict[str, Any] = {"gpus_per_run": [56, 64], "shardings": ["fsdp2"], "checkpointings": ["full"]}
    rows = sweep(["llama-3.1-70b"], gpus=["a100-40g"], optimizers=["adamw"], precisions=["mixed"], **step).rows
    assert [(row.gpus, row.fits) for row in rows] == [(56, False), (64, True)]
    assert violation_of(rows[0]) == (
        "llama-3.1-70b on 56 x a100-40g under fsdp2: adamw (fused), batch 1, sequence 2048, mixed, checkpointing full: "
        "fits by bytes, but fragmentation leaves no room"
    )
    assert violation_of(rows[1]) is None
