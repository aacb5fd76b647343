"""Rules against trace where sizes are extreme, and the records that `docs/accuracy.md` is written from."""

import json
import runpy
from pathlib import Path

import pytest
import torch

from optplan.planner.requested_step import step_options
from optplan.profilers.tracing.trace import RunSettings, TracedStep
from optplan.profilers.workloads.catalogue import build_subject

ROOT = Path(__file__).parents[2]
SCRIPT = runpy.run_path(str(ROOT / "benchmarks" / "check_agreement.py"))
RECORDS = ROOT / "tests" / "records"
ROWS = json.loads((RECORDS / "agreement.json").read_text(encoding="utf-8"))["rows"]
MEASURED = json.loads((RECORDS / "agreement_measured.json").read_text(encoding="utf-8"))["rows"]
SAME_SUMS = {
    "tiny-opt amp sdpa 5x701",
    "tiny-llama-gqa fp32 sdpa 3x173",
    "tiny-gpt2 fp32 sdpa 3x173",
    "tiny-mixtral bf16 sdpa 5x701",
    "heads-of-256 bf16 sdpa 2x512",
    "odd-heads amp sdpa 3x333",
}
"""Steps in which both engines are equally far from the measured bytes."""


@pytest.mark.parametrize(
    "model",
    [
        "one-layer-256k-words-tied", "one-layer-256k-words-untied", "layers-126", "heads-of-256", "odd-heads",
        "odd-heads-qwen3", "odd-heads-gemma-3", "odd-heads-phi-3", "odd-heads-window", "odd-heads-gpt2",
        "odd-heads-neox", "odd-heads-opt", "odd-heads-bert", "odd-heads-vit", "odd-heads-t5",
        "biases", "dropout", "phi-3-dropout", "gpt2-dry", "bert-dry",
    ],
)  # fmt: skip
def test_rules_and_trace_agree(model):
    assert SCRIPT["disagreements"](SCRIPT["check_cases"](model), mean=0.002, worst=0.01) == []


def test_the_record_holds_every_configuration():
    recorded = [(row["model"], row["step"], row["optimizer"]) for row in ROWS]
    assert recorded == [(c.model, c.step, name) for c in SCRIPT["read_cases"]() for name in c.optimizers]
    assert len(set(recorded)) >= 600
    assert len({(model, step) for model, step, _ in recorded}) >= 500


def test_the_tests_run_three_hundred_configurations_anew():
    cases, half = SCRIPT["read_cases"](), SCRIPT["half_of"](SCRIPT["read_cases"]())
    assert len(half) >= 300
    assert {case.step for case in half} == {case.step for case in cases}
    assert {case.model for case in half} == {case.model for case in cases}


def test_every_option_is_among_the_configurations():
    configs = [case.request.config for case in SCRIPT["read_cases"]()]
    assert {c.precision for c in configs} == {"bf16", "fp32", "amp", "mixed", "fp16-amp"}
    assert {c.checkpointing for c in configs} == {"none", "full", "full-reentrant", "selective"}
    assert {c.attention for c in configs} == {"sdpa", "eager", "flash"}
    assert {c.fused_loss for c in configs} == {"none", "chunked"}
    for name in ("padding_mask", "keep_grads", "step_in_backward", "empty_cache", "clip_grad_norm"):
        assert any(getattr(c, name) for c in configs), name
    assert {c.grad_accum for c in configs} == {1, 2, 3}
    assert {(c.batch_size, c.seq_len) for c in configs} >= {(1, 1), (7, 1), (5, 701), (1, 1021)}


def test_the_recorded_engines_agree():
    assert SCRIPT["disagreements"](ROWS, mean=0.0001, worst=0.0061) == []


def test_a_disagreement_is_a_sentence():
    row = {
        "model": "m",
        "step": "s",
        "optimizer": "sgd",
        "rules": {"phases": {"forward": 103}, "peak_bytes": 103, "reserved_bytes": 104},
        "trace": {"phases": {"forward": 100}, "peak_bytes": 100, "reserved_bytes": 104},
    }
    assert SCRIPT["disagreements"]([row], mean=0.02, worst=0.01) == [
        "m s sgd: peak is +3.000% from the trace",
        "m s sgd: forward is +3.000% from the trace",
        "peak: 3.000% from the trace in the mean of 1",
        "forward: 3.000% from the trace in the mean of 1",
    ]


def cases_of(row):
    return json.loads((RECORDS / row["record"]).read_text(encoding="utf-8").splitlines()[row["line"] - 1])


def errors_of(engine):
    """Each measured step's name and how far the engine's recorded peak is from it."""
    for row in MEASURED:
        if row[engine] is not None:
            case = cases_of(row)
            name = f"{case['model']} {case['precision']} {case['attention']} {case['batch']}x{case['seq']}"
            yield name, row[engine]["peak_bytes"] / SCRIPT["measured_bytes"](case) - 1


def test_the_record_holds_every_measured_step():
    lines = {
        (name, number)
        for name in ("public_h200_cases.jsonl", "h200_steps.jsonl")
        for number, line in enumerate((RECORDS / name).read_text(encoding="utf-8").splitlines(), start=1)
        if "error" not in json.loads(line)
    }
    assert {(row["record"], row["line"]) for row in MEASURED} == lines


def test_traced_steps_are_within_a_thousandth_of_the_measured():
    errors = list(errors_of("trace"))
    assert {name for name, error in errors if abs(error) > 0.001} <= SAME_SUMS
    assert max(abs(error) for _, error in errors) <= 0.006


def test_ruled_steps_are_near_the_measured():
    errors = {name: abs(error) for name, error in errors_of("rules")}
    assert sum(errors.values()) / len(errors) <= 0.005
    assert {name for name, error in errors.items() if error > 0.001} <= SAME_SUMS
    assert max(errors.values()) <= 0.006


@pytest.mark.parametrize("line", [53, 92, 109, 157, 162])
def test_segments_at_ascending_addresses_explain_five_gaps(line):
    case = cases_of({"record": "h200_steps.jsonl", "line": line})
    assert any(case["model"] in name for name in SAME_SUMS)
    request = SCRIPT["check_request"](SCRIPT["measured_spec"](case), gpu="h200-141g", **SCRIPT["measured_flags"](case))
    options = step_options(request)
    step = TracedStep(
        build_subject(request.model, options), options, RunSettings(clip_grad_norm=case.get("clip_grad_norm"))
    )
    part = step.part(lambda parameters: torch.optim.AdamW(parameters, lr=1e-4, fused=True))
    (run,) = step.simulate(part, ("ascending",))
    measured = {name: phase["peak"] for name, phase in case["steps"][-1].items() if name in run.phases}
    assert {name: run.phases[name] for name in measured} == measured


@pytest.mark.parametrize("model", ["tiny-t5", "tiny-flan-t5", "tiny-bert", "tiny-opt", "tiny-llama-drop", "tiny-vit"])
def test_a_step_traced_today_is_the_recorded_one(model):
    rows = [row for row in MEASURED if cases_of(row)["model"] == model]
    for row in rows:
        traced = SCRIPT["measured_figures"](cases_of(row))["trace"]
        assert traced["peak_bytes"] == pytest.approx(row["trace"]["peak_bytes"], rel=0.001)
