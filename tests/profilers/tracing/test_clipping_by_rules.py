"""Clipping as the rules describe it against the run of `torch.nn.utils.clip_grad_norm_` itself."""

from __future__ import annotations

import pytest

from optplan.planner.models.fields import Fields
from optplan.planner.models.registry import family_of
from optplan.planner.step.clipping import write_clipping
from optplan.planner.step.options import StepOptions
from optplan.planner.timeline import Allocation, Timeline, TimelineBuilder
from optplan.profilers.tracing.trace import RunSettings, TracedStep
from optplan.profilers.workloads.catalogue import build_subject

GPT2 = {"model_type": "gpt2", "vocab_size": 2003, "n_embd": 384, "n_layer": 1, "n_head": 6}
T5 = {"model_type": "t5", "vocab_size": 503, "d_model": 64, "d_kv": 16, "d_ff": 96, "num_heads": 4, "num_layers": 1}
OLMOE = {
    "model_type": "olmoe",
    "vocab_size": 503,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_experts": 4,
    "num_experts_per_tok": 2,
}


def sizes(events: Timeline) -> list[int]:
    """Bytes of each allocation in order, negative where it ends."""
    made: dict[int, int] = {}
    result = []
    for event in events:
        if isinstance(event, Allocation):
            made[event.id] = event.bytes
            result.append(event.bytes)
        else:
            result.append(-made[event.id])
    return result


@pytest.mark.parametrize("foreach", [True, False], ids=["foreach", "one-by-one"])
@pytest.mark.parametrize("precision", ["bf16", "fp32"])
@pytest.mark.parametrize("config", [GPT2, T5, OLMOE], ids=lambda config: config["model_type"])
def test_clipping_allocates_what_torch_does(config, precision, foreach):
    spec = family_of(config["model_type"]).spec(Fields(config, where="test"), name="case", source="test")
    options = StepOptions(batch_size=1, seq_len=16, precision=precision)
    settings = RunSettings(clip_grad_norm=1.0, clip_foreach=foreach)
    traced = TracedStep(build_subject(spec, options), options, settings).pieces.clip
    timeline = TimelineBuilder("clip")
    write_clipping(
        timeline,
        spec.trained_parameters,
        dtype=options.parameter_dtype,
        foreach=foreach,
        resident_threads=options.resident_threads,
    )
    assert sizes(timeline.events) == sizes(traced)
