"""Fit the coefficients of the step-time model to measured steps, and state its errors.

    python benchmarks/fit_step_time.py            # fits to all records, prints coefficients and the error of each step
    python benchmarks/fit_step_time.py --write    # writes them, the errors and measured links into step_time.toml
    python benchmarks/fit_step_time.py --check    # errors with the committed coefficients

The honest error is that of models left out: the steps of each model are predicted by a fit to those of all others.
Printed beside it: the same by optimizer, and how far steps are from their like that differ in the optimizer alone,
which is as near as any model of the work can come, and how far single processes are from the median of all that took
their step, which is what is fitted to.

Hosts differ. What those of a step's processes took to launch an operation is held against the median of all steps.
"""

from __future__ import annotations

import argparse
import math
import re
from collections.abc import Callable, Sequence
from statistics import fmean, median
from typing import Any, NamedTuple

import msgspec
import update_rates
from link_records import measured_shares
from step_time_cases import ROOT, Case, process_spread, read_cases, repeated_errors
from update_rates import with_update_rates

from optplan.planner.gpus import load_gpu
from optplan.planner.step_time import micro_steps, optimizer_update
from optplan.planner.step_time_overlap import Update, combine, phase_ends, step_length
from optplan.planner.step_time_rates import (
    CALIBRATED_GPU,
    FitError,
    FitErrors,
    LinkRates,
    TimeModel,
    load_time_model,
)
from optplan.planner.step_timer import host_factor

TABLE = ROOT / "planner" / "data" / "step_time.toml"
GPU = load_gpu(CALIBRATED_GPU)


class Fitted(NamedTuple):
    """A coefficient that is fitted: where the search starts, how strongly it is kept there, and what it can be."""

    part: str
    name: str
    start: float
    keep: float
    least: float
    most: float


FITTED = (
    Fitted("gpu", "product_share_16bit", 0.72, 3.0, 0.4, 0.85),
    Fitted("gpu", "product_share_fp32", 0.72, 0.1, 0.4, 0.85),
    Fitted("gpu", "moves_per_written_byte", 3.2, 0.1, 2.0, 5.0),
    Fitted("host", "seconds_per_call", 1.5e-5, 0.05, 5e-6, 4e-5),
    Fitted("host", "seconds_per_launch", 1e-5, 0.05, 3e-6, 3e-5),
    Fitted("host", "seconds_per_hook", 8e-6, 0.05, 2e-6, 3e-5),
    Fitted("host", "seconds_per_collective", 1.5e-3, 0.01, 1e-4, 5e-3),
    Fitted("host", "seconds_per_reduced_tensor", 5e-5, 0.01, 5e-6, 1e-3),
)
PHASE_SHARE = 0.25
"""Weight of the errors of forward and of backward beside that of the step: they tell what the host takes for which."""


def predicted_ends(case: Case, model: TimeModel, update: Update | None = None) -> list[float]:
    """When forward, backward and step end by the model, on the host that it was measured on; or the step alone.

    The step alone where the host runs ahead from one to the next.
    """
    exponent, factor = model.overlap.exponent, host_factor(case.time.host_launch_seconds, model)
    micro = micro_steps(case.work, case.request, GPU, model=_on_host(model, factor))
    update = update or update_of(case, model)
    busy = msgspec.structs.replace(update.busy, host=factor * update.busy.host)
    update = msgspec.structs.replace(update, busy=busy)
    if micro.waits:
        return phase_ends(micro, update, num_steps=1, exponent=exponent)
    return [step_length(micro, update, exponent=exponent)]


def predicted_seconds(case: Case, model: TimeModel) -> float:
    """Time of the step by the model, on the host that it was measured on."""
    return predicted_ends(case, model)[-1]


def squared_error(case: Case, ends: Sequence[float]) -> float:
    """How far a prediction is from a measured step: of the whole, and a share for each of forward and backward."""
    error = math.log(ends[-1] / case.seconds) ** 2
    phases = case.time.phases
    if len(ends) > 1:
        pairs = (ends[0], phases["forward"]), (ends[1] - ends[0], phases["backward"])
        error += PHASE_SHARE * sum(math.log(span / measured) ** 2 for span, measured in pairs)
    return error


def update_of(case: Case, model: TimeModel) -> Update:
    """The optimizer's step on the table's host."""
    return optimizer_update(case.candidate, case.moved_bytes, GPU, case.request, model=model)


def _on_host(model: TimeModel, factor: float) -> TimeModel:
    return msgspec.structs.replace(model, host=model.host.slower(factor))


def bound_of(case: Case, model: TimeModel) -> str:
    """What decides the step's time by the model."""
    micro = micro_steps(
        case.work, case.request, GPU, model=_on_host(model, host_factor(case.time.host_launch_seconds, model))
    )
    return combine(micro, update_of(case, model), exponent=model.overlap.exponent).bound


