"""The largest micro-batch of Llama-2-7B on two cards of 80 GB by optimizer, and its tokens a second, as JSON lines.

    python benchmarks/record_largest_batch.py --predict
    python benchmarks/record_largest_batch.py --out FILE [--optimizers ID ...] [--known FILE]

Adam-mini's authors report 3725.59 tokens/s with AdamW at a micro-batch of 1 and 5572.19 with Adam-mini at 4 on two
A800 of 80 GB (arXiv 2406.16793, figure 1), an effect of the batch that the smaller state makes room for. Here torch's
allocator is given what such a card has left beside the context and the communication library. The planner says the
largest micro-batch that fits; that one and the next are tried, further ones until one runs and the next does not. Two
steps of warm-up, the recorded one and three timed ones are taken of each. A row is one optimizer. With `--known`, what
that file's rows have found of the same steps under the same cap is taken from there, and only what is missing is tried.

Model states are sharded by FSDP2, in fp32 with bf16 computation, without activation checkpointing; sequences have 4096
tokens, Llama-2's own length, where AdamW fits with a micro-batch of 1 as reported. `--seq-len` and `--checkpointing`
change that. With `--device cpu --model FILE --pretend-largest N` the search is rehearsed without a GPU.

Needs torch, transformers, triton and optplan; `--predict` optplan alone.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec

if TYPE_CHECKING:
    from optplan.planner.request import StepRequest

SCHEMA = "optplan.largest-batch/1"
OPTIMIZERS: dict[str, dict[str, Any]] = {"adamw": {}, "adam-mini": {}, "micro-adam": {}, "adapprox": {"rank": 32}}
PUBLISHED = {"adamw": (1, 3725.59), "adam-mini": (4, 5572.19)}
"""Micro-batch and tokens a second by arXiv 2406.16793."""
CARD = "a100-80g"
NUM_RANKS, NUM_STEPS = 2, 6
MOST_TRIALS = 4
"""Of one optimizer beyond the first two."""


def main() -> int:
    """Predict, or measure and save; 1 if a search came to no end."""
    options = parse_arguments()
    if options.role == "rank":
        return run_rank_of(options)
    if options.predict:
        print_table([prediction(options, name) for name in options.optimizers])
        return 0
    if options.out is None:
        raise SystemExit("record_largest_batch.py: --out FILE is needed unless --predict is given")
    rows = measure_all(options)
    for row in rows:
        save(row, options)
    print_table(rows)
    return int(any(row["measured_largest"] is None for row in rows))


def parse_arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description="Find the largest micro-batch of each optimizer on two capped GPUs.")
    parser.add_argument("--out", type=Path, help="JSON lines file to append to")
    parser.add_argument("--predict", action="store_true", help="print what the planner says and measure nothing")
    parser.add_argument("--optimizers", nargs="+", choices=OPTIMIZERS, default=list(OPTIMIZERS), help="these alone")
    parser.add_argument("--known", type=Path, help="rows of an earlier search, which is gone on with")
    parser.add_argument("--model", default="llama-2-7b", help="as `optplan estimate` takes it")
    parser.add_argument("--seq-len", type=int, default=4096, help="tokens of a sequence")
    parser.add_argument("--sharding", default="fsdp2", help="how the two divide the model")
    parser.add_argument("--checkpointing", default="none", help="none, full or selective")
    parser.add_argument("--seconds", type=float, default=300.0, help="after which what runs is ended")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda", help="where to train")
    parser.add_argument("--pretend-largest", type=int, help="on the CPU: ranks run out of memory above this")
    parser.add_argument("--commit", default="", help="commit to record where the tree is no repository")
    parser.add_argument("--role", choices=("rank",), help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    return parser.parse_args()


def capped_request(options: argparse.Namespace, *, batch_size: int) -> StepRequest:
    """The step on GPUs as the H200 computes, with as much memory for torch as the smaller card has."""
    from optplan.planner.catalog import load_model
    from optplan.planner.request import check_request

    step = {"sharding": options.sharding, "precision": "mixed", "checkpointing": options.checkpointing}
    step |= {"seq_len": options.seq_len, "batch_size": batch_size, "gpus": NUM_RANKS, "nodes": 1}
    model = load_model(options.model)
    room = check_request(model, gpu=CARD, **step).gpu.usable_bytes
    request = check_request(model, gpu="h200", **step)
    gpu = msgspec.structs.replace(request.gpu, total_bytes=room + request.gpu.outside_bytes)
    return msgspec.structs.replace(request, gpu=gpu)


def prediction(options: argparse.Namespace, name: str) -> dict[str, Any]:
    """What the planner says of one optimizer: the largest micro-batch, and the peaks at it and above it."""
    from optplan.planner.candidates import choose_optimizers
    from optplan.planner.workload import Workload

    request = capped_request(options, batch_size=1)
    workload = Workload(request)
    (candidate,), _ = workload.candidates(choose_optimizers(name, OPTIMIZERS[name]))
    largest = workload.max_batch_size(candidate)
    assert largest is not None
    if options.pretend_largest is not None:
        largest = min(largest, options.pretend_largest)
    peaks = {size: workload.peaks(candidate, batch_size=size) for size in (max(largest, 1), largest + 1)}
    return {
        "schema": SCHEMA, "optimizer": name, "options": OPTIMIZERS[name], "model": options.model,
        "seq_len": options.seq_len, "sharding": options.sharding, "precision": "mixed",
        "checkpointing": options.checkpointing, "card": CARD, "cap_bytes": request.gpu.usable_bytes,
        "state_bytes": candidate.footprint.device_bytes, "predicted_largest": largest,
        "predicted": {
            str(size): {"peak_allocated_bytes": peak.peak_bytes, "reserved_bytes": peak.reserved_bytes}
            for size, peak in peaks.items() if peak is not None
        },
        "published": PUBLISHED.get(name),
    }  # fmt: skip


def measure_all(options: argparse.Namespace) -> list[dict[str, Any]]:
    """The rows of all optimizers: what is predicted, and every trial."""
    rows = [prediction(options, name) | {"trials": {}} for name in options.optimizers]
    for row in rows:
        row["trials"] = known_trials(row, options.known)
    end = time.monotonic() + options.seconds
    # Interrupted, what there is is saved.
    with tempfile.TemporaryDirectory() as name, contextlib.suppress(KeyboardInterrupt):
        while time.monotonic() < end:
            cases = [case for row in rows for case in next_cases(row)]
            if not cases:
                break
            # What may run out of memory comes last: it ends its launch.
            cases.sort(key=lambda case: case["batch_size"] > case["predicted_largest"])
            run_trials(cases, rows, options, Path(name), seconds=end - time.monotonic())
    for row in rows:
        row["measured_largest"] = measured_largest(row)
    return rows


SAME = ("schema", "optimizer", "options", "model", "seq_len", "sharding", "precision", "checkpointing", "cap_bytes")
"""What two rows of one search have in common."""


def known_trials(row: dict[str, Any], file: Path | None) -> dict[str, Any]:
    """The trials with a result in an earlier row of the same search, each with the commit that it was made at."""
    trials: dict[str, Any] = {}
    for line in file.read_text(encoding="utf-8").splitlines() if file else []:
        earlier = json.loads(line)
        if all(earlier[key] == row[key] for key in SAME):
            commit = earlier["environment"].get("commit")
            trials |= {
                size: {"commit": commit, **trial}
                for size, trial in earlier["trials"].items()
                if trial["fits"] is not None
            }
    return trials


def next_cases(row: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """The trials that an optimizer's search needs next: none once a micro-batch runs and the next does not."""
    trials, first = {int(size): trial["fits"] for size, trial in row["trials"].items()}, row["predicted_largest"]
    sizes = [max(first, 1), first + 1] if not trials else []
    if trials and measured_largest(row) is None and len(trials) < 2 + MOST_TRIALS:
        sizes = [max(trials) + 1] if all(trials.values()) else [min(trials) - 1]
    for size in dict.fromkeys(sizes):
        if size >= 1:
            yield {
                "name": f"{row['optimizer']}-{size}",
                "optimizer": row["optimizer"],
                "batch_size": size,
                "predicted_largest": row["predicted_largest"],
            }


