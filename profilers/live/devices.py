"""What the driver says of a GPU: its memory, this process's share of it, and who else is on it.

The driver is asked through NVML. It can be missing, too old, forbidden inside a container or blind to processes; every
answer may therefore be None, and `DeviceReader.remark` says why.

Source: NVML API reference, nvmlDeviceGetMemoryInfo, nvmlDeviceGetComputeRunningProcesses.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any, TypeVar

import msgspec
import torch

_Answer = TypeVar("_Answer")
_PART = "MIG-"


class DeviceMemory(msgspec.Struct, frozen=True):
    """Memory of one GPU at one moment, in bytes.

    Attributes:
        used_bytes: In use on the whole device.
        process_bytes: This process's share, None where the driver does not tell processes apart.
        other_bytes: What all other processes hold, None likewise.
    """

    used_bytes: int
    process_bytes: int | None
    other_bytes: int | None


class DeviceReader:
    """Asks the driver about the GPU that torch calls `index`.

    Attributes:
        remark: Why the driver did not answer when it was asked last, empty if it did.
        driver: Version of the driver, None if unknown.
    """

    def __init__(self, index: int) -> None:
        """Open the GPU that torch calls `index`; nothing is initialised on it, so that it can be read untouched."""
        self.remark = ""
        self.driver: str | None = None
        self._handle: Any = None
        self._nvml: Any = None
        try:
            import pynvml
        except ImportError:
            self.remark = "device memory is not read: the package nvidia-ml-py is not installed"
            return
        self._nvml = pynvml
        opened = self._ask(lambda nvml: _open(nvml, index), "device memory is not read")
        if opened is not None:
            self.driver, self._handle = opened

    def read(self) -> DeviceMemory | None:
        """The device's memory now, None where the driver does not say."""
        if self._handle is None:
            return None
        # Before this process has anything on the GPU the driver cannot list it; the last answer is what counts.
        self.remark = ""
        used = self._ask(self._used, "device memory is not read")
        if used is None:
            return None
        shares = self._ask(self._shares, "the driver does not tell processes apart")
        if shares is None:
            return DeviceMemory(used, None, None)
        mine = shares.get(os.getpid())
        if mine is None:
            # In a container the driver may list none, or under numbers that are not those seen inside it.
            if torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
                self.remark = "the driver does not tell processes apart: it does not list this one"
            return DeviceMemory(used, None, None)
        return DeviceMemory(used, mine, sum(shares.values()) - mine)

    def _used(self, nvml: Any) -> int:
        """Bytes in use, without what the driver keeps for itself where it tells the two apart."""
        version = getattr(nvml, "nvmlMemory_v2", None)
        if version is not None:
            return int(nvml.nvmlDeviceGetMemoryInfo(self._handle, version=version).used)
        return int(nvml.nvmlDeviceGetMemoryInfo(self._handle).used)

    def _shares(self, nvml: Any) -> dict[int, int] | None:
        """Bytes by process, None where the driver lists processes without their memory."""
        processes = [
            *nvml.nvmlDeviceGetComputeRunningProcesses(self._handle),
            *nvml.nvmlDeviceGetGraphicsRunningProcesses(self._handle),
        ]
        if any(process.usedGpuMemory is None for process in processes):
            self.remark = "the driver does not tell processes apart: it lists them without their memory"
            return None
        return {process.pid: int(process.usedGpuMemory) for process in processes}

    def _ask(self, question: Callable[[Any], _Answer], refusal: str) -> _Answer | None:
        """The driver's answer, None and a remark where it refuses."""
        try:
            return question(self._nvml)
        except (self._nvml.NVMLError, AttributeError, IndexError, OSError, ValueError, RuntimeError) as error:
            self.remark = f"{refusal}: {error}"
            return None


def _open(nvml: Any, index: int) -> tuple[str, Any]:
    """The driver's version and the GPU's handle."""
    nvml.nvmlInit()
    visible = [name.strip() for name in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",")]
    if visible[min(index, len(visible) - 1)].startswith(_PART):
        # A part of a GPU has memory of its own, and no number.
        handle = nvml.nvmlDeviceGetHandleByUUID(visible[index])
    else:
        # torch's own answer to what CUDA_VISIBLE_DEVICES makes of an index.
        handle = nvml.nvmlDeviceGetHandleByIndex(torch.cuda._get_nvml_device_index(index))
    return _text(nvml.nvmlSystemGetDriverVersion()), handle


def _text(value: str | bytes) -> str:
    return value.decode(errors="replace") if isinstance(value, bytes) else value
