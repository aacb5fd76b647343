"""Adapprox's reference against the truncated SVD, dense recursions in fp64, and the constants of the paper."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from optplan.optim_impls import Adapprox
from optplan.optim_impls.adapprox.reference import (
    RankRule,
    Rates,
    as_rsi,
    clipped,
    growth,
    guidance,
    low_rank_second_moment,
    relative_error,
    s_rsi,
    seeded_sketch,
    updated,
)


def heavy_tailed(rows: int, columns: int, seed: int, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    """Squares whose rows and columns differ by orders of magnitude, as second moments' do."""
    generator = torch.Generator().manual_seed(seed)
    scales = [torch.randn(n, generator=generator, dtype=dtype).mul_(1.5).exp_() for n in (rows, columns)]
    noise = torch.randn(rows, columns, generator=generator, dtype=dtype).exp_()
    return (torch.outer(*scales) * noise).square_()


def sketch_of(a: torch.Tensor, seed: int = 0) -> Any:
    return seeded_sketch(seed, step=1, index=0, like=a)


@pytest.mark.parametrize("rank", [1, 4, 16])
def test_the_range_finder_nearly_attains_the_best_error_of_its_rank(rank: int) -> None:
    """That of the truncated singular value decomposition: no sketch is better, and 16 are 3 % worse on average."""
    a = heavy_tailed(96, 160, seed=1)
    values = torch.linalg.svdvals(a)
    best = float(values[rank:].norm() / values.norm())
    errors = []
    for seed in range(16):
        q, u = s_rsi(a, rank, sketch_of(a, seed))
        errors.append(float((a - q @ u.mT).norm() / a.norm()))
        assert relative_error(a, u) == pytest.approx(errors[-1], rel=1e-6)
        torch.testing.assert_close(q.mT @ q, torch.eye(rank, dtype=a.dtype), rtol=0, atol=1e-12)
    assert min(errors) >= best * (1 - 1e-12)
    assert sum(errors) / len(errors) <= 1.03 * best


def test_a_sketch_is_never_wider_than_the_matrix() -> None:
    a = heavy_tailed(4, 30, seed=2)
    q, u = s_rsi(a, 2, sketch_of(a))
    assert (q.shape, u.shape) == ((4, 2), (30, 2))


@pytest.mark.parametrize(
    ("error", "ranks"), [(0.0, 7), (0.01, 8), (0.05, 15), (0.1, 28), (0.2, 67), (0.5, 176), (1.0, 191)]
)
def test_growth_of_the_rank(error: float, ranks: int) -> None:
    assert growth(error) == ranks


def test_the_rank_is_sought_every_ten_steps_and_kept_between() -> None:
    generator = torch.Generator().manual_seed(3)
    a = torch.rand(40, 5, generator=generator, dtype=torch.float64) @ torch.rand(
        5, 60, generator=generator, dtype=torch.float64
    )
    rule = RankRule(growth=lambda error: 1)
    assert [step for step in range(1, 32) if rule.searches_at(step)] == [1, 11, 21, 31]
    needed = next(k for k in range(1, 6) if relative_error(a, s_rsi(a, k, sketch_of(a))[1]) <= 0.01)
    found = [as_rsi(a, step, 3, 10, sketch_of(a), rule)[1].shape[1] for step in (1, 2, 10, 11)]
    assert found == [needed, 3, 3, needed]
    assert needed == 5


def test_the_rank_stops_at_its_limit() -> None:
    a = heavy_tailed(64, 64, seed=4)
    rule = RankRule(threshold=0.0)
    assert as_rsi(a, 1, 0, 16, sketch_of(a), rule)[1].shape == (64, 16)


def test_sketches_differ_by_seed_step_and_tensor_and_repeat_on_every_rank() -> None:
    like = torch.zeros(())

    def draw(seed: int, step: int, index: int) -> torch.Tensor:
        return seeded_sketch(seed, step=step, index=index, like=like)(7, 3)

    assert torch.equal(draw(1, 2, 3), draw(1, 2, 3))
    others = [draw(*numbers) for numbers in ((0, 2, 3), (1, 3, 3), (1, 2, 4), (2, 1, 3))]
    assert all(not torch.equal(draw(1, 2, 3), other) for other in others)


def test_negative_entries_of_the_product_count_as_zero() -> None:
    q, u = torch.tensor([[1.0], [0.0]]), torch.tensor([[2.0], [-2.0]])
    grad = torch.tensor([[3.0, 1.0], [0.0, 2.0]])
    expected = torch.tensor([[0.5 * 2 + 0.5 * 9, 0.5 * 1], [0.0, 0.5 * 4]])
    assert torch.equal(low_rank_second_moment(q, u, grad, 0.5), expected)


def test_the_clip_acts_above_its_threshold_only() -> None:
    direction = torch.tensor([3.0, 4.0])  # RMS sqrt(12.5)
    torch.testing.assert_close(clipped(direction, 1.0), direction / math.sqrt(12.5))
    assert torch.equal(clipped(direction, 4.0), direction)