def measured_largest(row: dict[str, Any]) -> int | None:
    """The micro-batch that ran while the next did not; 0 where not even 1 did, None where the search has no end."""
    fits = {int(size): trial["fits"] for size, trial in row["trials"].items()}
    if fits.get(1) is False:
        return 0
    return next((size for size in sorted(fits) if fits[size] and fits.get(size + 1) is False), None)


def run_trials(
    cases: list[dict[str, Any]],
    rows: list[dict[str, Any]],
    options: argparse.Namespace,
    folder: Path,
    *,
    seconds: float,
) -> None:
    """Run these cases and put what they found into their rows."""
    from rank_cases import Launch, run_cases

    by_name = {row["optimizer"]: row for row in rows}
    launch = Launch(Path(__file__), sys.argv[1:], NUM_RANKS, seconds)
    for case, ranks in run_cases(cases, launch, folder):
        trial = trial_of(ranks, case["batch_size"] * options.seq_len * NUM_RANKS)
        by_name[case["optimizer"]]["trials"][str(case["batch_size"])] = trial
        print(f"{case['name']:16} {trial['verdict']}", flush=True)


def trial_of(ranks: list[dict[str, Any]], num_tokens: int) -> dict[str, Any]:
    """One trial: whether it fits, its times and peaks; a rank that fell silent waited for one without memory."""
    from rank_cases import ran_out

    errors = [rank["error"] for rank in ranks if "error" in rank]
    out = [rank for rank in ranks if ran_out(rank)]
    if out or errors or len(ranks) < NUM_RANKS:
        verdict = "out of memory" if out else errors[0] if errors else "a rank told nothing"
        return {"fits": False if out else None, "verdict": verdict, "ranks": ranks}
    figures = [rank["figures"] for rank in ranks]
    seconds = max(figure["step_seconds"] or 0.0 for figure in figures)
    rate = num_tokens / seconds if seconds else None
    verdict = f"fits, {rate:,.2f} tokens/s on {NUM_RANKS} GPUs" if rate else "fits"
    return {"fits": True, "verdict": verdict, "step_seconds": seconds, "tokens_per_second": rate, "ranks": ranks}


