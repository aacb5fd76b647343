"""Every way to hold the command line wrong that a person can find: one sentence on stderr, exit 2, no output."""

from __future__ import annotations

import pytest

from optplan.app import app
from optplan.boundary import run

ESTIMATE = ["estimate", "--model", "llama-7b", "--gpu", "a100-40g"]

SENTENCES = [
    (["estimate", "--model", "lama-7b", "--gpu", "a100-40g"], "unknown model 'lama-7b'; nearest: "),
    (["estimate", "--model", "llama-7b", "--gpu", "a100-41g"], "unknown GPU 'a100-41g'; nearest: a100-40g"),
    ([*ESTIMATE, "--optimizer", "adamv"], "unknown optimizer 'adamv'; nearest: adamw"),
    ([*ESTIMATE, "-o", "micro-adam", "--set", "windw=5"], "unknown option of micro-adam 'windw'; nearest: window"),
    ([*ESTIMATE, "--set", "windw=5"], "unknown option 'windw'; nearest: window"),
    (
        [*ESTIMATE, "-o", "adamw", "--set", "implementation=fast"],
        "unknown implementation of adamw 'fast'; known: fused, foreach, for-loop, optplan",
    ),
    ([*ESTIMATE, "-o", "micro-adam", "--set", "window"], "--set takes key=value, such as window=10, got 'window'"),
    (
        [*ESTIMATE, "-o", "micro-adam", "--set", "adam-mini.version=1"],
        "--set 'adam-mini.version': 'adam-mini' is not among the optimizers chosen: micro-adam",
    ),
    (
        ["estimate", "--model", "llama-7b"],
        "no GPU given: add --gpu NAME (`optplan gpus` lists them) or a budget such as --memory 38GiB",
    ),
    (
        [*ESTIMATE, "--memory", "38GiB"],
        "--gpu and --memory contradict each other: give the GPU's name or a memory budget, not both",
    ),
    (
        ["estimate", "--model", "llama-7b", "--memory", "38"],
        "size '38' is not a number with a unit; write it like 38GiB (2^30) or 40GB (10^9)",
    ),
    (
        ["estimate", "--model", "llama-7b", "--memory", "0GiB"],
        "size '0GiB' is out of range; allowed: above 0 and at most 1024 PiB",
    ),
    (
        ["estimate", "--model", "llama-7b", "--memory", "-5GiB"],
        "size '-5GiB' is not a number with a unit; write it like 38GiB (2^30) or 40GB (10^9)",
    ),
    ([*ESTIMATE, "--batch-size", "0"], "--batch-size must be an integer between 1 and 1048576, got 0"),
    ([*ESTIMATE, "--batch-size", "-3"], "--batch-size must be an integer between 1 and 1048576, got -3"),
    ([*ESTIMATE, "--seq-len", "9" * 30], f"--seq-len must be an integer between 1 and 16777216, got {'9' * 30}"),
    ([*ESTIMATE, "--grad-accum", "1e3"], "--grad-accum must be an integer between 1 and 1048576, got '1e3'"),
    (
        [*ESTIMATE, "--gpus", "2"],
        "--gpus 2 needs a --sharding strategy: ddp, ddp-copies, zero1, zero1-deepspeed, zero2, zero3, fsdp2, "
        "fsdp2-noreshard, fsdp2-hybrid, fsdp2-offload",
    ),
    ([*ESTIMATE, "--sharding", "fsdp2"], "--sharding fsdp2 needs --gpus of at least 2, got 1"),
    ([*ESTIMATE, "--sharding", "fsdp3"], "unknown sharding for --sharding 'fsdp3'; nearest: fsdp2"),
    (
        [*ESTIMATE, "--sharding", "ddp", "--gpus", "8", "--nodes", "3"],
        "--nodes must divide --gpus, which counts the GPUs of all nodes: got 8 GPUs on 3 nodes",
    ),
    ([*ESTIMATE, "--engine", "trase"], "unknown engine for --engine 'trase'; nearest: trace"),
    (
        [*ESTIMATE, "--fused-loss", "chunk"],
        "unknown fused-loss for --fused-loss 'chunk'; nearest: chunked",
    ),
    (
        [*ESTIMATE, "--checkpointing", "al"],
        "unknown checkpointing for --checkpointing 'al'; known: none, full, full-reentrant, selective",
    ),
    ([*ESTIMATE, "--precision", "bf61"], "unknown precision for --precision 'bf61'; nearest: bf16"),
    (
        [*ESTIMATE, "--precision", "fp32", "--attention", "flash"],
        "--attention flash and --precision fp32 contradict each other: flash attention needs bf16, amp or fp16-amp",
    ),
    ([*ESTIMATE, "--state-dtype", "int8"], "unknown dtype for --state-dtype 'int8'; known: fp32, bf16, fp16"),
    (
        ["estimate", "--model", "gpt2", "--gpu", "a100-40g", "--seq-len", "4096"],
        "--seq-len 4096 is beyond the 1024 positions that gpt2 has embeddings for",
    ),
    (["estimate", "--gpu", "a100-40g"], "missing option '--model' / '-m'"),
    ([*ESTIMATE, "--no-such"], "no such option: --no-such"),
    (["estimat"], "no such command 'estimat'"),
]


@pytest.mark.parametrize(("args", "sentence"), SENTENCES, ids=[" ".join(args)[-60:] for args, _ in SENTENCES])
def test_bad_input_is_one_sentence(args: list[str], sentence: str, capsys: pytest.CaptureFixture[str]) -> None:
    status = run(app, args)
    out, err = capsys.readouterr()
    assert status == 2
    assert out == ""
    assert err.startswith("optplan: " + sentence)
    assert err.count("\n") == 1
    assert "Traceback" not in err


def test_an_unforeseen_failure_is_a_sentence_too(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("optplan.planner.estimate.load_model", lambda name: 1 / 0)
    assert run(app, ESTIMATE) == 1
    assert capsys.readouterr().err == (
        "optplan: internal error, please report it: ZeroDivisionError: division by zero (OPTPLAN_DEBUG=1 shows where)\n"
    )


def test_an_interrupt_ends_quietly(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(name: str) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("optplan.planner.estimate.load_model", interrupt)
    assert run(app, ESTIMATE) == 130
    assert capsys.readouterr().err == "optplan: interrupted\n"
