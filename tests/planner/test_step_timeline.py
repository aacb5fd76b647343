"""`optplan timeline`'s record: the same peak as the estimate's, and changes that do what they say."""

from __future__ import annotations

import shlex
from typing import Any

import pytest

from optplan.planner.errors import ConfigError
from optplan.planner.estimate import estimate
from optplan.planner.records import Estimate
from optplan.planner.step_timeline import timeline


def _estimate(**request: Any) -> Estimate:
    return estimate("llama-3.2-1b", gpu="a100-40g", **request).estimates[0]


@pytest.mark.parametrize(
    "step",
    [
        {"seq_len": 512},
        {"seq_len": 512, "optimizer": "adamw", "options": ["implementation=foreach"]},
        {"seq_len": 512, "batch_size": 4, "optimizer": "adam-mini"},
        {"seq_len": 512, "attention": "eager", "precision": "amp"},
    ],
    ids=str,
)
def test_the_peak_is_the_estimate_s(step: dict[str, Any]) -> None:
    report = timeline("llama-3.2-1b", gpu="a100-40g", **step)
    row = _estimate(**{"optimizer": "adamw", **step})
    assert report.peak_allocated_bytes == row.peak_allocated_bytes
    assert report.peak_phase == row.peak_phase
    assert {name: size for name, size in report.peak_categories.items() if size} == row.peak_categories
    assert report.peak_reserved_bytes == row.peak_reserved_bytes
    assert max(point.allocated_bytes for point in report.curve) == report.peak_allocated_bytes


def test_the_verdict_is_the_estimate_s_where_fragmentation_decides() -> None:
    step: dict[str, Any] = {"gpu": "a100-40g", "gpus": 48, "sharding": "fsdp2", "precision": "mixed"}
    report = timeline("llama-3.1-70b", checkpointing="full", **step)
    assert report.peak_allocated_bytes < report.gpu.usable_bytes
    (row,) = estimate("llama-3.1-70b", optimizer="adamw", checkpointing="full", **step).estimates
    assert (report.fits, report.headroom_bytes) == (row.fits, row.headroom_bytes)
    assert report.headroom_bytes == report.gpu.usable_bytes - report.peak_allocated_bytes
    assert report.notes[0] == (
        "the step fits by bytes, but fragmentation leaves no room for a request of 448.00 MiB: 4.02 GiB are cached in "
        "segments that cannot be given back"
    )
    assert timeline("llama-3.2-1b", gpu="a100-40g", seq_len=512).fits is True


def test_every_change_is_an_estimate_that_one_can_ask_for() -> None:
    step: dict[str, Any] = {"seq_len": 2048, "batch_size": 4, "attention": "eager"}
    report = timeline("llama-3.2-1b", gpu="a100-40g", options=["implementation=foreach"], **step)
    assert {"--checkpointing full", "--attention sdpa", "--batch-size 2 --grad-accum 2"} <= {
        change.change for change in report.changes
    }
    for change in report.changes:
        words = shlex.split(change.change)
        flags = {
            name.removeprefix("--").replace("-", "_"): value for name, value in zip(*[iter(words)] * 2, strict=True)
        }
        request: dict[str, Any] = {"optimizer": "adamw", "options": ["implementation=foreach"], **step}
        if "optimizer" in flags:
            request |= {"optimizer": flags.pop("optimizer"), "options": None}
        if "set" in flags:
            request["options"] = [flags.pop("set")]
        request |= {name: int(value) if value.isdigit() else value for name, value in flags.items()}
        assert _estimate(**request).peak_allocated_bytes == change.peak_allocated_bytes
        assert change.saved_bytes == report.peak_allocated_bytes - change.peak_allocated_bytes > 0


@pytest.mark.parametrize(
    ("model", "found"),
    [
        (
            "llama-3.2-1b",
            {
                "--fused-loss liger": "makes the head's gradients in the forward, chunk by chunk",
                "--fused-loss chunked": "holds the logits of an eighth of the tokens, made again later",
            },
        ),
        # Liger's package has no loss for it.
        ("gpt2", {"--fused-loss chunked": "holds the logits of an eighth of the tokens, made again later"}),
    ],
)
def test_losses_that_hold_fewer_logits_are_tried(model: str, found: dict[str, str]) -> None:
    report = timeline(model, gpu="a100-40g", batch_size=4, seq_len=1024)
    losses = {change.change: change.why for change in report.changes if change.change.startswith("--fused-loss")}
    assert losses == found


def test_only_what_the_peak_holds_is_addressed() -> None:
    # With 8 tokens the peak holds weights, gradients and state; recomputing activations would lower nothing.
    report = timeline("llama-3.2-1b", gpu="a100-40g", seq_len=8)
    assert "activations" not in {change.addresses for change in report.changes}
    assert [change.saved_bytes for change in report.changes] == sorted(
        (change.saved_bytes for change in report.changes), reverse=True
    )


def test_a_family_without_rules_is_told_of_the_other_engine() -> None:
    with pytest.raises(ConfigError, match=r"^bloom models have no step rules .* try --engine trace$"):
        timeline("bloom-7b1", gpu="a100-80g")
