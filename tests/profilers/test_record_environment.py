"""What a record says of how it was made."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from optplan.profilers.live.environment import command_line

PRINTED = "from optplan.profilers.live.environment import command_line; print(command_line())"


@pytest.mark.parametrize(
    ("words", "command"),
    [
        (["/usr/local/bin/optplan", "profile", "--model", "gpt2"], "optplan profile --model gpt2"),
        (["train.py", "--lr", "1e-4"], "train.py --lr 1e-4"),
        (["optplan", "profile", "--out", "/home/me/a b/step.json.gz"], "optplan profile --out step.json.gz"),
        (["optplan", "profile", "--out=/home/me/step.json.gz"], "optplan profile --out=step.json.gz"),
        (["optplan", "profile", "--out", "records/step.json.gz"], "optplan profile --out records/step.json.gz"),
        (["optplan", "profile", "--set", "window=20"], "optplan profile --set window=20"),
        (["optplan", "profile", "--out", "two words.json"], "optplan profile --out 'two words.json'"),
    ],
)
def test_the_command_of_a_record_can_be_repeated(
    words: list[str], command: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "argv", words)
    assert command_line() == command


@pytest.mark.parametrize(
    ("ranks", "command"),
    [
        ({"WORLD_SIZE": "1", "RANK": "0"}, "train.py"),
        ({"WORLD_SIZE": "2"}, "train.py"),
        ({"WORLD_SIZE": "2", "RANK": "1"}, "torchrun --nproc-per-node 2 train.py"),
        ({"WORLD_SIZE": "8", "RANK": "5", "LOCAL_WORLD_SIZE": "4"}, "torchrun --nnodes 2 --nproc-per-node 4 train.py"),
    ],
)
def test_several_processes_are_started_by_torchrun(
    ranks: dict[str, str], command: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("WORLD_SIZE", "RANK", "LOCAL_WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    for name, value in ranks.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(sys, "argv", ["train.py"])
    assert command_line() == command


RUN = (
    "import runpy, sys; sys.argv = ['trainer', '--steps', '2'];"
    " runpy.run_module('trainer', run_name='__main__', alter_sys=True)"
)
"""As a server of validation runs its children."""


@pytest.mark.parametrize(
    ("started", "ranks", "launcher"),
    [
        (["-m", "trainer", "--steps", "2"], {}, ""),
        (["-c", RUN], {"WORLD_SIZE": "2", "RANK": "0"}, "torchrun --nproc-per-node 2 -m "),
    ],
)
def test_a_package_that_was_run_is_named_and_not_its_file(
    tmp_path: Path, started: list[str], ranks: dict[str, str], launcher: str
) -> None:
    package = tmp_path / "trainer"
    package.mkdir()
    (package / "__init__.py").touch()
    (package / "__main__.py").write_text(PRINTED)
    command, environment = [sys.executable, *started], {**os.environ, **ranks}
    found = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True, env=environment)
    assert found.stdout == f"{launcher}trainer --steps 2\n"


def test_optplan_run_as_a_module_is_named_optplan(tmp_path: Path) -> None:
    script = ["profile", "--model", "tiny", "--out", "step.json.gz"]
    code = (
        "import json, runpy, sys, optplan.boundary as boundary;"
        "from optplan.profilers.live.environment import command_line;"
        "boundary.run = lambda *args, **kwargs: print(json.dumps(command_line())) or 0;"
        f"sys.argv = ['optplan', *{script}];"
        "runpy.run_module('optplan', run_name='__main__', alter_sys=True)"
    )
    found = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert json.loads(found.stdout) == "optplan profile --model tiny --out step.json.gz"
