"""The README with what it says of records written anew: the table of optimizers, the claim of accuracy."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any, NamedTuple

from profiles_section import readme_claim
from speed_page import newest_rows
from training_page import YARDSTICK, difference, summary_of, training_rows

README = Path(__file__).resolve().parent.parent / "README.md"
PLACE = r"(<!-- {name}: written by `make docs` -->\n).*?( *<!-- end -->)"
MODEL, DTYPE = "llama-2-7b", "bfloat16"


class Line(NamedTuple):
    """One optimizer of the table: its name there, in the planner, in the speed records, in the training records."""

    title: str
    planner: str
    speed: str
    training: str


LINES = (
    Line("`AdamW`", "adamw", "adamw", "adamw"),
    Line("`AdamMini`", "adam-mini", "adam-mini", "adam-mini"),
    Line("`Adapprox`, rank 32", "adapprox", "adapprox", "adapprox"),
    Line("`Adapprox`, rank 32, no first moment", "adapprox", "adapprox-no-momentum", ""),
    Line("`MicroAdam`, window 10, density 1 %", "micro-adam", "micro-adam", "micro-adam"),
)


def readme_page() -> str:
    """The whole README."""
    text = README.read_text(encoding="utf-8")
    for name, content in (("optimizers", _table()), ("accuracy", f"  {readme_claim()}\n")):
        place = re.compile(PLACE.format(name=name), re.DOTALL)
        text, count = place.subn(lambda found, content=content: f"{found[1]}{content}{found[2]}", text)
        if count != 1:
            raise SystemExit(f"README.md has {count} places for what is written on {name}, not 1")
    return text


def _table() -> str:
    speeds, trained = newest_rows(), training_rows()
    yardstick = summary_of(trained[YARDSTICK]).mean_loss
    lines = [
        "| | state, bytes a parameter | time of a step | loss |",
        "|---|---|---|---|",
        f"| torch's `AdamW(fused=True)` | {_state_bytes('adamw', {}):.2f} | 1 | {yardstick:.3f} |",
    ]
    for line in LINES:
        speed = speeds[line.speed, MODEL, DTYPE]
        runs = trained.get(line.training)
        loss = difference(summary_of(runs).mean_loss, yardstick) if runs else "not measured"
        state = _state_bytes(line.planner, speed["options"])
        lines.append(f"| {line.title} | {state:.2f} | {speed['ratio_to_torch']:.2f} | {loss} |")
    return "\n".join(lines) + "\n"


def _state_bytes(optimizer: str, options: dict[str, Any]) -> float:
    """Bytes of state a parameter of the model, as the planner counts them."""
    from optplan.planner.catalog import load_model
    from optplan.planner.optimizers.base import OptimizerContext
    from optplan.planner.optimizers.registry import build_optimizer

    parameters = list(load_model(MODEL).unique_parameters)
    planner, context = build_optimizer(optimizer, options).bind(parameters), OptimizerContext(DTYPE, DTYPE)
    total = sum(tensor.num_bytes for p in parameters for tensor in planner.state(p, context))
    return total / sum(p.numel for p in parameters)
