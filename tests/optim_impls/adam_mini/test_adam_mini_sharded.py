"""Adam-mini on rows dealt out to ranks that talk over gloo; each rank runs this file as a script."""

from __future__ import annotations

import json
import os
import runpy
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Placement, Replicate, Shard, distribute_tensor

from optplan.optim_impls import AdamMini

CASES = {
    name: case
    for name, case in runpy.run_path(str(Path(__file__).with_name("mini_cases.py")))["CASES"].items()
    if case[0].shape
}
OPTIONS: dict[str, Any] = {"lr": 0.02, "betas": (0.9, 0.95), "eps": 1e-6, "weight_decay": 0.1}
NUM_RANKS, NUM_STEPS = 2, 2
SHARDED = {
    "bias", "long bias", "many short rows", "one row", "patches", "query", "rows", "rows of one",
    "rows of several programs", "wide rows", "key of many elements", "rows of two chunks", "short rows of two chunks",
}  # fmt: skip
"""Cases whose second moments two ranks divide among them; of the others, each keeps all."""


LARGE = {"rows of several programs", "fused of many elements", "wide rows", "many short rows"}
"""Cases that Triton's interpreter takes long for, and that divide like others."""


def _values(seed: int, *, all_cases: bool) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {
        name: torch.randn(case.shape, generator=generator)
        for name, (case, _) in CASES.items()
        if all_cases or name not in LARGE
    }


def _optimizer(parameters: dict[str, torch.nn.Parameter], **options: Any) -> AdamMini:
    roles = {parameter: CASES[name][0] for name, parameter in parameters.items()}
    return AdamMini(list(parameters.items()), roles=roles, **OPTIONS, **options)


def _train_tensors(
    mesh: DeviceMesh | None, placement: Placement | None = None, *, all_cases: bool = True, **options: Any
) -> dict[str, Any]:
    """Parameters and second moments after steps on the tensors of every kind of block."""

    def deal(value: torch.Tensor) -> torch.Tensor:
        return value if mesh is None else distribute_tensor(value, mesh, [placement], src_data_rank=None)

    parameters = {name: torch.nn.Parameter(deal(value)) for name, value in _values(0, all_cases=all_cases).items()}
    optimizer = _optimizer(parameters, **options)
    for step in range(NUM_STEPS):
        for name, value in _values(1 + step, all_cases=all_cases).items():
            parameters[name].grad = deal(value)
        optimizer.step(grad_scale=0.5)
        if step == 0:
            saved = optimizer.state_dict()
            optimizer = _optimizer(parameters, **options)
            optimizer.load_state_dict(saved)
    found: dict[str, Any] = {}
    for name, parameter in parameters.items():
        moments = optimizer.state[parameter]["exp_avg_sq"]
        found[name] = [_whole(parameter).flatten().tolist(), _whole(moments).flatten().tolist(), _is_dealt(moments)]
    return found


def _whole(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.detach().full_tensor() if isinstance(tensor, DTensor) else tensor.detach()


def _is_dealt(tensor: torch.Tensor) -> bool:
    return isinstance(tensor, DTensor) and tensor.placements[0].is_shard()


def _gpt() -> Any:
    from transformers import GPT2Config, GPT2LMHeadModel  # slow to import, and not all ranks train it

    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=61, n_positions=16, n_embd=12, n_layer=2, n_head=3, bos_token_id=0, eos_token_id=0,
        embd_pdrop=0.0, resid_pdrop=0.0, attn_pdrop=0.0,
    )  # fmt: skip
    return GPT2LMHeadModel(config)


def _losses(model: torch.nn.Module, optimizer: torch.optim.Optimizer, *, first: int, count: int) -> list[float]:
    """Losses of some steps, each on the same tokens on every rank."""
    losses = []
    for step in range(first, first + count):
        tokens = torch.randint(61, (2, 16), generator=torch.Generator().manual_seed(step))
        loss = model(input_ids=tokens, labels=tokens, use_cache=False).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def _train_gpt(mesh: DeviceMesh, folder: Path) -> list[float]:
    model = _gpt()
    for block in model.transformer.h:
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)
    optimizer = AdamMini.from_module(model, lr=1e-2)
    losses = _losses(model, optimizer, first=0, count=3)
    of_model, of_optimizer = get_state_dict(model, optimizer)
    dcp.save({"model": of_model, "optimizer": of_optimizer}, checkpoint_id=folder)
    return losses


def _run(rank: int, port: int, folder: Path) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=NUM_RANKS)
    mesh = init_device_mesh("cpu", (NUM_RANKS,))
    found = {
        "reference": _train_tensors(mesh, Shard(0), backend="torch"),
        "repeated": _train_tensors(mesh, Replicate(), all_cases=False, backend="torch"),
        "kernels": _train_tensors(mesh, Shard(0), all_cases=False, backend="triton"),
        "losses": _train_gpt(mesh, folder / "checkpoint"),
    }
    if rank == 0:
        (folder / "found.json").write_text(json.dumps(found))
    dist.destroy_process_group()


@pytest.fixture(name="folder", scope="module")
def _folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the ranks left what they found, and their checkpoint."""
    folder = tmp_path_factory.mktemp("ranks")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    ranks = [
        subprocess.Popen([sys.executable, __file__, str(rank), str(port), str(folder)], env=environment)
        for rank in range(NUM_RANKS)
    ]
    assert [rank.wait(timeout=200) for rank in ranks] == [0] * NUM_RANKS
    return folder


@pytest.mark.parametrize("kind", ["reference", "repeated", "kernels"])
def test_ranks_take_the_steps_of_one(folder: Path, kind: str) -> None:
    found = json.loads((folder / "found.json").read_text())[kind]
    expected = _train_tensors(None, all_cases=kind == "reference", backend="torch")
    _check_tensors(found, expected)
    if kind != "repeated":
        assert {name for name, (_, _, dealt) in found.items() if dealt} == SHARDED & set(expected)


def _check_tensors(found: dict[str, Any], expected: dict[str, Any]) -> None:
    assert set(found) == set(expected)
    for name, (parameter, moments, _) in expected.items():
        ours, our_moments, _ = found[name]
        torch.testing.assert_close(torch.tensor(ours), torch.tensor(parameter), rtol=0, atol=2e-6, msg=name)
        torch.testing.assert_close(torch.tensor(our_moments), torch.tensor(moments), rtol=2e-6, atol=0, msg=name)


def test_one_process_goes_on_from_the_checkpoint_of_two(folder: Path) -> None:
    """Losses of two ranks and, after their checkpoint, of one process are those of one process all along."""
    losses = json.loads((folder / "found.json").read_text())["losses"]
    model = _gpt()
    optimizer = AdamMini.from_module(model, lr=1e-2)
    expected = _losses(model, optimizer, first=0, count=5)
    assert losses == pytest.approx(expected[:3], rel=1e-5)
    resumed = _gpt()
    optimizer = AdamMini.from_module(resumed, lr=1e-2)
    of_model, of_optimizer = get_state_dict(resumed, optimizer)
    state = {"model": of_model, "optimizer": of_optimizer}
    dcp.load(state, checkpoint_id=folder / "checkpoint", no_dist=True)
    set_state_dict(resumed, optimizer, model_state_dict=state["model"], optim_state_dict=state["optimizer"])
    assert _losses(resumed, optimizer, first=3, count=2) == pytest.approx(expected[3:], rel=1e-5)


if __name__ == "__main__":
    _run(int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3]))
