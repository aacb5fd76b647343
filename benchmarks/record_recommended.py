"""Run what `optplan recommend` recommends, and its runner-up, and save what was predicted beside what was measured.

    python benchmarks/record_recommended.py --out FILE [--records DIR] [--device cuda] [--situations FILE]

For each situation, a model and a budget, the recommendation is asked for with this machine's GPU and both
configurations are profiled in processes of their own; a row of JSON for each with the predicted and the measured peak,
reserved memory and step time, and whether it stayed within the budget. The records are kept under `--records`. What is
in the file already is not measured again.

Needs torch, transformers and optplan; where optplan is not installed, `python .ci/link_types.py` links this tree into
`.types`, to be named in PYTHONPATH.
"""

from __future__ import annotations

import argparse
import json
import sys
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import msgspec

from optplan.planner.measured.measurement import Measurement
from optplan.planner.measured.record_files import load_record
from optplan.profilers.validation.command import PRELOADED
from optplan.profilers.validation.launching import Launcher, Process, launching

SITUATIONS = Path(__file__).with_name("recommended_situations.toml")
PLACES = ("recommendation", "runner_up")
CONFIG_OPTIONS = (
    "precision", "batch_size", "seq_len", "grad_accum", "checkpointing", "attention", "fused_loss", "clip_grad_norm",
)  # fmt: skip
LIMIT_SECONDS = 240.0


def main() -> int:
    """Measure every situation; 1 if something could not be measured."""
    options = parse_arguments()
    options.records.mkdir(parents=True, exist_ok=True)
    situations = tomllib.loads(options.situations.read_text())["situation"]
    there = {(row["situation"], row["place"]) for row in read_rows(options.out)}
    num_failed = 0
    with launching([PRELOADED]) as launcher:
        for situation in situations:
            missing = [place for place in PLACES if (situation["name"], place) not in there]
            report = recommend(launcher, situation) if missing else {}
            for place in missing:
                row = measure(launcher, report[place], situation, place, options)
                num_failed += "error" in row
                save(options.out, row)
    return min(num_failed, 1)


def parse_arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="JSON lines are appended to this file")
    parser.add_argument("--records", type=Path, default=Path("recommended"), help="folder for the measured steps")
    parser.add_argument("--device", default="cuda", help="where to train")
    parser.add_argument("--steps", type=int, default=5, help="steps of each configuration")
    parser.add_argument("--situations", type=Path, default=SITUATIONS, help="another list of situations")
    return parser.parse_args()


def read_rows(path: Path) -> list[dict[str, Any]]:
    """The rows of the file without those that failed."""
    lines = path.read_text().splitlines() if path.exists() else []
    return [row for row in map(json.loads, lines) if "error" not in row]


def recommend(launcher: Launcher, situation: Mapping[str, Any]) -> dict[str, Any]:
    """The report of `optplan recommend`."""
    done = ended(launcher.start("optplan", ["recommend", *situation["ask"].split(), "--json"], {}))
    if done.status != 0:
        raise SystemExit(f"{situation['name']}: {done.last_words()}")
    report: dict[str, Any] = json.loads(done.output)
    return report


def measure(
    launcher: Launcher, chosen: Mapping[str, Any], situation: Mapping[str, Any], place: str, options: argparse.Namespace
) -> dict[str, Any]:
    """One configuration, profiled."""
    path = options.records / f"{situation['name']}-{place}.json.gz"
    words = ["profile", "--model", situation["ask"].split()[1], *profile_options(chosen), "--device", options.device]
    words += ["--steps", str(options.steps), "--out", str(path), "--json"]
    done = ended(launcher.start("optplan", words, {}))
    row = {"schema": "optplan.recommended/1", "situation": situation["name"], "ask": situation["ask"], "place": place,
           "optimizer": chosen["optimizer"], "implementation": chosen["implementation"], "options": chosen["options"],
           "config": chosen["config"], "predicted": predicted(chosen)}  # fmt: skip
    if not path.exists():
        return {**row, "error": done.last_words()}
    record = load_record(path)
    assert isinstance(record, Measurement)
    return {**row, "measured": measured(record), "environment": msgspec.to_builtins(record.environment)}


def profile_options(chosen: Mapping[str, Any]) -> list[str]:
    """The options of `optplan profile` that run a configuration."""
    settings = {"implementation": chosen["implementation"], **chosen["options"]}
    words = ["--optimizer", chosen["optimizer"]]
    for name, value in settings.items():
        words += ["--set", f"{name}={str(value).lower() if isinstance(value, bool) else value}"]
    for name in CONFIG_OPTIONS:
        if chosen["config"][name] is not None:
            words += [f"--{name.replace('_', '-')}", str(chosen["config"][name])]
    return words


def predicted(chosen: Mapping[str, Any]) -> dict[str, Any]:
    """The planner's figures."""
    time = chosen["time"] or {}
    names = ("peak_allocated_bytes", "peak_reserved_bytes")
    return {**{name: chosen[name] for name in names}, "step_seconds": time.get("step_seconds")}


def measured(record: Measurement) -> dict[str, Any]:
    """The same of the real step."""
    return {
        "peak_allocated_bytes": record.peak_allocated_bytes,
        "peak_reserved_bytes": record.peak_reserved_bytes,
        "device_bytes": record.device_bytes,
        "step_seconds": record.time.step_seconds if record.time else None,
        "out_of_memory": record.out_of_memory is not None,
    }


def ended(process: Process) -> Process:
    """The process, once it has ended."""
    if not process.wait(LIMIT_SECONDS):
        raise SystemExit(f"a process did not end within {LIMIT_SECONDS:.0f} s")
    return process


def save(path: Path, row: Mapping[str, Any]) -> None:
    """Append a row, and print its main figures."""
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(row) + "\n")
    print(row["situation"], row["place"], row["optimizer"], row.get("measured") or row.get("error"), flush=True)


if __name__ == "__main__":
    sys.exit(main())
