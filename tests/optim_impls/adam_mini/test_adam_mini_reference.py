"""The reference against Adam-mini written out element by element, and the blocks against their definition."""

from __future__ import annotations

import itertools
import math
import runpy
from pathlib import Path

import pytest
import torch

from optplan.optim_impls.adam_mini.reference import Hyperparameters, adam_mini, block_mean_square, spread
from optplan.planner.optimizers.adam_mini_blocks import blocks_of
from optplan.planner.tensors import HeadLayout, Parameter

CASES = runpy.run_path(str(Path(__file__).with_name("mini_cases.py")))["CASES"]
HYPER = Hyperparameters(lr=0.02, beta1=0.9, beta2=0.95, eps=1e-6, weight_decay=0.1)


def _labels(parameter: Parameter) -> list[object]:
    """The block of every element in logical order, by the definition in the paper, in plain Python."""
    labels: list[object] = []
    for index in itertools.product(*map(range, parameter.shape)):
        neuron = 0
        for axis in parameter.output_axes if parameter.shape else ():
            neuron = neuron * parameter.shape[axis] + index[axis]
        labels.append(_label(parameter, index, neuron))
    return labels


def _label(parameter: Parameter, index: tuple[int, ...], neuron: int) -> object:
    heads = parameter.heads
    if parameter.role == "bias":
        return index
    if parameter.role in ("norm", "other"):
        return 0
    if heads is None:
        return neuron
    slot = neuron // heads.head_dim
    kinds = ["q"] * heads.num_query_heads + ["k"] * heads.num_key_heads + ["v"] * heads.num_value_heads
    if heads.interleaved:
        group = heads.num_query_heads // heads.num_key_heads
        kinds = (["q"] * group + ["k", "v"]) * heads.num_key_heads
    return neuron if kinds[slot] == "v" else ("head", slot)


@pytest.mark.parametrize("name", [name for name, (p, _) in CASES.items() if p.numel < 5000])
def test_one_step_equals_the_formulas_written_out(name: str) -> None:
    parameter, num_blocks = CASES[name]
    blocks = blocks_of(parameter)
    generator = torch.Generator().manual_seed(0)
    w, g, m = (torch.randn(parameter.shape, generator=generator, dtype=torch.float64) for _ in range(3))
    v = torch.rand(blocks.state_shape, generator=generator, dtype=torch.float64)
    assert v.numel() == num_blocks
    labels = _labels(parameter)
    order = {label: number for number, label in enumerate(dict.fromkeys(_by_neuron(parameter, labels)))}
    members: dict[object, list[float]] = {}
    for label, value in zip(labels, g.flatten().tolist(), strict=True):
        members.setdefault(label, []).append(value)
    expected = []
    for label, w0, g0, m0 in zip(labels, *(t.flatten().tolist() for t in (w, g, m)), strict=True):
        mean_square = sum(x * x for x in members[label]) / len(members[label])
        v1 = 0.95 * v.flatten().tolist()[order[label]] + 0.05 * mean_square
        m1 = 0.9 * m0 + 0.1 * g0
        m_hat, v_hat = m1 / (1 - 0.9**3), v1 / (1 - 0.95**3)
        expected.append(w0 - 0.02 * 0.1 * w0 - 0.02 * m_hat / (math.sqrt(v_hat) + 1e-6))
    new = adam_mini(w, g, m, v, blocks=blocks, step=3, hyperparameters=HYPER)
    torch.testing.assert_close(new.flatten(), torch.tensor(expected, dtype=torch.float64), rtol=1e-13, atol=1e-14)


def _by_neuron(parameter: Parameter, labels: list[object]) -> list[object]:
    """Labels with the output axes outermost: the order in which blocks are numbered."""
    if not parameter.shape:
        return labels
    numbers = torch.arange(len(labels)).view(parameter.shape)
    return [
        labels[n] for n in numbers.movedim(parameter.output_axes, tuple(range(len(parameter.output_axes)))).flatten()
    ]


@pytest.mark.parametrize("name", CASES)
def test_spread_undoes_the_mean_of_a_constant_block(name: str) -> None:
    parameter, num_blocks = CASES[name]
    blocks = blocks_of(parameter)
    values = torch.arange(1.0, num_blocks + 1, dtype=torch.float64).view(blocks.state_shape)
    filled = spread(values, blocks).expand(parameter.shape)
    torch.testing.assert_close(block_mean_square(filled.clone(), blocks), values**2, rtol=1e-12, atol=0)


def test_arithmetic_is_fp32_for_bf16_tensors() -> None:
    """The step of a bf16 tensor is that of its values in fp32, rounded once when stored."""
    blocks = blocks_of(CASES["rows"][0])
    generator = torch.Generator().manual_seed(1)
    w, g, m = (torch.randn((7, 33), generator=generator).bfloat16() for _ in range(3))
    v = torch.rand(7, generator=generator)
    m_wide, v_wide = m.float(), v.clone()
    wide = adam_mini(w.float(), g.float(), m_wide, v_wide, blocks=blocks, step=1, hyperparameters=HYPER)
    new = adam_mini(w, g, m, v, blocks=blocks, step=1, hyperparameters=HYPER)
    assert new.dtype == torch.float32
    assert torch.equal(new, wide)
    assert torch.equal(v, v_wide)
    assert torch.equal(m, m_wide.bfloat16())


def test_second_moment_decays_in_bf16_training() -> None:
    """With beta2 = 0.999 a bf16 second moment would stay at 1 for ever: 0.999 rounds to 1."""
    blocks = blocks_of(CASES["rows"][0])
    w, g, m = (torch.zeros(7, 33, dtype=torch.bfloat16) for _ in range(3))
    v = torch.ones(7)
    for step in range(1, 1001):
        adam_mini(w, g, m, v, blocks=blocks, step=step, hyperparameters=Hyperparameters(1e-3, 0.9, 0.999, 1e-8, 0.0))
    torch.testing.assert_close(v, torch.full((7,), 0.999**1000), rtol=1e-4, atol=0)


def test_heads_that_do_not_cover_the_matrix_are_refused() -> None:
    parameter = Parameter("w", (24, 16), "query", "linear", heads=HeadLayout(5, num_query_heads=4))
    with pytest.raises(ValueError) as caught:
        blocks_of(parameter)
    assert str(caught.value) == (
        "the heads of 'w' must cover its 24 output neurons, got HeadLayout(head_dim=5, num_query_heads=4, "
        "num_key_heads=0, num_value_heads=0, interleaved=False)"
    )
