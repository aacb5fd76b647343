"""Loops of other people's: a plain one, a Trainer's, Lightning's, and a script's."""

from __future__ import annotations

import re
import sys
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import optplan
from optplan.app import app
from optplan.boundary import run
from optplan.planner.errors import ConfigError, OptplanError
from optplan.planner.measured.measurement import Measurement
from optplan.planner.measured.record_files import load_record
from optplan.profilers.live.describe import OptimizerRow, describe_optimizer

NUMEL = 6 * 3 + 3


def _step(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    model(torch.ones(4, 6)).sum().backward()
    optimizer.step()
    optimizer.zero_grad()


def test_a_plain_loop(tmp_path: Path) -> None:
    model, out = nn.Linear(6, 3), tmp_path / "step.json.gz"
    optimizer = torch.optim.AdamW(model.parameters())
    with optplan.profile_step(model, optimizer, name="toy", out=out) as prof:
        for _ in range(5):
            _step(model, optimizer)
    record = prof.measurement()
    assert (record.model.name, record.model.num_parameters) == ("toy", NUMEL)
    assert (record.config.batch_size, record.config.seq_len, record.config.precision) == (4, 6, "fp32")
    assert (record.optimizer, record.implementation) == ("adamw", "foreach")
    assert record.bytes.parameters == record.bytes.gradients == 4 * NUMEL
    assert record.bytes.optimizer_state == 2 * 4 * NUMEL + 2 * 4
    assert record.time is not None and record.time.num_steps == 2
    saved = load_record(out)
    assert isinstance(saved, Measurement) and saved.state_tensors == record.state_tensors


@pytest.mark.parametrize("steps", [3, 5])
def test_accumulation_and_autocast_are_seen(steps: int) -> None:
    model = nn.Linear(6, 3)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    with optplan.profile_step(model, optimizer) as prof:
        for _ in range(steps):
            for _ in range(4):
                with torch.autocast("cpu", torch.bfloat16):
                    model(torch.ones(2, 6)).sum().backward()
            optimizer.step()
            optimizer.zero_grad()
    assert (prof.measurement().config.grad_accum, prof.measurement().config.precision) == (4, "amp")


def test_nothing_measured_is_said() -> None:
    model = nn.Linear(6, 3)
    with optplan.profile_step(model, torch.optim.AdamW(model.parameters())) as prof:
        pass
    with pytest.raises(ConfigError, match=r"^nothing was measured: the model was not called while it was observed$"):
        prof.measurement()


def test_a_place_that_cannot_be_written_is_refused_before_the_first_step() -> None:
    model = nn.Linear(6, 3)
    with pytest.raises(OptplanError, match=r"^cannot write 'none/step': No such file or directory; nothing was saved$"):
        optplan.profile_step(model, torch.optim.AdamW(model.parameters()), out="none/step")


@pytest.mark.parametrize(
    ("build", "row"),
    [
        (lambda p: torch.optim.AdamW(p, fused=True), OptimizerRow("adamw", "fused", {"amsgrad": False})),
        (lambda p: torch.optim.AdamW(p, foreach=False), OptimizerRow("adamw", "for-loop", {"amsgrad": False})),
        (
            lambda p: torch.optim.SGD(p, momentum=0.5, fused=True),
            OptimizerRow("sgd", "fused", {"momentum": 0.5, "weight_decay": 0, "nesterov": False}),
        ),
        (lambda p: torch.optim.Adafactor(p), OptimizerRow("adafactor", "torch", {"foreach": False})),
        (lambda p: torch.optim.RMSprop(p), OptimizerRow("RMSprop", "torch", {})),
    ],
)
def test_optimizers_by_the_planner_s_names(build: Any, row: OptimizerRow) -> None:
    assert describe_optimizer(build(nn.Linear(6, 3).parameters())) == row


def test_a_trainer(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.GPT2Config(n_embd=8, n_layer=1, n_head=2, n_positions=16, vocab_size=20)
    model = transformers.GPT2LMHeadModel(config)
    rows = [{"input_ids": torch.arange(8) % 20, "labels": torch.arange(8) % 20} for _ in range(16)]
    settings = transformers.TrainingArguments(
        output_dir=str(tmp_path), per_device_train_batch_size=2, max_steps=5, report_to=[], use_cpu=True,
        disable_tqdm=True, save_strategy="no", logging_strategy="no",
    )  # fmt: skip
    callback = optplan.ProfileCallback(out=tmp_path / "step.json.gz")
    transformers.Trainer(model=model, args=settings, train_dataset=rows, callbacks=[callback]).train()
    record = callback.measurement
    numel = sum(parameter.numel() for parameter in model.parameters())
    assert record is not None
    assert record.bytes.parameters == record.bytes.gradients == 4 * numel
    assert (record.config.batch_size, record.config.seq_len) == (2, 8)
    assert record.optimizer == "adamw"
    assert isinstance(load_record(tmp_path / "step.json.gz"), Measurement)


def test_lightning() -> None:
    lightning = pytest.importorskip("lightning")

    class Module(lightning.LightningModule):  # type: ignore[misc, name-defined]
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(6, 3)

        def training_step(self, batch: torch.Tensor, batch_idx: int) -> torch.Tensor:
            return self.layer(batch).sum()

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.SGD(self.parameters(), lr=0.1, momentum=0.9)

    callback = optplan.LightningProfileCallback()
    trainer = lightning.Trainer(
        max_steps=5, accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, callbacks=[callback],
    )  # fmt: skip
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trainer.fit(Module(), torch.utils.data.DataLoader(torch.ones(32, 6), batch_size=4))
    record = callback.measurement
    assert record is not None
    assert record.bytes.parameters == record.bytes.optimizer_state == 4 * NUMEL
    assert (record.config.batch_size, record.optimizer) == (4, "sgd")


SCRIPT = """
import sys
import torch
from helper import WIDTH
torch.manual_seed(0)
model = torch.nn.Sequential(torch.nn.Linear(WIDTH, 3), torch.nn.ReLU())
optimizer = torch.optim.AdamW(model.parameters())
for step in range(int(sys.argv[1])):
    try:
        model(torch.ones(4, WIDTH)).sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    except Exception:
        print("swallowed")
    print("step", step)
"""


@pytest.fixture
def script(tmp_path: Path) -> str:
    (tmp_path / "helper.py").write_text("WIDTH = 6\n")
    path = tmp_path / "train.py"
    path.write_text(SCRIPT)
    return str(path)


def test_a_script_is_followed_and_ended(
    script: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delitem(sys.modules, "helper", raising=False)
    argv, out = list(sys.argv), tmp_path / "step.json.gz"
    assert run(app, ["profile", "--script", script, "--steps", "5", "--out", str(out), "--", "1000"]) == 0
    text = capsys.readouterr().out
    # One step shows the optimizer, five are measured; the last ends the script before its own line.
    assert re.findall(r"^step \d+$", text, re.MULTILINE)[-1] == "step 4"
    assert "swallowed" not in text
    record = load_record(out)
    assert isinstance(record, Measurement)
    assert record.bytes.parameters == 4 * NUMEL
    assert record.time is not None and record.time.num_steps == 2
    assert sys.argv == argv


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--", "2"], " ended after 2 steps; at least 4 are needed, the last of which is recorded"),
        (["--", "0"], " ended without a step of any torch optimizer"),
        (["--", "x"], " failed: ValueError: invalid literal for int() with base 10: 'x'"),
    ],
)
def test_a_script_that_ends_early(
    script: str, capsys: pytest.CaptureFixture[str], arguments: list[str], sentence: str
) -> None:
    assert run(app, ["profile", "--script", script, *arguments]) in (1, 2)
    assert sentence in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ([], "nothing to profile: give --model NAME, or a training script with --script FILE"),
        (["--script", "none.py"], "cannot run 'none.py': there is no such file"),
        (["-m", "gpt2", "--", "x"], "arguments belong to a script: give --script FILE, or leave 'x' out"),
    ],
)
def test_one_sentence(capsys: pytest.CaptureFixture[str], arguments: list[str], sentence: str) -> None:
    assert run(app, ["profile", *arguments]) == 2
    assert capsys.readouterr().err == f"optplan: {sentence}\n"


