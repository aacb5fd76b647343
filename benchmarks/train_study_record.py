"""The rows that `train_study.py` writes: one run each, with its curves and where it ran."""

from __future__ import annotations

import datetime
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
import triton
from train_study_corpus import Corpus
from train_study_optimizers import WEIGHT_DECAY, Subject
from train_study_runs import Outcome, Recipe

SCHEMA = "optplan.training/1"


def row_of(outcome: Outcome, subject: Subject, stage: str, recipe: Recipe, corpus: Corpus) -> dict[str, Any]:
    """One run.

    Args:
        outcome: What it gave.
        subject: Its optimizer.
        stage: `final` for a run at the best learning rate, `sweep` for the others.
        recipe: As every run's.
        corpus: The text.
    """
    plan = outcome.plan
    return {
        "schema": SCHEMA, "optimizer": plan.name, "options": subject.options, "follows": subject.follows,
        "stage": stage, "lr": plan.lr, "seed": plan.seed, "num_steps": plan.num_steps,
        "betas": subject.betas, "weight_decay": WEIGHT_DECAY,
        "parameter_dtype": str(plan.dtype).removeprefix("torch."), "autocast": "bfloat16",
        "final_validation_loss": outcome.validation_losses[-1][1],
        "train_losses": outcome.train_losses, "validation_losses": outcome.validation_losses,
        "num_parameters": outcome.num_parameters, "state_bytes": outcome.state_bytes,
        "seconds": outcome.seconds, "runs_alongside": outcome.alongside,
        "recipe": {**recipe._asdict(), "size": recipe.size._asdict()}, "corpus": corpus.facts,
    }  # fmt: skip


def save(path: Path, row: dict[str, Any], *, commit: str) -> None:
    """Append a row with its environment, and print its main figures."""
    row = {**row, "environment": environment(commit)}
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(row) + "\n")
    print(
        f"{row['optimizer']:21} lr {row['lr']:<8g} seed {row['seed']} {row['stage']:5}"
        f" loss {row['final_validation_loss'] or float('inf'):.4f}  {row['seconds']:.1f} s for {row['runs_alongside']}",
        flush=True,
    )


def environment(commit: str) -> dict[str, str]:
    """Where and with what the runs were made."""
    on_gpu = torch.cuda.is_available()
    words = [Path(word).name for word in sys.argv[1:]]
    return {
        "gpu": torch.cuda.get_device_name() if on_gpu else "none", "driver": _driver() if on_gpu else "none",
        "torch": torch.__version__, "triton": triton.__version__,
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "command": " ".join(["python", "benchmarks/train_study.py", *words]), "commit": commit or _head(),
        **({"note": os.environ["OPTPLAN_RECORD_NOTE"]} if os.environ.get("OPTPLAN_RECORD_NOTE") else {}),
    }  # fmt: skip


def _driver() -> str:
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    return subprocess.run(query, capture_output=True, text=True, check=True).stdout.splitlines()[0]


def _head() -> str:
    command = ["git", "rev-parse", "HEAD"]
    found = subprocess.run(command, capture_output=True, text=True, check=False, cwd=Path(__file__).parent)
    return found.stdout.strip() or "unknown"
