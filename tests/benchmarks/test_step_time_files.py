"""Times of steps in further processes, as the commands that measure or keep them write them beside the records."""

from __future__ import annotations

import gzip
import json
import shutil
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from optplan.planner.measured.step_times import FILE_NAME, read_process_times

RECORDS = Path(__file__).parents[1] / "records"
NAME = "gpt2_adamw_precision=bf16_batch_size=4_seq_len=1024"


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> Any:
    """A script of the benchmarks, by its name."""
    monkeypatch.syspath_prepend(str(RECORDS.parents[1] / "benchmarks"))

    def load(name: str) -> ModuleType:
        return pytest.importorskip(name)

    return load


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """One record of gpt2, 4 x 1024 in bf16, of a step of 34.3 ms."""
    shutil.copy(RECORDS / "h200_profiles" / f"{NAME}.json.gz", tmp_path)
    return tmp_path


def _run(module: ModuleType, monkeypatch: pytest.MonkeyPatch, *words: object) -> int:
    monkeypatch.setattr(sys, "argv", [module.__name__, *map(str, words)])
    return int(module.main())


def test_a_public_row_is_a_process_of_the_step_it_took(
    script: Any, folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    keep = script("keep_step_times")
    words = ("--records", folder, "--public", RECORDS / "public_h200_times.jsonl")
    assert _run(keep, monkeypatch, *words) == 0
    ((name, (time,)),) = read_process_times(folder).items()
    # Of 2.215, 0.0386 and 0.0302 s the first is the warm-up.
    assert (name, time.num_steps, time.phases) == (NAME, 2, {})
    assert time.step_seconds == pytest.approx((0.03864026 + 0.03018665) / 2)
    assert (time.host_launch_seconds, time.environment["torch"]) == ((None,), "2.11.0+cu130")
    before = (folder / FILE_NAME).read_bytes()
    assert _run(keep, monkeypatch, *words) == 0
    assert capsys.readouterr().out.splitlines() == ["1 times added, 0 were there", "0 times added, 1 were there"]
    assert (folder / FILE_NAME).read_bytes() == before


def test_lines_are_added_once_and_after_one_without_an_end(
    script: Any, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    keep = script("keep_step_times")
    rows = (RECORDS / "public_h200_times.jsonl").read_text("utf-8").splitlines()
    (row,) = [r for r in rows if '"gpt2"' in r and '"bf16"' in r and '"batch": 4' in r and '"adamw"' in r]
    (tmp_path / "rows.jsonl").write_text(f"{row}\n{row}\n")
    words = ("--records", folder, "--public", tmp_path / "rows.jsonl")
    assert _run(keep, monkeypatch, *words) == 0
    (time,) = read_process_times(folder)[NAME]
    line = (folder / FILE_NAME).read_text("utf-8").rstrip("\n").replace(str(time.step_seconds), "0.5")
    (folder / FILE_NAME).write_text(line)
    assert _run(keep, monkeypatch, *words) == 0
    assert [one.step_seconds for one in read_process_times(folder)[NAME]] == [0.5, time.step_seconds]


def test_another_record_of_the_step_is_another_process(
    script: Any, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    keep = script("keep_step_times")
    earlier = tmp_path / "earlier"
    earlier.mkdir()
    shutil.copy(folder / f"{NAME}.json.gz", earlier)
    assert _run(keep, monkeypatch, "--records", folder, "--earlier", earlier) == 1  # the same record, no other
    assert not (folder / FILE_NAME).exists()
    record = json.loads(gzip.decompress((folder / f"{NAME}.json.gz").read_bytes()))
    record["time"] |= {"step_seconds": 0.05, "host_launch_seconds": 2.5e-5}
    record["environment"]["command"] = "optplan profile --out /somewhere/gpt2.json.gz"
    (earlier / f"{NAME}.json.gz").write_bytes(gzip.compress(json.dumps(record).encode()))
    assert _run(keep, monkeypatch, "--records", folder, "--earlier", earlier) == 0
    (time,) = read_process_times(folder)[NAME]
    assert (time.step_seconds, time.host_launch_seconds) == (0.05, (2.5e-5,))
    assert time.environment["command"] == "optplan profile --out gpt2.json.gz"
    assert time.phases == record["time"]["phases"]


def test_a_process_takes_steps_again_and_adds_what_they_took(
    script: Any, folder: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    record_step_times = script("record_step_times")
    config = {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": 16, "intermediate_size": 24,
        "num_attention_heads": 2, "num_hidden_layers": 1, "num_key_value_heads": 1, "vocab_size": 32,
    }  # fmt: skip
    (tmp_path / "config.json").write_text(json.dumps(config))
    path = folder / f"{NAME}.json.gz"
    record = json.loads(gzip.decompress(path.read_bytes()))
    record["model"]["name"] = str(tmp_path / "config.json")
    record["config"] |= {"batch_size": 1, "seq_len": 8}
    path.write_bytes(gzip.compress(json.dumps(record).encode()))
    words = ("--records", folder, "--round", 3, "--device", "cpu", "--commit", "abcdef0")
    assert _run(record_step_times, monkeypatch, *words) == 0
    (time,) = read_process_times(folder)[NAME]
    assert (time.num_steps, time.host_launch_seconds) == (10, (None, None))
    assert 0 < time.phases["step"] < time.step_seconds < 10
    assert time.environment["commit"] == "abcdef0"
    # A step that is too long to be the host's is left out, and that there is none is a failure.
    assert _run(record_step_times, monkeypatch, *words, "--shorter-than", 0.01) == 1
    assert len(read_process_times(folder)[NAME]) == 1
