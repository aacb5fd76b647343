"""What the driver says of a GPU: its memory, this process's share of it, and who else is on it.

The driver is asked through NVML. It can be missing, too old, forbidden inside a container or blind to processes; every
answer may therefore be None, and `DeviceReader.remark` says why.

Source: NVML API reference, nvmlDeviceGetMemoryInfo, nvmlDeviceGetComputeRunningProcesses, nvmlDeviceGetHandleByUUID.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from typing import Any

import msgspec


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
        remark: Why the driver does not answer, empty if it does.
        driver: Version of the driver, None if unknown.
    """

    def __init__(self, uuid: str) -> None:
        """Open the GPU with this UUID, as `torch.cuda.get_device_properties(index).uuid` names it.

        A UUID, unlike an index, is right under CUDA_VISIBLE_DEVICES and on a MIG slice.
        """
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
        with self._answering("device memory is not read"):
            pynvml.nvmlInit()
            self.driver = _text(pynvml.nvmlSystemGetDriverVersion())
            self._handle = _handle(pynvml, uuid)

    def read(self) -> DeviceMemory | None:
        """The device's memory now, None where the driver does not say."""
        if self._handle is None:
            return None
        used: int | None = None
        with self._answering("device memory is not read"):
            used = int(self._nvml.nvmlDeviceGetMemoryInfo(self._handle).used)
        if used is None:
            return None
        shares = self._shares()
        if shares is None:
            return DeviceMemory(used, None, None)
        mine = shares.get(os.getpid())
        others = sum(share for process, share in shares.items() if process != os.getpid())
        # In a container the driver may list processes under numbers that are not those seen inside it.
        return DeviceMemory(used, mine, others if mine is not None or not shares else None)

    def _shares(self) -> dict[int, int] | None:
        """Bytes by process, None where the driver lists processes without their memory or not at all."""
        shares: dict[int, int] | None = None
        with self._answering("the driver does not tell processes apart"):
            processes = [
                *self._nvml.nvmlDeviceGetComputeRunningProcesses(self._handle),
                *self._nvml.nvmlDeviceGetGraphicsRunningProcesses(self._handle),
            ]
            if all(process.usedGpuMemory is not None for process in processes):
                shares = {process.pid: int(process.usedGpuMemory) for process in processes}
            else:
                self.remark = "the driver does not tell processes apart: it lists them without their memory"
        return shares

    @contextlib.contextmanager
    def _answering(self, refusal: str) -> Iterator[None]:
        """Turn a refusal of the driver into a remark."""
        try:
            yield
        except (self._nvml.NVMLError, AttributeError, ValueError) as error:
            self.remark = f"{refusal}: {error}"


def _handle(nvml: Any, uuid: str) -> Any:
    name = uuid if uuid.startswith(("GPU-", "MIG-")) else f"GPU-{uuid}"
    return nvml.nvmlDeviceGetHandleByUUID(name.encode())


def _text(value: str | bytes) -> str:
    return value.decode(errors="replace") if isinstance(value, bytes) else value
