"""Write the example pages of `docs/examples/`, and the figures of evidence that every page quotes.

`--check` compares the records inside the pages with what the code says now, and exits 1 if one of them is stale.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Callable
from functools import cache
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any

import accuracy_page as cases

if TYPE_CHECKING:
    from optplan.planner.accuracy import AccuracyReport, AccuracyRow

ROOT = Path(__file__).resolve().parent.parent
EXAMPLES = ROOT / "docs" / "examples"
EVIDENCE = ROOT / "reports" / "html" / "evidence.json"
PLACE = "one NVIDIA H200"
BAND = 0.01


def estimate_example() -> str:
    """The main job: llama-7b on a 40 GB A100."""
    import optplan
    from optplan.planner.estimate_details import details_of
    from optplan.reports.html.estimate_page import estimate_page

    report = optplan.estimate("llama-7b", gpu="a100-40g")
    return estimate_page(report, details_of(report, model="llama-7b"))


def measurement_example() -> str:
    """A step measured on an H200 over what the rules say of it."""
    from optplan.planner.measured.measurement import Measurement
    from optplan.planner.measured.record_files import load_record
    from optplan.reports.html.comparison_page import measurement_page

    record = load_record(EXAMPLES / "h200_step.json.gz")
    assert isinstance(record, Measurement)
    return measurement_page(record)


def accuracy_example() -> str:
    """Every committed step measured on the H200 beside its estimate."""
    from optplan.reports.html.accuracy_page import accuracy_page

    return accuracy_page(accuracy_report())


@cache
def accuracy_report() -> AccuracyReport:
    """Today's estimates of the committed measurements."""
    from optplan.planner.accuracy import AccuracyReport
    from optplan.planner.rivals import compared_rivals
    from optplan.planner.version import VERSION

    names = ("public_h200_cases.jsonl", "h200_steps.jsonl")
    rows = [_row(case, name) for name in names for _, case in cases._cases(name)]
    return AccuracyReport(version=VERSION, place=PLACE, rows=rows, rivals=compared_rivals())


def evidence() -> str:
    """What the pages say about how sure the rules are, from the same records."""
    import msgspec

    from optplan.planner.accuracy import Evidence

    rows = accuracy_report().rows
    errors = [abs(row.peak_error) for row in rows if row.peak_error is not None]
    reserved = [abs(row.reserved_error) for row in rows if row.reserved_error is not None]
    found = Evidence(
        place=PLACE,
        num_steps=len(errors),
        num_exact=sum(row.state_is_exact for row in rows),
        num_measured=len(rows),
        median_error=round(median(errors), 6),
        largest_error=round(max(errors), 6),
        share_within_band=round(sum(error <= BAND for error in errors) / len(errors), 4),
        median_reserved_error=round(median(reserved), 6),
        largest_reserved_error=round(max(reserved), 6),
    )
    return json.dumps(msgspec.to_builtins(found), indent=2) + "\n"


def _row(case: dict[str, Any], record: str) -> AccuracyRow:
    from optplan.planner.accuracy import AccuracyRow

    config, candidate, peaks, is_exact = cases.predict(case)
    phases = case["phases"] if "phases" in case else case["steps"][-1]
    measured = {phase: int(values["peak"]) for phase, values in phases.items()}
    return AccuracyRow(
        model=case["model"],
        precision=config.precision,
        optimizer=candidate.id,
        implementation=candidate.implementation,
        batch_size=config.batch_size,
        seq_len=config.seq_len,
        grad_accum=config.grad_accum,
        checkpointing=config.checkpointing,
        attention=config.attention,
        more=", ".join(name.replace("_", " ") for name in cases.FLAGS if case.get(name)),
        measured_peak_bytes=max(measured.values()),
        predicted_peak_bytes=peaks.peak_bytes,
        measured_reserved_bytes=case["reserved"],
        predicted_reserved_bytes=peaks.reserved_bytes,
        measured_phases=measured,
        predicted_phases={phase: peak.peak_allocated_bytes for phase, peak in peaks.phases.items()},
        state_is_exact=is_exact,
        record=record,
    )


PAGES: dict[str, Callable[[], str]] = {
    "llama-7b-a100-40g.html": estimate_example,
    "predicted-against-measured-h200.html": measurement_example,
    "accuracy-h200.html": accuracy_example,
}


def records_in(page: str) -> Any:
    """The records that a page embeds: what is compared, as scripts and layout may differ by version of plotly."""
    found = re.search(r'<script type="application/json" id="optplan-records">(.*?)</script>', page, flags=re.DOTALL)
    return json.loads(found.group(1)) if found else None


def main() -> int:
    """Write or check; the exit status says whether something is stale."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true")
    check = parser.parse_args().check
    stale = [] if _settle(EVIDENCE, evidence(), check=check) else [EVIDENCE.name]
    for name, write in PAGES.items():
        stale += [] if _settle(EXAMPLES / name, write(), check=check) else [name]
    for name in stale:
        print(f"{name} is stale: run `make examples`", file=sys.stderr)
    return 1 if stale else 0


def _settle(path: Path, text: str, *, check: bool) -> bool:
    if not check:
        path.write_text(text, encoding="utf-8")
        return True
    if not path.exists():
        return False
    old = path.read_text(encoding="utf-8")
    return old == text if path.suffix == ".json" else records_in(old) == records_in(text)


if __name__ == "__main__":
    sys.exit(main())
