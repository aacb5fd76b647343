"""What a page adds to an estimate: the configuration in focus, its state, its step."""

from __future__ import annotations

import msgspec

import optplan
from optplan.planner.estimate_details import details_of, focus_of


def test_the_recommendation_is_in_focus_as_it_would_run() -> None:
    report = optplan.estimate("llama-3.2-1b", gpu="rtx-3090-24g", optimizer=["adamw", "lion"], batch_size=4)
    assert report.recommendation is not None
    assert report.recommendation.config.checkpointing == "full"
    details = details_of(report)
    assert details is not None
    assert details.config.checkpointing == "full"
    (row,) = optplan.estimate(
        "llama-3.2-1b", gpu="rtx-3090-24g", optimizer=report.recommendation.optimizer, batch_size=4,
        checkpointing="full",
    ).estimates  # fmt: skip
    assert details.estimate.peak_allocated_bytes == row.peak_allocated_bytes


def test_without_a_recommendation_the_smallest_peak_is_in_focus() -> None:
    report = optplan.estimate("llama-7b", gpu="t4-16g", optimizer=["adamw", "adafactor"])
    assert report.recommendation is None
    row, config = focus_of(report)
    assert row.optimizer == "adafactor"
    assert config == report.config


def test_state_rows_add_up_to_the_state() -> None:
    report = optplan.estimate("gpt2", gpu="a100-40g", optimizer="adamw")
    details = details_of(report)
    assert details is not None
    # GPT-2 small has 124,439,808 parameters, AdamW two moments of 2 bytes and a step counter of 4 bytes for each of
    # its 148 tensors.
    assert sum(row.bytes for row in details.state if row.device == "device") == 2 * 2 * 124_439_808 + 148 * 4
    embedding = next(row for row in details.state if row.parameter == "transformer.wte.weight")
    assert (embedding.shape, embedding.count, embedding.bytes_each) == ((50257, 768), 1, 2 * 50257 * 768)
    layers = next(row for row in details.state if row.parameter == "transformer.h.*.mlp.c_fc.weight")
    assert (layers.count, layers.bytes) == (12, 12 * 2 * 768 * 3072)


def test_the_curve_reaches_the_peak() -> None:
    report = optplan.estimate("gpt2", gpu="a100-40g", optimizer="adamw")
    details = details_of(report)
    assert details is not None
    assert details.curve is not None
    assert max(point.allocated_bytes for point in details.curve.points) == report.estimates[0].peak_allocated_bytes


def test_what_cannot_be_made_again_has_no_details() -> None:
    report = optplan.estimate("gpt2", gpu="a100-40g", optimizer="adamw")
    other = msgspec.structs.replace(report.model, num_parameters=1)
    assert details_of(msgspec.structs.replace(report, model=other)) is None
    assert details_of(msgspec.structs.replace(report, engine="trace")) is None
    unknown = msgspec.structs.replace(report.model, name="no such model")
    assert details_of(msgspec.structs.replace(report, model=unknown)) is None
    assert details_of(msgspec.structs.replace(report, estimates=[])) is None
