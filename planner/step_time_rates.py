"""The coefficients of the step-time model, read from `data/step_time.toml`, which names the source of each."""

from __future__ import annotations

import tomllib
from functools import cache
from importlib.resources import files
from typing import Any, Literal

import msgspec

from optplan.planner.errors import DataError

CALIBRATED_GPU = "h200-141g"
LinkBasis = Literal["measured", "cited", "estimated"]


class GpuRates(msgspec.Struct, frozen=True):
    """Shares of the data sheet that a GPU reaches.

    Attributes:
        product_share_16bit: Of the matrix units' operations, by products in fp16 or bf16; likewise in fp32.
        attention_share: The same by fused attention.
        moves_per_written_byte: How often a byte of a written tensor crosses the memory bus, its reads included.
        seconds_per_launch: What a kernel takes that has next to nothing to do.
    """

    product_share_16bit: float
    product_share_fp32: float
    attention_share: float
    moves_per_written_byte: float
    seconds_per_launch: float


class HostRates(msgspec.Struct, frozen=True):
    """Seconds that the host takes.

    Attributes:
        seconds_per_call: To call torch or a module from Python.
        seconds_per_launch: To launch one operation below that, or for autograd to come to one of its nodes.
        seconds_per_hook: To hand one tensor to one of checkpointing's hooks.
        seconds_per_collective: To gather or reduce one group of FSDP2, with its hooks.
        seconds_per_reduced_tensor: To have one parameter's gradient reduced by DDP.
        launch_reference_seconds: What `host_launch_seconds` of a record is on this host, None if no record tells.
    """

    seconds_per_call: float
    seconds_per_launch: float
    seconds_per_hook: float
    seconds_per_collective: float
    seconds_per_reduced_tensor: float
    launch_reference_seconds: float | None = None

    def slower(self, factor: float) -> HostRates:
        """Of a host that takes so many times as long for everything."""
        rates = msgspec.structs.asdict(self).items()
        slower: dict[str, Any] = {name: None if rate is None else factor * rate for name, rate in rates}
        return HostRates(**slower)


class OptimizerRates(msgspec.Struct, frozen=True):
    """Time of `step()` besides moving its bytes at the copy bandwidth.

    Attributes:
        id: Id in the registry; `implementation` names one of its implementations.
        seconds_per_element: On the GPU.
        seconds_per_tensor: On the host, for every tensor; `seconds_per_matrix` besides for those of two dimensions.
        basis: Whether they rest on a measurement, which `source` names.
        flops_per_element_and_rank: Of optimizers that multiply matrices; likewise by a matrix's shorter side.
    """

    id: str
    implementation: str
    seconds_per_element: float
    seconds_per_tensor: float
    basis: Literal["measured", "estimated"]
    source: str
    seconds_per_matrix: float = 0.0
    flops_per_element_and_rank: float = 0.0
    flops_per_element_and_side: float = 0.0


class Overlap(msgspec.Struct, frozen=True):
    """How sharply the longest of GPU, host and links decides."""

    exponent: float


class LinkRates(msgspec.Struct, frozen=True):
    """Share of a link's rate in one direction that collectives reach.

    Attributes:
        link: Name of the link, as the rows of `clusters.toml` have it.
        bandwidth_share: Bytes per second through the link, over its rate by the data sheet.
        basis: `measured` by `benchmarks/record_links.py`, `cited` from somebody else's measurement, or `estimated`.
        source: The record or address.
    """

    link: str
    bandwidth_share: float
    basis: LinkBasis
    source: str


class FitError(msgspec.Struct, frozen=True):
    """Relative errors of some steps: the median, and the largest."""

    median: float
    largest: float


class FitErrors(msgspec.Struct, frozen=True):
    """How far the model is from measured steps.

    Attributes:
        num_steps: Measured steps.
        fitted: Errors on the steps that it was fitted to.
        held_out: Errors on each model's steps by a fit to the other models'.
        held_out_gpu: Of these, those of the steps on one GPU that it decides by that fit; likewise `held_out_host`.
        held_out_sharded: Of these, those of the steps over several GPUs.
        processes: How far single processes are from the median of all that took their step, which is what the model is
            fitted to.
        num_processes: How many they are.
    """

    num_steps: int
    fitted: FitError
    held_out: FitError
    held_out_gpu: FitError
    held_out_host: FitError
    held_out_sharded: FitError
    processes: FitError
    num_processes: int

    def expected(self, bound: str, *, gpus: int) -> FitError:
        """Of a step of a model that was not fitted to, by what decides it."""
        if gpus > 1:
            return self.held_out_sharded
        return self.held_out_host if bound == "host" else self.held_out_gpu


class FittedRecords(msgspec.Struct, frozen=True):
    """Measured steps that the model is fitted to.

    Attributes:
        path: Folder in the repository: records, and beside them the times of further processes.
        num_steps: Records there.
    """

    path: str
    num_steps: int


class TimeModel(msgspec.Struct, frozen=True):
    """All coefficients."""

    records: list[FittedRecords]
    errors: FitErrors
    gpu: GpuRates
    host: HostRates
    overlap: Overlap
    link: list[LinkRates]
    optimizer: list[OptimizerRates]

    def rates_of(self, optimizer: str, implementation: str) -> OptimizerRates:
        """Rates of one implementation.

        Raises:
            DataError: The table has none.
        """
        for row in self.optimizer:
            if (row.id, row.implementation) == (optimizer, implementation):
                return row
        raise DataError(f"step_time.toml has no row for {optimizer} with implementation={implementation}")

    def link_rates(self, link: str) -> LinkRates:
        """What collectives reach over a link.

        Raises:
            DataError: The table has no such link.
        """
        for row in self.link:
            if row.link == link:
                return row
        raise DataError(f"step_time.toml has no row for the link {link}")


@cache
def load_time_model() -> TimeModel:
    """The fitted coefficients.

    Raises:
        DataError: The table is damaged.
    """
    try:
        table = tomllib.loads(files("optplan.planner.data").joinpath("step_time.toml").read_text("utf-8"))
        return msgspec.convert(table, TimeModel)
    except (tomllib.TOMLDecodeError, msgspec.ValidationError) as error:
        raise DataError(f"step_time.toml is damaged: {error}") from error
