"""Hold the step rules against the trace engine and save both engines' figures.

    python benchmarks/check_agreement.py
    python benchmarks/check_agreement.py --only gpt2
    python benchmarks/check_agreement.py --measured

The configurations are those of `agreement_cases.toml`: models with few layers, which change nothing of what a layer
does. With `--measured`, both engines answer for the training steps that were measured on a GPU; that needs the version
of transformers of those steps, 5.17 (another one's models free tensors in another order):

    pip install --target FOLDER --no-deps transformers==5.17.0 'huggingface-hub<2' httpx httpcore certifi
    PYTHONPATH=FOLDER python benchmarks/check_agreement.py --measured

Needs torch and transformers, no GPU. The record is written to `tests/records/`, unless `--only` leaves some out.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import logging
import sys
import tomllib
import warnings
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple
from unittest.mock import patch

import torch
from transformers.integrations import sdpa_attention

from optplan.planner.candidates import choose_optimizers
from optplan.planner.catalog import find_entry, load_model
from optplan.planner.errors import ConfigError
from optplan.planner.models.reader import read_model
from optplan.planner.models.spec import ModelSpec
from optplan.planner.request import StepRequest, check_request
from optplan.planner.requested_step import step_options
from optplan.planner.step.rules import describes
from optplan.planner.workload import StepPeaks, Workload
from optplan.profilers.estimation import TracedWorkload
from optplan.profilers.workloads.source import CatalogueSource

CASES_FILE = Path(__file__).parent / "agreement_cases.toml"
RECORDS = Path(__file__).resolve().parent.parent / "tests" / "records"
GPU = "h200-141g"
PACKAGES = ("torch", "transformers")
MEASURED_TRANSFORMERS = "5.17"
MEASURED = ("public_h200_cases.jsonl", "h200_steps.jsonl")
OPTIMIZERS = {
    "adamw": "adamw:fused",
    "adamw_foreach": "adamw:foreach",
    "sgd": "sgd:fused",
    "adafactor": "adafactor:transformers",
    "adam_mini": "adam-mini:official",
}
"""Optimizers of the measured steps."""
FLAGS = ("fused_loss", "keep_grads", "padding_mask", "step_in_backward", "clip_grad_norm", "empty_cache")
"""Options that a measured step may name."""


class Case(NamedTuple):
    """A model and a step; each optimizer, `id` or `id:implementation`, is a configuration."""

    model: str
    step: str
    request: StepRequest
    optimizers: tuple[str, ...]


@cache
def model_spec(name: str) -> ModelSpec:
    """A model of `agreement_cases.toml`."""
    table = dict(_tables()["models"][name])
    config = table
    if "model_type" not in table:
        entry = find_entry(table.get("base", name))
        assert entry is not None, name
        config = {**entry.config, **dict.fromkeys(entry.nulls), **table["changes"]}
    return read_model(config, name=name, source=CASES_FILE.name, where=name)


@cache
def _tables() -> dict[str, Any]:
    return tomllib.loads(CASES_FILE.read_text(encoding="utf-8"))


def read_cases(only: str | None = None) -> list[Case]:
    """The configurations, of one model if asked for."""
    tables = _tables()
    pairs = [(model, step) for model in tables["every_step"] for step in _common_steps(tables)]
    pairs += [(case["model"], step) for case in tables["case"] for step in case["steps"]]
    cases = (_case(model, step) for model, step in pairs if only in (None, model))
    return [case for case in cases if case is not None]


def half_of(cases: list[Case]) -> list[Case]:
    """Every second case, but all of the special ones; of two neighbouring models the steps are not the same."""
    tables = _tables()
    steps, models = _common_steps(tables), tables["every_step"]
    return [
        case
        for case in cases
        if case.step not in steps
        or case.model not in models
        or (steps.index(case.step) + models.index(case.model)) % 2 == 0
    ]


def _common_steps(tables: dict[str, Any]) -> list[str]:
    return [name for name, step in tables["steps"].items() if not step.get("special")]


def _case(model: str, step: str) -> Case | None:
    """The case, None where the rules or the model refuse the step."""
    spec, flags = model_spec(model), dict(_tables()["steps"][step])
    optimizers = tuple(flags.pop("optimizers"))
    flags.pop("special", None)
    if spec.model_type == "vit":
        flags["seq_len"] = spec.max_seq_len
    flags["seq_len"] = min(flags["seq_len"], spec.max_seq_len)
    request = check_request(spec, **{"gpu": GPU, **flags})
    return Case(model, step, request, optimizers) if describes(spec, step_options(request)) else None


@contextmanager
def attention_as_measured() -> Iterator[None]:
    """Within the context T5 hands its learned bias to `F.scaled_dot_product_attention` as it lies in memory.

    So did transformers 5.17, with which the steps were measured and which the rules describe: CUDA has only the
    unfused kernel for it. Later versions copy the bias first, which a fused kernel then takes.
    """
    make_mask = getattr(sdpa_attention, "create_position_bias_mask", None)

    def uncopied(*args: Any, **kwargs: Any) -> Any:
        with patch.object(torch.Tensor, "contiguous", lambda tensor, **_: tensor):
            return make_mask(*args, **kwargs)

    if make_mask is None:
        yield
        return
    with patch.object(sdpa_attention, "create_position_bias_mask", uncopied):
        yield


def compare(case: Case, source: CatalogueSource) -> Iterator[dict[str, Any]]:
    """A row for each optimizer: the peaks of both engines."""
    ruled, traced = Workload(case.request), TracedWorkload(case.request, source)
    for optimizer in case.optimizers:
        with attention_as_measured():
            trace = _figures(_peaks(traced, optimizer))
        rules = _figures(_peaks(ruled, optimizer))
        yield {"model": case.model, "step": case.step, "optimizer": optimizer, "rules": rules, "trace": trace}


def _peaks(workload: Workload, optimizer: str) -> StepPeaks:
    name, _, implementation = optimizer.partition(":")
    choice = choose_optimizers(name, {"implementation": implementation} if implementation else None)
    (candidate,), _ = workload.candidates(choice)
    peaks = workload.peaks(candidate)
    assert peaks is not None
    return peaks


def _figures(peaks: StepPeaks) -> dict[str, Any]:
    figures: dict[str, Any] = {
        "phases": {name: phase.peak_allocated_bytes for name, phase in peaks.phases.items()},
        "peak_bytes": peaks.peak_bytes,
        "reserved_bytes": peaks.reserved_bytes,
    }
    if peaks.reserved_range_bytes is not None:
        figures["reserved_range_bytes"] = list(peaks.reserved_range_bytes)
    return figures


def errors(row: dict[str, Any]) -> dict[str, float]:
    """How far the rules are from the trace: the peak, each phase, the reserved bytes."""
    rules, trace = row["rules"], row["trace"]
    names = {name: rules["phases"][name] / bytes_ - 1 for name, bytes_ in trace["phases"].items()}
    return {
        "peak": rules["peak_bytes"] / trace["peak_bytes"] - 1,
        **names,
        "reserved": rules["reserved_bytes"] / trace["reserved_bytes"] - 1,
    }


def disagreements(rows: list[dict[str, Any]], *, mean: float, worst: float) -> list[str]:
    """What is further apart than it may be: single peaks beyond `worst`, means of all rows beyond `mean`.

    Reserved bytes are left out: which of several free blocks of one size is lower decides them.
    """
    found, sizes = [], defaultdict(list)
    for row in rows:
        for name, error in errors(row).items():
            if name == "reserved":
                continue
            sizes[name].append(abs(error))
            if abs(error) > worst:
                found.append(f"{row['model']} {row['step']} {row['optimizer']}: {name} is {error:+.3%} from the trace")
    means = {name: sum(values) / len(values) for name, values in sizes.items()}
    return found + [
        f"{name}: {value:.3%} from the trace in the mean of {len(sizes[name])}"
        for name, value in means.items()
        if value > mean
    ]


def check_cases(only: str | None, *, half: bool = False) -> list[dict[str, Any]]:
    """The rows of `agreement_cases.toml`, or of the half that the tests run, printed as they come."""
    cases = half_of(read_cases(only)) if half else read_cases(only)
    sources = {case.model: CatalogueSource(case.request.model) for case in cases}
    rows = []
    for case in cases:
        for row in compare(case, sources[case.model]):
            shares = "  ".join(f"{name} {error:+.3%}" for name, error in errors(row).items())
            print(f"{row['model']:28} {row['step']:32} {row['optimizer']:15} {shares}", flush=True)
            rows.append(row)
    return rows


def check_measured(only: str | None) -> list[dict[str, Any]]:
    """A row for each measured step: what was measured and both engines' figures, None where one has none."""
    rows = []
    for name in MEASURED:
        for index, line in enumerate((RECORDS / name).read_text(encoding="utf-8").splitlines()):
            case = json.loads(line)
            if "error" in case or only not in (None, case["model"]):
                continue
            rows.append({"record": name, "line": index + 1, **measured_figures(case)})
            print(name, index + 1, _shown(case, rows[-1]), flush=True)
    return rows


