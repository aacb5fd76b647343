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
from torch.distributed.tensor import DTensor, Shard, distribute_tensor
from transformers import GPT2Config, GPT2LMHeadModel

from optplan.optim_impls import AdamMini

CASES = {
    name: case
    for name, case in runpy.run_path(str(Path(__file__).with_name("mini_cases.py")))["CASES"].items()
    if case[0].shape
}
OPTIONS: dict[str, Any] = {"lr": 0.02, "betas": (0.9, 0.95), "eps": 1e-6, "weight_decay": 0.1}
NUM_STEPS = 3
SHARDED = {
    "bias", "long bias", "many short rows", "one row", "patches", "query", "rows", "rows of one",
    "rows of several programs", "wide rows", "key of many elements",
}  # fmt: skip
"""Cases whose second moments two ranks divide among them; of the others, each keeps all."""


def _values(seed: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.randn(case.shape, generator=generator) for name, (case, _) in CASES.items()}


def _optimizer(parameters: dict[str, torch.nn.Parameter], **options: Any) -> AdamMini:
    roles = {parameter: CASES[name][0] for name, parameter in parameters.items()}
    return AdamMini(list(parameters.items()), roles=roles, **OPTIONS, **options)


def _train_tensors(mesh: DeviceMesh | None, **options: Any) -> dict[str, Any]:
    """Parameters and second moments after steps on the tensors of every kind of block."""

    def deal(value: torch.Tensor) -> torch.Tensor:
        return value if mesh is None else distribute_tensor(value, mesh, [Shard(0)])

    parameters = {name: torch.nn.Parameter(deal(value)) for name, value in _values(0).items()}
    optimizer = _optimizer(parameters, **options)
    for step in range(NUM_STEPS):
        for name, value in _values(1 + step).items():
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


def _gpt() -> GPT2LMHeadModel:
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


def _run(rank: int, num_ranks: int, port: int, folder: Path, backend: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=num_ranks)
    mesh = init_device_mesh("cpu", (num_ranks,))
    found: dict[str, Any] = {"tensors": _train_tensors(mesh, backend=backend)}
    if backend == "torch":
        found["losses"] = _train_gpt(mesh, folder / "checkpoint")
    if rank == 0:
        (folder / "found.json").write_text(json.dumps(found))
    dist.destroy_process_group()


def _found_by(num_ranks: int, folder: Path, backend: str) -> dict[str, Any]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, __file__, "", str(num_ranks), str(port), str(folder), backend]
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    ranks = []
    for rank in range(num_ranks):
        command[2] = str(rank)
        ranks.append(subprocess.Popen(command, env=environment))
    assert [rank.wait(timeout=100) for rank in ranks] == [0] * num_ranks
    found: dict[str, Any] = json.loads((folder / "found.json").read_text())
    return found


@pytest.mark.parametrize(("num_ranks", "backend"), [(2, "torch"), (3, "torch"), (2, "triton")])
def test_shards_take_the_steps_of_the_whole(tmp_path: Path, num_ranks: int, backend: str) -> None:
    found = _found_by(num_ranks, tmp_path, backend)
    expected = _train_tensors(None, backend="torch")
    assert set(found["tensors"]) == set(expected)
    for name, (parameter, moments, _) in expected.items():
        ours, our_moments, dealt = found["tensors"][name]
        torch.testing.assert_close(torch.tensor(ours), torch.tensor(parameter), rtol=0, atol=2e-6, msg=name)
        torch.testing.assert_close(torch.tensor(our_moments), torch.tensor(moments), rtol=2e-6, atol=0, msg=name)
        if num_ranks == 2:
            assert dealt == (name in SHARDED), name
    if backend == "torch":
        _check_that_one_process_goes_on(tmp_path / "checkpoint", found["losses"])


def _check_that_one_process_goes_on(checkpoint: Path, losses: list[float]) -> None:
    """Losses of two ranks and, after their checkpoint, of one process are those of one process all along."""
    model = _gpt()
    optimizer = AdamMini.from_module(model, lr=1e-2)
    expected = _losses(model, optimizer, first=0, count=5)
    assert losses == pytest.approx(expected[:3], rel=1e-5)
    resumed = _gpt()
    optimizer = AdamMini.from_module(resumed, lr=1e-2)
    of_model, of_optimizer = get_state_dict(resumed, optimizer)
    state = {"model": of_model, "optimizer": of_optimizer}
    dcp.load(state, checkpoint_id=checkpoint, no_dist=True)
    set_state_dict(resumed, optimizer, model_state_dict=state["model"], optim_state_dict=state["optimizer"])
    assert _losses(resumed, optimizer, first=3, count=2) == pytest.approx(expected[3:], rel=1e-5)


if __name__ == "__main__":
    _run(int(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]), Path(sys.argv[4]), sys.argv[5])
