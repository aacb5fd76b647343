"""The class: state as the planner counts it, the authors' package, checkpoints, errors, a model that learns."""

from __future__ import annotations

import copy
import io
import runpy
from collections.abc import Collection
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.tensor
import transformers
from adam_mini import Adam_mini

from optplan.optim_impls import AdamMini
from optplan.optim_impls.adam_mini.optimizer import PartitionRow
from optplan.optim_impls.adam_mini.reference import Hyperparameters, adam_mini
from optplan.planner.optimizers.adam_mini_blocks import blocks_of
from optplan.planner.optimizers.base import OptimizerContext
from optplan.planner.optimizers.registry import build_optimizer
from optplan.planner.tensors import HeadLayout, Parameter

CASES = runpy.run_path(str(Path(__file__).with_name("mini_cases.py")))["CASES"]
OPTIONS: dict[str, Any] = {"lr": 0.01, "betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": 0.1, "backend": "torch"}
DTYPES = {torch.float32: "float32", torch.bfloat16: "bfloat16"}


FEW = ("bias", "rows", "interleaved", "transposed fused", "norm")
"""One of each kind of block, for tests of many steps."""


def _tensors(
    dtype: torch.dtype = torch.float32, *, names: Collection[str] = tuple(CASES)
) -> dict[str, torch.nn.Parameter]:
    generator = torch.Generator().manual_seed(0)
    tensors = {}
    for name in names:
        parameter, _ = CASES[name]
        tensors[name] = torch.nn.Parameter(torch.randn(parameter.shape, generator=generator).to(dtype))
    return tensors


