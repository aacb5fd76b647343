"""fp32 master weights of a bf16 model stepped with the model's own partition."""

from __future__ import annotations

import copy

import pytest
import torch
import transformers

from optplan.optim_impls import AdamMini
from optplan.optim_impls.adam_mini.reference import Hyperparameters, adam_mini
from optplan.optim_impls.adam_mini.roles import describe_module
from optplan.planner.optimizers.adam_mini_blocks import blocks_of
from optplan.planner.optimizers.base import OptimizerContext
from optplan.planner.optimizers.registry import build_optimizer

LR, DECAY = 0.01, 0.1


@pytest.fixture
def model() -> torch.nn.Module:
    """A bf16 model with tied weights, biases, fused attention and one frozen tensor."""
    torch.manual_seed(0)
    config = transformers.GPT2Config(n_embd=8, n_layer=1, n_head=2, vocab_size=11, n_positions=5)
    made = transformers.GPT2LMHeadModel(config).to(torch.bfloat16)
    made.transformer.wpe.weight.requires_grad_(False)
    return made


def masters_of(model: torch.nn.Module) -> list[torch.nn.Parameter]:
    """An fp32 copy of every trained parameter."""
    return [torch.nn.Parameter(p.detach().float()) for p in model.parameters() if p.requires_grad]


def give_gradients(tensors: list[torch.nn.Parameter], *, seed: int) -> None:
    """The same gradients, by place, for every list of the same shapes."""
    generator = torch.Generator().manual_seed(seed)
    for tensor in tensors:
        tensor.grad = torch.randn(tensor.shape, generator=generator)


def test_masters_step_like_a_model_that_is_in_fp32(model: torch.nn.Module) -> None:
    wide = copy.deepcopy(model).float()
    masters, own = masters_of(model), [p for p in wide.parameters() if p.requires_grad]
    before = [p.detach().clone() for p in model.parameters()]
    ours = AdamMini.from_module(model, masters=masters, lr=LR, weight_decay=DECAY, backend="torch")
    theirs = AdamMini.from_module(wide, lr=LR, weight_decay=DECAY, backend="torch")
    for seed in range(3):
        give_gradients(masters, seed=seed)
        give_gradients(own, seed=seed)
        ours.step()
        theirs.step()
    assert ours.partition_table() == theirs.partition_table()
    assert all(torch.equal(a, b) for a, b in zip(masters, own, strict=True))
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))


def test_masters_stay_beside_the_float64_reference(model: torch.nn.Module) -> None:
    masters = masters_of(model)
    hyper = Hyperparameters(LR, 0.9, 0.999, 1e-8, DECAY)
    described = [row.parameter for row in describe_module(model)]
    truth = [p.detach().double() for p in masters]
    m = [torch.zeros_like(p) for p in truth]
    v = [torch.zeros(blocks_of(p).state_shape, dtype=torch.float64) for p in described]
    optimizer = AdamMini.from_module(model, masters=masters, lr=LR, weight_decay=DECAY, backend="torch")
    for step in range(1, 4):
        give_gradients(masters, seed=step)
        for i, parameter in enumerate(described):
            gradient = masters[i].grad
            assert gradient is not None
            blocks = blocks_of(parameter)
            truth[i] = adam_mini(
                truth[i], gradient.double(), m[i], v[i], blocks=blocks, step=step, hyperparameters=hyper
            )
        optimizer.step()
    for master, wide in zip(masters, truth, strict=True):
        torch.testing.assert_close(master.detach().double(), wide, rtol=1e-6, atol=1e-7)


def test_masters_keep_the_state_that_the_planner_counts(model: torch.nn.Module) -> None:
    masters = masters_of(model)
    optimizer = AdamMini.from_module(model, masters=masters, backend="torch")
    give_gradients(masters, seed=0)
    optimizer.step()
    planner, context = build_optimizer("adam-mini"), OptimizerContext("float32", "float32")
    for master, row in zip(masters, describe_module(model), strict=True):
        real = {name: (tuple(t.shape), str(t.dtype)) for name, t in optimizer.state[master].items()}
        counted = planner.state(row.parameter, context)
        assert real == {s.name: (s.shape, f"torch.{s.dtype}") for s in counted}, row.parameter.name


def test_groups_of_masters(model: torch.nn.Module) -> None:
    masters = masters_of(model)
    groups = [{"params": masters[:3], "lr": 0.0}, {"params": masters[3:]}]
    optimizer = AdamMini.from_module(model, masters=masters, params=groups, backend="torch")
    assert [row.name for row in optimizer.partition_table()][:2] == [
        "transformer.wte.weight",
        "transformer.h.0.ln_1.weight",
    ]


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (lambda masters: masters[1:], "masters must be one for each of the model's 15 trained parameters, got 14"),
        (
            lambda masters: [masters[1], masters[0], *masters[2:]],
            "the role of parameter 'transformer.wte.weight' is for shape (11, 8), got (8,)",
        ),
    ],
)
def test_masters_that_do_not_suit(model: torch.nn.Module, change, sentence: str) -> None:
    with pytest.raises(ValueError) as error:
        AdamMini.from_module(model, masters=change(masters_of(model)))
    assert str(error.value) == sentence
