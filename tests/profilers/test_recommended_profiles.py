"""What `optplan recommend` can name for one GPU, `optplan profile` can run: every optimizer under every precision."""

from __future__ import annotations

import json
from typing import Any

import msgspec
import pytest
import torch

from optplan.planner.estimate import estimate
from optplan.planner.measured.expectation import expect
from optplan.planner.optimizers.registry import OPTIMIZERS
from optplan.planner.precision import PRECISIONS
from optplan.planner.records import GpuRow
from optplan.planner.search.recommend import recommend
from optplan.planner.search.records import Alternative
from optplan.profilers.live.command import profile

TINY = {
    "model_type": "llama", "architectures": ["LlamaForCausalLM"], "hidden_size": 32, "intermediate_size": 48,
    "num_hidden_layers": 1, "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 64,
    "max_position_embeddings": 16, "tie_word_embeddings": False,
}  # fmt: skip
BUILT = ("optplan", "torch", "fused", "foreach", "for-loop")
"""Implementations of torch's and ours; the others are packages."""
OWN = {(name, kind) for name, entry in OPTIMIZERS.items() for kind in entry.implementations if kind in BUILT}
SHORT = {"float32": "fp32", "bfloat16": "bf16"}


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A Llama of one layer."""
    path = tmp_path_factory.mktemp("tiny") / "config.json"
    path.write_text(json.dumps(TINY))
    torch.set_num_threads(1)
    return str(path)


@pytest.fixture(scope="module")
def named(config: str) -> dict[tuple[str, ...], Alternative]:
    """The best configuration of every optimizer, implementation, settings, state dtype and precision that fits."""
    report = recommend(
        config, gpu="h200", seq_len=8, tokens_per_step=16, optimizer=sorted({name for name, _ in OWN}),
        fused_loss="none", step_in_backward=False, explain=True,
    )  # fmt: skip
    return {_key(row): row for row in report.alternatives if row.best is not None}


def _key(row: Alternative) -> tuple[str, ...]:
    return row.optimizer, row.implementation, row.precision, row.state_dtype or "", json.dumps(row.settings)


def flags_of(row: Alternative) -> dict[str, Any]:
    """The configuration as a profile and an estimate take it."""
    assert row.best is not None
    names = ("precision", "batch_size", "seq_len", "grad_accum", "checkpointing", "attention", "fused_loss")
    flags = {name: getattr(row.best.config, name) for name in names}
    options = {"implementation": row.implementation, **row.settings}
    return {**flags, "optimizer": row.optimizer, "options": options, "state_dtype": SHORT.get(row.state_dtype or "")}


def chosen(named: dict[tuple[str, ...], Alternative]) -> list[Alternative]:
    """Every optimizer, implementation, state dtype and precision once, and under bf16 with every setting."""
    rows: dict[tuple[str, ...], Alternative] = {}
    for (*who, precision, dtype, settings), row in sorted(named.items()):
        every = (settings,) if (precision, dtype) == ("bf16", "") else ()
        rows.setdefault((*who, precision, dtype, *every), row)
    return [row for row in rows.values() if row.implementation in BUILT]


def without_step(state_tensors: dict[str, int]) -> dict[str, int]:
    """Bytes by name; the counters are on the host or on the device, which on the CPU are one."""
    return {name: size for name, size in state_tensors.items() if name != "step"}


def test_all_that_can_be_named_runs_and_keeps_what_is_predicted(
    config: str, named: dict[tuple[str, ...], Alternative]
) -> None:
    rows, wrong = chosen(named), []
    for row in rows:
        flags = flags_of(row)
        record = profile(config, device="cpu", num_steps=3, **flags)
        (expected,) = estimate(config, gpu="h200", **flags).estimates
        assert record is not None
        pair = without_step(record.state_tensors), without_step(expected.state_tensors)
        if pair[0] != pair[1] or record.bytes.master_weights != expected.bytes.master_weights:
            wrong.append((_key(row), *pair))
    assert wrong == []
    asked = {(row.optimizer, row.implementation, row.precision) for row in rows}
    assert asked == {(*who, precision) for who in OWN for precision in PRECISIONS}


@pytest.mark.parametrize("checkpointing", ["none", "selective", "full"])
def test_every_manner_runs_with_masters(config: str, checkpointing: str) -> None:
    record = profile(
        config, optimizer="adam-mini", precision="mixed", checkpointing=checkpointing, fused_loss="chunked",
        grad_accum=2, seq_len=8, device="cpu", num_steps=3,
    )  # fmt: skip
    assert record is not None
    assert all(0 < loss < 10 for loss in record.losses)


def test_a_record_with_a_state_dtype_is_expected_with_it(config: str) -> None:
    record = profile(config, optimizer="adamw", options={"implementation": "optplan"}, state_dtype="fp32", device="cpu")
    assert record is not None
    assert record.state_dtype == "float32"
    on_gpu = msgspec.structs.replace(
        record, gpu=GpuRow("h200-141g", 1, 1, 0), model=msgspec.structs.replace(record.model, name=config)
    )
    assert expect(on_gpu).estimates[0].state_tensors["exp_avg"] == record.state_tensors["exp_avg"]
