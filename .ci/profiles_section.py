"""The part of `docs/accuracy.md`, and of the README, on the steps that `optplan validate` measured and that are kept."""

from __future__ import annotations

import json
import tomllib
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable
from functools import cache
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any, NamedTuple

from savings_section import savings_section

if TYPE_CHECKING:
    from optplan.planner.measured.measurement import Environment, Measurement
    from optplan.planner.measured.validation import Judgement, ValidationReport

RECORDS = Path(__file__).resolve().parent.parent / "tests" / "records"
TITLES = {
    "h200_profiles": "Steps that `optplan validate` measured",
    "h200x2_profiles": "Steps that `optplan validate` measured on two GPUs",
}
NEAR = 0.0001
"""What counts as next to nothing: 0.01 %."""
GB = 10**9
FIGURES = ("peak_error", "reserved_error", "device_error", "step_seconds_error")


class Folder(NamedTuple):
    """The records of one folder, by name, and today's judgement of them."""

    records: dict[str, Measurement]
    report: ValidationReport


def profiles_section() -> list[str]:
    """Its lines: a part for each folder of records that is there."""
    return [line for name in TITLES if (RECORDS / name).is_dir() for line in _folder_lines(name)]


def readme_claim() -> str:
    """One sentence with the figures of the steps of one GPU."""
    rows = read_folder("h200_profiles").report.judgements
    models = {row.model for row in rows}
    optimizers = {row.optimizer for row in rows}
    peaks = _sizes(row.peak_error for row in rows)
    return (
        f"Of {len(rows)} training steps measured with `optplan validate` on an H200 ({len(models)} models,"
        f" {len(optimizers)} optimizers; [records and tables](docs/accuracy.md)), {_exact(rows)} have the predicted"
        f" state to the byte, and {_near(peaks)} the predicted peak within 0.01 %; the worst is {max(peaks):.2%} off."
    )


@cache
def read_folder(name: str) -> Folder:
    """The records of a folder beside today's rules."""
    from optplan.planner.measured.measurement import Measurement
    from optplan.planner.measured.record_files import load_record
    from optplan.planner.measured.validation import validate_records

    paths = sorted((RECORDS / name).glob("*.json.gz"))
    records = {path.name.removesuffix(".json.gz"): load_record(path) for path in paths}
    report = validate_records(paths)
    if report.skipped:
        raise SystemExit(f"tests/records/{name}: {report.skipped}")
    return Folder({key: record for key, record in records.items() if isinstance(record, Measurement)}, report)


def _folder_lines(name: str) -> list[str]:
    folder = read_folder(name)
    return [
        "",
        f"## {TITLES[name]}",
        "",
        *_where(name, folder),
        "",
        *_claims(name, folder),
        *_reasons(name),
        "",
        *_groups(folder),
        *(savings_section(folder.records) if name == "h200_profiles" else []),
        "",
        *_tables(folder.report),
    ]


def _where(name: str, folder: Folder) -> list[str]:
    """What was measured where, when and how, in the records' own words."""
    places = [record.environment for record in folder.records.values()]
    versions = {
        title: _one(getattr(place, key) for place in places)
        for title, key in (
            ("driver", "driver"),
            ("CUDA", "cuda"),
            ("torch", "torch"),
            ("triton", "triton"),
            ("transformers", "transformers"),
            ("optplan", "optplan"),
        )
    }
    dates = sorted(place.date for place in places)
    gpus = max(place.world_size for place in places)
    return [
        f"{len(places)} steps on {gpus if gpus > 1 else 'one'} {_one(place.gpu for place in places)}"
        f" ({', '.join(f'{title} {version}' for title, version in versions.items())} at commit"
        f" {_one(place.commit for place in places)}), from {dates[0]} to {dates[-1]}; in each run of some steps with"
        f" random weights and tokens the third was recorded. The records are in `tests/records/{name}/`: `optplan show`"
        f" opens one, `optplan validate --records tests/records/{name} --check` judges them anew, and the tests hold"
        " both engines to them within the bounds of `tests/records/profile_bounds.toml`. A single step is repeated by"
        f" its command, as `{_command(places[0])}`.{_note(folder.records.values())} {_bounds(name)['remark']} The trace was made without a"
        " GPU by `python benchmarks/check_profiles.py`.",
    ]


