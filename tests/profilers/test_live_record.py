"""What a recorded step says of itself, with stand-ins for the GPU: whose memory, how much, nothing of the profiler."""

from __future__ import annotations

import gzip
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch
import torch.distributed as dist
import transformers
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed.device_mesh import init_device_mesh
from torch.utils._python_dispatch import TorchDispatchMode

from optplan.planner.history.events import HistoryEvent
from optplan.planner.history.reader import parse_history
from optplan.planner.timeline import Allocation
from optplan.profilers.live.allocator_record import ReplayedRecord, replay_record
from optplan.profilers.live.measure import Losses, profile_fields
from optplan.profilers.live.profile import LiveProfile
from optplan.profilers.workloads.sharded_modules import fully_shard_module

HISTORIES = Path(__file__).parents[1] / "records" / "h200_histories"
WIDTH, VOCABULARY, TOKENS = 8, 20, 2 * 6


class _Seen(TorchDispatchMode):
    """Every new tensor's device, and how tensors were asked for."""

    def __init__(self) -> None:
        super().__init__()
        self.devices: list[str] = []
        self.pinned: list[object] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if isinstance(out, torch.Tensor) and not func.is_view and func._schema.name != "aten::copy_":
            self.devices.append(out.device.type)
            self.pinned.append((kwargs or {}).get("pin_memory"))
        return out


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_losses_take_nothing_on_the_gpu(dtype: torch.dtype) -> None:
    with FakeTensorMode():
        loss, losses = torch.ones((), device="cuda", dtype=dtype), Losses(3)
        with _Seen() as seen:
            losses.note(loss)
            losses.note(loss)
    assert (seen.devices, seen.pinned) == (["cpu"], [True])


def test_losses_are_kept_as_they_were() -> None:
    losses = Losses(3)
    assert losses.read() == []
    loss = torch.tensor(1.5)
    losses.note(loss)
    loss += 1
    losses.note(loss)
    assert losses.read() == [1.5, 2.5]


def _replayed(name: str, *, skipped: int = 0) -> tuple[ReplayedRecord, dict[str, int]]:
    """A recorded history, replayed from a later event on, and torch's own counters at its end."""
    document = json.loads(gzip.decompress((HISTORIES / f"{name}.json.gz").read_bytes()))
    history = parse_history(document, where=name, device=0)
    history = msgspec.structs.replace(history, events=history.events[skipped:])
    return replay_record(history), document["final_stats"]


@pytest.mark.parametrize("name", ["training", "training_expandable", "plain"])
def test_the_requested_peak_is_torch_s_own(name: str) -> None:
    record, stats = _replayed(name)
    assert record.peak_requested_bytes == stats["requested_bytes.all.peak"]
    assert record.peak_requested_bytes < max(record.allocated) == stats["allocated_bytes.all.peak"]


def test_what_was_asked_for_before_the_step_counts() -> None:
    # The recorded program reaches its peak late; by then most of it has been alive for a long time.
    record, stats = _replayed("training", skipped=300)
    assert record.start
    assert record.peak_requested_bytes == stats["requested_bytes.all.peak"]


def test_what_only_streams_still_use_is_not_asked_for() -> None:
    # torch's counter has it, as `active_bytes` has; what is allocated has not.
    record, stats = _replayed("streams")
    assert record.peak_requested_bytes < max(record.allocated) == stats["allocated_bytes.all.peak"]
    assert record.peak_requested_bytes < stats["requested_bytes.all.peak"]


class _Allocations(TorchDispatchMode):
    """Stands for a GPU's record: an allocation for each new storage, none of which is freed."""

    def __init__(self) -> None:
        super().__init__()
        self.events: list[HistoryEvent] = []
        self._kept: dict[int, torch.UntypedStorage] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        given = {value.untyped_storage().data_ptr() for value in args if isinstance(value, torch.Tensor)}
        for tensor in out if isinstance(out, tuple | list) else [out]:
            if isinstance(tensor, torch.Tensor) and tensor.numel():
                self._see(tensor.untyped_storage(), given)
        return out

    def _see(self, storage: torch.UntypedStorage, given: set[int]) -> None:
        address = storage.data_ptr()
        if address not in self._kept and address not in given:
            self._kept[address] = storage
            self.events.append(HistoryEvent("alloc", address, storage.nbytes(), 0, (0, 0), 0))

    def start(self) -> None:
        self.events.clear()

    def count(self) -> int:
        return len(self.events)

    def stop(self) -> list[HistoryEvent]:
        return list(self.events)


