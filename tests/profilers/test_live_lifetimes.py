"""What the profiler leaves alive: nothing. Without a garbage collector all dies when the last reference goes."""

from __future__ import annotations

import gc
import json
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch._dynamo  # torch's first optimizer imports it, and that import itself leaves cycles
from torch import nn

import optplan
from optplan.profilers.live import measure
from optplan.profilers.live.command import profile
from optplan.profilers.live.profile import LiveProfile
from optplan.profilers.workloads.real_step import RealStep

LLAMA = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": 16, "intermediate_size": 24,
    "num_attention_heads": 2, "num_hidden_layers": 1, "num_key_value_heads": 1, "vocab_size": 32,
    "max_position_embeddings": 64,
}  # fmt: skip
Refs = list[weakref.ref[Any]]


@pytest.fixture(autouse=True)
def no_garbage_collector() -> Iterator[None]:
    gc.collect()
    gc.disable()
    yield
    gc.enable()


def _alive(refs: Refs) -> list[str]:
    return [type(ref()).__name__ for ref in refs if ref() is not None]


def _refs(model: nn.Module, optimizer: torch.optim.Optimizer) -> Refs:
    parameters = list(model.parameters())
    state = [value for values in optimizer.state.values() for value in values.values() if torch.is_tensor(value)]
    return [weakref.ref(thing) for thing in (model, optimizer, *parameters, *state)]


def _made() -> tuple[nn.Module, torch.optim.Optimizer]:
    model = nn.Sequential(nn.Linear(6, 5), nn.GELU(), nn.Linear(5, 3))
    return model, torch.optim.AdamW(model.parameters())


def _train(model: nn.Module, optimizer: torch.optim.Optimizer, *, steps: int = 5) -> torch.Tensor:
    for _ in range(steps):
        loss: torch.Tensor = model(torch.ones(4, 6)).square().sum()
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        optimizer.zero_grad()
    return loss


def _unwatched() -> Refs:
    model, optimizer = _made()
    live = LiveProfile(model, optimizer)
    _train(model, optimizer)
    return [*_refs(model, optimizer), weakref.ref(live)]


def _watched() -> Refs:
    model, optimizer = _made()
    live = LiveProfile(model, optimizer)
    with live.observing():
        _train(model, optimizer)
    return [*_refs(model, optimizer), weakref.ref(live)]


def _out_of_memory() -> Refs:
    model, optimizer = _made()
    live = LiveProfile(model, optimizer)
    live.device = torch.device("cpu")
    try:
        with live.observing():
            _train(model, optimizer, steps=2)
            model(torch.ones(4, 6))
            raise torch.cuda.OutOfMemoryError("CUDA out of memory")
    except torch.cuda.OutOfMemoryError:
        assert live.out_of_memory is not None and live.out_of_memory.phase == "forward"
    return [*_refs(model, optimizer), weakref.ref(live)]


def _step_profile() -> Refs:
    model, optimizer = _made()
    with optplan.profile_step(model, optimizer) as prof:
        _train(model, optimizer)
    assert prof.measurement().time is not None
    return [*_refs(model, optimizer), weakref.ref(prof)]


@pytest.mark.parametrize("run", [_unwatched, _watched, _out_of_memory, _step_profile])
def test_a_loop_dies_with_its_caller(run: Callable[[], Refs], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda _: 0)
    refs = run()
    assert len(refs) >= 6
    assert _alive(refs) == []


def test_a_loss_that_is_kept_keeps_no_model() -> None:
    model, optimizer = _made()
    live = LiveProfile(model, optimizer)
    with live.observing():
        # The third step's graph has the hooks that follow backward.
        loss = _train(model, optimizer, steps=3)
    refs = [weakref.ref(thing) for thing in (model, optimizer, live)]
    del model, optimizer, live
    assert _alive(refs) == []
    assert loss.grad_fn is not None


@pytest.mark.parametrize(
    "step",
    [
        {"optimizer": "adamw"},
        {"optimizer": "adam-mini", "precision": "amp"},
        {"optimizer": "micro-adam", "checkpointing": "full"},
        {"optimizer": "adapprox", "fused_loss": "chunked"},
        {"optimizer": "sgd", "precision": "fp16-amp", "clip_grad_norm": 1.0, "grad_accum": 2},
    ],
)
def test_a_measured_step_leaves_nothing(step: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, refs = tmp_path / "config.json", list[weakref.ref[Any]]()
    path.write_text(json.dumps(LLAMA))
    build = measure.build_real_step

    def watched(*args: Any, **kwargs: Any) -> RealStep:
        made = build(*args, **kwargs)
        refs.extend(_refs(made.model, made.optimizer))
        return made

    monkeypatch.setattr(measure, "build_real_step", watched)
    record = profile(str(path), device="cpu", num_steps=5, batch_size=2, seq_len=8, **step)
    assert record is not None and record.time is not None and record.time.num_steps == 2
    assert len(refs) > 10
    assert _alive(refs) == []


def test_a_trainer_s_callback_that_lives_on_keeps_nothing() -> None:
    pytest.importorskip("transformers")
    callback = optplan.ProfileCallback()
    model, optimizer = _made()
    callback.on_train_begin(None, None, None, model=model, optimizer=optimizer)
    _train(model, optimizer)
    callback.on_train_end(None, None, None)
    refs = _refs(model, optimizer)
    del model, optimizer
    assert callback.measurement is not None
    assert _alive(refs) == []


def test_lightning_s_callback_that_lives_on_keeps_nothing() -> None:
    pytest.importorskip("lightning")
    callback = optplan.LightningProfileCallback()
    model, optimizer = _made()
    trainer = SimpleNamespace(optimizers=[optimizer])
    callback.on_train_start(trainer, model)
    for index in range(5):
        callback.on_train_batch_start(trainer, model, torch.ones(4, 6), index)
        _train(model, optimizer, steps=1)
    callback.on_train_end(trainer, model)
    refs = _refs(model, optimizer)
    del model, optimizer, trainer
    assert callback.measurement is not None
    assert _alive(refs) == []
