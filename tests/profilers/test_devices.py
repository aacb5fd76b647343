"""What the driver says of a GPU, or why it says nothing; the driver here is a stand-in."""

from __future__ import annotations

import os
import sys
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from optplan.planner.errors import ConfigError
from optplan.planner.gpus import load_gpu
from optplan.profilers.live.command import check_device, this_gpu
from optplan.profilers.live.devices import DeviceMemory, DeviceReader
from optplan.profilers.live.environment import given_notes
from optplan.profilers.live.measure import _size_notes, device_bytes, held_by_others, profile_notes

GIB = 2**30
ME = os.getpid()


class RefusedError(Exception):
    """What NVML raises."""


class Nvml:
    """A driver with one GPU in use."""

    NVMLError = RefusedError
    nvmlMemory_v2 = 2  # noqa: N815 - as in pynvml

    def __init__(self, processes: dict[int, int | None], *, refuse: dict[str, str] | None = None) -> None:
        self._processes, self._refuse = processes, refuse or {}
        self.opened: object = None

    def __getattr__(self, name: str) -> Any:
        """Any call that was told to refuse does; the others that are not there answer nothing."""
        if name not in self._refuse and not hasattr(Nvml, f"_{name}"):
            raise AttributeError(name)

        def call(*args: Any, **kwargs: Any) -> Any:
            if name in self._refuse:
                raise RefusedError(self._refuse[name])
            return getattr(self, f"_{name}")(*args, **kwargs)

        return call

    def _nvmlInit(self) -> None:  # noqa: N802
        pass

    def _nvmlSystemGetDriverVersion(self) -> bytes:  # noqa: N802
        return b"580.1"

    def _nvmlDeviceGetHandleByIndex(self, index: int) -> str:  # noqa: N802
        self.opened = index
        return "handle"

    def _nvmlDeviceGetHandleByUUID(self, uuid: str) -> str:  # noqa: N802
        self.opened = uuid
        return "handle"

    def _nvmlDeviceGetMemoryInfo(self, _: str, version: int | None = None) -> Any:  # noqa: N802
        # Without a version the driver counts what it keeps for itself.
        return SimpleNamespace(used=3 * GIB if version == 2 else 4 * GIB)

    def _nvmlDeviceGetComputeRunningProcesses(self, _: str) -> list[Any]:  # noqa: N802
        return [SimpleNamespace(pid=pid, usedGpuMemory=used) for pid, used in self._processes.items()]

    def _nvmlDeviceGetGraphicsRunningProcesses(self, _: str) -> list[Any]:  # noqa: N802
        return []


def _reader(monkeypatch: pytest.MonkeyPatch, nvml: object, index: int = 0) -> DeviceReader:
    monkeypatch.setitem(sys.modules, "pynvml", nvml)
    return DeviceReader(index)


@pytest.fixture(autouse=True)
def _all_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)


@pytest.mark.parametrize(
    ("processes", "memory", "others"),
    [
        ({ME: 2 * GIB, 1: GIB}, DeviceMemory(3 * GIB, 2 * GIB, GIB), GIB),
        # Before this process is on the GPU all that is in use is others'.
        ({1: 3 * GIB}, DeviceMemory(3 * GIB, None, None), 3 * GIB),
        ({}, DeviceMemory(3 * GIB, None, None), 3 * GIB),
    ],
)
def test_shares(
    monkeypatch: pytest.MonkeyPatch, processes: dict[int, int | None], memory: DeviceMemory, others: int
) -> None:
    reader = _reader(monkeypatch, Nvml(processes))
    assert reader.read() == memory
    assert (reader.driver, reader.remark) == ("580.1", "")
    assert held_by_others(memory) == others


@pytest.mark.parametrize(
    ("nvml", "memory", "remark"),
    [
        (
            Nvml({1: None}),
            DeviceMemory(3 * GIB, None, None),
            "the driver does not tell processes apart: it lists them without their memory",
        ),
        (
            Nvml({}),
            DeviceMemory(3 * GIB, None, None),
            "the driver does not tell processes apart: it does not list this one",
        ),
        (
            Nvml({}, refuse={"nvmlDeviceGetComputeRunningProcesses": "Insufficient Permissions"}),
            DeviceMemory(3 * GIB, None, None),
            "the driver does not tell processes apart: Insufficient Permissions",
        ),
        (
            Nvml({}, refuse={"nvmlDeviceGetMemoryInfo": "GPU is lost"}),
            None,
            "device memory is not read: GPU is lost",
        ),
        (
            Nvml({}, refuse={"nvmlInit": "NVML Shared Library Not Found"}),
            None,
            "device memory is not read: NVML Shared Library Not Found",
        ),
        (None, None, "device memory is not read: the package nvidia-ml-py is not installed"),
    ],
)
def test_why_it_does_not_say(
    monkeypatch: pytest.MonkeyPatch, nvml: object, memory: DeviceMemory | None, remark: str
) -> None:
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    reader = _reader(monkeypatch, nvml)
    assert reader.read() == memory
    assert reader.remark == remark