def with_reference(model: TimeModel, cases: Sequence[Case]) -> TimeModel:
    """With the median of what hosts took to launch an operation, where records tell."""
    told = [seconds for case in cases if (seconds := case.time.host_launch_seconds) is not None]
    reference = float(_text(median(told))) if told else None
    return msgspec.structs.replace(model, host=msgspec.structs.replace(model.host, launch_reference_seconds=reference))


def fit(cases: Sequence[Case], start: TimeModel) -> TimeModel:
    """The coefficients with the least squared relative errors, found by a pattern search on their logarithms.

    What the host takes to launch an optimizer's step is known before, from that step's own time.
    """
    start = with_update_rates(start, cases)
    updates = [update_of(case, start) for case in cases]
    known: list[dict[tuple[float, ...], float]] = [{} for _ in cases]

    def error(index: int, model: TimeModel) -> float:
        """Of a case; most coefficients are none of its business, and one alone changes at a time."""
        case, found, rates = cases[index], known[index], _rates_of(cases[index], model)
        if rates not in found:
            found[rates] = squared_error(case, predicted_ends(case, model, updates[index]))
        return found[rates]

    def loss(point: list[float]) -> float:
        model = _moved(start, point)
        errors = [error(index, model) for index in range(len(cases))]
        kept = sum(one.keep * log**2 for one, log in zip(FITTED, point, strict=True))
        return fmean(errors) + kept / len(cases)

    return _rounded(_moved(start, _searched(loss, [0.0] * len(FITTED))))


def _rates_of(case: Case, model: TimeModel) -> tuple[float, ...]:
    """The fitted coefficients that a case's forward and backward depend on."""
    gpu, host, config = model.gpu, model.host, case.request.config
    return (
        gpu.product_share_fp32 if config.precision == "fp32" else gpu.product_share_16bit,
        gpu.moves_per_written_byte,
        host.seconds_per_call,
        host.seconds_per_launch,
        host.seconds_per_hook if config.checkpointing != "none" else 0.0,
        *((host.seconds_per_collective, host.seconds_per_reduced_tensor) if config.gpus > 1 else ()),
    )


def _rounded(model: TimeModel) -> TimeModel:
    """With the digits that the table has."""
    parts: dict[str, Any] = {name: getattr(model, name) for name in ("gpu", "host")}
    for one in FITTED:
        value = float(_text(getattr(parts[one.part], one.name)))
        parts[one.part] = msgspec.structs.replace(parts[one.part], **{one.name: value})
    return msgspec.structs.replace(model, **parts)


def _text(value: float) -> str:
    return f"{value:.3g}"


def _searched(loss: Callable[[list[float]], float], point: list[float]) -> list[float]:
    """The point with the least loss, found one coordinate at a time with smaller and smaller steps."""
    best, step = loss(point), 0.2
    while step > 1e-3:
        moved = False
        for index in range(len(point)):
            for change in (step, -step):
                other = [log + change * (i == index) for i, log in enumerate(point)]
                if (found := loss(other)) < best - 1e-12:
                    best, point, moved = found, other, True
        step = step if moved else step / 2
    return point


def _moved(start: TimeModel, logs: Sequence[float]) -> TimeModel:
    parts: dict[str, Any] = {name: getattr(start, name) for name in ("gpu", "host")}
    for one, log in zip(FITTED, logs, strict=True):
        parts[one.part] = msgspec.structs.replace(parts[one.part], **{one.name: _limited(one, log)})
    return msgspec.structs.replace(start, **parts)


def _limited(one: Fitted, log: float) -> float:
    return min(max(one.start * math.exp(log), one.least), one.most)


def errors_of(cases: Sequence[Case], model: TimeModel) -> list[float]:
    """How much more than measured each step takes by the model, as a share of the measured time."""
    return [predicted_seconds(case, model) / case.seconds - 1 for case in cases]


def model_of(case: Case) -> str:
    """Name of a step's model."""
    return case.request.model.name


def optimizer_of(case: Case) -> str:
    """Id and implementation of a step's optimizer."""
    return f"{case.candidate.id} {case.candidate.implementation}"


class HeldOut(NamedTuple):
    """Error of a step by a fit to the steps of all other groups, what decides it by that fit, and its GPUs."""

    error: float
    bound: str
    gpus: int


def held_out(cases: Sequence[Case], start: TimeModel, group: Callable[[Case], str] = model_of) -> list[HeldOut]:
    """How each step is predicted by a fit to the steps of all other groups."""
    fits = {
        name: fit([case for case in cases if group(case) != name], start) for name in sorted(set(map(group, cases)))
    }
    return [
        HeldOut(errors_of([case], model)[0], bound_of(case, model), case.request.config.gpus)
        for case, model in ((case, fits[group(case)]) for case in cases)
    ]


