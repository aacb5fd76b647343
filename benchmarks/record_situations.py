"""Run what `optplan recommend` recommends, and its runner-up, on the GPU that it was asked about; save and compare.

    python benchmarks/record_situations.py --out benchmarks/records/h200_situations [--situations NAME ...] [--steps 6]
        [--known tests/records/h200_profiles ...]

Situations of one H200, each a question of its own with a small step, so that whole steps of exactly the recommended
configurations are run. `optplan profile` runs each in a process of its own. Written are its records, and a row for each
in `situations.jsonl` with what was predicted: the memory error must stay within 1 %, and what was predicted to be
quicker by more than the search counts as alike must have been quicker. The exit status is 1 if not.

A configuration of which `--known` folders hold a measurement on the same GPU model is not run again: the row then names
the record, and when and how it was made.

Only torch's optimizers and optplan's own are asked for, and no fused loss: nothing else has to be installed. With
`--device cpu` a tiny model runs through the same, which says nothing of memory or time and is for trying.
"""

from __future__ import annotations

import argparse
import json
import shlex
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, NamedTuple

from optplan.planner.errors import OptplanError
from optplan.planner.gpus import find_gpu
from optplan.planner.measured.measurement import Measurement
from optplan.planner.measured.record_files import load_record
from optplan.planner.search.describe import title_of
from optplan.planner.search.picks import ALIKE_SECONDS
from optplan.planner.search.recommend import recommend
from optplan.planner.search.records import Configuration, SearchReport

SCHEMA = "optplan.situation-benchmark/1"
GPU = "h200-141g"
WITHIN = 0.01
"""Largest memory error that is promised."""
SAME = ("optimizer", "implementation", "options", "state_dtype", "config")
"""What a record and a configuration must have in common, besides the model."""
OWN = ("adamw", "micro-adam", "adam-mini", "adapprox", "sgd")
TINY = {
    "model_type": "llama", "architectures": ["LlamaForCausalLM"], "hidden_size": 64, "intermediate_size": 128,
    "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 256,
    "max_position_embeddings": 128, "tie_word_embeddings": False,
}  # fmt: skip
"""Config of the model for trying."""

SMALL: dict[str, Any] = {"precision": "bf16", "seq_len": 2048, "tokens_per_step": 2048}
"""One sequence a step, everything in bf16: how people fine-tune on a card that is small for the model."""
SAVING = ("adamw", "adam-mini", "micro-adam")
TORCHS = ("adamw.implementation=fused",)
"""AdamW is torch's own, as in nearly every trainer."""

SITUATIONS: dict[str, dict[str, Any]] = {
    "llama-2-7b": {"model": "llama-2-7b", "tokens_per_step": 8192},
    "llama-2-7b-40gib": {"model": "llama-2-7b", "tokens_per_step": 8192, "budget": "40GiB"},
    "llama-3.2-1b-24gib": {"model": "llama-3.2-1b", "tokens_per_step": 16384, "budget": "24GiB"},
    "llama-2-7b-48gib": {**SMALL, "model": "llama-2-7b", "budget": "48GiB", "optimizer": SAVING},
    "llama-3.1-8b-80gib": {**SMALL, "model": "llama-3.1-8b", "budget": "80GiB", "optimizer": SAVING, "options": TORCHS},
    "llama-3.2-1b-amp": {"model": "llama-3.2-1b", "precision": "amp", "seq_len": 1024, "tokens_per_step": 2048},
}
"""Questions by name, besides what all of them share."""
SHARED: dict[str, Any] = {"gpu": GPU, "optimizer": OWN, "fused_loss": "none", "step_in_backward": False}


class Known(NamedTuple):
    """A measurement that was made before, and where it lies."""

    path: Path
    record: Measurement


class Run(NamedTuple):
    """One configuration that was run: the recommended one or the runner-up; `known` is the record it is taken from."""

    place: str
    configuration: Configuration
    measured: Measurement
    known: Path | None = None


