"""Losses that never hold all logits: the rules against the trace, allocation by allocation."""

from __future__ import annotations

from itertools import groupby

import pytest

from optplan.planner.models.fields import Fields
from optplan.planner.models.registry import family_of
from optplan.planner.step.options import StepOptions
from optplan.planner.step.rules import write_forward_backward
from optplan.planner.timeline import Allocation, TimelineBuilder
from optplan.profilers.tracing.trace import TracedStep
from optplan.profilers.workloads.catalogue import build_subject

SMALL = {
    "hidden_size": 96, "intermediate_size": 160, "num_hidden_layers": 2, "num_attention_heads": 3, "vocab_size": 1009,
    "max_position_embeddings": 512, "num_key_value_heads": 3,
}  # fmt: skip
FIELDS = {
    "llama": SMALL,
    "qwen3": {**SMALL, "head_dim": 32, "tie_word_embeddings": True},
    "gemma2": {**SMALL, "head_dim": 32, "num_key_value_heads": 1, "query_pre_attn_scalar": 32},
    "phi3": {**SMALL, "pad_token_id": 0},
    "olmo2": SMALL,
    "gpt2": {"n_embd": 96, "n_layer": 2, "n_head": 3, "vocab_size": 1009, "n_positions": 512},
    "gpt_neox": SMALL,
}
EAGER = ("gemma2",)
"""What caps its attention scores."""
STEPS = {
    "bf16": {"batch_size": 2, "seq_len": 173},
    "fp32": {"batch_size": 3, "seq_len": 61, "precision": "fp32"},
    "amp": {"batch_size": 2, "seq_len": 101, "precision": "amp", "checkpointing": "full"},
    "accumulated": {"batch_size": 1, "seq_len": 130, "precision": "amp", "grad_accum": 2},
    "few-tokens": {"batch_size": 1, "seq_len": 5},
    "reentrant": {"batch_size": 2, "seq_len": 40, "checkpointing": "full-reentrant"},
}


def sizes_of(timeline, phase, options):
    """Signed sizes, each run of frees sorted; the rotary embedding's positions, which end later, are left out."""
    sizes = {event.id: event.bytes for event in timeline if isinstance(event, Allocation)}
    changes = [
        event.bytes if isinstance(event, Allocation) else -sizes[event.id]
        for event in timeline
        if event.phase == phase and event.id in sizes
    ]
    kept = [change for change in changes if abs(change) != 4 * options.seq_len]
    runs = [list(run) for _, run in groupby(kept, key=lambda change: change > 0)]
    return [change for run in runs for change in (run if run[0] > 0 else sorted(run))]


def both(model_type, step, loss):
    """Each phase's changes by rules and by trace."""
    spec = family_of(model_type).spec(Fields({"model_type": model_type, **FIELDS[model_type]}, where="test"),
                                      name="small", source="test")  # fmt: skip
    options = StepOptions(**STEPS[step], fused_loss=loss, attention="eager" if model_type in EAGER else "sdpa")
    ruled = TimelineBuilder("load")  # gradients that are there before are no part of a phase
    write_forward_backward(ruled, spec, options)
    traced = TracedStep(build_subject(spec, options), options).pieces.steady[-1]
    return [tuple(sizes_of(t, phase, options) for t in (ruled.events, traced)) for phase in ("forward", "backward")]


def pairs(models):
    """Every model with half of the steps, neighbours with the other half."""
    return [(m, s) for i, m in enumerate(models) for j, s in enumerate(STEPS) if (i + j) % 2 == 0]


@pytest.mark.parametrize(("model_type", "step"), [*pairs(FIELDS), ("gemma2", "accumulated")])
def test_a_chunked_loss_allocates_what_its_rules_say(model_type, step):
    for ruled, traced in both(model_type, step, "chunked"):
        assert ruled == traced


@pytest.mark.parametrize(("model_type", "step"), pairs(["llama", "qwen3", "gemma2", "phi3", "olmo2"]))
def test_ligers_loss_allocates_what_its_rules_say(model_type, step):
    for ruled, traced in both(model_type, step, "liger"):
        assert ruled == traced
