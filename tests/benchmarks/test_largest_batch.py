"""The search for the largest micro-batch on capped GPUs, and cases that several processes measure, without either."""

from __future__ import annotations

import argparse
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
    return lambda names: list(rank_cases.run_cases([{"name": name} for name in names], launch, tmp_path))


def test_a_case_that_ends_its_launch_keeps_no_other_from_running(launches: Any) -> None:
    found = {case["name"]: [rank["rank"] for rank in ranks] for case, ranks in launches("abcd")}
    assert found == {"a": [0, 1], "b": [0], "c": [0, 1], "d": [0, 1]}


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


def test_llama_2_7b_in_4096_tokens_is_predicted_to_fit_once_with_adamw_and_twice_with_adam_mini(search: Any) -> None:
    options = argparse.Namespace(
        model="llama-2-7b", sharding="fsdp2", checkpointing="none", seq_len=4096, pretend_largest=None
    )
    rows = {name: search.prediction(options, name) for name in search.OPTIMIZERS}
    assert {name: found["predicted_largest"] for name, found in rows.items()} == {
        "adamw": 1, "adam-mini": 2, "micro-adam": 2, "adapprox": 2,
    }  # fmt: skip
    for found in rows.values():
        below, above = (peaks["peak_allocated_bytes"] for peaks in found["predicted"].values())
        assert below <= found["cap_bytes"] < above
    # Adam-mini's second moments are a few megabytes: half of AdamW's 8 bytes for each of the rank's parameters.
    numel = 6_738_415_616 // 2
    assert rows["adamw"]["state_bytes"] == pytest.approx(8 * numel, rel=1e-4)
    assert rows["adam-mini"]["state_bytes"] == pytest.approx(4 * numel, rel=1e-3)
