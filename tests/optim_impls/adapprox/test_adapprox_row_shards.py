"""The factorisation of a matrix whose rows lie on several ranks, one of which may have none; ranks are threads here."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence

import pytest
import torch

from optplan.optim_impls.adapprox.reference import Rates
from optplan.optim_impls.adapprox.sharded import MatrixRows, step_matrices_by_rows
from optplan.optim_impls.adapprox.subspace import step_matrix, uniform_start

SHAPES = ((40, 30), (7, 11))
RATES = Rates(lr=0.1, beta2=0.9)
RANK = 2


class Ranks:
    """As many threads as ranks, which combine their tensors as a collective does."""

    def __init__(self, number: int) -> None:
        self._barrier = threading.Barrier(number)
        self._sent: list[list[torch.Tensor]] = [[] for _ in range(number)]

    def together(self, rank: int) -> Callable[[Sequence[torch.Tensor], str], list[torch.Tensor]]:
        """The collective as one rank calls it."""

        def combine(tensors: Sequence[torch.Tensor], operation: str) -> list[torch.Tensor]:
            self._sent[rank] = [tensor.clone() for tensor in tensors]
            self._barrier.wait()
            stacked = [torch.stack(parts) for parts in zip(*self._sent, strict=True)]
            self._barrier.wait()
            return [part.amax(dim=0) if operation == "max" else part.sum(dim=0) for part in stacked]

        return combine


class Matrices:
    """Weights, moments and factors of all shapes, whole or the rows from `first` on; gradients of a step."""

    def __init__(self, rows: Callable[[int], slice]) -> None:
        generator = torch.Generator().manual_seed(0)
        self._rows, self._ordinals = rows, range(len(SHAPES))
        self.weights = [torch.randn(s, generator=generator, dtype=torch.float64)[rows(s[0])].clone() for s in SHAPES]
        self.momenta = [torch.zeros_like(weight) for weight in self.weights]
        self.q = [weight.new_zeros(len(weight), RANK) for weight in self.weights]
        self.u = [weight.new_zeros(weight.shape[1], RANK) for weight in self.weights]

    def gradients(self, step: int) -> list[torch.Tensor]:
        generator = torch.Generator().manual_seed(1 + step)
        return [torch.randn(s, generator=generator, dtype=torch.float64)[self._rows(s[0])] for s in SHAPES]

    def of_step(self, step: int) -> list[MatrixRows]:
        starts = [uniform_start(5 + ordinal, like=self.q[ordinal]) for ordinal in self._ordinals]
        numels = [rows * columns for rows, columns in SHAPES]
        columns = (self.weights, self.gradients(step), self.momenta, self.q, self.u, starts, numels)
        return [MatrixRows(*row) for row in zip(*columns, strict=True)]


def _rows_of(rank: int, most: Callable[[int], int]) -> Callable[[int], slice]:
    return lambda rows: slice(rank * most(rows), (rank + 1) * most(rows))


@pytest.mark.parametrize(
    ("number", "most"),
    [(1, lambda rows: rows), (2, lambda rows: -(-rows // 2)), (3, lambda rows: -(-rows // 2))],
    ids=["one rank", "two ranks, uneven", "a third rank without rows"],
)
def test_rows_on_ranks_take_the_steps_of_the_whole(number: int, most: Callable[[int], int]) -> None:
    whole, ranks = Matrices(lambda rows: slice(0, rows)), Ranks(number)
    parts = [Matrices(_rows_of(rank, most)) for rank in range(number)]

    def train(rank: int) -> None:
        for step in range(3):
            step_matrices_by_rows(parts[rank].of_step(step), RATES, ranks.together(rank))

    threads = [threading.Thread(target=train, args=(rank,)) for rank in range(number)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=60)
    for step in range(3):
        for one in whole.of_step(step):
            step_matrix(one.w, one.grad, one.momentum, one.q, one.u, RATES, one.sketch)
    for place in range(len(SHAPES)):
        for name in ("weights", "momenta", "q"):
            joined = torch.cat([getattr(part, name)[place] for part in parts])
            torch.testing.assert_close(joined, getattr(whole, name)[place], rtol=1e-11, atol=1e-12)
        for part in parts:
            torch.testing.assert_close(part.u[place], whole.u[place], rtol=1e-11, atol=1e-12)
            assert torch.equal(part.u[place], parts[0].u[place])


def test_kernels_of_a_rank_without_rows_receive_u() -> None:
    pytest.importorskip("triton")
    from optplan.optim_impls.adapprox.sharded_launcher import RankSums

    wide, u = 16, torch.full((11, RANK), 3.0)
    grams, new_u = torch.eye(wide)[None], torch.randn(11, RANK)
    answers = [("sum", [grams, torch.ones(1)]), ("sum", [grams]), ("sum", [new_u])]

    def together(tensors: Sequence[torch.Tensor], operation: str) -> list[torch.Tensor]:
        expected, answer = answers.pop(0)
        assert operation == expected
        assert [tensor.shape for tensor in tensors] == [tensor.shape for tensor in answer]
        assert not any(tensor.any() for tensor in tensors), "a rank without rows adds nothing"
        return answer

    RankSums([None], [77], [u], wide=wide, together=together).take_part()
    assert not answers
    assert torch.equal(u, new_u)
