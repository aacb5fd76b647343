"""The grid around a step says what an estimate of each of its steps says."""

from __future__ import annotations

from typing import Any

import pytest

import optplan
from optplan.planner.catalog import load_model
from optplan.planner.estimate_details import details_of
from optplan.planner.optimizers.registry import build_optimizer
from optplan.planner.request import check_request
from optplan.planner.what_if import WhatIf, WhatIfCell, what_if

OPTIMIZERS = [build_optimizer(name) for name in ("micro-adam", "adamw", "lion")]


def grid_of(model: str = "gpt2", *, work: int = 132_000, **step: object) -> WhatIf | None:
    return what_if(check_request(load_model(model), gpu="a100-40g", **step), OPTIMIZERS, work=work)  # type: ignore[arg-type]


def test_the_grid_holds_every_combination_of_its_axes() -> None:
    grid = grid_of()
    assert grid is not None
    assert grid.axes["checkpointing"] == ["none", "full"]
    assert grid.axes["optimizer"] == ["micro-adam", "adamw", "lion"]
    # An H100 has other workspaces than an A100, while an 80 GB A100 takes the same step as one of 40 GB.
    assert {"a100-40g", "a100-80g", "h100-80g", "h200-141g"} <= set(grid.axes["gpu"])
    keys = {(c.gpu, c.optimizer, c.batch_size, c.seq_len, c.checkpointing) for c in grid.cells}
    expected = 1
    for values in grid.axes.values():
        expected *= len(values)
    assert len(keys) == len(grid.cells) == expected


def test_it_starts_with_what_was_asked() -> None:
    grid = grid_of(batch_size=3, seq_len=256, checkpointing="selective")
    assert grid is not None
    assert grid.start == {
        "gpu": "a100-40g", "optimizer": "micro-adam", "batch_size": 3, "seq_len": 256, "checkpointing": "selective",
    }  # fmt: skip
    assert all(value in grid.axes[name] for name, value in grid.start.items())


@pytest.mark.parametrize("index", [0, 17, 40, -1])
def test_a_cell_equals_the_estimate(index: int) -> None:
    grid = grid_of(grad_accum=2, precision="amp")
    assert grid is not None
    cell = grid.cells[index]
    (row,) = optplan.estimate(
        "gpt2", gpu=cell.gpu, optimizer=cell.optimizer, batch_size=cell.batch_size, seq_len=cell.seq_len,
        checkpointing=cell.checkpointing, grad_accum=2, precision="amp",
    ).estimates  # fmt: skip
    assert cell.peak_allocated_bytes == row.peak_allocated_bytes
    assert cell.peak_reserved_bytes == row.peak_reserved_bytes
    assert cell.peak_categories == row.peak_categories
    assert (cell.headroom_bytes, cell.fits, cell.peak_phase) == (row.headroom_bytes, row.fits, row.peak_phase)


def test_a_cell_of_several_gpus_equals_the_estimate() -> None:
    sharded: Any = {"gpus": 2, "sharding": "fsdp2"}
    request = check_request(load_model("gpt2"), gpu="a100-40g", **sharded)
    grid = what_if(request, [build_optimizer("adamw")], work=180_000)
    assert grid is not None
    for gpu in ("a100-40g", "a100-80g", "h100-80g"):
        cell = next(cell for cell in grid.cells if cell.gpu == gpu and cell.checkpointing == "none")
        report = optplan.estimate("gpt2", gpu=gpu, optimizer="adamw", **sharded)
        # The communication library has its part of each GPU.
        alone = optplan.estimate("gpt2", gpu=gpu, optimizer="adamw")
        assert cell.usable_bytes == report.gpu.usable_bytes < alone.gpu.usable_bytes
        assert cell.headroom_bytes == report.estimates[0].headroom_bytes


@pytest.mark.parametrize(("work", "fits"), [(80_000, False), (60_000, None)], ids=["simulated", "not simulated"])
def test_a_cell_near_the_limit_has_the_estimate_s_verdict_where_there_is_time(work: int, fits: bool | None) -> None:
    request = check_request(load_model("llama-7b"), gpu="a100-80g")
    grid = what_if(request, [build_optimizer("adam-mini")], work=work)
    (row,) = optplan.estimate("llama-7b", gpu="a100-40g", optimizer="adam-mini").estimates
    assert grid is not None
    assert grid.cells[0].fits is True
    cell = next(cell for cell in grid.cells if (cell.gpu, cell.checkpointing) == ("a100-40g", "none"))
    assert cell.headroom_bytes == row.headroom_bytes
    assert cell.headroom_bytes > 0
    assert (row.fits, cell.fits) == (False, fits)


def test_less_work_means_fewer_cells() -> None:
    small, large = grid_of(work=22_000), grid_of(work=132_000)
    assert small is not None
    assert large is not None
    assert 0 < len(small.cells) < len(large.cells)


def test_what_a_report_has_answered_already_is_not_simulated_again() -> None:
    report = optplan.estimate("gpt2", gpu="a100-40g", optimizer=["micro-adam", "adamw", "lion"], batch_size=2)
    details = details_of(report)
    plain = grid_of(batch_size=2)
    assert details is not None
    assert details.what_if is not None
    assert plain is not None
    told = {cell_key(cell): cell for cell in details.what_if.cells}
    common = [cell for cell in plain.cells if cell_key(cell) in told]
    assert len(common) > 40
    assert all(told[cell_key(cell)] == cell for cell in common)


def cell_key(cell: WhatIfCell) -> tuple[object, ...]:
    return cell.gpu, cell.optimizer, cell.batch_size, cell.seq_len, cell.checkpointing


def test_a_family_without_step_rules_has_no_grid(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("optplan.planner.workload.has_rules", lambda _: False)
    assert grid_of() is None
