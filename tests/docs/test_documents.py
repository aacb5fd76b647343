"""The documents say what the program does."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from optplan.app import app
from optplan.boundary import run

ROOT = Path(__file__).resolve().parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def test_generated_documents_are_fresh() -> None:
    command = [sys.executable, str(ROOT / ".ci" / "write_docs.py"), "--check"]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.stderr == ""
    assert result.returncode == 0


def test_the_readme_sets_up_with_two_commands() -> None:
    command = [sys.executable, str(ROOT / ".ci" / "readme_commands.py")]
    lines = subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()
    assert lines == [
        "pip install . && optplan estimate --model llama-7b --gpu a100-40g",
        'pip install -c constraints.txt -e ".[test]" && pytest',
    ]


def console_lines() -> list[str]:
    after_setup = README.partition("\n## What it answers\n")[2]
    blocks = re.findall(r"```console\n(.*?)```", after_setup, re.DOTALL)
    return [line for block in blocks for line in block.splitlines() if line.startswith("optplan ")]


@pytest.mark.parametrize("line", console_lines())
def test_every_command_of_the_readme_runs(line: str, capsys: pytest.CaptureFixture[str]) -> None:
    status = run(app, line.split()[1:])
    out, err = capsys.readouterr()
    assert status in (0, 1)
    assert out
    assert err == ""


def test_the_python_of_the_readme_runs(capsys: pytest.CaptureFixture[str]) -> None:
    code = next(block for block in re.findall(r"```python\n(.*?)```", README, re.DOTALL) if "estimate(" in block)
    exec(compile(code, "README.md", "exec"), {})
    state_bytes, peak_bytes, fits = capsys.readouterr().out.split()
    assert int(state_bytes) < int(peak_bytes)
    assert fits in ("True", "False")


def test_links_between_documents_lead_somewhere() -> None:
    for document in [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").glob("*.md")]:
        for target in re.findall(r"\]\(([^)#]+)[^)]*\)", document.read_text(encoding="utf-8")):
            if not target.startswith("http"):
                assert (document.parent / target).exists(), f"{document.name}: {target}"


def test_every_command_is_documented() -> None:
    reference = (ROOT / "docs" / "cli.md").read_text(encoding="utf-8")
    for command in app.registered_commands:
        assert command.callback is not None
        assert f"## `optplan {command.callback.__name__}`" in reference