def test_a_process_that_is_not_on_the_gpu_yet_is_told_apart_later(monkeypatch: pytest.MonkeyPatch) -> None:
    # torch calls itself initialized as soon as it has asked for a GPU's name; the driver lists no process then.
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    processes: dict[int, int | None] = {1: GIB}
    reader = _reader(monkeypatch, Nvml(processes))
    before = reader.read()
    processes[ME] = 2 * GIB
    after = reader.read()
    assert device_bytes(before, after) == {"device_bytes": 2 * GIB, "device_basis": "process"}
    assert profile_notes(None, reader) == given_notes()
    assert reader.remark == ""


def test_a_driver_that_falls_silent_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    processes: dict[int, int | None] = {ME: GIB}
    reader = _reader(monkeypatch, Nvml(processes))
    reader.read()
    processes[1] = None
    reader.read()
    assert reader.remark == "the driver does not tell processes apart: it lists them without their memory"


def test_an_old_driver_counts_its_own_memory_too(monkeypatch: pytest.MonkeyPatch) -> None:
    old = Nvml({ME: GIB})
    monkeypatch.delattr(Nvml, "nvmlMemory_v2")
    assert _reader(monkeypatch, old).read() == DeviceMemory(4 * GIB, GIB, 0)


@pytest.mark.parametrize(
    ("visible", "index", "opened"),
    [
        (None, 1, 1),
        ("3,1", 0, 3),
        ("3,1", 1, 1),
        ("MIG-5f8c,MIG-77aa", 1, "MIG-77aa"),
    ],
)
def test_the_gpu_that_torch_means(
    monkeypatch: pytest.MonkeyPatch, visible: str | None, index: int, opened: object
) -> None:
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    nvml = Nvml({})
    _reader(monkeypatch, nvml, index)
    assert nvml.opened == opened


def test_a_gpu_that_is_not_visible(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0")
    reader = _reader(monkeypatch, Nvml({}), 1)
    assert reader.read() is None
    assert reader.remark.startswith("device memory is not read: device 1 is not visible")


@pytest.mark.parametrize(
    ("before", "after", "fields"),
    [
        (None, None, {}),
        (DeviceMemory(GIB, None, None), None, {}),
        (None, DeviceMemory(5 * GIB, 4 * GIB, GIB), {"device_bytes": 4 * GIB, "device_basis": "process"}),
        # Processes are not told apart: what others held before is subtracted.
        (
            DeviceMemory(GIB, None, None),
            DeviceMemory(5 * GIB, None, None),
            {"device_bytes": 4 * GIB, "device_basis": "difference"},
        ),
        (None, DeviceMemory(5 * GIB, None, None), {}),
    ],
)
def test_whose_memory_it_is(before: DeviceMemory | None, after: DeviceMemory | None, fields: dict[str, Any]) -> None:
    assert device_bytes(before, after) == fields


@pytest.mark.parametrize(
    ("name", "sentence"),
    [
        ("cuda:2", "--device cuda:2 is not there: torch sees 2; allowed: cuda:0 to cuda:1"),
        ("cuda:", "--device 'cuda:' is not known; allowed: cpu, cuda, cuda:0, cuda:1 ..."),
    ],
)
def test_several_gpus(monkeypatch: pytest.MonkeyPatch, name: str, sentence: str) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert check_device("cuda") == torch.device("cuda", 0)
    assert check_device("cuda:1") == torch.device("cuda", 1)
    with pytest.raises(ConfigError) as raised:
        check_device(name)
    assert str(raised.value) == sentence


def _has(monkeypatch: pytest.MonkeyPatch, name: str, total: int) -> torch.device:
    properties = SimpleNamespace(name=name, total_memory=total)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: properties)
    return torch.device("cuda", 0)


def test_a_part_of_a_gpu_is_told_from_the_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    device = _has(monkeypatch, "NVIDIA A100-SXM4-40GB MIG 1g.5gb", 4_970_250_240)
    with pytest.raises(ConfigError) as raised:
        this_gpu(device)
    assert str(raised.value) == (
        "the GPU in this machine, 'NVIDIA A100-SXM4-40GB MIG 1g.5gb' with 4.63 GiB, is not in the catalogue; "
        "name the one that is most like it with --gpu"
    )
    assert _size_notes(load_gpu("a100-40g"), device) == [
        "measured on NVIDIA A100-SXM4-40GB MIG 1g.5gb with 4.63 GiB; what is predicted is for a100-40g with 39.38 GiB"
    ]


def test_the_whole_gpu_has_no_note(monkeypatch: pytest.MonkeyPatch) -> None:
    device = _has(monkeypatch, "NVIDIA H200", 150_109_880_320)
    gpu = this_gpu(device)
    assert gpu.id == "h200-141g"
    assert _size_notes(gpu, device) == []
