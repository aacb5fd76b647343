"""Two ranks that hold the rows of every parameter train as one process does; each loads what the other saved.

The ranks run `sharded_cases.py` as a script and talk over gloo.
"""

from __future__ import annotations

import runpy
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

SCRIPT = Path(__file__).with_name("sharded_cases.py")
RANKS = runpy.run_path(str(SCRIPT))
CASES, SAVED_AFTER, NUM_STEPS = RANKS["CASES"], RANKS["SAVED_AFTER"], RANKS["NUM_STEPS"]

EXACT = {"rtol": 0.0, "atol": 0.0}
SUMMED: dict[torch.dtype, dict[str, float]] = {
    # Sums over rows are added rank by rank; entries are of order 1.
    torch.float64: {"rtol": 1e-12, "atol": 1e-13},
    torch.float32: {"rtol": 1e-4, "atol": 1e-5},
}

Tensors = dict[str, dict[str, torch.Tensor]]


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What one process trained, what both ranks did, and what one process made of the ranks' checkpoint."""
    folder = tmp_path_factory.mktemp("sharded")
    one = {name: _train_alone(name, save_to=folder / f"{name}-on-one") for name in CASES}
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    ranks = [subprocess.Popen([sys.executable, str(SCRIPT), rank, port, str(folder)]) for rank in "01"]
    assert [rank.wait(timeout=500) for rank in ranks] == [0, 0]
    found = [torch.load(folder / f"found-{rank}.pt") for rank in range(2)]
    resumed = {name: _train_alone(name, load_from=folder / f"{name}-on-two") for name in CASES}
    return {"one": one, "ranks": found, "resumed_on_one": resumed}


def _train_alone(name: str, *, save_to: Path | None = None, load_from: Path | None = None) -> Tensors:
    training = RANKS["Training"](CASES[name], RANKS["one_process"])
    if load_from is not None:
        training.load(load_from)
    else:
        training.run(0, SAVED_AFTER)
    if save_to is not None:
        training.save(save_to)
        torch.save(training.whole(), f"{save_to.parent / name}-whole.pt")
    training.run(SAVED_AFTER, NUM_STEPS)
    found: Tensors = training.whole()
    return found


def _assert_same(name: str, found: Tensors, expected: Tensors) -> None:
    tolerance = SUMMED[CASES[name].dtype] if name.startswith(("adapprox", "adam-mini")) else EXACT
    assert list(found) == list(expected)
    for parameter, tensors in expected.items():
        assert list(found[parameter]) == list(tensors)
        for key, tensor in tensors.items():
            where = f"{parameter} {key}"
            torch.testing.assert_close(found[parameter][key], tensor, **tolerance, msg=lambda m, w=where: f"{w}: {m}")


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("rank", [0, 1])
def test_two_ranks_train_as_one_process(results: dict[str, Any], name: str, rank: int) -> None:
    _assert_same(name, results["ranks"][rank][name]["trained"], results["one"][name])


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("rank", [0, 1])
def test_two_ranks_go_on_from_the_checkpoint_of_one_process(results: dict[str, Any], name: str, rank: int) -> None:
    _assert_same(name, results["ranks"][rank][name]["resumed"], results["one"][name])


@pytest.mark.parametrize("name", RANKS["ONE_EACH"])
def test_two_ranks_cut_a_whole_state_to_their_rows(results: dict[str, Any], name: str) -> None:
    _assert_same(name, results["ranks"][0][name]["cut"], results["ranks"][0][name]["resumed"])


@pytest.mark.parametrize("name", CASES)
def test_one_process_goes_on_from_the_checkpoint_of_two_ranks(results: dict[str, Any], name: str) -> None:
    _assert_same(name, results["resumed_on_one"][name], results["one"][name])


@pytest.mark.parametrize("name", CASES)
def test_what_ranks_share_is_the_same_to_the_bit(results: dict[str, Any], name: str) -> None:
    first, second = (rank[name]["trained"] for rank in results["ranks"])
    for parameter, tensors in first.items():
        for key, tensor in tensors.items():
            assert torch.equal(tensor, second[parameter][key]), f"{parameter} {key}"


@pytest.mark.parametrize("name", RANKS["ONE_EACH"])
def test_losses_under_fully_shard(results: dict[str, Any], name: str) -> None:
    expected = RANKS["train_network"](CASES[name], None)
    for rank in results["ranks"]:
        assert rank[name]["losses"] == pytest.approx(expected, rel=1e-5)


STEP = {"step": 4}
STATE_BYTES: list[tuple[str, str, list[dict[str, int]]]] = [
    ("adamw", "uneven", [{"exp_avg": 19 * 24 * 4, "exp_avg_sq": 19 * 24 * 4}, {"exp_avg": 1728, "exp_avg_sq": 1728}]),
    ("adamw", "one_row", [{"exp_avg": 160, "exp_avg_sq": 160}, {"exp_avg": 0, "exp_avg_sq": 0}]),
    # 1536 elements a rank: 6 blocks of 256, each 4 buckets and 11 of 256 selected, 3 rows of the window.
    ("micro-adam", "even", [{
        "error_feedback": 768, "bucket_min": 6 * 4 * 2, "bucket_max": 6 * 4 * 2,
        "window_indices": 3 * 6 * 11 * 2, "window_values": 3 * 6 * 11 * 2,
    }] * 2),
    # The whole of 888 elements on each rank: 3 blocks and a short one of 120 (5 selected, 4 buckets).
    ("micro-adam", "uneven", [{
        "error_feedback": 444, "bucket_min": 16 * 2, "bucket_max": 16 * 2,
        "window_indices": 3 * (3 * 11 + 5) * 2, "window_values": 3 * (3 * 11 + 5) * 2,
    }] * 2),
    # Own rows of the first moment and of Q, all of U, in 8 bytes: rank 5.
    ("adapprox", "even", [{"exp_avg": 32 * 48 * 8, "q_factor": 32 * 5 * 8, "u_factor": 48 * 5 * 8}] * 2),
    ("adapprox", "uneven", [
        {"exp_avg": rows * 24 * 8, "q_factor": rows * 5 * 8, "u_factor": 24 * 5 * 8} for rows in (19, 18)
    ]),
    ("adapprox", "vector", [{"exp_avg": 65 * 8, "exp_avg_sq": 65 * 8}] * 2),
]  # fmt: skip


@pytest.mark.parametrize(("name", "parameter", "expected"), STATE_BYTES)
def test_state_bytes_of_each_rank(
    results: dict[str, Any], name: str, parameter: str, expected: list[dict[str, int]]
) -> None:
    assert [rank[name]["own_bytes"][parameter] for rank in results["ranks"]] == [STEP | sizes for sizes in expected]


@pytest.mark.parametrize("rank", [0, 1])
def test_other_placements_are_refused(results: dict[str, Any], rank: int) -> None:
    columns = (
        "takes DTensors whose dimension 0 is sharded over one mesh dimension, "
        "got placements (Shard(dim=1),) for shape (4, 6)"
    )
    assert results["ranks"][rank]["refusals"] == {
        "micro-adam": f"MicroAdam {columns}",
        "adapprox": f"Adapprox {columns}",
        "adapprox-paper": "mode='paper' takes whole tensors, got one of shape (4, 6) on 2 ranks; use mode='fast'",
    }
