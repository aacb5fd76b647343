"""`optplan profile` on a machine without a GPU: a small model on the CPU, and what is refused."""

import errno
import json
import os
from pathlib import Path

import pytest

from optplan.app import app
from optplan.boundary import run
from optplan.planner.measured.measurement import Measurement
from optplan.planner.measured.record_files import load_record

TINY = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_attention_heads": 2,
    "num_hidden_layers": 2,
    "num_key_value_heads": 1,
    "vocab_size": 32,
    "max_position_embeddings": 64,
    "tie_word_embeddings": False,
}
# Embedding and head of 32 x 16; per layer q 16x16, k and v 8x16, o 16x16, three of 24x16, two norms; the last norm.
NUM_PARAMETERS = 2 * 32 * 16 + 2 * (2 * 16 * 16 + 2 * 8 * 16 + 3 * 24 * 16 + 2 * 16) + 16
ON_CPU = ["--device", "cpu", "--batch-size", "2", "--seq-len", "8"]


@pytest.fixture
def config(tmp_path: Path) -> str:
    path = tmp_path / "config.json"
    path.write_text(json.dumps(TINY))
    return str(path)


@pytest.mark.parametrize(
    ("optimizer", "state_bytes"),
    [
        (["adamw"], 2 * 4 * NUM_PARAMETERS + 4 * 21),
        (["sgd"], 4 * NUM_PARAMETERS),
        (["adamw", "--set", "implementation=foreach"], 2 * 4 * NUM_PARAMETERS + 4 * 21),
    ],
)
def test_a_step_on_the_cpu(
    config: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], optimizer: list[str], state_bytes: int
) -> None:
    out = tmp_path / "step.json.gz"
    command = ["profile", "-m", config, *ON_CPU, "--precision", "fp32", "--steps", "5", "-o", *optimizer]
    assert run(app, [*command, "--out", str(out), "--json"]) == 0
    printed = json.loads(capsys.readouterr().out)
    record = load_record(out)
    assert isinstance(record, Measurement)
    assert record.device == printed["device"] == "cpu"
    assert record.bytes.parameters == record.bytes.gradients == 4 * NUM_PARAMETERS
    assert record.bytes.optimizer_state == state_bytes
    assert record.peak_allocated_bytes is None and record.history is None
    assert len(record.losses) == 5
    assert record.time is not None and record.time.num_steps == 2


@pytest.mark.parametrize(
    "options",
    [
        ["--grad-accum", "2", "--clip-grad-norm", "1.0"],
        ["--keep-grads", "--padding-mask", "--empty-cache"],
        ["--checkpointing", "full"],
        ["--checkpointing", "full-reentrant"],
        ["--precision", "amp", "--attention", "eager"],
        ["--precision", "mixed"],
    ],
    ids=" ".join,
)
def test_the_options_of_a_step(config: str, capsys: pytest.CaptureFixture[str], options: list[str]) -> None:
    assert run(app, ["profile", "-m", config, *ON_CPU, "--steps", "4", "--json", *options]) == 0
    record = json.loads(capsys.readouterr().out)
    assert all(loss > 0 for loss in record["losses"])
    assert record["losses"][-1] < record["losses"][0]


def test_the_terminal_says_what_the_cpu_cannot_tell(config: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(app, ["profile", "-m", config, *ON_CPU, "--steps", "4"]) == 0
    text = capsys.readouterr().out
    assert "ran on the CPU: tensors are counted, there is no allocator to read" in text
    assert "no estimate to hold it against: a step measured on the CPU has no GPU to be estimated for" in text


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--steps", "2"], "--steps must be at least 3, the last of which is recorded; got 2"),
        (["--device", "tpu"], "--device 'tpu' is not known; allowed: cpu, cuda, cuda:0, cuda:1 ..."),
        (["-o", "lion"], "lion (pytorch_optimizer) cannot be run by the profiler; allowed: "),
        (["-o", "adamv"], "unknown optimizer 'adamv'; nearest: adamw"),
        (["--step-in-backward"], "--step-in-backward True cannot be profiled in this version; allowed: False"),
        (["--state-dtype", "fp32"], "adamw with implementation=fused keeps its state in bfloat16, got float32; "),
        (
            ["-o", "adamw-8bit", "--set", "hf_embeddings_32bit=true"],
            "adamw-8bit (bitsandbytes) with hf_embeddings_32bit=True cannot be run by the profiler; "
            "allowed: hf_embeddings_32bit=False",
        ),
        (["--out", "none/step.json.gz"], "cannot write 'none/step.json.gz': No such file or directory; "),
    ],
)
def test_one_sentence(config: str, capsys: pytest.CaptureFixture[str], arguments: list[str], sentence: str) -> None:
    status = run(app, ["profile", "-m", config, *ON_CPU, *arguments])
    out, err = capsys.readouterr()
    assert status in (1, 2)
    assert out == ""
    assert err.startswith(f"optplan: {sentence}")
    assert err.count("\n") == 1