def summary(errors: Sequence[float]) -> FitError:
    """The median and the largest of some errors, without their signs."""
    sizes = [abs(error) for error in errors]
    return FitError(round(median(sizes), 3), round(max(sizes), 3))


def fit_errors(fitted: Sequence[float], found: Sequence[HeldOut], processes: Sequence[float]) -> FitErrors:
    """What the table states."""
    alone = [one for one in found if one.gpus == 1]
    return FitErrors(
        num_steps=len(fitted),
        fitted=summary(fitted),
        held_out=summary([one.error for one in found]),
        held_out_gpu=summary([one.error for one in alone if one.bound != "host"]),
        held_out_host=summary([one.error for one in alone if one.bound == "host"]),
        held_out_sharded=summary([one.error for one in found if one.gpus > 1]),
        processes=summary(processes),
        num_processes=len(processes),
    )


def show_errors(title: str, cases: Sequence[Case], errors: Sequence[float]) -> None:
    """Print the error of each step, the median and the largest; and these by model and by optimizer."""
    for case, error in zip(cases, errors, strict=True):
        print(f"  {case.name:76} {case.seconds * 1e3:7.1f} ms  {100 * error:+6.1f} %")
    for group in (model_of, optimizer_of):
        for name in sorted(set(map(group, cases))):
            _show_summary(
                f"  {name}", [error for case, error in zip(cases, errors, strict=True) if group(case) == name]
            )
    _show_summary(title, errors)
    print()


def _show_summary(title: str, errors: Sequence[float]) -> None:
    found = summary(errors)
    print(f"{title}: median {100 * found.median:.1f} %, largest {100 * found.largest:.1f} % of {len(errors)} steps")


def written(text: str, model: TimeModel, links: dict[str, LinkRates]) -> str:
    """The table's text with the fitted coefficients, the errors and the measured links."""
    for one in FITTED:
        text = _set(text, one.part, one.name, _text(getattr(getattr(model, one.part), one.name)))
    if model.host.launch_reference_seconds is not None:
        text = _set(text, "host", "launch_reference_seconds", _text(model.host.launch_reference_seconds))
    for name in ("num_steps", "num_processes"):
        text = _set(text, "errors", name, str(getattr(model.errors, name)))
    for name in ("fitted", "held_out", "held_out_gpu", "held_out_host", "held_out_sharded", "processes"):
        found = getattr(model.errors, name)
        text = _set(text, "errors", name, f"{{ median = {found.median}, largest = {found.largest} }}")
    for records in model.records:
        start = text.index(f'path = "{records.path}"\n')
        entry = re.sub(r"num_steps = .*", f"num_steps = {records.num_steps}", text[start:], count=1)
        text = text[:start] + entry
    text = update_rates.written(text, model)
    for name, row in links.items():
        fields = f'bandwidth_share = {row.bandwidth_share}\nbasis = "{row.basis}"\nsource = "{row.source}"'
        start = text.index(f'link = "{name}"\n') + len(f'link = "{name}"\n')
        text = text[:start] + fields + text[text.index("\n\n[", start) :]
    return text


def _set(text: str, part: str, name: str, value: str) -> str:
    """The text with a value of one of its parts, which is added at its end if it is not there."""
    start = text.index(f"\n[{part}]\n")
    end = text.index("\n\n[", start)
    entry, found = re.subn(rf"(?m)^{name} = .*$", f"{name} = {value}", text[start:end], count=1)
    return text[:start] + entry + ("" if found else f"\n{name} = {value}") + text[end:]


def _refitted(cases: Sequence[Case], committed: TimeModel) -> TimeModel:
    """The fit to all steps, with its errors, each printed."""
    start = with_reference(committed, cases)
    by_optimizer = held_out(cases, start, optimizer_of)
    show_errors("optimizers left out", cases, [one.error for one in by_optimizer])
    found, model = held_out(cases, start), fit(cases, start)
    show_errors("models left out", cases, [one.error for one in found])
    records = [msgspec.structs.replace(row, num_steps=len(read_cases([row]))) for row in model.records]
    errors = fit_errors(errors_of(cases, model), found, process_spread(cases))
    return msgspec.structs.replace(model, records=records, errors=errors)


def main() -> None:
    """Fit, write or check."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true")
    parser.add_argument("--write", action="store_true")
    arguments = parser.parse_args()
    committed = load_time_model()
    cases = read_cases(committed.records)
    model = committed if arguments.check else _refitted(cases, committed)
    show_errors("fitted", cases, errors_of(cases, model))
    _show_summary("from the median of their like", list(repeated_errors(cases).values()))
    _show_summary("single processes from the median of their step", process_spread(cases))
    print(model.gpu, model.host, model.errors, sep="\n")
    if arguments.write:
        TABLE.write_text(written(TABLE.read_text("utf-8"), model, measured_shares()), "utf-8")


if __name__ == "__main__":
    main()