def measured_figures(case: dict[str, Any]) -> dict[str, Any]:
    """Both engines' figures for a measured step."""
    spec = measured_spec(case)
    request = check_request(spec, gpu=GPU, **measured_flags(case))
    optimizer = OPTIMIZERS[case["optimizer"]]
    figures: dict[str, Any] = {}
    for engine, workload in (
        ("rules", Workload(request)),
        ("trace", TracedWorkload(request, CatalogueSource(spec))),
    ):
        try:
            with attention_as_measured():
                figures[engine] = _figures(_peaks(workload, optimizer))
        except ConfigError:
            figures[engine] = None
    return figures


def measured_spec(case: dict[str, Any]) -> ModelSpec:
    """The model of a measured step: its own configuration where the record holds one, else the catalogue's."""
    if "config" not in case:
        return load_model(case["model"])
    return read_model(case["config"], name=case["model"], source="record", where=case["model"])


def measured_flags(case: dict[str, Any]) -> dict[str, Any]:
    """The options of a measured step."""
    named = {True: "full", False: "none"}
    return {
        "precision": case["precision"],
        "batch_size": case["batch"],
        "seq_len": case["seq"],
        "grad_accum": case.get("grad_accum", 1),
        "checkpointing": named.get(case["checkpointing"], case["checkpointing"]),
        "attention": case["attention"],
        **{name: case[name] for name in FLAGS if name in case},
    }


