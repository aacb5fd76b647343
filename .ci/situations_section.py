"""`docs/recommend.md`: the table of the situations that were run, from the rows that `record_situations.py` wrote."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
ROWS = ROOT / "benchmarks" / "records" / "h200_situations" / "situations.jsonl"
PAGE = ROOT / "docs" / "recommend.md"
PLACE = r"(<!-- situations: written by `make docs` -->\n).*?(<!-- end -->)"
GIB = 2**30
FEW = 3
"""Optimizers that are named in a question; more of them are all that are run here."""

Row = dict[str, Any]


def recommend_page() -> str:
    """The page with today's table."""
    table = "\n".join(situations_table(read_rows())) + "\n"
    text, count = re.subn(
        PLACE, lambda found: found[1] + table + found[2], PAGE.read_text(encoding="utf-8"), flags=re.DOTALL
    )
    assert count == 1
    return text


def read_rows() -> list[Row]:
    """Every row, in the order in which they were written."""
    return [json.loads(line) for line in ROWS.read_text(encoding="utf-8").splitlines()]


def situations_table(rows: list[Row]) -> list[str]:
    """A line for each configuration, and the verdict of its situation in the second of them."""
    lines = [
        "| question | | configuration | GiB: predicted, measured | seconds: predicted, measured | order of speed |",
        "|---|---|---|---|---|---|",
    ]
    for both in _newest(rows):
        lines += [_line(row, _question(row["question"]) if row is both[0] else "", _verdict(both)) for row in both]
    return lines


def _newest(rows: list[Row]) -> list[list[Row]]:
    """Of each situation the rows of the newest asking, one that has both configurations if there is any."""
    newest: dict[str, list[Row]] = {}
    asking: list[Row] = []
    for row in rows:
        if row["place"] == "recommended":
            asking = [row]
        else:
            asking.append(row)
        if len(asking) >= len(newest.get(row["situation"], [])):
            newest[row["situation"]] = asking
    return list(newest.values())


def _line(row: Row, question: str, verdict: str) -> str:
    memory = f"{row['predicted_peak_bytes'] / GIB:.2f}, {row['measured_peak_bytes'] / GIB:.2f}"
    predicted, measured = row["predicted_step_seconds"], row["measured_step_seconds"]
    seconds = f"{predicted:.3f}, {measured:.3f} ({predicted / measured - 1:+.0%})"
    known = "\\*" if row.get("record") else ""
    cells = [question, row["place"], row["configuration"] + known, memory, seconds, verdict if question else ""]
    return f"| {' | '.join(cells)} |"


def _question(question: Row) -> str:
    words = [question["model"], question.get("precision", "any precision"), f"{question['tokens_per_step']:,} tokens"]
    words[-1] += f" in sequences of {question['seq_len']:,}" if "seq_len" in question else ""
    words += [question["budget"].replace("GiB", " GiB") if "budget" in question else "the whole GPU"]
    named = question["optimizer"]
    words += [f"{', '.join(named[:-1])} or {named[-1]}"] if len(named) <= FEW else []
    words += [f"`--set {setting}`" for setting in question.get("options", ())]
    return ", ".join(words)


def _verdict(both: list[Row]) -> str:
    from optplan.planner.search.picks import ALIKE_SECONDS

    if len(both) == 1:
        return "runner-up not measured"
    first, second = both
    predicted = first["predicted_step_seconds"] / second["predicted_step_seconds"]
    measured = first["measured_step_seconds"] / second["measured_step_seconds"]
    if max(predicted, 1 / predicted) <= 1 + ALIKE_SECONDS:
        return f"predicted alike, measured {abs(measured - 1):.0%} apart"
    right = (predicted < 1) == (measured < 1)
    return f"{'right' if right else 'wrong'}: {predicted - 1:+.0%} predicted, {measured - 1:+.0%} measured"
