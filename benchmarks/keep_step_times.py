"""Keep times of recorded steps that were measured otherwise: as lines of the `step_times.jsonl` beside the records.

    python benchmarks/keep_step_times.py --records tests/records/h200_profiles --earlier FOLDER
    python benchmarks/keep_step_times.py --records tests/records/h200_profiles --public FILE

`--earlier` takes the times of other records of the same steps, by the same names. `--public` takes those of rows that
public libraries alone measured: the first step of a process is its warm-up, the others' mean is its time. What is there
already is not added again.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from pathlib import Path
from statistics import fmean
from typing import Any

import msgspec
from step_time_cases import asked_of_row

from optplan.planner.candidates import OptimizerChoice
from optplan.planner.measured.expectation import asked_of
from optplan.planner.measured.measurement import Measurement
from optplan.planner.measured.record_files import load_record
from optplan.planner.measured.step_times import FILE_NAME, ProcessTime, read_process_times
from optplan.planner.request import StepRequest
from optplan.planner.workload import Workload


def main() -> int:
    """Add what is new; 1 if nothing belongs to a record."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--records", type=Path, required=True, help="folder of the records")
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--earlier", type=Path, help="folder of other records of the same steps")
    source.add_argument("--public", type=Path, help="JSON lines of steps that public libraries measured")
    options = parser.parse_args()
    kept = {time for times in read_process_times(options.records).values() for time in map(_key, times)}
    found = list(of_public(options.public, options.records) if options.public else of_earlier(options))
    new = list({_key(time): time for time in found if _key(time) not in kept}.values())
    if new:
        append(options.records / FILE_NAME, new)
    print(f"{len(new)} times added, {len(found) - len(new)} were there")
    return 0 if found else 1


def append(path: Path, times: list[ProcessTime]) -> None:
    """Add lines to a file, whose last line may have no end."""
    before = path.read_bytes() if path.exists() else b""
    with path.open("ab") as file:
        file.write(b"\n" if before and not before.endswith(b"\n") else b"")
        file.write(msgspec.json.Encoder().encode_lines(times))


def _key(time: ProcessTime) -> tuple[str, float]:
    return time.record, time.step_seconds


def of_earlier(options: argparse.Namespace) -> Iterator[ProcessTime]:
    """The times of records whose step another record of the same name is of."""
    for path in sorted(options.earlier.glob("*.json.gz")):
        other, record = options.records / path.name, load_record(path)
        assert isinstance(record, Measurement)
        is_another = other.exists() and other.read_bytes() != path.read_bytes()
        if is_another and record.time is not None and record.time.step_seconds is not None:
            yield ProcessTime(
                record=path.name.removesuffix(".json.gz"),
                step_seconds=record.time.step_seconds,
                phases=dict(record.time.phases),
                num_steps=record.time.num_steps,
                host_launch_seconds=(record.time.host_launch_seconds,),
                environment=_environment(record),
            )


def _environment(record: Measurement) -> dict[str, str]:
    """Where a record was made, without folders of that machine."""
    place = msgspec.to_builtins(record.environment)
    words = [Path(word).name if "/" in word else word for word in place["command"].split()]
    return {name: place[name] for name in ("gpu", "driver", "torch", "triton", "date", "commit")} | {
        "command": " ".join(words)
    }


def of_public(rows: Path, records: Path) -> Iterator[ProcessTime]:
    """The times of rows whose step there is a record of."""
    names = {}
    for path in sorted(records.glob("*.json.gz")):
        record = load_record(path)
        assert isinstance(record, Measurement)
        names[_step(*asked_of(record))] = path.name.removesuffix(".json.gz")
    for line in rows.read_text("utf-8").splitlines():
        row: dict[str, Any] = json.loads(line)
        name = names.get(_step(*asked_of_row(row)))
        if name is not None:
            timed = row["step_seconds"][1:]
            yield ProcessTime(
                record=name,
                step_seconds=fmean(timed),
                phases={},
                num_steps=len(timed),
                host_launch_seconds=(None,),
                environment={"gpu": row["device"], "torch": row["torch"], "transformers": row["transformers"]}
                | {"command": f"a row of {rows.name}"},
            )


def _step(request: StepRequest, choices: list[OptimizerChoice]) -> tuple[str, ...]:
    """What makes a step the same as another: model, settings, and the optimizer with its options as they come out."""
    (candidate,), _ = Workload(request).candidates(choices)
    return request.model.name, str(request.config), candidate.id, candidate.implementation, str(candidate.options)


if __name__ == "__main__":
    raise SystemExit(main())
