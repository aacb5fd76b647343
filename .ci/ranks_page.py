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
        " in one process: the second row's parameters were placed where an earlier step had left memory, so that they"
        " came out of large cached blocks without rests; a fresh process, which is what is estimated, has these rests,"
        " 64.5 MiB of them in the parameters alone. With the first row's 2.27 GB in the cache the second row's error is"
        " 0.60 %; with the shards of a Llama-3.2-1B there the last row's first step is met to 2 KB.",
        "",
        "| model | sharding | precision | batch x tokens | forward | backward | step | peak | reserved | device memory |",
        "|---|---|---|---|---|---|---|---|---|---|",
        *map(_line, cases),
        *_published_lines(),
        *_largest_batch_lines(),
    ]


def _published_lines() -> list[str]:
    from optplan.planner.sharding.published_steps import published_steps

    return [
        "",
        "What torchtitan has published for many GPUs, GiB reserved, lies between two of our settings; its own differs as"
        " the last column says. Shards, state, gathered parameters and the buffers of collectives are those that"
        " torch's `FSDPMemTracker` counts, to the byte in the tests; DeepSpeed's formulas stand in"
        " [the memory model](memory-model.md).",
        "",
        "| step | published | below | above | what differs |",
        "|---|---|---|---|---|",
        *(_published_line(row) for row in published_steps()),
    ]


def _published_line(row: Any) -> str:
    import optplan

    cells = [f"[{row.where}]({row.source})", f"{row.value_gib:g}"]
    for checkpointing in row.between:
        (found,) = optplan.estimate(
            row.model, gpu="h100", optimizer="adamw", checkpointing=checkpointing, **row.step
        ).estimates
        assert found.peak_reserved_bytes
        cells.append(f"{found.peak_reserved_bytes / 2**30:.1f} ({checkpointing})")
    return f"| {' | '.join([*cells, row.differs])} |"


LARGEST = {"adamw": {}, "adam-mini": {}, "micro-adam": {}, "adapprox": {"rank": 32}}
PUBLISHED_BATCHES = {"adamw": "1, 3725.59 tokens/s", "adam-mini": "4, 5572.19 tokens/s"}


def _largest_batch_lines() -> list[str]:
    return [
        "",
        "## The largest micro-batch on two cards of 80 GB",
        "",
        "Adam-mini's authors report 49.6 % more tokens a second than AdamW for Llama-2-7B on two A800 of 80 GB"
        " (arXiv 2406.16793): at a micro-batch of 4 instead of 1, so it is an effect of the batch. Predicted here for"
        " two A100 of 80 GB under FSDP2, fp32 shards, bf16 computation, no checkpointing; `benchmarks/"
        "record_largest_batch.py` measures it on capped cards, which has not been done yet.",
        "",
        "| optimizer | state of a rank | largest, 4096 tokens | its peak | largest, 2048 tokens | its peak | published |",
        "|---|---|---|---|---|---|---|",
        *map(_largest_line, LARGEST),
        "",
        "From 1 to 4 it is in none of these settings, and the arithmetic says what it takes: Adam-mini keeps 13.48 GB"
        " less on each of two ranks. If AdamW has no room for 2 sequences and Adam-mini has for 4, two sequences' "
        "activations are less than these 13.48 GB, and all that AdamW keeps besides is more than the card less 13.48"
        " GB, about 70 GB. Sharded in fp32 it keeps 53.9. The code that they name for this run accumulates"
        " micro-batches without reducing"
        " ([TinyLlama](https://github.com/jzhang38/TinyLlama/blob/main/pretrain/tinyllama.py), `no_backward_sync`),"
        " which leaves whole gradients on each GPU, 13.5 GB or more; that is not modelled here.",
    ]


def _largest_line(name: str) -> str:
    import optplan

    cells = [name + "".join(f", {key}={value}" for key, value in LARGEST[name].items())]
    for seq_len in (4096, 2048):
        step: dict[str, Any] = {
            "gpu": "a100-80g", "gpus": 2, "sharding": "fsdp2", "precision": "mixed", "seq_len": seq_len,
            "optimizer": name, "options": LARGEST[name],
        }  # fmt: skip
        (one,) = optplan.estimate("llama-2-7b", **step).estimates
        (row,) = optplan.estimate("llama-2-7b", **step, batch_size=max(one.max_batch_size or 0, 1)).estimates
        assert row.peak_allocated_bytes
        cells += [f"{one.bytes.optimizer_state / 1e9:.2f} GB"] * (len(cells) == 1)
        cells += [str(one.max_batch_size), f"{row.peak_allocated_bytes / 2**30:.2f} GiB"]
    return f"| {' | '.join([*cells, PUBLISHED_BATCHES.get(name, '-')])} |"


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