def _one(values: Iterable[Any]) -> str:
    return ", ".join(dict.fromkeys(map(str, values)))


def _command(place: Environment) -> str:
    """A command as it can be given, without the place of its record."""
    words = place.command.replace("__main__.py", "optplan", 1).split()
    if place.world_size > 1 and words[0] != "torchrun":
        words = ["torchrun", "--nproc-per-node", str(place.world_size), "-m", *words]
    return " ".join(words[: words.index("--out")] if "--out" in words else words)


def _note(records: Iterable[Measurement]) -> str:
    """What the measuring person had to say of the circumstances."""
    kept = list(records)
    notes = Counter(note for record in kept for note in record.notes if note.startswith("measured "))
    return "".join(f" {count if count < len(kept) else 'They all'} were {note}." for note, count in notes.items())


def _claims(name: str, folder: Folder) -> list[str]:
    rows = folder.report.judgements
    lines = [f"- **State**: {_exact(rows)} of {folder.report.state_known} to the byte."]
    lines.append(_claim("Rules, peak allocated", (row.peak_error for row in rows)))
    traced = _traced_errors(name, folder)
    lines += [_claim("Trace, peak allocated", traced)] if traced else []
    lines += _same_categories(name, folder)
    phases = [error for row in rows for error in row.phase_errors.values()]
    lines.append(_claim("Rules, each phase's peak", phases, "phases"))
    lines.append(_claim("Rules, peak reserved", (row.reserved_error for row in rows)))
    lines.append(_claim("Rules, memory of the device, context included", (row.device_error for row in rows)))
    return [*lines, *_time_claim(rows), *_in_40_gb(folder)]


def _time_claim(rows: list[Judgement]) -> list[str]:
    times, spread = _sizes(row.step_seconds_error for row in rows), _sizes(_spread(rows))
    if not times:
        return []
    line = (
        f"- **Time of a step**, the median over the processes that took it, predicted for their hosts: median error"
        f" {median(times):.0%}, largest {max(times):.0%}."
    )
    if spread:
        line += f" Single processes are {median(spread):.0%} from that median in the median, {max(spread):.0%} at most."
    return [f"{line} It is an estimate for ranking; the steps of small models wait for the host."]


def _spread(rows: list[Judgement]) -> list[float]:
    """How far each process is from the median of its step."""
    return [error for row in rows for error in row.step_seconds_spread]


def _claim(what: str, errors: Iterable[float | None], unit: str = "steps") -> str:
    sizes = _sizes(errors)
    exact, near = sizes.count(0), _near(sizes)
    found = [f"{exact} to the byte"] * bool(exact) + [f"{near} within 0.01 %"] * (near > exact)
    return (
        f"- **{what}**: of {len(sizes)} {unit}, {' and '.join(found) or 'none within 0.01 %'}; median error"
        f" {median(sizes):.4%}, largest {max(sizes):.3%}."
    )


def _traced(name: str) -> dict[str, Any]:
    """The figures of the steps of a folder that `benchmarks/check_profiles.py` has traced."""
    rows = json.loads((RECORDS / "traced_profiles.json").read_text(encoding="utf-8"))["rows"]
    return {row["record"].removeprefix(f"{name}/"): row["trace"] for row in rows if row["trace"]}


def _same_categories(name: str, folder: Folder) -> list[str]:
    """In how many of the steps in whose records nothing is unexplained the trace has each category to the byte."""
    traced = _traced(name)
    records = {
        key: record
        for key, record in folder.records.items()
        if key in traced and record.peak_categories and "unexplained" not in record.peak_categories
    }
    same = sum(traced[key]["categories"] == record.peak_categories for key, record in records.items())
    return [
        f"- **What is alive at the peak**: nothing is unexplained in the records of {len(records)} of these steps; in"
        f" {same} of them the trace has every category to the byte."
    ] * bool(records)