def _edited(script: str, line: str) -> str:
    """The script with a line before each step, and without its own handler."""
    text = Path(script).read_text().replace("        model(torch", f"        {line}\n        model(torch")
    Path(script).write_text(text.replace("except Exception", "except ZeroDivisionError"))
    return script


OOM = "raise torch.cuda.OutOfMemoryError('CUDA out of memory. Tried to allocate 2.00 GiB')"


@pytest.mark.parametrize(
    ("line", "status", "told"),
    [
        (f"if step == 4: {OOM}", 1, None),
        ("if step == 4: raise KeyboardInterrupt", 130, "optplan: interrupted"),
        ("if step == 1: raise KeyboardInterrupt", 130, "optplan: interrupted"),
    ],
)
def test_a_script_that_is_cut_short(
    script: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    line: str,
    status: int,
    told: str | None,
) -> None:
    monkeypatch.delitem(sys.modules, "helper", raising=False)
    out = tmp_path / "step.json.gz"
    assert run(app, ["profile", "--script", _edited(script, line), "--out", str(out), "--", "1000"]) == status
    printed = capsys.readouterr()
    if told is not None:
        assert printed.err.splitlines()[-1] == told
    # The first step shows the optimizer, the fourth is recorded; before its end there is nothing to keep.
    assert out.exists() == ("4" in line)
    if out.exists():
        record = load_record(out)
        assert isinstance(record, Measurement)
        assert (record.out_of_memory is not None) == (told is None)
        assert ("interrupted: fewer steps were timed than asked for" in record.notes) == (told is not None)


def test_memory_that_runs_out_in_a_script_s_first_step(
    script: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delitem(sys.modules, "helper", raising=False)
    monkeypatch.chdir(Path(_edited(script, OOM)).parent)
    assert run(app, ["profile", "--script", "train.py", "--", "9"]) == 1
    assert capsys.readouterr().err.splitlines()[-1] == (
        "optplan: 'train.py' ran out of memory in its first optimizer step: "
        "CUDA out of memory. Tried to allocate 2.00 GiB"
    )


def test_an_interrupted_loop_says_so() -> None:
    model = nn.Linear(6, 3)
    optimizer = torch.optim.AdamW(model.parameters())
    prof = optplan.profile_step(model, optimizer)
    with pytest.raises(KeyboardInterrupt), prof:
        for _ in range(4):
            _step(model, optimizer)
        raise KeyboardInterrupt
    assert prof.measurement().notes[-1] == "interrupted: fewer steps were timed than asked for"
