"""The search for the largest micro-batch on capped GPUs, and cases that several processes measure, without either."""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"


@pytest.fixture(name="search", scope="module")
def _search() -> Any:
    sys.path.insert(0, str(BENCHMARKS))
    import record_largest_batch

    return record_largest_batch


@pytest.fixture(name="launches")
def _launches(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """`run_cases` whose launches are a script that stops behind the case `b`, of which rank 1 tells nothing."""
    sys.path.insert(0, str(BENCHMARKS))
    import rank_cases

    script = tmp_path / "rank.py"
    script.write_text(
        "import json, pathlib, sys\n"
        "folder = pathlib.Path(sys.argv[1])\n"
        "for case in json.loads((folder / 'cases.json').read_text()):\n"
        "    name = case['name']\n"
        "    (folder / f'{name}.begun').touch()\n"
        "    for rank in (0, 1) if name != 'b' else (0,):\n"
        "        part = folder / 'part'\n"
        "        part.write_text(json.dumps({'rank': rank}))\n"
        "        part.rename(folder / f'{name}-rank-{rank}.json')\n"
        "    if name == 'b':\n"
        "        sys.exit(1)\n"
    )
    command = [sys.executable, str(script), str(tmp_path)]
    monkeypatch.setattr(rank_cases, "_start", lambda *_: subprocess.Popen(command))
    launch = rank_cases.Launch(script, (), 2, 30.0)
    return lambda names, **given: list(
        rank_cases.run_cases([{"name": name} for name in names], launch._replace(**given), tmp_path)
    )


def test_a_case_that_ends_its_launch_keeps_no_other_from_running(launches: Any) -> None:
    found = {case["name"]: [rank["rank"] for rank in ranks] for case, ranks in launches("abcd")}
    assert found == {"a": [0, 1], "b": [0], "c": [0, 1], "d": [0, 1]}


RANKS = """
import argparse
from pathlib import Path

import torch
import torch.distributed as dist
from rank_cases import joined, run_rank

def run(case):
    if case["name"] == "fails-on-1" and rank.index == 1:
        raise ValueError("it would not")
    if case["name"] == "runs-out":
        raise torch.OutOfMemoryError("tried to allocate")
    given = torch.ones(1)
    if case["name"] == "is-well":
        dist.all_reduce(given)
    return {"found": given.item(), "renewed": rank.facts.get("groups_renewed", 0)}

parser = argparse.ArgumentParser()
parser.add_argument("--role")
parser.add_argument("--folder", type=Path)
with joined("cpu") as rank:
    run_rank(rank, parser.parse_args().folder, run)
"""
"""A benchmark of two ranks over gloo, its cases named by what happens in them."""


def test_ranks_go_on_in_the_same_launch_after_a_failure(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sys.path.insert(0, str(BENCHMARKS))
    import rank_cases

    script = tmp_path / "ranks.py"
    script.write_text(RANKS)
    monkeypatch.setenv("PYTHONPATH", str(BENCHMARKS))
    launches = []
    start = rank_cases._start
    monkeypatch.setattr(rank_cases, "_start", lambda *given: launches.append(given) or start(*given))
    cases = [{"name": name} for name in ("runs-out", "fails-on-1", "is-well")]
    launch = rank_cases.Launch(script, (), 2, 60)
    found = {case["name"]: ranks for case, ranks in rank_cases.run_cases(cases, launch, tmp_path)}
    assert [rank["out_of_memory"] for rank in found["runs-out"]] == ["tried to allocate"] * 2
    assert found["fails-on-1"][0]["renewed"] == 1
    assert found["fails-on-1"][1]["error"] == "ValueError: it would not"
    assert [(rank["found"], rank["renewed"]) for rank in found["is-well"]] == [(2.0, 2)] * 2
    assert len(launches) == 1


def test_a_case_that_takes_too_long_is_given_up(launches: Any, tmp_path: Path) -> None:
    slow = tmp_path / "rank.py"
    slow.write_text(slow.read_text().replace("if name == 'b':", "if name == 'b':\n        import time; time.sleep(60)"))
    found = {case["name"]: [rank["rank"] for rank in ranks] for case, ranks in launches("abc", case_seconds=1.0)}
    assert found == {"a": [0, 1], "b": [0], "c": [0, 1]}


def row(predicted: int, **trials: bool) -> dict[str, Any]:
    return {
        "optimizer": "sgd",
        "predicted_largest": predicted,
        "trials": {name[1:]: {"fits": fits} for name, fits in trials.items()},
    }


@pytest.mark.parametrize(
    ("found", "sizes", "largest"),
    [
        (row(3), [3, 4], None),
        (row(0), [1], None),
        (row(3, _3=True, _4=False), [], 3),
        (row(3, _3=True, _4=True), [5], None),
        (row(3, _3=True, _4=True, _5=False), [], 4),
        (row(3, _3=False, _4=False), [2], None),
        (row(3, _3=False, _4=False, _2=True), [], 2),
        (row(1, _1=False, _2=False), [], 0),
        (row(1, _1=True, _2=True, _3=True, _4=True, _5=True, _6=True), [], None),
    ],
)
def test_the_search_ends_between_a_batch_that_runs_and_the_next(
    search: Any, found: dict[str, Any], sizes: list[int], largest: int | None
) -> None:
    assert [case["batch_size"] for case in search.next_cases(found)] == sizes
    assert search.measured_largest(found) == largest


def test_an_earlier_search_is_gone_on_with(search: Any, tmp_path: Path) -> None:
    same = {"schema": search.SCHEMA, "optimizer": "adam-mini", "options": {}, "model": "llama-2-7b", "seq_len": 4096,
            "sharding": "fsdp2", "precision": "mixed", "checkpointing": "none", "cap_bytes": 80}  # fmt: skip
    trials = {"2": {"fits": False}, "3": {"fits": False}, "1": {"fits": None, "verdict": "a rank told nothing"}}
    earlier = [same | {"trials": trials}, same | {"cap_bytes": 40, "trials": {"1": {"fits": False}}}]
    file = tmp_path / "rows.jsonl"
    file.write_text("\n".join(json.dumps(row | {"environment": {"commit": "abc"}}) for row in earlier))
    now = same | {"predicted_largest": 2, "trials": search.known_trials(same, file)}
    assert now["trials"] == {"2": {"commit": "abc", "fits": False}, "3": {"commit": "abc", "fits": False}}
    assert [case["name"] for case in search.next_cases(now)] == ["adam-mini-1"]
    assert search.known_trials(same, None) == {}


def rank(number: int, seconds: float | None = 2.0, **more: Any) -> dict[str, Any]:
    return {"rank": number, "figures": {"step_seconds": seconds, "out_of_memory": None}, **more}


@pytest.mark.parametrize(
    ("ranks", "fits", "verdict"),
    [
        ([rank(0), rank(1, 2.5)], True, "fits, 3,276.80 tokens/s on 2 GPUs"),
        ([rank(0), {"rank": 1, "out_of_memory": "tried to allocate"}], False, "out of memory"),
        ([rank(1, None, figures={"out_of_memory": {"phase": "backward"}})], False, "out of memory"),
        ([rank(0), {"rank": 1, "error": "ValueError: bad"}], None, "ValueError: bad"),
        ([rank(0)], None, "a rank told nothing"),
    ],
)
def test_a_trial_is_what_its_slowest_rank_says(
    search: Any, ranks: list[dict[str, Any]], fits: bool | None, verdict: str
) -> None:
    trial = search.trial_of(ranks, 2 * 4096)
    assert (trial["fits"], trial["verdict"]) == (fits, verdict)


def test_llama_2_7b_in_4096_tokens_is_predicted_to_run_with_the_micro_batches_that_were_measured(search: Any) -> None:
    options = argparse.Namespace(
        model="llama-2-7b", sharding="fsdp2", checkpointing="none", seq_len=4096, pretend_largest=None
    )
    rows = {name: search.prediction(options, name) for name in search.OPTIMIZERS}
    assert {name: found["predicted_largest"] for name, found in rows.items()} == {
        "adamw": 1, "adam-mini": 1, "micro-adam": 2, "adapprox": 2,
    }  # fmt: skip
    for name, found in rows.items():
        below, above = (peaks["peak_allocated_bytes"] for peaks in found["predicted"].values())
        assert below <= found["cap_bytes"]
        # Adam-mini's second sequence would fit by bytes: what is cut up keeps it from running.
        assert (above <= found["cap_bytes"]) == (name == "adam-mini")
    # Adam-mini's second moments are a few megabytes: half of AdamW's 8 bytes for each of the rank's parameters.
    numel = 6_738_415_616 // 2
    assert rows["adamw"]["state_bytes"] == pytest.approx(8 * numel, rel=1e-4)
    assert rows["adam-mini"]["state_bytes"] == pytest.approx(4 * numel, rel=1e-3)
