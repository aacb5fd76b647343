"""The launch tables and the scratch of a step of the kernels, as the planner says them: seen without a GPU."""

from __future__ import annotations

import ctypes
from typing import Any, ClassVar

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from optplan.optim_impls import Adapprox
from optplan.optim_impls.adapprox.layout import FIELDS, Field
from optplan.planner.optimizers.base import OptimizerContext
from optplan.planner.optimizers.registry import build_optimizer
from optplan.planner.tensors import Parameter
from optplan.planner.timeline import Allocation, TimelineBuilder

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
SHAPES: list[tuple[int, ...]] = [(70, 65), (37,), (64, 128), (6, 5, 7), (0,), (66, 136), (1, 9)]
"""Three rounds (even rows, odd rows, and 6 x 35 whose rank is 1), vectors between them."""


class Requests(TorchDispatchMode):
    """Bytes of what is allocated without contents."""

    def __init__(self) -> None:
        super().__init__()
        self.sizes: list[int] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if func is torch.ops.aten.empty.memory_format and result.numel():  # the interpreter makes empty ones
            self.sizes.append(result.untyped_storage().nbytes())
        return result


@pytest.fixture(scope="module")
def stepped() -> tuple[Adapprox, list[torch.nn.Parameter]]:
    """An optimizer after its first step; rank 10."""
    parameters = [torch.nn.Parameter(torch.zeros(shape, device=DEVICE)) for shape in SHAPES]
    for parameter in parameters:
        parameter.grad = torch.ones_like(parameter)
    optimizer = Adapprox(parameters, rank=10, backend="triton")
    optimizer.step()
    return optimizer, parameters


def _tables(optimizer: Adapprox) -> list[Any]:
    ((upload, _),) = optimizer._plans[0].scratch["uploads"]
    return upload()


def _planned() -> dict[bool, list[int]]:
    """Bytes of the tables (True) and of the scratch, in order."""
    timeline, context = TimelineBuilder("step"), OptimizerContext("float32", "float32")
    described = [Parameter(f"p{i}", shape, "other", "linear") for i, shape in enumerate(SHAPES)]
    build_optimizer("adapprox", {"rank": "10"}).write_step(timeline, described, context)
    made = [event for event in timeline.events if isinstance(event, Allocation)]
    return {kind: [e.bytes for e in made if ("launch tables" in e.name) is kind] for kind in (True, False)}


@pytest.mark.skipif(torch.cuda.is_available(), reason="on a GPU the tables themselves are allocated")
def test_a_step_allocates_what_the_planner_says_in_its_order(stepped: Any) -> None:
    with Requests() as requests:
        stepped[0].step()
    assert requests.sizes == _planned()[False]


def test_all_tables_come_in_one_buffer_of_the_planned_size(stepped: Any) -> None:
    tables = _tables(stepped[0])
    assert len(tables) == 4
    assert {table.rows.untyped_storage().nbytes() for table in tables} == set(_planned()[True])
    assert all(table.rows.data_ptr() % 16 == 0 for table in tables)


def test_no_table_outlives_the_step(stepped: Any) -> None:
    batches = stepped[0]._plans[0].batches
    assert [batch.scratch["num_tables"] for batch in batches] == [3, 1]
    assert all("tables" not in batch.scratch for batch in batches)


def test_long_programs_come_first_and_every_program_finds_its_place(stepped: Any) -> None:
    even = _tables(stepped[0])[1]
    # Of 64 x 128 and 66 x 136, pass A walks 2 and 3 tiles in 1 and 2 programs; pass B 1 and 2 tiles in 2 and 3.
    of_a, of_b, _ = (owners.tolist() for owners in even.owners)
    assert (of_a, of_b) == ([1, 1, 0], [1, 1, 1, 0, 0])
    rows = even.rows.view(2, -1).tolist()
    assert [(row[Field.FIRST_A], row[Field.FIRST_B]) for row in rows] == [(2, 3), (0, 0)]


