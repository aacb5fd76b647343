"""The GPU catalogue: what the driver gives, what the context takes, how fast memory and arithmetic are.

Source: `data/gpus.toml`, which names the origin and the day of every row.
"""

from __future__ import annotations

import re
import tomllib
from functools import cache
from importlib.resources import files
from typing import Any, Literal

import msgspec

from optplan.planner.errors import ConfigError, DataError, shorten, unknown
from optplan.planner.records import GpuRow
from optplan.planner.units import GIB, KIB, MIB, format_bytes

Basis = Literal["measured", "reported", "estimated"]

CONTEXT_BYTES_PER_THREAD = 2 * KIB
"""Local memory that a context sets aside for every thread the GPU can hold: an RTX 6000 Ada's 426 MiB are 142 x 1536
times 2 KiB (https://github.com/unslothai/unsloth-zoo/pull/1053), a B200's 612 MiB 20 MiB more than 148 x 2048 times
2 KiB (https://github.com/unslothai/unsloth/pull/8669), an RTX 3090's 256 MiB 10 MiB more than 82 x 1536 times 2 KiB
(https://github.com/invoke-ai/InvokeAI/issues/9413)."""
CONTEXT_BASE_BYTES = 91 * MIB
"""What a fresh context on an H200 takes beyond that: 618.8 MiB measured, less 132 x 2048 x 2 KiB."""
MODULES_BYTES = 148 * MIB
"""Kernels that torch has loaded once a bf16 training step has run: measured on an H200, the same for every model."""
COPY_FRACTION = 0.89
"""Share of the data sheet's bandwidth that a large copy reaches on an H200 (4.28 of 4.8 TB/s)."""

MAX_BUDGET_BYTES = 2**50
_DRIVERS_DIFFER = 0.03
"""How far apart two drivers' figures for one GPU's memory can be, ECC on or off left aside."""
_BRAND = re.compile(r"nvidia|amd|geforce|tesla|quadro|instinct|rtx|generation|edition")