def _traced_errors(name: str, folder: Folder) -> list[float]:
    found = _traced(name)
    return [
        found[key]["peak_bytes"] / record.peak_allocated_bytes - 1
        for key, record in folder.records.items()
        if key in found and record.peak_allocated_bytes and record.out_of_memory is None
    ]


def _in_40_gb(folder: Folder) -> list[str]:
    """The promise of MicroAdam's paper, where it was measured."""
    steps = {
        record.config.checkpointing: record
        for record in folder.records.values()
        if (record.model.name, record.optimizer, record.config.gpus) == ("llama-2-7b", "micro-adam", 1)
    }
    if "full" not in steps or "none" not in steps:
        return []
    told = [
        f"{(record.device_bytes or 0) / GB:.1f} GB with checkpointing {name} ({(record.peak_reserved_bytes or 0) / GB:.1f}"
        f" reserved, {(record.peak_allocated_bytes or 0) / GB:.1f} allocated at the peak)"
        for name, record in sorted(steps.items())
    ]
    config = steps["full"].config
    return [
        f"- **Llama-2-7B with MicroAdam in less than 40 GB**, as [its paper](https://arxiv.org/abs/2405.15593) says: every"
        f" parameter trained in {config.precision}, {config.batch_size} x {config.seq_len} tokens, window"
        f" {steps['full'].options['window']}, density {steps['full'].options['density']:.0%}. The device memory of the"
        f" whole process was {' and '.join(told)}; GB are 10^9 bytes."
    ]


def _reasons(name: str) -> list[str]:
    """What is known of the records that are further off than the others."""
    found = [f"- `{row['record']}`: {row['why']}." for row in _bounds(name).get("apart", [])]
    return ["", "Further off than the others are:", "", *found] if found else []


def _bounds(name: str) -> dict[str, Any]:
    """How far a folder's records may be off, and what is to be known about them."""
    found: dict[str, Any] = tomllib.loads((RECORDS / "profile_bounds.toml").read_text(encoding="utf-8"))[name]
    return found


def _groups(folder: Folder) -> list[str]:
    rows = folder.report.judgements
    shardings = {name: record.config.sharding for name, record in folder.records.items()}
    titles = "records | peak: median | worst | phases: worst | reserved: worst | device: worst | step time: median"
    lines = [f"| | {titles} |", f"|---|{'---|' * len(titles.split('|'))}"]
    keys: tuple[Callable[[Judgement], str], ...] = (
        lambda row: f"{row.optimizer} ({row.implementation})",
        lambda row: row.model,
        lambda row: f"{row.precision}, checkpointing {row.checkpointing}, sharding {shardings[row.record]}".replace(
            ", sharding none", ""
        ),
    )
    for key in keys:
        groups: dict[str, list[Judgement]] = defaultdict(list)
        for row in rows:
            groups[key(row)].append(row)
        lines += [_group_line(title, groups[title]) for title in sorted(groups)]
    return lines


def _group_line(title: str, rows: list[Judgement]) -> str:
    peak, reserved, device, time = (_sizes(getattr(row, name) for row in rows) for name in FIGURES)
    phases = _sizes(error for row in rows for error in row.phase_errors.values())
    cells = [title, str(len(rows)), f"{median(peak):.3%}" if peak else "-"]
    cells += [f"{max(sizes):.3%}" if sizes else "-" for sizes in (peak, phases, reserved, device)]
    return f"| {' | '.join([*cells, f'{median(time):.0%}' if time else '-'])} |"


def _tables(report: ValidationReport) -> list[str]:
    """What `optplan validate --check --md` writes of the folder, less its headline."""
    from optplan.reports.markdown.validation import validation_markdown

    return validation_markdown(report).splitlines()[2:]


def _sizes(errors: Iterable[float | None]) -> list[float]:
    return [abs(error) for error in errors if error is not None]


def _near(sizes: list[float]) -> int:
    return sum(size <= NEAR for size in sizes)


def _exact(rows: list[Judgement]) -> int:
    return sum(row.state_difference_bytes == 0 for row in rows)