def main() -> int:
    """Ask, run, save and compare."""
    options = parse_arguments()
    options.out.mkdir(parents=True, exist_ok=True)
    failures, start = [], time.monotonic()
    known = read_known(options.known)
    for name in options.situations:
        question = tiny_question(options.out) if options.device == "cpu" else SITUATIONS[name]
        runs = []
        try:
            for run in run_situation(name, question, options, known):
                save(options.out, row_of(name, question, run))
                runs.append(run)
        except subprocess.CalledProcessError as error:
            failures.append(f"{name}: not run: {' '.join(error.stderr.split())}")
        failures += judge(name, runs)
    print(f"{time.monotonic() - start:.0f} s in all")
    for sentence in failures:
        print(sentence, file=sys.stderr)
    return 1 if failures else 0


def parse_arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description="Run recommended configurations and their runners-up.")
    parser.add_argument("--out", type=Path, required=True, help="folder for the records and situations.jsonl")
    parser.add_argument("--situations", nargs="+", choices=SITUATIONS, default=list(SITUATIONS), help="these alone")
    parser.add_argument("--steps", type=int, default=6, help="steps of each: the third is recorded, the rest timed")
    parser.add_argument("--known", nargs="+", type=Path, default=[], help="folders of records not to be made again")
    parser.add_argument("--device", default="cuda", help="where to run: cuda, cuda:1 ..., or cpu")
    return parser.parse_args()


def tiny_question(folder: Path) -> dict[str, Any]:
    """A question that a CPU can run the answers of."""
    path = folder / "config.json"
    path.write_text(json.dumps(TINY))
    return {"model": str(path), "seq_len": 32, "tokens_per_step": 128, "precision": "bf16", "prefer": "speed"}


def run_situation(
    name: str, question: dict[str, Any], options: argparse.Namespace, known: Sequence[Known] = ()
) -> Iterator[Run]:
    """Run what is recommended, then the runner-up, or take what is known of them."""
    asked = SHARED | {key: value for key, value in question.items() if key != "model"}
    report = recommend(question["model"], **asked)
    for place, found in (("recommended", report.recommendation), ("runner-up", report.runner_up)):
        if found is None:
            continue
        print(f"{name}, {place}: {title_of(found)}", flush=True)
        before = find_known(known, report, found)
        if before is not None:
            yield Run(place, found, before.record, before.path)
            continue
        path = options.out / f"{name}-{place}.json.gz"
        command = profile_command(found, device=options.device, steps=options.steps, out=path)
        subprocess.run(
            [sys.executable, "-m", *command], check=True, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
        )
        record = load_record(path)
        assert isinstance(record, Measurement)
        yield Run(place, found, record)


def read_known(folders: Sequence[Path]) -> list[Known]:
    """The whole steps on a GPU of the asked model that the folders hold, the newest first."""
    records = [(path, load_record(path)) for folder in folders for path in sorted(folder.glob("*.json.gz"))]
    known = [Known(path, record) for path, record in records if isinstance(record, Measurement) and is_whole(record)]
    return sorted(known, key=lambda one: one.record.environment.date, reverse=True)


def is_whole(record: Measurement) -> bool:
    """Whether it is of one process on the GPU asked about and has memory and time."""
    environment = record.environment
    if record.source != "live" or record.out_of_memory or record.peak_allocated_bytes is None or record.time is None:
        return False
    if environment.gpu is None or environment.gpu_total_bytes is None or environment.world_size != 1:
        return False
    try:
        return find_gpu(environment.gpu, environment.gpu_total_bytes).id == GPU
    except OptplanError:
        return False


def find_known(known: Sequence[Known], report: SearchReport, found: Configuration) -> Known | None:
    """The newest record of exactly this configuration of this model; None if there is none."""
    wanted = (report.model, *(getattr(found, name) for name in SAME))
    return next((one for one in known if (one.record.model, *(getattr(one.record, n) for n in SAME)) == wanted), None)


