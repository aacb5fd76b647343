"""The plan of all measurements, run with small jobs on two GPUs that are not there."""

from __future__ import annotations

import json
import subprocess
import sys
import tarfile
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "benchmarks" / "measure_all.py"
BUSY = "measured while other GPUs of this host were busy: the host's share of the times may be longer"
WORK = """
import json, os, sys, time
path, what = sys.argv[1:3]
row = {name: os.environ.get(name) for name in ("CUDA_VISIBLE_DEVICES", "OPTPLAN_RECORD_NOTE", "OPTPLAN_COMMIT")}
with open(path, "a") as file:
    file.write(json.dumps({**row, "commit": sys.argv[3]}) + "\\n")
    if what == "hang":
        file.write('{"half')
        file.flush()
        time.sleep(60)
if what == "fail":
    sys.exit("it cannot be done")
time.sleep(float(what) if what[0].isdigit() else 0)
"""


def _job(tmp_path: Path, name: str, what: str, gpus: int, *, seconds: int = 1, goes_on: bool = False) -> str:
    command = f"python {tmp_path / 'work.py'} {{out}}/rows.jsonl {what} {{commit}}"
    return (
        f'[[job]]\nname = "{name}"\ncommand = "{command}"\ngpus = {gpus}\nseconds = {seconds}\n'
        f"goes_on = {str(goes_on).lower()}\n"
    )


def _run(tmp_path: Path, jobs: list[str], *arguments: str, budget: float = 20) -> tuple[int, list[str], str]:
    """Exit status, lines and errors of one call."""
    (tmp_path / "work.py").write_text(WORK)
    (tmp_path / "jobs.toml").write_text("\n".join(jobs))
    words = ["--out", str(tmp_path / "out"), "--jobs", str(tmp_path / "jobs.toml"), "--commit", "0123abcd"]
    words += ["--budget-seconds", str(budget), "--gpus", "2", *arguments]
    done = subprocess.run(
        [sys.executable, str(SCRIPT), *words], capture_output=True, text=True, check=False, timeout=60
    )
    return done.returncode, done.stdout.splitlines(), done.stderr


def _rows(tmp_path: Path, name: str) -> list[dict[str, str]]:
    lines = (tmp_path / "out" / "work" / name / "rows.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


def test_single_jobs_run_beside_each_other_and_pairs_alone(tmp_path: Path) -> None:
    jobs = [_job(tmp_path, "a", "0.8", 1), _job(tmp_path, "b", "0.8", 1), _job(tmp_path, "pair", "0", 2)]
    jobs.append(_job(tmp_path, "c", "0", 1))
    status, lines, errors = _run(tmp_path, jobs, "--pack", str(tmp_path / "pack"))
    assert (status, errors) == (0, "")
    told = [" ".join(line.split()[2:4]) for line in lines if " s  " in line and line.startswith(" ")]
    assert told[:2] == ["begins a", "begins b"]
    assert sorted(told[2:4]) == ["done a", "done b"]
    assert told[4:] == ["begins pair", "done pair", "begins c", "done c"]
    assert _rows(tmp_path, "b") == [
        {"CUDA_VISIBLE_DEVICES": "1", "OPTPLAN_RECORD_NOTE": BUSY, "OPTPLAN_COMMIT": "0123abcd", "commit": "0123abcd"}
    ]
    assert _rows(tmp_path, "pair")[0]["CUDA_VISIBLE_DEVICES"] == "0,1"
    assert _rows(tmp_path, "pair")[0]["OPTPLAN_RECORD_NOTE"] is None
    attempts = [json.loads(line) for line in (tmp_path / "out" / "run.jsonl").read_text().splitlines()]
    assert {attempt["name"]: attempt["beside"] for attempt in attempts if attempt["name"] in ("pair", "c")} == {
        "pair": [],
        "c": [],
    }
    with tarfile.open(tmp_path / "pack" / "measured-1.tar.gz") as archive:
        assert {f"work/{name}/rows.jsonl" for name in ("a", "b", "pair", "c")} < set(archive.getnames())


def test_what_is_done_is_not_done_again_and_what_failed_is(tmp_path: Path) -> None:
    jobs = [_job(tmp_path, "good", "0", 1), _job(tmp_path, "bad", "fail", 1)]
    assert _run(tmp_path, jobs)[0] == 1
    status, lines, _ = _run(tmp_path, jobs)
    assert status == 1
    assert [line.split()[:2] for line in lines[-2:]] == [["good", "earlier"], ["bad", "failed"]]
    assert lines[-1].endswith("it cannot be done")
    # An attempt that failed leaves nothing to which the next one adds.
    assert (len(_rows(tmp_path, "good")), len(_rows(tmp_path, "bad"))) == (1, 1)


@pytest.mark.parametrize(("goes_on", "num_rows"), [(False, 1), (True, 2)])
def test_the_budget_stops_a_job_between_two_rows(tmp_path: Path, goes_on: bool, num_rows: int) -> None:
    jobs = [_job(tmp_path, "slow", "hang", 1, seconds=2, goes_on=goes_on), _job(tmp_path, "long", "0", 1, seconds=99)]
    for _ in range(2):
        status, lines, _ = _run(tmp_path, jobs, budget=4.4)
        assert status == 0
        assert [line.split()[:2] for line in lines[-2:]] == [["slow", "stopped"], ["long", "left"]]
    assert len(_rows(tmp_path, "slow")) == num_rows


def test_another_commit_is_measured_anew(tmp_path: Path) -> None:
    jobs = [_job(tmp_path, "good", "0", 0)]
    _run(tmp_path, jobs)
    _, lines, _ = _run(tmp_path, jobs, "--commit", "ffff")
    assert lines[-1].split()[:2] == ["good", "done"]
    assert [row["commit"] for row in _rows(tmp_path, "good")] == ["ffff"]


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--only", "good", "bat"], "no job bat; known: good\n"),
        (["--only", "good", "--dry-run"], ""),
    ],
)
def test_names_are_checked(tmp_path: Path, arguments: list[str], sentence: str) -> None:
    status, _, errors = _run(tmp_path, [_job(tmp_path, "good", "0", 0)], *arguments)
    assert (status, errors) == (int(bool(sentence)), sentence)
    assert not (tmp_path / "out").exists()


def test_the_plan_names_scripts_and_options_that_are_there() -> None:
    words = [sys.executable, str(SCRIPT), "--out", "x", "--gpus", "2", "--dry-run"]
    done = subprocess.run(words, capture_output=True, text=True, check=True)
    # Three calls of ten minutes suffice for everything.
    assert float(done.stdout.splitlines()[-1].split()[0]) < 3 * 540
    for job in tomllib.loads(SCRIPT.with_suffix(".toml").read_text())["job"]:
        _, script, *options = job["command"].split()
        if script != "-m":
            text = (ROOT / script).read_text()
            assert [word for word in options if word.startswith("--") and f'"{word}"' not in text] == []
        assert all((ROOT / word).exists() for word in options if word.startswith("tests/"))