def run_rank_of(options: argparse.Namespace) -> int:
    """All cases that wait, on one rank."""
    from rank_cases import joined, measured, run_rank

    from optplan.planner.candidates import choose_optimizers

    def run(case: dict[str, Any]) -> dict[str, Any]:
        if options.pretend_largest is not None and case["batch_size"] > options.pretend_largest:
            return {"out_of_memory": "pretended"}
        request = capped_request(options, batch_size=case["batch_size"])
        (choice,) = choose_optimizers(case["optimizer"], OPTIMIZERS[case["optimizer"]])
        return measured(rank, request, choice, num_steps=NUM_STEPS, has_history=False)

    cap = capped_request(options, batch_size=1).gpu.usable_bytes
    with joined(options.device, cap_bytes=cap) as rank:
        run_rank(rank, options.folder, run)
    return 0


def print_table(rows: list[dict[str, Any]]) -> None:
    """A line an optimizer."""
    head = ("optimizer", "state GB", "predicted", "peak GiB", "above GiB", "measured", "tokens/s", "published")
    print("{:12} {:>9} {:>10} {:>9} {:>10} {:>9} {:>10} {:>14}".format(*head))
    for row in rows:
        peaks = [peak["peak_allocated_bytes"] / 2**30 for peak in row["predicted"].values()]
        largest = row.get("measured_largest")
        rate = row["trials"][str(largest)].get("tokens_per_second") if largest else None
        published = "{}: {}".format(*row["published"]) if row["published"] else "-"
        print(
            f"{row['optimizer']:12} {row['state_bytes'] / 1e9:9.2f} {row['predicted_largest']:10} {peaks[0]:9.2f} "
            f"{peaks[-1]:10.2f} {'-' if largest is None else largest:>9} {f'{rate:.2f}' if rate else '-':>10} "
            f"{published:>14}"
        )
    print(f"room for torch on each card: {rows[0]['cap_bytes'] / 2**30:.2f} GiB")


def save(row: dict[str, Any], options: argparse.Namespace) -> None:
    """Append a row with its environment."""
    from train_study_record import environment

    words = ["python", "benchmarks/record_largest_batch.py", *(Path(word).name for word in sys.argv[1:])]
    where = environment(options.commit) | {"command": " ".join(words)}
    with options.out.open("a", encoding="utf-8") as file:
        file.write(json.dumps({**row, "environment": where}, separators=(",", ":")) + "\n")


if __name__ == "__main__":
    raise SystemExit(main())