def test_without_a_gpu_the_sentence_says_what_to_do(config: str, capsys: pytest.CaptureFixture[str]) -> None:
    torch = pytest.importorskip("torch")
    if torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    assert run(app, ["profile", "-m", config]) == 2
    assert capsys.readouterr().err == (
        "optplan: no CUDA GPU is visible to torch (driver missing, CUDA_VISIBLE_DEVICES empty, or a torch without"
        " CUDA); --device cpu measures tensors without an allocator\n"
    )


@pytest.mark.parametrize(("interrupted_at", "is_saved"), [(1, False), (4, True)])
def test_an_interrupt_keeps_what_is_measured(
    config: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    interrupted_at: int,
    is_saved: bool,
) -> None:
    torch = pytest.importorskip("torch")
    steps, backward = iter(range(100)), torch.Tensor.backward

    def interrupted(loss: object) -> None:
        if next(steps) == interrupted_at:
            raise KeyboardInterrupt
        backward(loss)

    monkeypatch.setattr(torch.Tensor, "backward", interrupted)
    out = tmp_path / "step.json.gz"
    command = ["profile", "-m", config, *ON_CPU, "-o", "sgd", "--set", "implementation=foreach", "--out", str(out)]
    assert run(app, command) == 130
    assert capsys.readouterr().err.endswith("optplan: interrupted\n")
    assert out.exists() is is_saved
    if is_saved:
        record = load_record(out)
        assert isinstance(record, Measurement)
        assert record.notes[-1] == "interrupted: fewer steps were timed than asked for"
        assert record.time is not None and record.time.num_steps == 1


def _failing(monkeypatch: pytest.MonkeyPatch, phase: str, *, at: int) -> None:
    """Let the memory run out in a phase of the step of this number, counted from 1."""
    torch = pytest.importorskip("torch")
    owner, name = {
        "load": (torch.optim.SGD, "__init__"),
        "forward": (torch.nn.Embedding, "forward"),
        "backward": (torch.autograd, "backward"),
        "step": (torch.optim.SGD, "step"),
    }[phase]
    calls, original = iter(range(1, 100)), getattr(owner, name)

    def fails(*args: object, **kwargs: object) -> object:
        if next(calls) == at:
            raise torch.cuda.OutOfMemoryError(f"CUDA out of memory. Tried to allocate 2.00 GiB in {phase}")
        return original(*args, **kwargs)

    monkeypatch.setattr(owner, name, fails)


@pytest.mark.parametrize(
    ("phase", "at"), [("load", 1), ("forward", 1), ("forward", 3), ("backward", 2), ("backward", 3), ("step", 1)]
)
def test_running_out_of_memory_is_a_result(
    config: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    phase: str,
    at: int,
) -> None:
    _failing(monkeypatch, phase, at=at)
    out = tmp_path / "step.json.gz"
    command = ["profile", "-m", config, *ON_CPU, "-o", "sgd", "--set", "implementation=foreach", "--out", str(out)]
    assert run(app, command) == 1
    assert f"out of memory in {phase}" in " ".join(capsys.readouterr().out.split())
    record = load_record(out)
    assert isinstance(record, Measurement) and record.out_of_memory is not None
    assert record.out_of_memory.phase == phase
    assert record.out_of_memory.message == f"CUDA out of memory. Tried to allocate 2.00 GiB in {phase}"
    assert len(record.losses) == (0 if phase == "load" else at - 1)
    assert run(app, ["show", str(out)]) == 0


def test_a_full_disk_loses_no_figure(
    config: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    (tmp_path / "records").mkdir()
    monkeypatch.chdir(tmp_path / "records")
    command = ["profile", "-m", config, *ON_CPU, "-o", "sgd", "--set", "implementation=foreach", "--steps", "3"]
    assert run(app, [*command, "--out", "step.json.gz", "--json"]) == 1
    printed, told = capsys.readouterr()
    assert json.loads(printed)["bytes"]["parameters"] == 2 * NUM_PARAMETERS
    assert told.splitlines()[-1] == "optplan: cannot write 'step.json.gz': No space left on device; nothing was saved"
    assert list((tmp_path / "records").iterdir()) == []