class _OnCpu(LiveProfile):
    """A profile whose record is a stand-in."""

    def __init__(self, model: nn.Module, optimizer: torch.optim.Optimizer, record: _Allocations) -> None:
        super().__init__(model, optimizer)
        self._record: Any = record
        self._follower._count_events = self._communication._count = record.count

    def _read(self, history: Any) -> None:
        # Of these tensors none is freed, so the last moment is the peak.
        allocated = [0]
        for event in history:
            allocated.append(allocated[-1] + event.size)
        replayed = ReplayedRecord(history, allocated, [], 0, 4321, None, None)
        self.history = self._named(replayed)
        self.phase_peaks = {"step": allocated[-1]}
        self.peak_requested_bytes = replayed.peak_requested_bytes


def _profile_gpt2(*, amp: bool) -> _OnCpu:
    config = transformers.GPT2Config(n_embd=WIDTH, n_layer=1, n_head=2, n_positions=16, vocab_size=VOCABULARY)
    model = transformers.GPT2LMHeadModel(config)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    tokens = torch.zeros(2, TOKENS // 2, dtype=torch.long)
    record = _Allocations()
    profile = _OnCpu(model, optimizer, record)
    with profile.observing(), record:
        for _ in range(3):
            with torch.autocast("cpu", torch.bfloat16, enabled=amp):
                loss = model(input_ids=tokens, labels=tokens).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
    return profile


@pytest.mark.parametrize(
    ("amp", "expected"),
    [
        (False, [("logits_and_loss", 4 * TOKENS * VOCABULARY)]),
        # The weight and what it is multiplied with, in bf16, are activations, as in both engines.
        (
            True,
            [
                ("activations", 2 * TOKENS * WIDTH),
                ("activations", 2 * VOCABULARY * WIDTH),
                ("logits_and_loss", 2 * TOKENS * VOCABULARY),
            ],
        ),
    ],
)
def test_of_the_output_head_only_what_it_returns_is_logits(amp: bool, expected: list[tuple[str, int]]) -> None:
    profile = _profile_gpt2(amp=amp)
    assert profile.history is not None
    made = [event for event in profile.history.events if isinstance(event, Allocation)]
    assert sorted((e.category, e.bytes) for e in made if e.name == "lm_head forward") == expected
    after = [event for event in made if event.name == "loss forward"]
    assert after and {event.category for event in after} == {"logits_and_loss"}
    assert profile_fields(profile)["peak_requested_bytes"] == 4321


@pytest.fixture
def ranks() -> Iterator[Any]:
    """A process group of this process alone."""
    dist.init_process_group("gloo", rank=0, world_size=1, store=dist.HashStore())
    yield init_device_mesh("cpu", (1,))
    dist.destroy_process_group()


def test_what_fsdp2_gathers_for_the_root_is_gathered_in_the_recorded_step(ranks: Any) -> None:
    config = transformers.LlamaConfig(
        hidden_size=WIDTH, intermediate_size=WIDTH, num_hidden_layers=1, num_attention_heads=2, vocab_size=VOCABULARY,
        tie_word_embeddings=False,
    )  # fmt: skip
    model = transformers.LlamaForCausalLM(config)
    fully_shard_module(model, mesh=ranks, reshards=True, mixed=False)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    tokens = torch.zeros(1, 4, dtype=torch.long)
    profile = _OnCpu(model, optimizer, _Allocations())
    with profile.observing():
        for _ in range(3):
            model(input_ids=tokens, labels=tokens).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
    gathered = [owner.name for _, _, owner in profile._communication.ranges if owner.category == "parameters"]
    # The root's come first, before the module's own code runs.
    assert sorted(gathered[:3]) == ["gathered lm_head.weight", "gathered model.embed_tokens.weight",
                                    "gathered model.norm.weight"]  # fmt: skip
    assert gathered[3].startswith("gathered model.layers.0.")
