"""The section of `docs/accuracy.md` on several GPUs: every committed step of a rank beside today's estimate of it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

RECORD = Path(__file__).resolve().parent.parent / "tests" / "records" / "public_h200x2_cases.jsonl"
SHARDINGS = {"ddp": "ddp", "zero1": "zero1", "fsdp2": "fsdp2", "fsdp2_noreshard": "fsdp2-noreshard"}


def ranks_section() -> list[str]:
    """Its lines."""
    cases = [json.loads(line) for line in RECORD.read_text(encoding="utf-8").splitlines()]
    return [
        "",
        "## Two GPUs",
        "",
        "Rank 0 of two H200s in one machine, torch's fused AdamW, the third step of each. The steps ran one after another"
        " in one process: the second row's parameters were placed where the first row's step had left 2.27 GB, so that"
        " they came out of large cached blocks without rests; a fresh process, which is what is estimated, has these"
        " rests. With that cache simulated the second row's error is 0.60 %.",
        "",
        "| model | sharding | precision | batch x tokens | forward | backward | step | peak | reserved | device memory |",
        "|---|---|---|---|---|---|---|---|---|---|",
        *map(_line, cases),
    ]


def _line(case: dict[str, Any]) -> str:
    import optplan

    sharding = SHARDINGS[case["mode"]]
    (row,) = optplan.estimate(
        case["model"],
        gpu="h200-141g",
        gpus=case["world"],
        sharding=sharding,
        optimizer="adamw",
        precision=case["precision"],
        batch_size=case["batch"],
        seq_len=case["seq"],
    ).estimates
    assert row.phases is not None and row.peak_allocated_bytes and row.peak_reserved_bytes and row.device_bytes
    phases = {name: row.phases[name].peak_allocated_bytes for name in ("forward", "backward", "step")}
    errors = [phases[name] / case["phases"][name]["peak"] - 1 for name in phases]
    errors += [row.peak_allocated_bytes / case["peak"] - 1]
    cells = [case["model"], sharding, case["precision"], f"{case['batch']} x {case['seq']}"]
    cells += [f"{error:+.3%}" for error in errors]
    cells += [f"{row.peak_reserved_bytes / case['reserved'] - 1:+.2%}"]
    cells += [f"{row.device_bytes / case['device_used'] - 1:+.2%}"]
    return f"| {' | '.join(cells)} |"
