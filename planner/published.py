"""Memory figures that papers print, each held against ours.

Source: `data/published.toml`, which says of every figure where it stands, how it is known, and under which terms it
holds.
"""

from __future__ import annotations

import tomllib
from functools import cache
from importlib.resources import files
from typing import Any, Literal

import msgspec

from optplan.planner.catalog import load_model
from optplan.planner.dtypes import Dtype
from optplan.planner.errors import DataError
from optplan.planner.footprint import optimizer_footprint
from optplan.planner.models.reader import read_model
from optplan.planner.models.resnet import resnet_parameters
from optplan.planner.optimizers.base import OptimizerContext
from optplan.planner.optimizers.registry import build_optimizer
from optplan.planner.tensors import Parameter
from optplan.planner.units import GIB, MIB
from optplan.planner.version import VERSION

PUBLISHED_SCHEMA: Literal["optplan.published/1"] = "optplan.published/1"

Unit = Literal["GiB", "MiB", "GB", "%", "GPUs"]
Evidence = Literal["read", "summary", "arithmetic", "derived", "recalled"]
Status = Literal["passes", "fails", "not reproducible", "unverified"]

UNVERIFIED: frozenset[Evidence] = frozenset({"derived", "recalled"})
"""Kinds of evidence that are not good enough for a figure to count."""
_BYTES: dict[str, int] = {"GiB": GIB, "MiB": MIB, "GB": 10**9}
_RESNETS = {"resnet-18": 18, "resnet-50": 50}
_SLACK = 1e-9  # of the printed unit: for the binary fractions behind decimal tolerances