class Gpu(msgspec.Struct, frozen=True, kw_only=True):
    """One GPU as a program sees it, or a memory budget without a GPU.

    Attributes:
        id: Name on the command line, such as `a100-40g`; the size itself for a budget, such as `38 GiB`.
        name: Name as the vendor writes it.
        aliases: Further names accepted, the driver's among them.
        vendor: `nvidia`, `amd`, or None for a budget.
        architecture: Compute capability as `sm_90`, or AMD's target as `gfx942`.
        sm_count: Streaming multiprocessors, or AMD's compute units.
        threads_per_sm: Threads that one multiprocessor can hold.
        marketing_gib: The number on the box; vendors write GB and mean 2^30 bytes.
        total_bytes: What `torch.cuda.get_device_properties().total_memory` reports.
        total_basis: Where `total_bytes` comes from.
        total_source: The log, issue or sibling it comes from, in words.
        context_bytes: Device memory that torch cannot have after a training step: CUDA context and loaded kernels; 0
            for a budget, which is what torch may allocate.
        context_basis: Where `context_bytes` comes from.
        context_source: The same in words.
        communication_bytes: Device memory that the communication library takes where several GPUs work together.
        communication_basis: Where `communication_bytes` comes from.
        memory_bandwidth_bytes_per_s: Bandwidth by the data sheet.
        copy_bandwidth_bytes_per_s: Bytes read plus written per second by a large device copy, where measured.
        peak_flops: Dense operations per second by dtype (`fp32`, `tf32`, `fp16`, `bf16`, `fp8`), by the data sheet; a
            dtype that the matrix units lack is left out.
        host_link: Link to the host, such as `PCIe 4.0 x16`.
        host_link_bytes_per_s: Bytes per second over it, one direction.
        peer_link: Link to other GPUs, such as `NVLink`, or None.
        peer_link_bytes_per_s: Bytes per second to all peers, both directions together.
        source: Address of the data sheet.
        as_of: Day on which the row was written, `YYYY-MM-DD`.
    """

    id: str
    name: str
    total_bytes: int
    total_basis: Basis
    total_source: str
    context_bytes: int
    context_basis: Basis
    context_source: str
    aliases: tuple[str, ...] = ()
    vendor: Literal["nvidia", "amd"] | None = None
    architecture: str | None = None
    sm_count: int | None = None
    threads_per_sm: int | None = None
    marketing_gib: int | None = None
    communication_bytes: int = 0
    communication_basis: Basis | Literal[""] = ""
    memory_bandwidth_bytes_per_s: float | None = None
    copy_bandwidth_bytes_per_s: float | None = None
    peak_flops: dict[str, float] = {}
    host_link: str | None = None
    host_link_bytes_per_s: float | None = None
    peer_link: str | None = None
    peer_link_bytes_per_s: float | None = None
    source: str | None = None
    as_of: str | None = None

    @property
    def usable_bytes(self) -> int:
        """What is left for torch's allocator once context, kernels and communication library are loaded."""
        return self.total_bytes - self.context_bytes - self.communication_bytes

    @property
    def outside_bytes(self) -> int:
        """What context, kernels and communication library take."""
        return self.context_bytes + self.communication_bytes

    @property
    def marketing_bytes(self) -> int | None:
        """The number on the box in bytes."""
        return None if self.marketing_gib is None else self.marketing_gib * GIB

    @property
    def is_budget(self) -> bool:
        """Whether this is a memory budget rather than a GPU."""
        return self.vendor is None

    @property
    def supports_bf16(self) -> bool:
        """Whether the matrix units compute in bf16; taken for granted of a budget."""
        return self.is_budget or "bf16" in self.peak_flops

    @property
    def supports_fp8(self) -> bool:
        """Whether the matrix units compute in fp8; taken for granted of a budget."""
        return self.is_budget or "fp8" in self.peak_flops

    @property
    def compute_capability(self) -> tuple[int, int] | None:
        """CUDA compute capability, such as (9, 0); None for AMD and for a budget."""
        if self.architecture is None or not self.architecture.startswith("sm_"):
            return None
        digits = self.architecture.removeprefix("sm_")
        return int(digits[:-1]), int(digits[-1])

    @property
    def achievable_bandwidth_bytes_per_s(self) -> float | None:
        """Bandwidth of a large copy: measured, or `COPY_FRACTION` of the data sheet's."""
        if self.copy_bandwidth_bytes_per_s is not None or self.memory_bandwidth_bytes_per_s is None:
            return self.copy_bandwidth_bytes_per_s
        return COPY_FRACTION * self.memory_bandwidth_bytes_per_s

    @property
    def flags(self) -> tuple[str, str]:
        """The command-line flag that names this GPU or budget again, to the byte."""
        if not self.is_budget:
            return "--gpu", self.id
        for unit, size in (("GiB", GIB), ("MiB", MIB), ("KiB", KIB)):
            if self.total_bytes % size == 0:
                return "--memory", f"{self.total_bytes // size}{unit}"
        return "--memory", f"{self.total_bytes}B"


def gpu_ids() -> tuple[str, ...]:
    """Ids of the catalogue in alphabetical order."""
    return tuple(load_gpus())


def load_gpu(name: str) -> Gpu:
    """The GPU of the catalogue that a name means.

    Args:
        name: Id, alias or the driver's name, in any case and with any separators: `a100-40g`, `A100_40GB`,
            `NVIDIA A100-SXM4-40GB`, `rtx4090`; the memory size may be left out where only one GPU fits.

    Raises:
        ConfigError: The name is unknown, or several GPUs fit.
    """
    exact, stems = _names()
    key = _key(name[:100])
    found = exact.get(key) or stems.get(key, ())
    if len(found) == 1:
        return load_gpus()[found[0]]
    if found:
        raise ConfigError(f"GPU {shorten(name)} is ambiguous; say which: {', '.join(found)}")
    short = [_stem(ids[0]) for ids in stems.values() if len(ids) == 1]
    raise unknown("GPU", name, [*gpu_ids(), *short], more="run `optplan gpus` for the list, or give --memory 38GiB")


def find_gpu(driver_name: str, total_bytes: int) -> Gpu:
    """The catalogue's row of a GPU that is at hand.

    Args:
        driver_name: What the driver calls it, such as `NVIDIA A100-SXM4-40GB`.
        total_bytes: The memory that the driver reports, which tells apart sizes that share a name.

    Raises:
        ConfigError: The catalogue has none of this name and size.
    """
    exact, stems = _names()
    key = _key(driver_name[:100])
    sized = [load_gpus()[id_] for id_ in exact.get(key) or stems.get(key, ())]
    near = [gpu for gpu in sized if abs(gpu.total_bytes - total_bytes) <= _DRIVERS_DIFFER * gpu.total_bytes]
    if len(near) != 1:
        size = format_bytes(total_bytes)
        raise ConfigError(
            f"the GPU in this machine, {shorten(driver_name)} with {size}, is not in the catalogue; "
            "name the one that is most like it with --gpu"
        )
    return near[0]


