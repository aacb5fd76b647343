"""Ask the trace engine about the steps that `optplan validate` measured, and save its figures.

    pip install --target FOLDER --no-deps transformers==5.17.0 'huggingface-hub<2' httpx httpcore certifi
    PYTHONPATH=FOLDER python benchmarks/check_profiles.py
    PYTHONPATH=FOLDER python benchmarks/check_profiles.py --only gpt2

The version of transformers is that of the records, as another one's models free tensors in another order. Needs torch
and no GPU. The figures are written to `tests/records/traced_profiles.json`, unless `--only` leaves some out. The rules
need no such file: whoever asks them has the answer at once.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import logging
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from optplan.planner.errors import ConfigError
from optplan.planner.measured.measurement import Measurement
from optplan.planner.measured.record_files import load_record
from optplan.planner.workload import StepPeaks
from optplan.profilers.validation.record_tracing import RecordTracer, shared_runs_together

RECORDS = Path(__file__).resolve().parent.parent / "tests" / "records"
FOLDERS = ("h200_profiles", "h200x2_profiles")
FIGURES = RECORDS / "traced_profiles.json"
PACKAGES = ("torch", "transformers")


class Profile(NamedTuple):
    """A committed record and its name, folder included."""

    name: str
    record: Measurement


def read_profiles(only: str | None = None) -> list[Profile]:
    """The committed records, of one model if asked for, steps that differ in the optimizer alone together."""
    found = {
        f"{folder}/{path.name.removesuffix('.json.gz')}": record
        for folder in FOLDERS
        for path in sorted((RECORDS / folder).glob("*.json.gz"))
        if isinstance(record := load_record(path), Measurement) and only in (None, record.model.name)
    }
    return [Profile(name, found[name]) for name in shared_runs_together(found)]


def trace_profiles(profiles: list[Profile]) -> Iterator[dict[str, Any]]:
    """A row for each record: the engine's figures, or why there are none."""
    tracer = RecordTracer()
    for name, record in profiles:
        try:
            yield {"record": name, "trace": figures_of(tracer.peaks(record))}
        except ConfigError as error:
            yield {"record": name, "trace": None, "reason": str(error)}


def figures_of(peaks: StepPeaks) -> dict[str, Any]:
    """The figures that are saved, in bytes."""
    return {
        "phases": {name: phase.peak_allocated_bytes for name, phase in peaks.phases.items()},
        "peak_bytes": peaks.peak_bytes,
        "categories": dict(sorted(peaks.categories.items())),
        "reserved_bytes": peaks.reserved_bytes,
    }


def peak_error(row: dict[str, Any], record: Measurement) -> float | None:
    """Traced less measured peak as a share of the measured; None where one is missing."""
    if row["trace"] is None or not record.peak_allocated_bytes:
        return None
    return float(row["trace"]["peak_bytes"] / record.peak_allocated_bytes - 1)


def wrong_version(profiles: list[Profile]) -> str | None:
    """What is wrong with the installed transformers for these records."""
    here = importlib.metadata.version("transformers")
    measured = {record.environment.transformers for _, record in profiles}
    return None if measured == {here} else f"transformers is {here}: the steps were measured with {measured}"


def main() -> int:
    """Trace, print each error and write the file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", metavar="MODEL")
    only = parser.parse_args().only
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    profiles = read_profiles(only)
    if not profiles or (reason := wrong_version(profiles)):
        print(reason if profiles else f"no record of {only}", file=sys.stderr)
        return 2
    rows, records = [], dict(profiles)
    for row in trace_profiles(profiles):
        rows.append(row)
        error = peak_error(row, records[row["record"]])
        print(row["record"], row.get("reason") if error is None else f"{error:+.4%}", flush=True)
    if only is None:
        _save(rows)
    return 0


def _save(rows: list[dict[str, Any]]) -> None:
    versions = {name: importlib.metadata.version(name) for name in PACKAGES}
    lines = ",\n".join(json.dumps(row) for row in sorted(rows, key=lambda row: str(row["record"])))
    text = f'{{"schema": "optplan.traced-profiles/1", "versions": {json.dumps(versions)}, "rows": [\n{lines}\n]}}\n'
    FIGURES.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    sys.exit(main())