def _renew(tensors: dict[str, torch.nn.Parameter], *, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    for tensor in tensors.values():
        tensor.grad = torch.randn(tensor.shape, generator=generator).to(tensor.dtype)


def _optimizer(tensors: dict[str, torch.nn.Parameter], **options: Any) -> AdamMini:
    roles = {tensor: CASES[name][0] for name, tensor in tensors.items()}
    return AdamMini(list(tensors.items()), roles=roles, **{**OPTIONS, **options})


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("state_dtype", [None, torch.float32, torch.bfloat16])
def test_state_is_what_the_planner_counts(dtype: torch.dtype, state_dtype: torch.dtype | None) -> None:
    tensors = _tensors(dtype)
    _renew(tensors, seed=1)
    optimizer = _optimizer(tensors, state_dtype=state_dtype)
    optimizer.step()
    planner = build_optimizer("adam-mini")
    context = OptimizerContext(DTYPES[dtype], DTYPES[dtype], state_dtype and DTYPES[state_dtype])
    for name, tensor in tensors.items():
        real = {key: (tuple(t.shape), str(t.dtype), t.nbytes) for key, t in optimizer.state[tensor].items()}
        counted = planner.state(CASES[name][0], context)
        assert real == {s.name: (s.shape, f"torch.{s.dtype}", s.num_bytes) for s in counted}, name


def test_hundred_steps_in_fp32_stay_beside_fp64() -> None:
    tensors = _tensors(names=FEW)
    hyper = Hyperparameters(0.01, 0.9, 0.95, 1e-8, 0.1)
    wide = {name: tensor.detach().double() for name, tensor in tensors.items()}
    m = {name: torch.zeros_like(tensor) for name, tensor in wide.items()}
    v = {name: torch.zeros(blocks_of(CASES[name][0]).state_shape, dtype=torch.float64) for name in wide}
    optimizer = _optimizer(tensors)
    start = {name: tensor.clone() for name, tensor in wide.items()}
    for step in range(1, 101):
        _renew(tensors, seed=step)
        for name, tensor in tensors.items():
            gradient = tensor.grad.double()
            blocks = blocks_of(CASES[name][0])
            wide[name] = adam_mini(
                wide[name], gradient, m[name], v[name], blocks=blocks, step=step, hyperparameters=hyper
            )
        optimizer.step()
    for name, tensor in tensors.items():
        # Each step may lose half a unit in the last place of fp32.
        lost = 100 * 2**-24 * start[name].norm()
        assert (tensor.detach().double() - wide[name]).norm() <= lost, name


OFFICIAL: dict[str, tuple[tuple[int, ...], str | Parameter]] = {
    "model.embed_tokens.weight": ((29, 24), "token_embedding"),
    "layers.0.self_attn.q_proj.weight": (
        (24, 24),
        Parameter("q", (24, 24), "query", "linear", heads=HeadLayout(6, num_query_heads=4)),
    ),
    "layers.0.self_attn.k_proj.weight": (
        (12, 24),
        Parameter("k", (12, 24), "key", "linear", heads=HeadLayout(6, num_key_heads=2)),
    ),
    "layers.0.self_attn.v_proj.weight": ((12, 24), "value"),
    "layers.0.self_attn.o_proj.weight": ((24, 24), "attention_output"),
    "layers.0.mlp.up_proj.weight": ((40, 24), "mlp"),
    "layers.0.mlp.up_proj.bias": ((40,), "bias"),
    "layers.0.input_norm.weight": ((24,), "norm"),
    "conv.weight": ((5, 3, 2, 2), "other"),
    "lm_head.weight": ((29, 24), "output_head"),
}


def test_parity_with_the_authors_package_on_its_partition() -> None:
    generator = torch.Generator().manual_seed(0)
    ours = {name: torch.nn.Parameter(torch.randn(shape, generator=generator)) for name, (shape, _) in OFFICIAL.items()}
    theirs = {name: torch.nn.Parameter(tensor.detach().clone()) for name, tensor in ours.items()}
    start = {name: tensor.detach().clone() for name, tensor in ours.items()}
    # Theirs takes no param groups and drops the decay of whatever is called norm or bias, so ours gets none there.
    official = Adam_mini(
        list(theirs.items()), lr=0.01, betas=(0.9, 0.95), weight_decay=0.1, dim=24, n_heads=4, n_kv_heads=2,
        verbose=False,
    )  # fmt: skip
    undecayed = [tensor for name, tensor in ours.items() if "norm" in name or "bias" in name]
    decayed = [tensor for name, tensor in ours.items() if "norm" not in name and "bias" not in name]
    groups = [{"params": decayed}, {"params": undecayed, "weight_decay": 0.0}]
    optimizer = AdamMini(groups, roles={ours[name]: role for name, (_, role) in OFFICIAL.items()}, **OPTIONS)
    for step in range(20):
        _renew(ours, seed=step)
        for name, tensor in theirs.items():
            tensor.grad = ours[name].grad.clone()
        optimizer.step()
        official.step()
    for name, tensor in ours.items():
        moved = (tensor.detach() - start[name]).norm()
        assert moved > 0.1
        assert (tensor.detach() - theirs[name].detach()).norm() <= 2e-6 * moved, name


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_checkpoint_continues_bit_for_bit(dtype: torch.dtype) -> None:
    tensors = _tensors(dtype)
    optimizer = _optimizer(tensors)
    for step in range(3):
        _renew(tensors, seed=step)
        optimizer.step()
    file = io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    file.seek(0)
    others = {name: torch.nn.Parameter(tensor.detach().clone()) for name, tensor in tensors.items()}
    resumed = _optimizer(others)
    resumed.load_state_dict(torch.load(file, weights_only=True))
    for name in tensors:
        for key, value in optimizer.state[tensors[name]].items():
            loaded = resumed.state[others[name]][key]
            assert loaded.dtype == value.dtype and torch.equal(loaded, value), (name, key)
    for group in (tensors, others):
        _renew(group, seed=9)
    optimizer.step()
    resumed.step()
    assert all(torch.equal(tensors[name], others[name]) for name in tensors)


def test_a_copy_steps_on_its_own() -> None:
    layer = torch.nn.Linear(3, 2)
    optimizer = AdamMini.from_module(layer, backend="torch")
    layer2, optimizer2 = copy.deepcopy((layer, optimizer))
    for parameter in layer2.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer2.step()
    assert not torch.equal(layer.weight, layer2.weight)
    assert optimizer2.partition_table() == optimizer.partition_table()


def test_groups_closures_and_schedulers() -> None:
    layer = torch.nn.Linear(3, 2)
    optimizer = AdamMini.from_module(
        layer, params=[{"params": [layer.weight], "lr": 0.1}, {"params": [layer.bias]}], lr=0.0, backend="torch"
    )
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda epoch: 0.5**epoch)
    before = layer.bias.detach().clone()

    def closure() -> float:
        optimizer.zero_grad()
        loss = layer(torch.ones(1, 3)).square().sum()
        loss.backward()
        return loss.item()

    losses = []
    for _ in range(5):
        losses.append(optimizer.step(closure))
        scheduler.step()
    assert losses[-1] < losses[0]
    assert torch.equal(layer.bias, before)
    assert optimizer.param_groups[0]["lr"] == 0.1 * 0.5**5