class Reading(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Other terms for a figure: another optimizer's layout, or bytes a parameter.

    Attributes:
        label: The terms in words.
        optimizer: Optimizer whose layout is taken, or an empty string for `bytes_per_parameter`.
        options: Its options, `implementation` among them.
        bytes_per_parameter: Bytes a parameter.
        num_parameters: Parameters to count; the model's own if None.
        gpu_bytes: Memory of one GPU for a figure in GPUs; the row's own if None.
    """

    label: str
    optimizer: str = ""
    options: dict[str, Any] = {}
    bytes_per_parameter: float | None = None
    num_parameters: int | None = None
    gpu_bytes: int | None = None


class PublishedRow(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One printed figure and the terms under which ours is compared with it.

    Attributes:
        id: Name of the row.
        paper: `arXiv:` and its number.
        where: Table, figure, section, or the page that quotes it.
        claim: The statement in words.
        evidence: How the figure is known.
        value: The printed number.
        unit: Its true unit, whatever the paper calls it.
        relation: Whether ours must equal the number or exceed it.
        tolerance: Largest difference that passes, in `unit`.
        tolerance_reason: Why that much.
        model: Catalogue id, `resnet-18`, `resnet-50`, or a model of the file itself.
        optimizer: Optimizer id.
        options: Its options, `implementation` among them.
        dtype: Dtype of parameters, gradients and (where it follows them) state.
        compare: Which of our two numbers is held against the figure.
        bytes_per_parameter: The paper's formula as bytes a parameter, or None.
        num_parameters: The count that the paper multiplies, where it is rounded.
        formula: The paper's formula in words.
        gpu_bytes: Memory of one GPU, for a figure in GPUs.
        how: Which terms make the figure true.
        not_reproducible: Why none do, or an empty string.
        readings: Other terms, shown beside.
    """

    id: str
    paper: str
    where: str
    claim: str
    evidence: Evidence
    value: float
    unit: Unit
    tolerance: float
    tolerance_reason: str
    model: str
    optimizer: str
    how: str
    relation: Literal["equal", "more than"] = "equal"
    options: dict[str, Any] = {}
    dtype: Dtype = "float32"
    compare: Literal["layout", "formula"] = "layout"
    bytes_per_parameter: float | None = None
    num_parameters: int | None = None
    formula: str = ""
    gpu_bytes: int | None = None
    not_reproducible: str = ""
    readings: tuple[Reading, ...] = ()


class ReadingValue(msgspec.Struct, frozen=True):
    """What other terms give, in the row's unit."""

    label: str
    value: float


class PublishedCheck(msgspec.Struct, frozen=True, kw_only=True):
    """A printed figure beside ours, all numbers in the row's unit.

    Attributes:
        row: The figure.
        layout: From the state tensors, to the byte.
        formula: From the paper's formula, or None where it gives none that is bytes a parameter.
        ours: The one of the two that is compared.
        difference: Ours less the printed number.
        status: `unverified` if the figure itself is not certain, `not reproducible` if no terms meet it.
        readings: What the other terms give.
    """

    row: PublishedRow
    layout: float
    formula: float | None
    ours: float
    difference: float
    status: Status
    readings: tuple[ReadingValue, ...]

    @property
    def passes(self) -> bool:
        """Whether ours meets a figure that counts."""
        return self.status == "passes"


class PublishedReport(msgspec.Struct, frozen=True, kw_only=True):
    """The answer of `optplan published`: every figure with its check.

    Attributes:
        as_of: Day on which the figures were gathered, `YYYY-MM-DD`.
        counts: Number of rows by status; every status is there.
    """

    schema: Literal["optplan.published/1"] = PUBLISHED_SCHEMA
    version: str
    as_of: str
    checks: list[PublishedCheck]
    counts: dict[Status, int]


def published_report() -> PublishedReport:
    """Every published figure, checked."""
    checks = [check(row) for row in published_rows()]
    counts: dict[Status, int] = {"passes": 0, "fails": 0, "not reproducible": 0, "unverified": 0}
    for done in checks:
        counts[done.status] += 1
    return PublishedReport(version=VERSION, as_of=_table()["as_of"], checks=checks, counts=counts)


@cache
def published_rows() -> tuple[PublishedRow, ...]:
    """The figures in the order of the file.

    Raises:
        DataError: The file is damaged, or an id stands in it twice.
    """
    try:
        rows = msgspec.convert(_table()["row"], tuple[PublishedRow, ...])
    except (msgspec.ValidationError, KeyError) as error:
        raise DataError(f"published.toml is damaged: {error}") from error
    if len({row.id for row in rows}) < len(rows):
        raise DataError("published.toml is damaged: an id stands in it twice")
    for row in rows:
        if (row.compare == "formula" and row.bytes_per_parameter is None) or (row.unit == "GPUs") != bool(
            row.gpu_bytes
        ):
            raise DataError(f"published.toml is damaged: row {row.id} lacks what it is compared with")
    return rows


def check(row: PublishedRow) -> PublishedCheck:
    """Hold one figure against ours.

    Raises:
        DataError: The row does not give the terms that it is to be compared under.
    """
    layout = _layout_value(row, row.optimizer, row.options, row.gpu_bytes)
    formula = None
    if row.bytes_per_parameter is not None:
        formula = _formula_value(row, row.bytes_per_parameter, row.num_parameters, row.gpu_bytes)
    ours = layout if row.compare == "layout" else formula
    if ours is None:
        raise _incomplete(row, "bytes_per_parameter")
    readings = tuple(ReadingValue(reading.label, _reading_value(row, reading)) for reading in row.readings)
    return PublishedCheck(
        row=row,
        layout=layout,
        formula=formula,
        ours=ours,
        difference=ours - row.value,
        status=_status(row, ours, readings),
        readings=readings,
    )


def _status(row: PublishedRow, ours: float, readings: tuple[ReadingValue, ...]) -> Status:
    if row.not_reproducible:
        met = any(_meets(row, value) for value in (ours, *(reading.value for reading in readings)))
        return "fails" if met else "not reproducible"
    if row.evidence in UNVERIFIED:
        return "unverified"
    return "passes" if _meets(row, ours) else "fails"


def _meets(row: PublishedRow, value: float) -> bool:
    if row.relation == "more than":
        return value > row.value
    return abs(value - row.value) <= row.tolerance + _SLACK


def _reading_value(row: PublishedRow, reading: Reading) -> float:
    gpu_bytes = reading.gpu_bytes or row.gpu_bytes
    if reading.optimizer:
        return _layout_value(row, reading.optimizer, reading.options, gpu_bytes)
    if reading.bytes_per_parameter is None:
        raise _incomplete(row, "bytes_per_parameter or optimizer for a reading")
    return _formula_value(row, reading.bytes_per_parameter, reading.num_parameters, gpu_bytes)


def _layout_value(row: PublishedRow, optimizer: str, options: dict[str, Any], gpu_bytes: int | None) -> float:
    return _in_unit(row, _state_bytes(row.model, optimizer, tuple(sorted(options.items())), row.dtype), gpu_bytes)


def _formula_value(
    row: PublishedRow, bytes_per_parameter: float, num_parameters: int | None, gpu_bytes: int | None
) -> float:
    count = num_parameters or sum(p.numel for p in _parameters(row.model))
    return _in_unit(row, bytes_per_parameter * count, gpu_bytes)


def _in_unit(row: PublishedRow, num_bytes: float, gpu_bytes: int | None) -> float:
    """Bytes in the unit of a row; as a saving against AdamW with fp32 state, or as GPUs that hold them."""
    if row.unit == "%":
        return 100 * (1 - num_bytes / _state_bytes(row.model, "adamw", (), "float32"))
    if row.unit != "GPUs":
        return num_bytes / _BYTES[row.unit]
    if gpu_bytes is None:
        raise _incomplete(row, "gpu_bytes")
    return num_bytes / gpu_bytes


def _incomplete(row: PublishedRow, what: str) -> DataError:
    return DataError(f"published.toml is damaged: row {row.id} lacks {what}")


@cache
def _state_bytes(model: str, optimizer: str, options: tuple[tuple[str, Any], ...], dtype: Dtype) -> int:
    """Bytes of an optimizer's state on the device, unrounded."""
    parameters = _parameters(model)
    bound = build_optimizer(optimizer, dict(options)).bind(parameters)
    return optimizer_footprint(bound, parameters, OptimizerContext(dtype, dtype)).device_bytes


@cache
def _parameters(model: str) -> tuple[Parameter, ...]:
    if model in _RESNETS:
        return resnet_parameters(_RESNETS[model])
    for own in _table()["model"]:
        if own["id"] == model:
            spec = read_model(own["config"], name=model, source=own["source"], where=f"the model '{model}'")
            return spec.unique_parameters
    return load_model(model).unique_parameters


@cache
def _table() -> dict[str, Any]:
    try:
        return tomllib.loads(files("optplan.planner.data").joinpath("published.toml").read_text("utf-8"))
    except tomllib.TOMLDecodeError as error:
        raise DataError(f"published.toml is damaged: {error}") from error