def custom_gpu(memory_bytes: int) -> Gpu:
    """A memory budget in the place of a GPU: bytes that torch may allocate, so no context is taken off.

    Raises:
        ConfigError: The budget is not an integer from 1 byte to 1 PiB.
    """
    if type(memory_bytes) is not int or not 0 < memory_bytes <= MAX_BUDGET_BYTES:
        raise ConfigError(f"--memory must be above 0 and at most 1024 TiB, got {shorten(memory_bytes)} bytes")
    return Gpu(
        id=re.sub(r"\.?0+ ", " ", format_bytes(memory_bytes)) if memory_bytes >= KIB else f"{memory_bytes} B",
        name="memory budget",
        total_bytes=memory_bytes,
        total_basis="measured",
        total_source="given with --memory",
        context_bytes=0,
        context_basis="measured",
        context_source="a budget is what torch may allocate",
    )


@cache
def load_gpus() -> dict[str, Gpu]:
    """Every GPU of the catalogue by id, in alphabetical order.

    Raises:
        DataError: The table is damaged, or an id stands in it twice.
    """
    try:
        table = tomllib.loads(files("optplan.planner.data").joinpath("gpus.toml").read_text("utf-8"))
        rows = [_gpu(row, table) for row in table["gpu"]]
    except (tomllib.TOMLDecodeError, msgspec.ValidationError, KeyError) as error:
        raise DataError(f"gpus.toml is damaged: {error}") from error
    gpus = {gpu.id: gpu for gpu in sorted(rows, key=lambda gpu: gpu.id)}
    if len(gpus) < len(rows):
        raise DataError("gpus.toml is damaged: an id stands in it twice")
    return gpus


def _gpu(row: dict[str, Any], table: dict[str, Any]) -> Gpu:
    row["source"] = table["sources"][row["source"]]
    row["host_link_bytes_per_s"] = table["host_link_bytes_per_s"][row["host_link"]]
    if row["vendor"] == "nvidia":
        row["threads_per_sm"] = table["threads_per_sm"][row["architecture"]]
    if "context_bytes" not in row:
        row["context_bytes"] = estimate_context_bytes(sm_count=row["sm_count"], threads_per_sm=row["threads_per_sm"])
        row["context_basis"] = "estimated"
        row["context_source"] = "2 KiB a resident thread + 91 MiB + 148 MiB of kernels, after an H200"
    return msgspec.convert(row, Gpu)


def estimate_context_bytes(*, sm_count: int, threads_per_sm: int) -> int:
    """CUDA context and loaded kernels after a bf16 training step, in bytes, of a GPU where nobody has measured them."""
    return CONTEXT_BYTES_PER_THREAD * sm_count * threads_per_sm + CONTEXT_BASE_BYTES + MODULES_BYTES


@cache
def _names() -> tuple[dict[str, tuple[str, ...]], dict[str, tuple[str, ...]]]:
    """Accepted spellings to ids: full names, and names without the memory size."""
    exact: dict[str, tuple[str, ...]] = {}
    stems: dict[str, tuple[str, ...]] = {}
    for gpu in load_gpus().values():
        for key in {_key(name) for name in (gpu.id, gpu.name, *gpu.aliases)}:
            exact[key] = (*exact.get(key, ()), gpu.id)
        stem = _key(_stem(gpu.id))
        stems[stem] = (*stems.get(stem, ()), gpu.id)
    return exact, stems


def _stem(id_: str) -> str:
    return re.sub(r"-[0-9]+g$", "", id_)


def _key(name: str) -> str:
    """A spelling without case, separators, brand and the B of GB."""
    letters = _BRAND.sub("", re.sub(r"[^a-z0-9]", "", name.lower()))
    return re.sub(r"(?<=[0-9])gi?b", "g", letters)


def gpu_row(gpu: Gpu) -> GpuRow:
    """The GPU as a report shows it."""
    return GpuRow(
        gpu.id,
        gpu.total_bytes,
        gpu.usable_bytes,
        gpu.context_bytes,
        communication_bytes=gpu.communication_bytes,
        communication_basis=gpu.communication_basis,
    )
