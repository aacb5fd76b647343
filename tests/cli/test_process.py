"""The command line as a process: start-up time, what it imports, pipes, locales, widths."""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
from pathlib import Path

import pytest

ESTIMATE = ["estimate", "--model", "llama-7b", "--gpu", "a100-40g"]


def optplan(*args: str, **environment: str) -> subprocess.CompletedProcess[bytes]:
    env = {**os.environ, "COLUMNS": "100", **environment}
    return subprocess.run(
        [sys.executable, "-m", "optplan", *args], capture_output=True, env=env, timeout=60, check=False
    )


def processor_seconds(*args: str) -> float:
    """Processor time of the single-threaded process: wall time on an idle machine, whatever else runs on this one."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    result = optplan(*args)
    assert (result.returncode in (0, 1), result.stderr) == (True, b"")
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


@pytest.mark.parametrize(
    ("args", "limit_seconds"),
    [([*ESTIMATE, "--optimizer", "adamw", "--json"], 0.5), (ESTIMATE, 1.2)],
    ids=["one optimizer as JSON", "the default table"],
)
def test_answers_quickly_from_a_cold_start(args: list[str], limit_seconds: float) -> None:
    assert min(processor_seconds(*args) for _ in range(5)) <= limit_seconds


@pytest.mark.parametrize(("model", "gpus"), [("llama-3.1-405b", "8"), ("palm-540b", "64")])
def test_the_number_of_gpus_for_the_largest_models_takes_no_more_than_two_seconds(model: str, gpus: str) -> None:
    sharded = ["--gpus", gpus, "--sharding", "fsdp2", "--precision", "mixed", "--checkpointing", "full"]
    args = ["estimate", "--model", model, "--gpu", "h100", "--optimizer", "adamw", *sharded]
    assert min(processor_seconds(*args) for _ in range(3)) <= 2


@pytest.mark.parametrize("args", [["--help"], ESTIMATE, ["models"], ["gpus"], ["optimizers"], ["published"]])
def test_never_loads_torch(args: list[str]) -> None:
    code = (
        "import sys\nfrom optplan.app import app\nfrom optplan.boundary import run\n"
        f"run(app, {args!r})\n"
        "heavy = {'torch', 'triton', 'transformers', 'numpy', 'plotly'} & set(sys.modules)\n"
        "sys.exit(9 if heavy else 0)"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, check=False).returncode == 0


def test_json_is_one_document_and_nothing_else() -> None:
    result = optplan(*ESTIMATE, "--json")
    assert result.stderr == b""
    assert json.loads(result.stdout)["schema"] == "optplan.estimate/1"


def test_a_closed_pipe_ends_quietly() -> None:
    command = f"{sys.executable} -m optplan models | head -n 1; exit ${{PIPESTATUS[0]}}"
    result = subprocess.run(["bash", "-c", command], capture_output=True, check=False)
    assert result.stderr == b""
    assert result.returncode == 0


def test_a_closed_stdout_is_one_sentence() -> None:
    command = f"{sys.executable} -m optplan gpus --json >&-"
    result = subprocess.run(["bash", "-c", command], capture_output=True, check=False)
    assert result.stderr == b"optplan: stdout is closed: there is nowhere to print the result\n"
    assert result.returncode == 2


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_a_full_disk_is_one_sentence() -> None:
    with Path("/dev/full").open("wb") as full:
        result = subprocess.run(
            [sys.executable, "-m", "optplan", "gpus", "--json"], stdout=full, stderr=subprocess.PIPE, check=False
        )
    assert result.stderr == b"optplan: No space left on device\n"
    assert result.returncode == 1


@pytest.mark.parametrize("columns", ["40", "60", "80", "100", "200"])
def test_no_line_is_wider_than_the_terminal(columns: str) -> None:
    result = optplan(*ESTIMATE, COLUMNS=columns)
    command_line = "optplan estimate "  # kept whole, so that it can be copied
    lines = [line for line in result.stdout.decode().splitlines() if not line.startswith(command_line)]
    assert result.returncode == 0
    assert max(len(line) for line in lines) <= int(columns)


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "cp1252", "utf-8"])
def test_any_locale_can_show_the_table(encoding: str) -> None:
    result = optplan(*ESTIMATE, PYTHONIOENCODING=encoding)
    assert result.returncode == 0
    assert result.stderr == b""
    text = result.stdout.decode(encoding)
    assert "?" not in text
    assert "optimizer state" in text


def test_no_color_and_pipes_get_no_escape_codes() -> None:
    assert b"\x1b" not in optplan(*ESTIMATE).stdout
    assert b"\x1b" not in optplan(*ESTIMATE, NO_COLOR="1", FORCE_COLOR="1", TERM="xterm-256color").stdout.replace(
        b"\x1b[1m", b""
    ).replace(b"\x1b[0m", b"").replace(b"\x1b[2m", b"")


def test_an_argument_that_is_not_text_is_refused() -> None:
    command = [sys.executable, "-m", "optplan", "estimate", "--gpu", "a100-40g", "--model", b"\xff\xfe"]
    result = subprocess.run(command, capture_output=True, check=False)
    assert result.returncode == 2
    assert result.stderr.startswith(b"optplan: unknown model '\\udcff\\udcfe'")


def test_help_names_every_command() -> None:
    text = optplan("--help").stdout.decode()
    for command in ("estimate", "explain", "models", "gpus", "optimizers", "published"):
        assert command in text
