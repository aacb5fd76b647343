"""`estimate --engine trace`: the rules' questions answered by running the model, the user's own models among them."""

import json
import sys

import pytest

from optplan.planner.errors import ConfigError
from optplan.planner.estimate import estimate
from optplan.profilers.estimation import _largest, traced_estimate

MODULE = """
import torch
from torch import nn


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(1000, 64)
        self.lm_head = nn.Linear(64, 1000)

    def forward(self, tokens, targets):
        logits = self.lm_head(self.embed(tokens))
        return nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten())

    def example_inputs(self, batch_size, seq_len):
        tokens = torch.zeros(batch_size, seq_len, dtype=torch.int64)
        return {"tokens": tokens, "targets": tokens}


def build():
    return Net()


def number():
    return 3


def broken():
    raise RuntimeError("no weights")
"""


@pytest.fixture
def package(tmp_path, monkeypatch):
    (tmp_path / "mynet.py").write_text(MODULE)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])
    yield "mynet"
    sys.modules.pop("mynet", None)


@pytest.mark.parametrize(
    "flags",
    [
        {},
        {"checkpointing": "selective", "clip_grad_norm": 1.0},
        {"step_in_backward": True},
        {"keep_grads": True, "precision": "mixed"},
        {"fused_loss": "chunked", "alloc_conf": "expandable_segments:True"},
        {"alloc_conf": "max_split_size_mb:64,roundup_power2_divisions:4", "precision": "amp", "empty_cache": True},
    ],
    ids=str,
)
def test_rules_and_trace_agree_on_gpt2(flags):
    step = {"gpu": "a100-80g", "batch_size": 2, "seq_len": 512, **flags}
    (ruled,) = estimate("gpt2", optimizer="adamw", **step).estimates
    (traced,) = traced_estimate("gpt2", optimizer="adamw", **step).estimates
    assert traced.bytes == ruled.bytes
    assert list(traced.phases) == list(ruled.phases)
    for phase, peak in ruled.phases.items():
        assert traced.phases[phase].peak_allocated_bytes == pytest.approx(peak.peak_allocated_bytes, rel=0.002)


def test_the_record_says_trace_and_how_the_step_was_had():
    report = traced_estimate("gpt2", gpu="a100-80g", optimizer=["adamw", "micro-adam"], seq_len=128)
    assert report.engine == "trace"
    assert report.notes == ["attention kernel: flash"]
    assert [row.notes[0] for row in report.estimates] == [
        "its step was traced",
        "its step is the planner's, the rest was traced",
    ]
    least, most = report.estimates[0].peak_reserved_range_bytes
    assert least <= report.estimates[0].peak_reserved_bytes <= most
    assert report.recommendation.command.endswith("--seq-len 128 --engine trace")


def test_attention_that_falls_to_the_math_kernel_is_reported():
    report = traced_estimate("tinyllama-1.1b", gpu="a100-80g", optimizer="sgd", seq_len=128, precision="fp32")
    assert report.notes == [
        "attention kernel: math",
        "attention falls to the math kernel, which keeps every attention weight",
    ]


def test_a_model_of_ones_own_computes_its_own_loss(package):
    with pytest.raises(ConfigError) as refused:
        traced_estimate(f"{package}:build", gpu="a100-80g", optimizer="adamw", fused_loss="chunked")
    assert str(refused.value) == "mynet:build computes its own loss: let the module fuse it and leave --fused-loss none"


@pytest.mark.parametrize(("usable", "start", "largest"), [(1000, 1, 9), (1000, 30, 9), (109, 1, 0), (110, 2, 1)])
def test_the_largest_batch_is_found_from_any_start(usable, start, largest):
    assert _largest(lambda batch: 10 + 100 * batch, usable, start=start) == largest


def test_a_model_of_ones_own_is_planned_for(package, capsys):
    status = _run(
        "estimate", "--model", f"{package}:build", "--memory", "1GiB", "-o", "adamw", "--engine", "trace",
        "--batch-size", "4", "--seq-len", "16", "--precision", "fp32", "--json",
    )  # fmt: skip
    report = json.loads(capsys.readouterr().out)
    count = 1000 * 64 + 64 * 1000 + 1000
    assert status == 0
    assert report["model"] == {"name": "mynet:build", "num_parameters": count, "source": "mynet:build"}
    (row,) = report["estimates"]
    assert row["bytes"]["parameters"] == 4 * count
    assert row["bytes"]["optimizer_state"] == 2 * 4 * count + 3 * 4
    # Loss and its backward: logits, log-softmax, their two gradients, each a number for every token and word.
    assert row["peak_categories"]["logits_and_loss"] >= 3 * 4 * 16 * 1000 * 4


@pytest.mark.parametrize(
    ("factory", "sentence"),
    [
        ("nowhere:build", "--model nowhere:build cannot be imported: ModuleNotFoundError: No module named 'nowhere'"),
        ("mynet:number", "--model mynet:number must return a torch.nn.Module, got int"),
        ("mynet:broken", "--model mynet:broken failed: RuntimeError: no weights"),
    ],
)
def test_a_factory_that_gives_no_module_is_refused(package, factory, sentence):
    with pytest.raises(ConfigError) as error:
        traced_estimate(factory, memory="1GiB", optimizer="adamw")
    assert str(error.value) == sentence


def test_checkpointing_is_a_modules_own_business(package):
    with pytest.raises(ConfigError) as error:
        traced_estimate("mynet:build", memory="1GiB", optimizer="adamw", checkpointing="full", seq_len=8)
    assert str(error.value) == (
        "mynet:build has no gradient_checkpointing_enable(): let the module checkpoint itself and leave "
        "--checkpointing none"
    )


def test_a_model_without_a_transformers_class_is_refused():
    with pytest.raises(ConfigError) as error:
        traced_estimate("palm-8b", gpu="a100-80g", optimizer="adamw")
    assert str(error.value) == (
        "transformers has no class for palm-8b (PaLM, the paper's layout (no transformers class)): it cannot be traced"
    )


def test_the_rules_do_not_answer_for_the_trace():
    with pytest.raises(ConfigError) as error:
        estimate("gpt2", gpu="a100-80g", engine="trace")
    assert str(error.value) == ("engine trace runs the model itself: call optplan.profilers.estimation.traced_estimate")


def test_without_torch_one_sentence_says_what_to_install(monkeypatch, capsys):
    import importlib.util

    found = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *args: None if name == "torch" else found(name, *args)
    )
    assert _run("estimate", "--model", "gpt2", "--gpu", "a100-80g", "--engine", "trace") == 2
    assert capsys.readouterr().err == (
        "optplan: this needs torch, which is not installed: pip install 'optplan[gpu,hf]'\n"
    )


def _run(*args):
    from optplan.app import app
    from optplan.boundary import run

    return run(app, list(args))