def test_from_module_reports_what_it_found() -> None:
    config = transformers.GPT2Config(n_embd=8, n_layer=1, n_head=2, vocab_size=11, n_positions=5)
    rows = AdamMini.from_module(transformers.GPT2LMHeadModel(config)).partition_table()
    assert [(row.name.removeprefix("transformer."), row.kind, row.num_blocks) for row in rows] == [
        ("wte.weight", "row", 11),
        ("wpe.weight", "row", 5),
        ("h.0.ln_1.weight", "tensor", 1),
        ("h.0.ln_1.bias", "element", 8),
        ("h.0.attn.c_attn.weight", "fused_qkv", 2 + 2 + 8),
        ("h.0.attn.c_attn.bias", "element", 24),
        ("h.0.attn.c_proj.weight", "row", 8),
        ("h.0.attn.c_proj.bias", "element", 8),
        ("h.0.ln_2.weight", "tensor", 1),
        ("h.0.ln_2.bias", "element", 8),
        ("h.0.mlp.c_fc.weight", "row", 32),
        ("h.0.mlp.c_fc.bias", "element", 32),
        ("h.0.mlp.c_proj.weight", "row", 8),
        ("h.0.mlp.c_proj.bias", "element", 8),
        ("ln_f.weight", "tensor", 1),
        ("ln_f.bias", "element", 8),
    ]
    assert rows[4] == PartitionRow(
        "transformer.h.0.attn.c_attn.weight", (8, 24), "fused_qkv", "fused_qkv", 12,
        "heads of 4 in GPT2Attention: queries, then keys, then values",
    )  # fmt: skip


def test_a_small_transformer_learns() -> None:
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=32, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=32,
    )  # fmt: skip
    model = transformers.LlamaForCausalLM(config)
    optimizer = AdamMini.from_module(model, lr=3e-3, backend="torch")
    tokens = (torch.arange(16)[None] * torch.tensor([[1], [3], [5], [7]])) % 32
    losses = []
    for _ in range(40):
        loss = model(input_ids=tokens, labels=tokens).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[0] > 3.3
    assert losses[-1] < 1.0


def test_frozen_and_empty_parameters() -> None:
    layer = torch.nn.Linear(3, 2)
    layer.weight.requires_grad_(False)
    assert [row.name for row in AdamMini.from_module(layer).partition_table()] == ["bias"]
    empty = torch.nn.Parameter(torch.zeros(0, 4))
    empty.grad = torch.zeros(0, 4)
    AdamMini([empty], roles={empty: "mlp"}).step()
    assert empty.shape == (0, 4)


ROW = torch.nn.Parameter(torch.zeros(4, 6))


@pytest.mark.parametrize(
    ("roles", "options", "message"),
    [
        (
            {},
            {},
            "parameter '0' of shape (4, 6) has no role; name one in roles, or use AdamMini.from_module(model)",
        ),
        (
            {ROW: Parameter("w", (6, 4), "mlp", "linear")},
            {},
            "the role of parameter '0' is for shape (6, 4), got (4, 6)",
        ),
        ({ROW: "mlp"}, {"lr": -1.0}, "lr must be >= 0, got -1.0"),
        ({ROW: "mlp"}, {"betas": (0.9, 1.0)}, "beta2 must be >= 0 and < 1, got 1.0"),
        (
            {ROW: "rows"},
            {},
            "the role of parameter '0' must be one of attention_output, bias, fused_qkv, key, mlp, norm, other, "
            "output_head, patch_embedding, position_embedding, query, router, token_embedding, value; got rows",
        ),
        (
            {ROW: "query"},
            {},
            "the role of parameter '0' is query, whose blocks are heads; give a Parameter with its head layout",
        ),
    ],
)
def test_wrong_arguments_are_refused(roles: Any, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError) as caught:
        AdamMini([ROW], roles=roles, **options)
    assert str(caught.value) == message


def test_a_refused_group_leaves_the_optimizer_as_it_was() -> None:
    optimizer = AdamMini([ROW], roles={ROW: "mlp"})
    other = torch.nn.Parameter(torch.zeros(3))
    with pytest.raises(ValueError, match="has no role"):
        optimizer.add_param_group({"params": [other]})
    assert len(optimizer.param_groups) == 1
    optimizer.add_param_group({"params": [other], "roles": {other: "norm"}})
    assert [row.kind for row in optimizer.partition_table()] == ["row", "tensor"]


def test_columns_on_different_ranks_are_refused() -> None:
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    try:
        mesh = torch.distributed.init_device_mesh("cpu", (1,))
        tensor = torch.distributed.tensor.distribute_tensor(
            torch.zeros(4, 6), mesh, [torch.distributed.tensor.Shard(1)]
        )
        sharded = torch.nn.Parameter(tensor)
        with pytest.raises(ValueError) as caught:
            AdamMini([sharded], roles={sharded: "mlp"})
    finally:
        torch.distributed.destroy_process_group()
    assert str(caught.value) == (
        "AdamMini takes DTensors whose dimension 0 is sharded over one mesh dimension, "
        "got placements (Shard(dim=1),) for shape (4, 6)"
    )
