"""Ask public memory estimators about the training steps that were measured on a GPU, and save what they say.

    pip install --target rivals --no-deps llm-analysis gpu-estimator mlsysim deepspeed
    PYTHONPATH=rivals python benchmarks/run_rivals.py

Needs torch, transformers and accelerate, no GPU. The estimators are public packages that are installed for this only,
together with what they import. Written anew each time: `planner/data/rivals.toml`, which the accuracy page shows.
"""

from __future__ import annotations

import argparse
import datetime
import importlib.metadata
import json
import platform
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from rival_tools import TOOLS, Answer, Tool, read_cases

ROOT = Path(__file__).resolve().parent.parent
RECORD = ROOT / "tests" / "records" / "public_h200_cases.jsonl"
OUT = ROOT / "planner" / "data" / "rivals.toml"
OPTIMIZERS = {
    "adamw": ("adamw", "fused"), "adamw_foreach": ("adamw", "foreach"), "sgd": ("sgd", "fused"),
    "adafactor": ("adafactor", "transformers"), "adam_mini": ("adam-mini", "official"),
}  # fmt: skip
"""Optimizer of the record to the optimizer and implementation of an estimate."""


def main() -> None:
    """Write the file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=OUT)
    out = parser.parse_args().out
    cases = read_cases(RECORD)
    answers = {name: [_told(name, tool, case) for case in cases] for name, tool in TOOLS.items()}
    out.write_text("\n".join([*_head(), *_case_lines(cases), *_tool_lines(answers)]) + "\n", encoding="utf-8")


def _told(name: str, tool: Tool, case: dict[str, Any]) -> Answer:
    answer = tool.ask(case)
    size = f"{answer.predicted_bytes / case['peak'] - 1:+.1%}" if answer.predicted_bytes else "no answer"
    print(f"{name:14} {case['model']:16} {case['precision']:5} {size:>10}  {answer.note}", file=sys.stderr, flush=True)
    return answer


def _head() -> Iterator[str]:
    versions = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in ("torch", "transformers"))
    yield "# What public estimators say of training steps that were measured on a GPU."
    yield "# Written by `python benchmarks/run_rivals.py`; not edited by hand."
    yield ""
    yield f"date = {datetime.date.today().isoformat()}"
    yield f"environment = {json.dumps(f'Python {platform.python_version()}, {versions}, no GPU')}"
    yield f"record = {json.dumps(str(RECORD.relative_to(ROOT)))}"
    yield 'place = "one NVIDIA H200"'


def _case_lines(cases: list[dict[str, Any]]) -> Iterator[str]:
    for case in cases:
        optimizer, implementation = OPTIMIZERS[case["optimizer"]]
        fields = {
            "model": case["model"], "precision": case["precision"], "optimizer": optimizer,
            "implementation": implementation, "batch_size": case["batch"], "seq_len": case["seq"],
            "checkpointing": "full" if case["checkpointing"] else "none", "attention": case["attention"],
            "measured_peak_bytes": max(phase["peak"] for phase in case["phases"].values()),
        }  # fmt: skip
        yield ""
        yield "[[cases]]"
        yield from (f"{name} = {json.dumps(value)}" for name, value in fields.items())


def _tool_lines(answers: dict[str, list[Answer]]) -> Iterator[str]:
    for name, given in answers.items():
        tool = TOOLS[name]
        yield ""
        yield "[[tools]]"
        for field in ("title", "package", "version", "source", "counts"):
            yield f"{field} = {json.dumps(getattr(tool, field), ensure_ascii=False)}"
        yield "answers = ["
        for number, answer in enumerate(given):
            size = f"predicted_bytes = {answer.predicted_bytes}, " if answer.predicted_bytes is not None else ""
            nearest = "is_nearest = true, " if answer.is_nearest else ""
            call, note = (json.dumps(text, ensure_ascii=False) for text in (answer.call, answer.note))
            yield f"    {{ case = {number}, {size}{nearest}call = {call}, note = {note} }},"
        yield "]"


if __name__ == "__main__":
    main()
