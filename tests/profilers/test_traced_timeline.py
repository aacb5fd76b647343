"""The traced step event by event adds up to the peaks that the trace finds, and follows the rules' step."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from optplan.planner.candidates import choose_optimizers
from optplan.planner.request import check_request
from optplan.profilers.estimation import TracedWorkload, traced_timeline
from optplan.profilers.workloads.source import find_source

TINY = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_attention_heads": 4,
    "num_hidden_layers": 2,
    "num_key_value_heads": 2,
    "vocab_size": 1000,
    "max_position_embeddings": 256,
}


@pytest.fixture
def config(tmp_path: Path) -> str:
    path = tmp_path / "config.json"
    path.write_text(json.dumps(TINY))
    return str(path)


@pytest.mark.parametrize(
    "flags",
    [
        {},
        {"grad_accum": 3},
        {"keep_grads": True},
        {"step_in_backward": True},
        {"empty_cache": True},
        {"clip_grad_norm": 1.0},
    ],
    ids=str,
)
@pytest.mark.parametrize("optimizer", ["adamw", "adapprox"])
def test_the_history_has_the_trace_s_peak(config: str, flags: dict[str, Any], optimizer: str) -> None:
    source = find_source(config)
    workload = TracedWorkload(check_request(source.spec, gpu="h200-141g", seq_len=64, **flags), source, searches=False)
    (candidate,), _ = workload.candidates(choose_optimizers(optimizer))
    peaks, history = workload.peaks(candidate), workload.history(candidate)
    assert max(history.allocated) == peaks.peak_bytes
    assert sum(tensor.bytes for tensor in history.resident) == history.allocated[0]
    assert sum(tensor.bytes for tensor in history.alive(history.peak_event)) == peaks.peak_bytes
    assert sum(tensor.bytes for tensor in history.alive(len(history.events))) == history.allocated[-1]
    assert history.reserved_bytes == peaks.reserved_bytes


def test_the_timeline_names_modules(config: str) -> None:
    report = traced_timeline(config, gpu="h200-141g", seq_len=64)
    assert report.engine == "trace"
    assert any("layers.1" in tensor.name for tensor in report.alive)
    assert [span.phase for span in report.phases][:2] == ["forward", "backward"]