def measured_bytes(case: dict[str, Any]) -> int:
    """The peak of a measured step, the last of its run."""
    phases = case["phases"] if "phases" in case else case["steps"][-1]
    return max(int(phase["peak"]) for phase in phases.values())


def _shown(case: dict[str, Any], row: dict[str, Any]) -> str:
    measured = measured_bytes(case)
    parts = [case["model"], case["precision"], case["attention"], f"{case['batch']}x{case['seq']}"]
    for engine in ("rules", "trace"):
        figures = row[engine]
        parts.append(f"{engine} {figures['peak_bytes'] / measured - 1:+.3%}" if figures else f"{engine} none")
    return " ".join(parts)


def main() -> int:
    """Write the record."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", metavar="MODEL")
    parser.add_argument("--measured", action="store_true")
    arguments = parser.parse_args()
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    version = importlib.metadata.version("transformers")
    if arguments.measured and not version.startswith(MEASURED_TRANSFORMERS):
        print(f"transformers is {version}: the steps were measured with {MEASURED_TRANSFORMERS}", file=sys.stderr)
        return 2
    rows = (check_measured if arguments.measured else check_cases)(arguments.only)
    if not rows:
        print(f"no configuration of {arguments.only}", file=sys.stderr)
        return 1
    if arguments.only is None:
        versions = {name: importlib.metadata.version(name) for name in PACKAGES}
        name = "agreement_measured" if arguments.measured else "agreement"
        lines = ",\n".join(json.dumps(row) for row in rows)
        text = f'{{"schema": "optplan.agreement/1", "versions": {json.dumps(versions)}, "rows": [\n{lines}\n]}}\n'
        (RECORDS / f"{name}.json").write_text(text, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