def test_the_guidance_raises_agreement_damps_opposition_and_is_capped() -> None:
    x = torch.tensor([1.0, 0.0])
    factors = [float(guidance(x, torch.tensor(m), cap=3.0, eps=0.0)) for m in ([2.0, 0.0], [0.0, 1.0], [-1.0, 0.0])]
    assert factors == [3.0, 1.0, 0.5]
    w, grad, v, m = (torch.ones(2) * n for n in (1.0, 1.0, 1.0, 0.0))
    rates = Rates(lr=0.1, weight_decay=0.0, guidance_cap=3.0)
    first, later = (updated(w, grad, v, m, step, rates)[0] for step in (1, 2))
    torch.testing.assert_close(first, w - 0.1 * 0.1)
    torch.testing.assert_close(later, w - 0.1 * 0.1 * 3)


def dense_steps(start: torch.Tensor, gradients: list[torch.Tensor], beta1: float) -> torch.Tensor:
    """The update with the whole second moment in fp64: what Adapprox does where its factors are exact."""
    w = start.double()
    v, m = torch.zeros_like(w), torch.zeros_like(w)
    for g in (gradient.double() for gradient in gradients):
        v = 0.999 * v + 0.001 * g * g
        move = g / (v.sqrt() + 1e-8)
        move = move / max(1.0, float(move.square().mean().sqrt()))
        m = beta1 * m + (1 - beta1) * move
        w = w - 0.01 * (m + 0.1 * w)
    return w


@pytest.mark.parametrize("num_steps", [1, 100])
@pytest.mark.parametrize("beta1", [0.9, 0.0])
@pytest.mark.parametrize("options", [{"mode": "paper", "rank": "adaptive"}, {"mode": "fast", "rank": 2}])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_where_the_factors_are_exact_it_is_the_dense_recursion(
    dtype: torch.dtype, options: dict[str, Any], beta1: float, num_steps: int
) -> None:
    generator = torch.Generator().manual_seed(5)
    rows, columns = (torch.randn(n, generator=generator, dtype=dtype).exp() for n in (24, 36))
    signs = [torch.randn(24, 36, generator=generator).sign().to(dtype) for _ in range(num_steps)]
    matrices = [signs[t] * torch.outer(rows, columns) * (1 + 0.5 * math.sin(t)) for t in range(num_steps)]
    vectors = [torch.randn(50, generator=generator, dtype=dtype) for _ in range(num_steps)]
    starts = [torch.randn(24, 36, generator=generator, dtype=dtype), torch.randn(50, generator=generator, dtype=dtype)]
    parameters = [torch.nn.Parameter(start.clone()) for start in starts]
    optimizer = Adapprox(parameters, lr=0.01, betas=(beta1, 0.999), backend="torch", **options)
    for gradients in zip(matrices, vectors, strict=True):
        for parameter, gradient in zip(parameters, gradients, strict=True):
            parameter.grad = gradient
        optimizer.step()
    for parameter, start, gradients in zip(parameters, starts, (matrices, vectors), strict=True):
        moved = parameter.detach().double() - start.double()
        expected = dense_steps(start, gradients, beta1) - start.double()
        # The fast mode's shifts take a millionth off the factors at each step.
        limit = 2e-3 if options["mode"] == "fast" else 2e-5 if dtype is torch.float32 else 1e-9
        assert float((moved - expected).norm() / expected.norm()) < limit


def test_paper_mode_in_fp32_follows_fp64_for_a_hundred_steps() -> None:
    moved = []
    for dtype in (torch.float32, torch.float64):
        parameter = torch.nn.Parameter(torch.zeros(30, 44, dtype=dtype))
        optimizer = Adapprox([parameter], lr=0.01, mode="paper", rank=5)
        for step in range(100):
            generator = torch.Generator().manual_seed(step)
            scale = torch.rand(30, 1, generator=generator) + torch.rand(44, generator=generator)
            parameter.grad = (scale * torch.randn(30, 44, generator=generator)).to(dtype)
            optimizer.step()
        moved.append(parameter.detach().double())
    assert float((moved[0] - moved[1]).norm() / moved[1].norm()) < 1e-3


@pytest.mark.parametrize("options", [{"mode": "paper", "rank": "max"}, {"mode": "fast", "rank": 4}])
def test_the_first_step_is_clipped_to_the_threshold_without_bias_correction(options: dict[str, Any]) -> None:
    for clip, size in ((1.0, 1.0), (0.25, 0.25), (100.0, 1 / math.sqrt(0.001))):
        parameter = torch.nn.Parameter(torch.zeros(20, 32, dtype=torch.float64))
        parameter.grad = torch.randn(20, 32, generator=torch.Generator().manual_seed(6), dtype=torch.float64)
        Adapprox([parameter], lr=1.0, betas=(0.0, 0.999), eps=0.0, weight_decay=0.0, clip=clip, **options).step()
        expected = -size * parameter.grad.sign()
        torch.testing.assert_close(parameter.detach(), expected)