def test_steps_go_on_after_a_counter_was_set_ahead(stepped: Any) -> None:
    """The batches are then divided anew; their tables with them."""
    optimizer, parameters = stepped
    before = [float(optimizer.state[p]["step"]) for p in parameters]
    optimizer.state[parameters[0]]["step"].fill_(70)
    moved = [parameter.detach().clone() for parameter in parameters]
    optimizer.step()
    assert [float(optimizer.state[p]["step"]) for p in parameters] == [71.0, *(count + 1 for count in before[1:])]
    assert not any(torch.equal(p, old) for p, old in zip(parameters, moved, strict=True) if p.numel())


class Launches:
    """Stands for kernels past their first call, and keeps what each is given: the first row, owners, scratch."""

    seen: ClassVar[list[tuple[Any, ...]]] = []

    def __init__(self, kernel: Any, num_programs: int, **constants: Any) -> None:
        del kernel, constants
        self._num_programs, self.takes_addresses = num_programs, False

    def __call__(self, table: Any, owners: Any, scratch: Any, *rest: Any) -> None:
        del rest
        if self.takes_addresses:
            row = list((ctypes.c_int64 * FIELDS).from_address(table))
            self.seen.append((row, list((ctypes.c_int32 * self._num_programs).from_address(owners)), scratch % 16))
        else:
            self.seen.append((table[:FIELDS].tolist(), owners.tolist(), scratch.data_ptr() % 16))
        self.takes_addresses = True


@pytest.mark.skipif(torch.cuda.is_available(), reason="the host cannot read tables on a GPU")
def test_kernels_are_given_the_same_by_address_as_by_tensor(monkeypatch: pytest.MonkeyPatch) -> None:
    launcher = pytest.importorskip("optplan.optim_impls.adapprox.launcher")
    monkeypatch.setattr(launcher, "BoundKernel", Launches)
    monkeypatch.setattr(Launches, "seen", [])
    parameters = [torch.nn.Parameter(torch.zeros(shape)) for shape in SHAPES]
    for parameter in parameters:
        parameter.grad = torch.ones_like(parameter)
    optimizer = Adapprox(parameters, rank=10, backend="triton")
    optimizer.step()
    by_tensor = list(Launches.seen)
    optimizer.step()
    # Three rounds of seven launches and six of a second iteration, and two for vectors.
    assert len(by_tensor) == 3 * 13 + 2
    assert Launches.seen[len(by_tensor) :] == by_tensor


class Rated(Launches):
    """Keeps how each launch of pass B takes its learning rate."""

    def __init__(self, kernel: Any, num_programs: int, **constants: Any) -> None:
        super().__init__(kernel, num_programs, **constants)
        self._rated = constants.get("LR")

    def __call__(self, table: Any, owners: Any, scratch: Any, *rest: Any) -> None:
        if self._rated is not None:
            self.seen.append((self._rated, rest[1]))


def test_a_rate_on_the_device_of_another_dtype_is_not_read_by_a_kernel_bound_to_the_last(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """0 and 1 are no rate and a number, 2 and 3 a scalar in fp32 and in fp64."""
    launcher = pytest.importorskip("optplan.optim_impls.adapprox.launcher")
    monkeypatch.setattr(launcher, "BoundKernel", Rated)
    monkeypatch.setattr(Rated, "seen", [])
    parameter = torch.nn.Parameter(torch.zeros(9, device=DEVICE))
    parameter.grad = torch.ones_like(parameter)
    single, double = (torch.tensor(0.1, dtype=dtype, device=DEVICE) for dtype in (torch.float32, torch.float64))
    optimizer = Adapprox([parameter], backend="triton", capturable=True)
    for rate in (0.1, single, double, single):
        optimizer.param_groups[0]["lr"] = rate
        optimizer.step()
    assert [kind for kind, _ in Rated.seen] == [1, 2, 3, 2]
    assert [rate for _, rate in Rated.seen] == [0.1, single, double, single]