def profile_command(found: Configuration, *, device: str, steps: int, out: Path) -> list[str]:
    """The `optplan profile` command of a configuration."""
    program, _, *flags = shlex.split(found.command)
    return [program, "profile", *flags, "--device", device, "--steps", str(steps), "--out", str(out)]


def memory_error(run: Run) -> float | None:
    """Predicted less measured peak, as a share of the measured one; None where none was measured."""
    measured = run.measured.peak_allocated_bytes
    return run.configuration.peak_allocated_bytes / measured - 1 if measured else None


def times_of(run: Run) -> tuple[float, float] | None:
    """Predicted and measured seconds of the step."""
    predicted, measured = run.configuration.time, run.measured.time
    if predicted is None or measured is None or measured.step_seconds is None:
        return None
    return predicted.step_seconds, measured.step_seconds


def row_of(name: str, question: dict[str, Any], run: Run) -> dict[str, Any]:
    """One line of `situations.jsonl`."""
    times, measured = times_of(run), run.measured
    return {
        "schema": SCHEMA, "situation": name, "place": run.place,
        "question": {"gpu": GPU, "optimizer": OWN, **question},
        "configuration": title_of(run.configuration), "command": run.configuration.command,
        "predicted_peak_bytes": run.configuration.peak_allocated_bytes,
        "measured_peak_bytes": measured.peak_allocated_bytes, "memory_error": memory_error(run),
        "predicted_step_seconds": times[0] if times else None, "measured_step_seconds": times[1] if times else None,
        "device": measured.device, "gpu": measured.environment.gpu, "torch": measured.environment.torch,
        "date": measured.environment.date, "commit": measured.environment.commit,
        "asked_date": f"{datetime.now(UTC):%Y-%m-%dT%H:%M:%SZ}", "asked_commit": commit_here(),
        "record": None if run.known is None else run.known.as_posix(),
        "record_command": None if run.known is None else told_command(measured),
    }  # fmt: skip


def told_command(record: Measurement) -> str:
    """The `optplan profile` command that made a record, without where it was saved."""
    _, *words = shlex.split(record.environment.command)
    kept = [word for word, before in zip(words, ["", *words], strict=False) if "--out" not in (word, before)]
    return shlex.join(["optplan", *(word for word in kept if word != "--json")])


def commit_here() -> str | None:
    """The commit that predicts; None where the code is no checkout."""
    folder = Path(__file__).parent
    found = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, check=False, cwd=folder)
    return found.stdout.strip()[:12] or None


def save(folder: Path, row: dict[str, Any]) -> None:
    """Append the row, and print its figures."""
    with (folder / "situations.jsonl").open("a", encoding="utf-8") as file:
        file.write(json.dumps(row) + "\n")
    error = "not measured" if row["memory_error"] is None else f"{100 * row['memory_error']:+.2f} %"
    seconds = [f"{row[key]:.3f} s" for key in ("predicted_step_seconds", "measured_step_seconds") if row[key]]
    print(f"  {row['place']:12} memory {error}, step predicted and measured {' and '.join(seconds)}", flush=True)


def judge(name: str, runs: list[Run]) -> list[str]:
    """What did not hold, in sentences."""
    if any(run.measured.device == "cpu" for run in runs):
        return []
    errors = [(run, memory_error(run)) for run in runs]
    found = [
        f"{name}, {run.place}: memory is {'not known' if error is None else f'{100 * error:+.2f} % off'}"
        for run, error in errors
        if error is None or abs(error) > WITHIN
    ]
    return found + ([] if is_order_right(runs) else [f"{name}: the quicker one by the prediction was slower"])


def is_order_right(runs: list[Run]) -> bool:
    """Whether the one predicted to be quicker was; of two predicted to be alike either may be."""
    pairs = [pair for pair in map(times_of, runs) if pair is not None]
    if len(pairs) < 2:
        return True
    (first, second), (measured_first, measured_second) = zip(*pairs, strict=True)
    if max(first, second) / min(first, second) <= 1 + ALIKE_SECONDS:
        return True
    return (first < second) == (measured_first < measured_second)


if __name__ == "__main__":
    raise SystemExit(main())
